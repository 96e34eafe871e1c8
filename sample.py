"""Generates text with a trained model, token by token, in memory that does not grow with the text.

    python sample.py                                           from out/base, one text after a blank start
    python sample.py --out_dir=out/tiny --prompt="class "      continue a prompt
    python sample.py --out_dir=out/tiny --interactive          a conversation: each answer continues all before it
    python sample.py --init_from=someone/model                 a model of the Hugging Face hub, or from anywhere else
    python sample.py --prompt_file=story.txt                   or a file's text; - reads standard input
    python sample.py --prompt_file=story.txt --save_state=story.state      where it stopped, without the text:
    python sample.py --load_state=story.state                              continues, as one run would have
    python sample.py --num_samples=4 --temperature=0.8 --top_p=0.95 --max_new_tokens=1000

From Python: open_model of checkpoint.py, then generate_text, or read_prompt and stream_text.
"""
import codecs
import contextlib
import dataclasses
import hashlib
import itertools
import math
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from configurator import UserError, command, configure, first_line, help_first, shell

help_first(__name__, __file__)

from support.checks import at_least, require                                      # support comes before torch
from support.files import check_target, read_text, replacing
from support.machine import out_of_memory, say

import torch
from torch.utils._pytree import tree_map
from tqdm import tqdm

from model import state_bytes
from checkpoint import checkpoint_in, inference, is_state, load_file, load_plugin, open_model


@dataclass
class SampleConfig:
    # The model
    out_dir: str = "out/base"        # folder of a trained model: its best.pt, or else its ckpt.pt, is used
    init_from: str = ""              # use this instead of out_dir: a checkpoint file, a shared folder or a hub id
    plugin: str = ""                 # Python file to run first, which may add to MIXERS and FEATURE_MAPS of model.py
    device: str = "auto"             # cpu, cuda or mps; auto picks the best available
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # precision of the weights; auto: bf16 on CUDA, fp32 elsewhere
    compile: bool | Literal["auto"] = "auto"  # compile the step of a token; auto: on CUDA, for 50,000 tokens or more

    # The prompt
    prompt: str = ""                 # text to continue; empty: start a new document
    prompt_file: str = ""            # file to read the prompt from; - is standard input
    interactive: bool = False        # answer each line of standard input; Ctrl-C ends an answer, Ctrl-D the program

    # The text
    num_samples: int = 1             # number of texts to generate, all at once
    max_new_tokens: int = 500        # largest number of tokens to generate for a text or an answer
    temperature: float = 0.8         # below 1 is safer, above 1 wilder; 0: always take the likeliest token
    top_k: int = 0                   # choose among the k likeliest tokens; 0: among all
    top_p: float = 1.0               # choose among the fewest tokens that together have this probability
    seed: int = 1337                 # seed of the random numbers: the same seed gives the same text
    stop: bool = True                # end a text at its end-of-text token

    # Where it stopped
    save_state: str = ""             # save the state at the end of the text to this file
    load_state: str = ""             # continue from the state in this file, num_samples times; a prompt is read next

    def __post_init__(self):
        at_least(self, 1, "num_samples", "max_new_tokens")
        at_least(self, 0, "temperature", "top_k")
        if self.num_samples > 2**16:
            raise ValueError(f"num_samples must be at most {2**16}, got {self.num_samples}")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature must be 0 or at least 0.001, got {self.temperature}")
        if not -2**63 <= self.seed < 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if not 1e-9 <= self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 (at least 1e-9) and at most 1, got {self.top_p}")
        if self.prompt and self.prompt_file:
            raise ValueError("give either prompt or prompt_file, not both")
        if self.interactive and (self.num_samples > 1 or self.prompt_file == "-"):
            raise ValueError("interactive reads standard input and writes one text: leave out num_samples and "
                             "prompt_file=-")
        if self.save_state and self.num_samples > 1:
            raise ValueError("save_state keeps one text: use num_samples=1, and num_samples=N with load_state")
        target = Path(self.save_state or "x.state")
        if not target.parent.is_dir() or target.exists() and not target.is_file():
            raise ValueError(f"save_state={target} must be a file in an existing folder")


# ----------------------------------------------------------------------------------------------------------------------
# Text in, text out: from Python too


@dataclass
class TextState:
    """Where a text stopped: everything its continuation depends on, of the same size however long the text is."""
    model: dict = None               # the model's state
    unread: list = field(default_factory=list)  # the token that this state has not read: the last one
    half: bytes = b""                # of a character whose other bytes are still to come

    @property
    def nbytes(self):
        return state_bytes(self.model)

    @property
    def tokens(self):
        """How many the text has so far."""
        return (int(self.model["tokens"]) if self.model else 0) + len(self.unread)


def generate_text(model, tokenizer, prompt="", state=None, **options):
    """What the model writes after the prompt, and where it stopped: that state continues the text, as often as wanted.

    Args: model, tokenizer, from open_model; prompt, str; state, a TextState, None for a new text; options, those of
    stream_text.
    Returns: (str, TextState)
    """
    state = read_prompt(model, tokenizer, prompt, state)
    return "".join(stream_text(model, tokenizer, state, **options)), state


def read_prompt(model, tokenizer, prompt="", state=None):
    """The TextState after `prompt`, at the cost of reading the prompt alone. An empty new text is a new document."""
    state = state or TextState()
    tokens = state.unread + tokenizer.encode(prompt).tolist() or [tokenizer.eot]
    check_prompt(tokens, state, model.config)
    past = state.model
    with torch.no_grad(), inference(model):
        for part in torch.tensor([tokens[:-1]], device=model.embed.weight.device).split(4096, dim=1):
            if part.numel():
                _, past = model.hidden(part, past)
    return TextState(past, tokens[-1:], b"" if prompt else state.half)


def stream_text(model, tokenizer, state, stop=True, **options):
    """Yields what each new token adds to the text after `state`, whole characters only, and moves `state` along.

    Options: max_new_tokens=500, and those of LM.generate: temperature=0.8, top_k=0 (all), top_p=1.0, generator=None (of
    torch's random numbers), compiled=False; stop=True ends the text at its end-of-text token.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    utf8.setstate((state.half, 0))
    for token, in stream_tokens(model, state, **options):
        if stop and token == tokenizer.eot:
            break
        piece = utf8.decode(tokenizer.decode_bytes([token]))
        state.half = utf8.getstate()[0]
        yield piece


def stream_tokens(model, state, texts=1, max_new_tokens=500, temperature=0.8, **options):
    """Yields the next token of each of `texts` texts that continue `state`, which moves along with the first."""
    check_positions(state, model.config, max_new_tokens)
    idx = torch.tensor([state.unread] * texts, device=model.embed.weight.device)
    past = tree_map(lambda x: x.expand(texts, *x.shape[1:]) if torch.is_tensor(x) and x.dim() else x, state.model)
    with inference(model):
        for tokens, after in model.generate(idx, max_new_tokens, temperature, state=past, **options):
            tokens = tokens.tolist()
            state.model = after
            state.unread = tokens[:1]
            yield tokens


def check_prompt(tokens, state, config):
    """UserError where the model knows no such token, or has no positions for the prompt."""
    if max(tokens) >= config.vocab_size:
        raise UserError(f"the prompt has token {max(tokens)}, and the model only knows those below {config.vocab_size}")
    room = positions_left(state, config) - len(tokens)
    if room < 0:
        raise UserError(f"the model's learned positions end at {config.seq_len} tokens, and the text would have "
                        f"{config.seq_len - room}: shorten the prompt")


def check_positions(state, config, max_new_tokens):
    room = positions_left(state, config) - 1                                      # for the token not read yet
    if max_new_tokens > room:
        fix = f"use --max_new_tokens={room} or less" if room > 0 else "shorten the prompt"
        raise UserError(f"the model's learned positions end at {config.seq_len} tokens, and prompt and text would have "
                        f"{config.seq_len - room + max_new_tokens}: {fix}")


def positions_left(state, config):
    """How many more tokens the model can read; without learned positions there is no limit."""
    read = int(state.model["tokens"]) if state.model else 0
    return config.seq_len - read if config.pos == "learned" else math.inf


# ----------------------------------------------------------------------------------------------------------------------
# States in files


def identity(model):
    """A hash of settings and weights: a state means something to the model that made it, and to no other."""
    digest = hashlib.sha256(repr(model.config).encode())
    for p in model.parameters():
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def settings_of(model):
    """What a state of the model depends on, besides its weights: {setting: value}."""
    precision = "bf16" if model.embed.weight.dtype == torch.bfloat16 else "fp32"
    return dataclasses.asdict(model.config) | {"precision": precision}


def difference(settings, model):
    """How the model that had these settings differs from this one, which is another."""
    if not settings:                                                              # earlier versions did not keep them
        return "in settings, weights or precision"
    changed = [f"{key} was {settings[key]}, here {value}" for key, value in settings_of(model).items()
               if settings.get(key, value) != value]
    return ", ".join(changed) or "its weights differ"


def write_state(path, model, state, generator, seed):
    """To path: the state, and the random numbers to come."""
    tensors = tree_map(lambda x: x.cpu().clone() if torch.is_tensor(x) else x, state.model)
    content = {"model": identity(model), "settings": settings_of(model), "state": tensors, "unread": state.unread,
               "half": list(state.half), "seed": seed, "rng": generator.get_state(), "device": generator.device.type}
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def holds_state(path):
    try:
        return is_state(load_file(path))
    except Exception:  # whatever it is, torch.load can't read it
        return False


def read_state(path, model, generator, seed):
    """The TextState that write_state wrote. The random numbers continue too, unless the seed is another."""
    device = model.embed.weight.device
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is not a file that holds a state")
    try:
        carried = load_file(path, device)
    except FileNotFoundError:
        raise UserError(f"no state {path}: --save_state={path} writes it") from None
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a cut zip, a flipped bit, a forbidden pickle: each its own exception type
        raise UserError(f"{path} is damaged or not a state ({first_line(error)})") from None
    if isinstance(carried, dict) and "model_config" in carried:
        raise UserError(f"{path} is a checkpoint, not a state: use {shell(f'--init_from={path}')}")
    try:
        require(is_state(carried), "it lacks what a state has")
        other = carried["model"] != identity(model)
        why = difference(carried.get("settings", {}), model) if other else ""
        state = TextState(carried["state"], carried["unread"], bytes(carried["half"]))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged or not a state") from None
    if other:
        raise UserError(f"{path} is the state of another model ({why}): use its --out_dir, or --init_from, and its "
                        "--precision")
    if carried["seed"] == seed and carried["device"] == device.type:
        generator.set_state(carried["rng"].cpu())
    return state


# ----------------------------------------------------------------------------------------------------------------------
# The program


@out_of_memory("use a smaller --num_samples")
def main():
    config, = configure(sys.argv[1:], SampleConfig)
    load_plugin(config.plugin)
    source = config.init_from or checkpoint_in(config.out_dir)
    model, tokenizer = open_model(source, config.device, config.precision)
    prompt = read_text(config.prompt_file) if config.prompt_file else config.prompt
    generator = torch.Generator(model.embed.weight.device).manual_seed(config.seed)
    options = {key: getattr(config, key) for key in ("max_new_tokens", "temperature", "top_k", "top_p")}
    options["generator"] = generator
    options["compiled"] = config.compile
    if config.compile == "auto":                                                  # by then it has paid for itself
        options["compiled"] = generator.device.type == "cuda" and config.max_new_tokens >= 50_000
    if options["compiled"]:
        say("compiling the step of a token takes about a minute, before the second token")
    state = TextState()
    if config.save_state:
        check_target(config.save_state, "save_state", holds_state)
    if config.load_state:
        state = read_state(config.load_state, model, generator, config.seed)

    if config.interactive:
        state = converse(model, tokenizer, prompt, state, config, options)
    else:
        state = write(model, tokenizer, prompt, state, config, options)
    if config.save_state:
        write_state(config.save_state, model, state, generator, config.seed)


def write(model, tokenizer, prompt, before, config, options):
    """Prints the prompt and what comes after it; on stderr, how fast both went. Returns where it stopped."""
    start = time.perf_counter()
    state = read_prompt(model, tokenizer, prompt, before)
    check_positions(state, model.config, config.max_new_tokens)
    length = state.tokens - before.tokens
    reading = time.perf_counter() - start
    start = time.perf_counter()
    if config.num_samples == 1:
        print("\ufffd" * bool(before.half and prompt) + prompt, end="", flush=True)
        made = write_one(model, tokenizer, state, config, options)
    else:
        beginning = before.half + tokenizer.decode_bytes(tokenizer.encode(prompt))
        made = write_several(model, tokenizer, beginning, state, config, options)
    writing = time.perf_counter() - start
    read = f"after {before.tokens:,} tokens"
    if length == 1:
        read = f"prompt: 1 token in {reading:.2f} s"
    elif length:
        read = f"prompt: {length} tokens in {reading:.2f} s ({length / reading:,.0f} tokens/s)"
    print(f"\n{read}; text: {made} tokens in {writing:.1f} s ({made / writing:,.0f} tokens/s); "
          f"the state is {state.nbytes / config.num_samples / 1e3:,.1f} kB per text", file=sys.stderr)
    return state


def write_one(model, tokenizer, state, config, options):
    """Prints one text as it is made, and returns its number of tokens."""
    made = 0
    for piece in stream_text(model, tokenizer, state, config.stop, **options):
        print(piece, end="", flush=True)
        made += 1
    if config.save_state:                                                         # it keeps half a character
        print(end="\n" if sys.stdout.isatty() else "")                            # a file gets the next run's text too
    else:
        print("\ufffd" * bool(state.half))
    return made


def write_several(model, tokenizer, beginning, state, config, options):
    """Prints num_samples texts after the same beginning, made at once, and returns their number of tokens."""
    texts = [[] for _ in range(config.num_samples)]
    running = set(range(config.num_samples))
    with tqdm(total=config.max_new_tokens, unit="tok", disable=None) as bar:
        for tokens in stream_tokens(model, state, config.num_samples, **options):
            running -= {i for i in running if config.stop and tokens[i] == tokenizer.eot}
            for i in running:
                texts[i].append(tokens[i])
            bar.update()
            if not running:
                break
    for i, text in enumerate(texts, 1):
        text = (beginning + tokenizer.decode_bytes(text)).decode(errors="replace")
        print(f"--- {i} of {config.num_samples}\n{text}")
    return sum(map(len, texts))


def converse(model, tokenizer, prompt, state, config, options):
    """Answers the prompt, then each line that is typed, which continues the text so far. An empty line adds nothing.

    The whole conversation is one text, read through one state. From a pipe or into one, `--- N` stands above answer N.
    Returns where it stopped.
    """
    if sys.stdin is None:
        raise UserError("standard input is closed: --interactive reads it")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        print("The model continues each line that you type; an empty line lets it continue. Ctrl-C ends an answer, "
              "Ctrl-D the program.", file=sys.stderr)
    for number, line in enumerate(itertools.chain([prompt] if prompt else [], typed_lines(terminal)), 1):
        if not terminal:
            print(f"--- {number}")
        new_line = "\n" if line and state.unread not in ([], [tokenizer.eot]) else ""
        with ctrl_c_noted() as noted:
            state = read_prompt(model, tokenizer, new_line + line, state)
            room = max(1, positions_left(state, model.config) - 1)
            limits = {"max_new_tokens": min(config.max_new_tokens, room)}
            made = 0
            for piece in stream_text(model, tokenizer, state, config.stop, **options | limits):
                print(piece, end="", flush=True)
                made += 1
                if noted:
                    break
        print(flush=True)
        remarks = [f"{state.tokens} tokens so far", f"the state is {size_of(state, model.config)}"]
        if made == config.max_new_tokens:
            remarks.append(f"cut at max_new_tokens={made}, an empty line continues")
        print(f"[{'; '.join(remarks)}]", file=sys.stderr)
    return state


def size_of(state, config):
    """The size of a state in words, and what may still change it."""
    size = f"{state.nbytes / 1e3:,.1f} kB"
    if "softmax" in config.mixers:
        return f"{size} and grows: softmax layers keep all tokens"
    if "window" in config.mixers and state.tokens < config.window:
        return f"{size} and full at {config.window} tokens"
    return size


def typed_lines(terminal):
    """Yields the lines of standard input up to its end. At a terminal's prompt, Ctrl-C discards the line."""
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if not terminal:
        while (line := typed_line("")) is not None:
            yield line
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() edits lines with it)
    waiting = False

    def interrupt(number, frame):
        if waiting:                                                               # else it comes too soon after another
            raise KeyboardInterrupt
    before = signal.signal(signal.SIGINT, interrupt)
    while True:
        try:
            waiting = True
            line = typed_line("> ")
            waiting = False
        except KeyboardInterrupt:
            waiting = False
            print()
            continue
        if line is None:
            break
        yield line
    print()
    signal.signal(signal.SIGINT, before)


def typed_line(prompt):
    """The next line of standard input, or None at its end."""
    try:
        return input(prompt)
    except EOFError:
        return None


@contextlib.contextmanager
def ctrl_c_noted():
    """Yields a list that the first Ctrl-C fills: a step of the model is never cut in two. The second is as always."""
    noted = []

    def note(number, frame):
        noted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    command(main)
