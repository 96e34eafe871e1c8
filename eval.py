"""Measures a trained model on text: perplexity and bits per byte of any file, and the tasks of lm-evaluation-harness.

    python eval.py --out_dir=out/tiny --file=README.md              one JSON line
    python eval.py --tasks=lambada_openai,hellaswag --limit=500     needs pip install lm_eval
    python eval.py --tasks=mine --task_dir=tasks                    tasks of your own, as .yaml files of the harness

A recurrent model reads a file of any length in one pass: each token is predicted from all before it, through the state.
With softmax layers or learned positions it is read in windows of seq_len that overlap by half.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import Failed, UserError, command, configure, help_first

help_first(__name__, __file__)

from support.checks import at_least                                               # support comes before torch
from support.files import read_text
from support.machine import out_of_memory, say
from support.report import print_json

import torch
from tqdm import tqdm

from checkpoint import checkpoint_in, inference, load_plugin, open_model


@dataclass
class EvalConfig:
    # The model
    out_dir: str = "out/base"        # folder of a trained model: its best.pt, or else its ckpt.pt, is used
    init_from: str = ""              # use this instead of out_dir: a checkpoint file, a shared folder or a hub id
    plugin: str = ""                 # Python file to run first, which may add to MIXERS and FEATURE_MAPS of model.py
    device: str = "auto"             # cpu, cuda or mps; auto picks the best available
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # precision of the weights; auto: bf16 on CUDA, fp32 elsewhere

    # A text
    file: str = ""                   # text file to measure, in UTF-8; - is standard input
    context: int = 0                 # tokens per window; 0: all, or seq_len with softmax layers or learned positions

    # Tasks of lm-evaluation-harness
    tasks: str = ""                  # tasks of lm-evaluation-harness, separated by commas
    task_dir: str = ""               # folder with .yaml files of further tasks
    limit: int = 0                   # documents per task; 0: all
    batch_size: int = 16             # continuations of a task to read at once

    def __post_init__(self):
        if not (self.file or self.tasks):
            raise ValueError("there is nothing to measure: give --file=TEXT, or --tasks=NAME,NAME")
        if self.file and self.tasks:
            raise ValueError(f"file={self.file} and tasks={self.tasks} are two measurements: leave out one of them")
        at_least(self, 0, "context", "limit")
        at_least(self, 1, "batch_size")


@torch.no_grad()
def nats(model, tokens, context=0, piece=4096):
    """-log p of tokens[1:], summed: in one pass that carries the state, or in windows where context is not 0.

    A window predicts the last half of its tokens (the first window all of them): each has context/2 tokens before it.
    """
    tokens = torch.as_tensor(tokens, device=model.embed.weight.device)[None]
    end = tokens.shape[1] - 1
    done = 0
    total = 0.0
    state = None
    with tqdm(total=end, unit="tok", leave=False, disable=None) as bar:
        while done < end:
            start = max(0, done - context // 2) if context else done
            stop = min(end, start + (context or piece))
            targets = tokens[:, start + 1:stop + 1].clone()
            targets[:, :done - start] = -1                                        # counted in the window before
            loss, new_state = model(tokens[:, start:stop], targets, state)
            state = None if context else new_state
            total += float(loss) * (stop - done)
            bar.update(stop - done)
            done = stop
    return total


@torch.no_grad()
def log_probs(model, tokenizer, text, given="", piece=512):
    """log p in nats of each token of the text, predicted from all before it: `given`, or else the start of a document.

    Returns: a tensor (tokens,), in the order of tokenizer.encode(text).
    """
    before = tokenizer.encode(given).tolist() or [tokenizer.eot]
    answer = tokenizer.encode(text).tolist()
    tokens = torch.tensor(before + answer, device=model.embed.weight.device)
    found = [torch.zeros(0, device=tokens.device)]
    state = None
    with inference(model):
        for start in range(0, len(tokens) - 1, piece):
            targets = tokens[start + 1:start + 1 + piece]
            logits, state = model(tokens[None, start:start + len(targets)], state=state)
            log_p = logits[0].float().log_softmax(-1)
            found.append(log_p.gather(1, targets[:, None])[:, 0])
    return torch.cat(found)[len(before) - 1:].cpu()


@torch.no_grad()
def continuations(model, pairs, batch_size):
    """For each (context, continuation), token ids: log p of the continuation, and is each token of it the likeliest?"""
    longest = model.config.seq_len if model.config.pos == "learned" else sys.maxsize
    answers = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))      # like lengths together
    for start in tqdm(range(0, len(order), batch_size), leave=False, disable=None):
        group = order[start:start + batch_size]
        rows = [[*pairs[i][0], *pairs[i][1]][:-1][-longest:] for i in group]
        for i, row, hidden in zip(group, rows, hidden_rows(model, rows)):
            answer = torch.tensor(pairs[i][1][-longest:], device=hidden.device)
            log_p = model.logits(hidden[len(row) - len(answer):len(row)]).float().log_softmax(-1)
            total = float(log_p.gather(1, answer[:, None]).sum())
            if math.isnan(total):
                raise Failed("the log-probabilities are NaN: the model's training diverged; use an earlier checkpoint")
            likeliest = log_p.argmax(-1) == answer
            answers[i] = total, bool(likeliest.all())
    return answers


def hidden_rows(model, rows):
    """What the final norm gives for each row of tokens, read at once. What fills a row up comes after it, unseen."""
    width = max(map(len, rows))
    filled = [row + [0] * (width - len(row)) for row in rows]
    x, _ = model.hidden(torch.tensor(filled, device=model.embed.weight.device))
    return x


def default_context(model):
    """seq_len for a model with a growing state or learned positions; 0, one pass, for all others."""
    bounded = model.config.pos == "learned" or "softmax" in model.config.mixers
    return model.config.seq_len if bounded else 0


def harness_model(model, tokenizer, context, batch_size):
    """The model with the interface of lm-evaluation-harness."""
    from lm_eval.api.model import TemplateLM

    class Harness(TemplateLM):
        eot_token_id = tokenizer.eot                                              # stands before a text without context

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return [int(token) for token in tokenizer.encode(string)]

        def _loglikelihood_tokens(self, requests, **kwargs):
            pairs = [(given or [tokenizer.eot], answer) for _, given, answer in requests]
            return continuations(model, pairs, batch_size)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return [-nats(model, [tokenizer.eot, *self.tok_encode(r.args[0])], context) for r in requests]

        def generate_until(self, requests, disable_tqdm=False):
            ignored = {key for r in requests for key in r.args[1]} - OPTIONS - {*LIMITS}
            if ignored:
                say(f"warning: generation_kwargs that change nothing here: {', '.join(sorted(ignored))}")
            return [write(model, tokenizer, *r.args) for r in tqdm(requests, disable=disable_tqdm)]
    return Harness()


def write(model, tokenizer, given, options):
    """What the model writes after `given`, as the options of a task say, up to one of the strings `until`."""
    prompt = tokenizer.encode(given).tolist() or [tokenizer.eot]
    limit, sampling, stops = read_options(options, len(prompt))
    most = 256 if limit is None else limit
    if model.config.pos == "learned":
        end = model.config.seq_len
        most = min(most, max(end - len(prompt), end // 2))                        # the prompt keeps half of them
        prompt = prompt[-max(1, end - most):]
    idx = torch.tensor([prompt], device=model.embed.weight.device)
    text = b""
    for token, _ in model.generate(idx, most, **sampling):
        if int(token) == tokenizer.eot:
            break
        text += tokenizer.decode_bytes(token.tolist())
        if ends := [text.index(stop) for stop in stops if stop in text]:
            text = text[:min(ends)]
            break
    return text.decode(errors="replace")


OPTIONS = {"max_length", "do_sample", "temperature", "top_k", "top_p", "until"}
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts


def read_options(options, prompt_length=0):
    """(most new tokens or None, arguments of LM.generate, strings to stop at) of the generation_kwargs of a task.

    They are read as the harness's own HFLM does: a temperature above 0 means sampling unless do_sample is false. null
    is as if left out. Differs: do_sample alone samples at temperature 1, where HFLM fails, and without a top_k among
    all tokens, where transformers take 50.
    """
    given = {key: value for key, value in options.items() if value is not None}
    until = given.get("until", [])
    if isinstance(until, str):
        until = [until]
    try:
        limits = [int(given[name]) for name in LIMITS if name in given]
        if not limits and "max_length" in given:                                  # of prompt and text
            limits = [max(0, int(given["max_length"]) - prompt_length)]
        temperature = float(given.get("temperature", 1))
        samples = str(given.get("do_sample", "temperature" in given)).lower() in ("true", "1")
        sampling = {
            "temperature": temperature if samples and temperature >= 1e-3 else 0,     # below, it takes the likeliest
            "top_k": int(given.get("top_k", 0)),
            "top_p": float(given.get("top_p", 1)),
        }
        stops = [stop.encode() for stop in until if stop]
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature {temperature}")
        if min(limits, default=0) < 0:
            raise ValueError(f"at most {min(limits)} tokens")
    except (ValueError, TypeError, OverflowError, AttributeError) as error:
        raise UserError(f"a task's generation_kwargs cannot be read ({error}): {options}") from None
    return limits[0] if limits else None, sampling, stops


def run_tasks(config, harness):
    """{task: {metric: value}} of lm-evaluation-harness; of a task with filters {task: {"metric,filter": value}}."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    try:
        manager = TaskManager(include_path=config.task_dir or None)
        found = lm_eval.simple_evaluate(harness, tasks=config.tasks.split(","), limit=config.limit or None,
                                        bootstrap_iters=0, task_manager=manager)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, OSError) as error:  # an unknown task, a null in it; data out of reach
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"lm_eval cannot run {config.tasks} ({reason})") from None
    results = {}
    for task, values in found["results"].items():
        figures = {key: value for key, value in values.items() if isinstance(value, float)}
        results[task] = {key.removesuffix(",none"): value for key, value in figures.items()}
    return results


@out_of_memory("use a smaller --batch_size, or --context=1024")
def main():
    config, = configure(sys.argv[1:], EvalConfig)
    if config.task_dir and not Path(config.task_dir).is_dir():
        raise UserError(f"task_dir={config.task_dir} must be a folder with .yaml files")
    load_plugin(config.plugin)
    model, tokenizer = open_model(config.init_from or checkpoint_in(config.out_dir), config.device, config.precision)
    context = config.context or default_context(model)
    if model.config.pos == "learned" and context > model.config.seq_len:
        raise UserError(f"the model's learned positions end at {model.config.seq_len} tokens: use a smaller --context")
    with inference(model):
        if config.tasks:
            result = measure_tasks(config, model, tokenizer, context)
        else:
            result = measure_text(config, model, tokenizer, context)
    print_json(result)


def measure_tasks(config, model, tokenizer, context):
    try:
        harness = harness_model(model, tokenizer, context, config.batch_size)
    except ImportError:
        raise UserError("tasks are run by lm-evaluation-harness: pip install lm_eval") from None
    return run_tasks(config, harness)


def measure_text(config, model, tokenizer, context):
    text = read_text(config.file)
    if not text:
        raise UserError(f"{config.file} is empty")
    size = len(text.encode())
    tokens = tokenizer.encode(text).tolist()
    loss = nats(model, [tokenizer.eot, *tokens], context) / len(tokens)
    if not math.isfinite(loss):
        raise Failed(f"the loss is {loss}: the model's training diverged; use an earlier checkpoint")
    return {
        "tokens": len(tokens),
        "bytes": size,
        "loss": loss,
        "ppl": math.exp(min(100, loss)),
        "bits_per_byte": loss * len(tokens) / math.log(2) / size,
        "context": context or "all",
    }


if __name__ == "__main__":
    command(main)
