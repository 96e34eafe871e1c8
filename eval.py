"""Measures a trained model on text: perplexity and bits per byte of any file, and the tasks of lm-evaluation-harness.

    python eval.py --out_dir=out/tiny --file=README.md              one JSON line
    python eval.py --tasks=lambada_openai,hellaswag --limit=500     needs pip install lm_eval
    python eval.py --tasks=mine --task_dir=tasks                    tasks of your own, as .yaml files of the harness

A recurrent model reads a file of any length in one pass: each token is predicted from all before it, through the state.
With softmax layers or learned positions it is read in windows of seq_len that overlap by half.
"""
import json
import math
import sys
from dataclasses import dataclass
from typing import Literal

from configurator import UserError, command, configure, help_first

help_first(__name__, __file__)

from support.files import read_text                                               # support comes before torch
from support.machine import out_of_memory

import torch
from tqdm import tqdm

from checkpoint import checkpoint_in, import_plugin, inference, open_model


@dataclass
class EvalConfig:
    # The model
    out_dir: str = "out/base"        # the folder of a trained model; its best.pt is taken, or else ckpt.pt
    init_from: str = ""              # instead of out_dir: a checkpoint file, a shared folder or a hub id
    plugin: str = ""                 # a Python file to run first: it may add to MIXERS and FEATURE_MAPS of model.py
    device: str = "auto"             # cpu, cuda, mps; auto takes the best there is
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto is bf16 on CUDA, fp32 elsewhere

    # A text
    file: str = ""                   # a text to read, in UTF-8; - is standard input
    context: int = 0                 # tokens in a window; 0: all before, or seq_len where no fixed state holds them

    # Tasks of lm-evaluation-harness
    tasks: str = ""                  # tasks of lm-evaluation-harness, separated by commas
    task_dir: str = ""               # a folder with .yaml files of further tasks
    limit: int = 0                   # documents of each task; 0 means all
    batch_size: int = 16             # continuations of tasks to read at once

    def __post_init__(self):
        if bool(self.file) == bool(self.tasks):
            raise ValueError("give --file=TEXT or --tasks=NAME,NAME")
        for key, low in (("context", 0), ("limit", 0), ("batch_size", 1)):
            if getattr(self, key) < low:
                raise ValueError(f"{key} must be at least {low}, got {getattr(self, key)}")


@torch.no_grad()
def nats(model, tokens, context=0, piece=4096):
    """-log p of tokens[1:], summed: in one pass that carries the state, or in windows where context is not 0.

    A window predicts the last half of its tokens (the first window all of them): each has context/2 tokens before it.
    """
    tokens = torch.as_tensor(tokens, device=next(model.parameters()).device)[None]
    end, done, total, state = tokens.shape[1] - 1, 0, 0.0, None
    with tqdm(total=end, unit="tok", leave=False, disable=None) as bar:
        while done < end:
            start = done if not context else max(0, done - context // 2)
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
def continuations(model, pairs, batch_size):
    """For each (context, continuation), token ids: log p of the continuation, and is each token of it the likeliest?"""
    longest = model.config.seq_len if model.config.pos == "learned" else sys.maxsize
    device, answers = next(model.parameters()).device, [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))      # like lengths together
    for start in tqdm(range(0, len(order), batch_size), leave=False, disable=None):
        group = order[start:start + batch_size]
        rows = [[*pairs[i][0], *pairs[i][1]][:-1][-longest:] for i in group]
        width = max(map(len, rows))                                               # what fills up comes after, unseen
        x, _ = model.hidden(torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device))
        for i, row, hidden in zip(group, rows, x):
            answer = torch.tensor(pairs[i][1][-longest:], device=device)
            log_p = model.logits(hidden[len(row) - len(answer):len(row)]).float().log_softmax(-1)
            answers[i] = float(log_p.gather(1, answer[:, None]).sum()), bool((log_p.argmax(-1) == answer).all())
    return answers


def default_context(model):
    return model.config.seq_len if model.config.pos == "learned" or "softmax" in model.config.mixers else 0


def harness_model(model, tokenizer, context, batch_size):
    """The model as lm-evaluation-harness wants it."""
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
            return [self.write(*r.args) for r in tqdm(requests, disable=disable_tqdm)]

        def write(self, given, options):
            """Greedily, or as options say, until one of the strings `until` is there; it is left out."""
            most, text, until = int(options.get("max_gen_toks", 256)), b"", options.get("until") or []
            stops = [stop.encode() for stop in ([until] if isinstance(until, str) else until) if stop]
            prompt = self.tok_encode(given) or [tokenizer.eot]
            if model.config.pos == "learned":
                prompt = prompt[-max(1, model.config.seq_len - most):]
            temperature = options.get("temperature", 0) if options.get("do_sample") else 0
            idx = torch.tensor([prompt], device=next(model.parameters()).device)
            for token, _ in model.generate(idx, most, temperature, options.get("top_k", 0), options.get("top_p", 1.0)):
                if int(token) == tokenizer.eot:
                    break
                text += tokenizer.decode_bytes(token.tolist())
                if ends := [text.index(stop) for stop in stops if stop in text]:
                    text = text[:min(ends)]
                    break
            return text.decode(errors="replace")
    return Harness()


def run_tasks(config, harness):
    """{task: {metric: value}} of lm-evaluation-harness; of a task with filters {task: {"metric,filter": value}}."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    try:
        manager = TaskManager(include_path=config.task_dir or None)
        found = lm_eval.simple_evaluate(harness, tasks=config.tasks.split(","), limit=config.limit or None,
                                        bootstrap_iters=0, task_manager=manager)
    except (ValueError, KeyError, OSError) as error:  # an unknown task; data that is neither here nor reachable
        raise UserError(f"lm_eval cannot run {config.tasks}: {' '.join(str(error).split())[:300]}") from None
    return {task: {key.removesuffix(",none"): value for key, value in values.items() if isinstance(value, float)}
            for task, values in found["results"].items()}


@out_of_memory("take a smaller --batch_size, or --context=1024")
def main():
    config, = configure(sys.argv[1:], EvalConfig)
    import_plugin(config.plugin)
    model, tokenizer = open_model(config.init_from or checkpoint_in(config.out_dir), config.device, config.precision)
    context = config.context or default_context(model)
    if model.config.pos == "learned" and context > model.config.seq_len:
        raise UserError(f"the model's learned positions end at {model.config.seq_len} tokens: take a smaller --context")
    with inference(model):
        if config.tasks:
            try:
                harness = harness_model(model, tokenizer, context, config.batch_size)
            except ImportError:
                raise UserError("tasks are run by lm-evaluation-harness: pip install lm_eval") from None
            print(json.dumps(run_tasks(config, harness)))
            return
        text = read_text(config.file)
        tokens = [tokenizer.eot, *(int(token) for token in tokenizer.encode(text))]
        if len(tokens) == 1:
            raise UserError(f"{config.file} is empty")
        total = nats(model, tokens, context)
    size, count = len(text.encode()), len(tokens) - 1
    print(json.dumps({"tokens": count, "bytes": size, "loss": total / count, "ppl": math.exp(min(100, total / count)),
                      "bits_per_byte": total / math.log(2) / size, "context": context or "all"}))


if __name__ == "__main__":
    command(main)
