"""What prepare.py says at its end: what was made, which preset of config/ suits it and this machine, and how long that
trains. Without torch, which takes 1 s."""
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import duration, escape, shell
from support.texts import MEANINGS, listed

MUCH = 20_000_000  # so many tokens are enough for a preset of 45 M parameters
LEAST = 10_000  # tokens to train on: fewer are read 40 times in the 100 steps of the shortest run
LEAST_VAL = 100  # tokens for validation


@dataclass
class Preset:
    """A file of config/: its parameters, its tokens in a step, and its steps. A text is read 4 times at most: more
    teaches little (arXiv 2305.16264), and a text of 600 kB read 5 times had its lowest validation loss at 3.6."""
    name: str
    parameters: float
    tokens: int
    steps: int

    def steps_for(self, train):
        return min(self.steps, max(100, 100 * round(4 * train / self.tokens / 100)))

    def command(self, train, val, names):
        words = ["python", "train.py", f"config/{self.name}.py", *names]
        if (steps := self.steps_for(train)) < self.steps:
            words.append(f"--max_steps={steps}")
        if min(train, val) <= 256 and self.name == "tiny":  # its seq_len
            words.append(f"--seq_len={min(train, val) // 2}")
        return shell(*words)

    def seconds(self, train):
        """On this machine's CPU: 6 operations for each parameter and token."""
        return 6 * self.parameters * self.tokens * self.steps_for(train) / machine_speed()


def machine_speed(size=96):
    """Operations of a training per second, from matrix products small enough for one core, the best of 20 ms.

    Measured on two cores: tiny and base train at half of what as many cores multiply. More than 16 help little.
    """
    a = np.ones((size, size), np.float32)
    best = math.inf
    end = time.perf_counter() + 0.02
    while (start := time.perf_counter()) < end:
        a @ a
        best = min(best, time.perf_counter() - start)
    return min(usable_cores(), 16) / 2 * 2 * size**3 / best


def usable_cores():
    """Those of this process; of a machine that does not say, all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def too_small(train, val, bytes_each):
    """What to say of a text from which no preset learns anything, or ""."""
    if train < LEAST:
        return (f"too small to train on: give at least {LEAST * bytes_each // 1000} kB of text, better ten times "
                "that or more")
    if val < LEAST_VAL:
        return (f"too little text for validation: it needs at least {LEAST_VAL * bytes_each} bytes, by a longer "
                "validation file or a larger --val_fraction")
    return ""


def next_steps(dataset, data_dir, vocab_size, train, val):
    """The command that trains a model that fits the text and the machine, on its own line, and how long it takes."""
    names = [f"--dataset={dataset}"]
    if str(data_dir) != "data":
        names.append(f"--data_dir={data_dir}")
    if dataset not in ("c4", "stdlib"):  # one folder, one run
        names.append(f"--out_dir=out/{dataset}")
    tiny = Preset("tiny", 1.79e6 + 192 * vocab_size, 4096, 700)
    hybrid = Preset("hybrid", 18.93e6 + 512 * vocab_size, 65536, 20000)
    gpu = shutil.which("nvidia-smi") is not None
    on_a_gpu = f"    {hybrid.command(train, val, names)}"
    if train >= MUCH and gpu:
        return f"next:\n{on_a_gpu}"
    here = (f"next, about {duration(tiny.seconds(train))} on this machine's CPU when nothing else runs on it:\n"
            f"    {tiny.command(train, val, names)}")
    return f"{here}\nor, on a GPU:\n{on_a_gpu}" if train >= MUCH else here


def say_what_was_made(config, manifest, sources):
    entries = manifest["files"].values()
    train, val = (sum(entry["tokens"] for entry in entries if entry["split"] == split) for split in ("train", "val"))
    name = Path(manifest["tokenizer"]).name
    lines = [f"{config.folder}: {train:,} tokens to train on and {val:,} for validation, tokenizer {name}"
             + ", all verified" * config.verify]
    held = [path for source in sources if source.stem.startswith("val-") for path in source.paths]
    if held:
        lines.append(f"  validation: {listed(held)}")
    elif any(source.stem.startswith("both-") for source in sources):
        lines.append(f"  validation: {val / (train + val):.1%} of the tokens"
                     + ", since no file is named val" * bool(config.data_files))
    for key, meaning in MEANINGS.items():
        if count := sum(entry.get(key, 0) for entry in entries):
            lines.append(f"  {meaning}: {count:,}")
    lines += [f"  {example}" for entry in entries for example in entry.get("examples", [])][:10]
    bytes_each = round(sum(entry["bytes"] for entry in entries) / (train + val)) or 1
    advice = too_small(train, val, bytes_each)
    advice = advice or next_steps(config.dataset, config.folder.parent, manifest["vocab_size"], train, val)
    lines += advice.split("\n")
    print("\n".join(map(escape, lines)))
