"""Generates text with a trained model, token by token, in memory that does not grow with the text.

    python sample.py                                           from out/base, one text after a blank start
    python sample.py --out_dir=out/tiny --prompt="class "      continue a prompt
    python sample.py --init_from=someone/model                 a model of the Hugging Face hub, or from anywhere else
    python sample.py --prompt_file=story.txt                   or a file's text; - reads standard input
    python sample.py --prompt_file=story.txt --save_state=story.state      where it stopped, without the text:
    python sample.py --load_state=story.state                              goes on, as one run would have
    python sample.py --num_samples=4 --temperature=0.8 --top_p=0.95 --max_new_tokens=1000
"""
import codecs
import hashlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, command, configure, help_first

help_first(__name__, __file__)

from support.files import read_text, replacing                                    # support comes before torch
from support.machine import autocast, out_of_memory, pick_device

import torch
from torch.utils._pytree import tree_map
from tqdm import tqdm

from model import state_bytes
from checkpoint import load_file, open_model


@dataclass
class SampleConfig:
    out_dir: str = "out/base"        # the folder of a trained model; its best.pt is taken, or else ckpt.pt
    init_from: str = ""              # instead of out_dir: a checkpoint file, a shared folder or a hub id
    prompt: str = ""                 # the text to continue; empty starts a new document
    prompt_file: str = ""            # read the prompt from this file; - is standard input
    num_samples: int = 1             # texts to generate, all at once
    max_new_tokens: int = 500        # longest text, in tokens after the prompt
    temperature: float = 0.8         # below 1 is safer, above 1 wilder; 0 always takes the likeliest token
    top_k: int = 0                   # choose among the k likeliest tokens; 0 means all
    top_p: float = 1.0               # choose among the fewest tokens that hold this much probability
    seed: int = 1337                 # the same seed gives the same text
    save_state: str = ""             # write where the text stopped to this file
    load_state: str = ""             # go on from there, with num_samples texts; a prompt is read after it
    stop: bool = True                # end a text at its end-of-text token
    device: str = "auto"             # cpu, cuda, mps; auto takes the best there is
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto is bf16 on CUDA, fp32 elsewhere

    def __post_init__(self):
        for key, low in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
            if getattr(self, key) < low:
                raise ValueError(f"{key} must be at least {low}, got {getattr(self, key)}")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature must be 0 or at least 0.001, got {self.temperature}")
        if not -2**63 <= self.seed < 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.prompt and self.prompt_file:
            raise ValueError("give either prompt or prompt_file, not both")
        if self.save_state and self.num_samples > 1:
            raise ValueError("save_state keeps one text: take num_samples=1, and num_samples=N with load_state")
        target = Path(self.save_state or "x.state")
        if not target.parent.is_dir() or target.exists() and not target.is_file():
            raise ValueError(f"save_state={target} must be a file in a folder that is there")


def identity(model):
    """A hash of settings and weights: a state means something to the model that made it, and to no other."""
    digest = hashlib.sha256(repr(model.config).encode())
    for p in model.parameters():
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_state(path, model, state, unread, generator, seed, half):
    """To path: the state, the token it has not read, the random numbers to come, and the bytes of half a character."""
    with replacing(Path(path)) as temporary:
        state = tree_map(lambda x: x.cpu().clone() if torch.is_tensor(x) else x, state)
        torch.save({"model": identity(model), "state": state, "unread": unread, "half": list(half), "seed": seed,
                    "rng": generator.get_state(), "device": generator.device.type}, temporary)


def check_save_state(path):
    """UserError where --save_state would replace a file that is no state: a checkpoint, say."""
    if not Path(path).exists():
        return
    try:
        ours = "unread" in load_file(path, "cpu")
    except Exception:  # whatever it is, torch.load can't read it
        ours = False
    if not ours:
        raise UserError(f"save_state={path} is there and is not a state: take another name")


def read_state(path, model, texts, device):
    """What write_state wrote, for this number of texts."""
    try:
        carried = load_file(path, device)
        same = carried["model"] == identity(model)
    except FileNotFoundError:
        raise UserError(f"no state {path}: --save_state={path} writes it") from None
    except Exception as error:  # a cut zip, a flipped bit, a forbidden pickle: each its own exception type
        raise UserError(f"{path} is damaged or not a state ({(str(error) or repr(error)).splitlines()[0]})") from None
    if not same:
        raise UserError(f"{path} is the state of another model: name its --out_dir, and its --precision")
    carried["state"] = tree_map(lambda x: x.expand(texts, *x.shape[1:]) if torch.is_tensor(x) and x.dim() else x,
                                carried["state"])
    return carried


def check_prompt(prompt, state, config, max_new_tokens):
    """UserError where the model knows no such token, or has no positions for prompt and text."""
    if max(prompt) >= config.vocab_size:
        raise UserError(f"the prompt has token {max(prompt)}, and the model only knows those below {config.vocab_size}")
    room = config.seq_len - (int(state["tokens"]) if state else 0) - len(prompt)
    if config.pos == "learned" and max_new_tokens > room:
        mend = f"take --max_new_tokens={room} or less" if room > 0 else "shorten the prompt"
        raise UserError(f"the model's learned positions end at {config.seq_len} tokens, and prompt and text would have "
                        f"{config.seq_len - room + max_new_tokens}: {mend}")


@out_of_memory("take a smaller --num_samples")
def main():
    config, = configure(sys.argv[1:], SampleConfig)
    sys.stdout.reconfigure(errors="replace")                                      # characters that this terminal lacks
    device = pick_device(config.device)
    model, tokenizer, precision = open_model(config, device)
    given = tokenizer.encode(read_text(config.prompt_file) if config.prompt_file else config.prompt).tolist()
    carried = {"state": None, "unread": [], "half": []}
    if config.save_state:
        check_save_state(config.save_state)
    if config.load_state:
        carried = read_state(config.load_state, model, config.num_samples, device)
    state, prompt = carried["state"], carried["unread"] + given or [tokenizer.eot]
    check_prompt(prompt, state, model.config, config.max_new_tokens)

    start = time.perf_counter()
    idx = torch.tensor([prompt] * config.num_samples, device=device)
    generator = torch.Generator(device).manual_seed(config.seed)
    if carried.get("seed") == config.seed and carried["device"] == device.type:   # another seed: another text
        generator.set_state(carried["rng"].cpu())
    texts, running = [[] for _ in range(config.num_samples)], set(range(config.num_samples))
    streaming, utf8 = config.num_samples == 1, codecs.getincrementaldecoder("utf-8")("replace")
    half = bytes(carried["half"])
    utf8.setstate((half, 0))
    bar = tqdm(total=config.max_new_tokens, unit="tok", disable=None if not streaming else True)
    if streaming:
        print(utf8.decode(tokenizer.decode_bytes(given)), end="")
    with autocast(device, precision):
        for tokens, state in model.generate(idx, config.max_new_tokens, config.temperature, config.top_k, config.top_p,
                                            generator, state):
            for i, token in enumerate(tokens.tolist()):
                if i in running and config.stop and token == tokenizer.eot:
                    running.discard(i)
                elif i in running:
                    texts[i].append(token)
            if streaming and running:
                print(utf8.decode(tokenizer.decode_bytes(texts[0][-1:])), end="", flush=True)
            bar.update()
            if not running:
                break
    bar.close()
    seconds, made = time.perf_counter() - start, sum(map(len, texts))
    if config.save_state:
        write_state(config.save_state, model, state, tokens.tolist(), generator, config.seed, utf8.getstate()[0])
    if streaming:                                                                 # a state keeps half a character
        goes_on = config.save_state and not sys.stdout.isatty()                   # a file gets the next run's text too
        print(utf8.decode(b"", final=True) if not config.save_state else "", end="" if goes_on else "\n")
    for i, text in enumerate(texts if not streaming else []):
        text = (half + tokenizer.decode_bytes(given + text)).decode(errors="replace")
        print(f"--- {i + 1} of {config.num_samples}\n{text}")
    print(f"\n{made} tokens in {seconds:.1f} s: {made / seconds:,.0f} tokens/s after a prompt of {len(prompt)}; "
          f"the state is {state_bytes(state) / config.num_samples / 1e3:,.1f} kB a text", file=sys.stderr)


if __name__ == "__main__":
    command(main)
