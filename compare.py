"""Compares configs at equal tokens, each at its own tuned learning rate, over seeds, also beyond the trained length.

    python compare.py                    seven presets, small, on Python's source: an hour or two on two cores
    python compare.py --max_steps=1000   the same, with any setting of train.py changed for all
    python compare.py config/softmax.py config/hybrid.py,window=256 --dataset=mix --lrs=1e-3,2e-3 --plot=compare.png

An arm is a config file, with settings of its own after commas. Every training is the plain command train.py, which
stands in the log.txt of its folder, out_dir/ARM/lrLR-seedSEED: so one that was stopped goes on, one that is finished is
not repeated, and one that another process is at is waited for.

Seed 1 tries every learning rate. The one with the lowest *training* loss over the last tenth of the logged steps is
taken: in less than an epoch that is text not seen before, and nothing is tuned on the validation text of the report.
Fresh seeds, 2 and on, are then trained at that rate, and only these are reported.

The report reads windows of `longer` times seq_len validation tokens. A token is predicted from all before it in its
window; the loss to seq_len and the loss beyond are means over the positions of the same windows.
"""
import importlib.util
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

# Before torch: threads that spin long starve where a core is shared; those that never do sleep between small products.
os.environ.update({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"} | os.environ)

import torch
import torch.nn.functional as F
from tqdm import tqdm

from bench import table
from checkpoint import Log, load_checkpoint, load_model
from configurator import UserError, command, configure
from machine import autocast, out_of_memory, pick_device, say
from model import LM, ModelConfig
from prepare import replacing
from recall import machine, write_json
from train import Dataset, TrainConfig, Windows

PROGRAM = Path(__file__).resolve().with_name("train.py")
PRESETS = ["config/base.py", "config/softmax.py", "config/based.py", "config/retnet.py", "config/deltanet.py",
           "config/gated_deltanet.py,feature_dim=24", "config/hybrid.py,feature_dim=24"]
SMALL = ["--dataset=stdlib", "--dim=128", "--n_heads=4", "--seq_len=256", "--window=64", "--batch_size=8",
         "--grad_accum=1", "--optimizer=muon", "--warmup_steps=50", "--max_steps=500"]  # for PRESETS; flags win
DIVERGED, BUSY = "steps in a row were skipped", "is at work in"                  # how train.py says so


@dataclass
class CompareConfig:
    lrs: str = "0.01,0.02,0.04"      # learning rates to try, separated by commas
    seeds: int = 3                   # trainings of each arm that are reported, at the learning rate taken
    jobs: int = 1                    # trainings side by side on a CPU, which share its cores
    longer: int = 4                  # length of the validation windows, in units of seq_len
    out_dir: str = "out/compare"     # where the trainings and results.json are kept
    plot: str = ""                   # also draw loss against position to this file: needs matplotlib
    device: str = "auto"             # as for train.py
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as for train.py

    def __post_init__(self):
        for key in ("seeds", "jobs", "longer"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        self.rates = self.lrs.split(",")                                          # as written: they name folders
        try:
            self.rates.sort(key=float)
            good = len({float(lr) for lr in self.rates if 0 < float(lr) < math.inf}) == len(self.rates)
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"lrs must be different numbers above 0 with commas, 0.01,0.02, got {self.lrs!r}")


# ----------------------------------------------------------------------------------------------------------------------
# The command line


@dataclass
class Arm:
    name: str                        # the file's stem and its own settings
    arguments: list                  # of train.py, but for lr, seed and out_dir
    train: TrainConfig
    model: ModelConfig

    def text(self):
        """What must be the same for all."""
        same = {key: getattr(self.train, key) for key in ("dataset", "data_dir", "eval_tokens")}
        tokens = self.train.max_steps * self.train.batch_size * self.model.seq_len
        return same | {"seq_len": self.model.seq_len, "tokens": tokens}

    def parameters(self):
        with torch.device("meta"):
            return sum(p.numel() for p in LM(self.model).parameters())


def key_of(flag):
    return flag.lstrip("-").partition("=")[0]


def parse(argv):
    """(CompareConfig, Arms) of a command line. UserError for what train.py would refuse, before anything is trained."""
    flags, texts = ([word for word in argv if word.startswith("-") == dashed] for dashed in (True, False))
    mine = {field.name for field in fields(CompareConfig)}
    taken = mine - {"device", "precision"}                                        # these train.py is given as well
    config, = configure([flag for flag in flags if key_of(flag) in {*mine, "help", "h"}], CompareConfig, doc=__doc__)
    passed = SMALL * (not texts) + [flag for flag in flags if key_of(flag) not in taken]
    arms = []
    for text in texts or PRESETS:
        file, *settings = re.split(r",(?=\w+=)", text)                            # mixers=linear,window is one setting
        if not file.endswith(".py"):
            raise UserError(f"{text} is not understood: an arm is FILE.py or FILE.py,key=value, a flag is --key=value")
        arguments = [file, *passed, *(f"--{setting}" for setting in settings)]
        _, train, model = configure(arguments, CompareConfig, TrainConfig, ModelConfig)
        for key in map(key_of, arguments[1:]):
            if key in taken | {"lr", "seed", "resume", "eval_only"}:
                raise UserError(f"{key} is no setting of an arm: --lrs, --seeds and the like are the same for all")
        if not model.causal:
            raise UserError(f"{text}: causal=False sees the token it should predict")
        arms.append(Arm(",".join([Path(file).stem, *settings]).replace("/", "_"), arguments, train, model))
    check_alike(arms)
    return config, arms


def check_alike(arms):
    names = [arm.name for arm in arms]
    for arm in arms:
        if names.count(arm.name) > 1:
            raise UserError(f"two arms are called {arm.name}: give one of them another file name, or leave it out")
        for key, value in arm.text().items():
            if value != arms[0].text()[key]:
                raise UserError(f"{arm.name} has {key}={value} and {arms[0].name} {arms[0].text()[key]}: arms are "
                                "compared on the same text, so set it for all by flags")


# ----------------------------------------------------------------------------------------------------------------------
# Trainings


class Training:
    """One run of train.py: its command, its folder, and how it goes."""

    def __init__(self, arm, lr, seed, config):
        self.arm, self.lr, self.seed, self.process = arm, lr, seed, None
        self.folder = Path(config.out_dir, arm.name, f"lr{lr}-seed{seed}")
        self.command = [sys.executable, str(PROGRAM), *arm.arguments, f"--lr={lr}", f"--seed={seed}",
                        f"--out_dir={self.folder}"]
        self.seen = self.step()                                                   # for the progress bar

    def said(self):
        """The lines of log.txt from the last command on: a training left by a killed compare.py may write there too."""
        path = self.folder / "log.txt"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return lines[max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=0):]

    def records(self):
        return Log.read(self.folder / "metrics.jsonl")

    def step(self):
        return max((record["step"] for record in self.records()), default=0)

    def diverged(self):
        """Did this command end so? It would again."""
        lines = self.said()
        return lines[:1] == [f"$ {shlex.join(self.command)}"] and any(DIVERGED in line for line in lines)

    def loss(self):
        """Mean training loss over the last tenth of the logged steps; infinite where it is no number."""
        losses = list({r["step"]: r["loss"] for r in self.records() if "loss" in r}.values())  # a spike is logged twice
        last = losses[-math.ceil(len(losses) / 10):]
        return math.inf if self.diverged() or not last or None in last else statistics.mean(last)

    def start(self, threads):
        if self.diverged():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "log.txt", "a") as log:
                log.write(f"$ {shlex.join(self.command)}\n")
                log.flush()
                self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                                env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        except OSError as error:
            raise UserError(f"cannot write to {self.folder} ({error.strerror}): use another --out_dir") from None

    def code(self):
        """Its exit code, or None while it runs."""
        return self.process.poll() if self.process else 0

    def is_busy(self):
        """Did it end because another process trains in its folder?"""
        return self.code() == 2 and any(BUSY in line for line in self.said())

    def check(self):
        if self.code() and not self.diverged():
            raise UserError(f"{self.folder / 'log.txt'} ends, with exit code {self.code()}: {self.said()[-1]}")
        self.seen = self.arm.train.max_steps
        say(f"{self.arm.name}, lr {self.lr}, seed {self.seed}: "
            + ("diverged" if self.diverged() else f"training loss {self.loss():.4f}"))


def pick(trainings):
    """The training of the lowest training loss, or None where all diverged."""
    best = min(trainings, key=Training.loss)
    rates = [training.lr for training in trainings]
    losses = ", ".join(f"{training.lr}: {training.loss():.4f}" for training in trainings)
    if best.loss() == math.inf:
        say(f"warning: {best.arm.name} diverged at every lr, {', '.join(rates)}, and is left out: try lower --lrs")
        return None
    say(f"{best.arm.name}: lr {best.lr} (training loss by lr: {losses})")
    if len(rates) > 1 and best.lr in (rates[0], rates[-1]):
        say(f"warning: the best lr of {best.arm.name}, {best.lr}, is at an end of --lrs: try some beyond it")
    return best


def train_all(arms, config):
    """{arm name: (its tuning trainings, those to report)}, all of them ended."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)                     # ends the trainings, as Ctrl-C does
    threads = max(1, torch.get_num_threads() // config.jobs)
    found = {arm.name: ([Training(arm, lr, 1, config) for lr in config.rates], []) for arm in arms}
    everything = [training for tuning, _ in found.values() for training in tuning]
    waiting, running, ended, again = [*everything], [], [], 0.0
    total = sum(arm.train.max_steps for arm in arms) * (len(config.rates) + config.seeds)
    with tqdm(total=total, initial=sum(t.seen for t in everything), unit="step", disable=None, smoothing=0.02) as bar:
        try:
            while len(ended) < len(everything):
                while waiting and len(running) < config.jobs and time.time() > again:
                    running.append(waiting.pop(0))
                    running[-1].start(threads)
                time.sleep(0.5)
                for training in [t for t in running if t.code() is not None]:
                    running.remove(training)
                    if training.is_busy():                                        # by hand, or by a killed compare.py
                        waiting.append(training)
                        again = time.time() + 10
                        continue
                    training.check()
                    ended.append(training)
                    tuning, report = found[training.arm.name]
                    if not report and all(t in ended for t in tuning) and (best := pick(tuning)):
                        report += [Training(best.arm, best.lr, seed + 2, config) for seed in range(config.seeds)]
                        everything += report
                        waiting += report
                for training in running:
                    training.seen = training.step()
                bar.update(sum(t.seen for t in everything) - bar.n)
        finally:
            left = [training.process for training in running if training.process]
            for process in left:
                process.terminate()                                               # they save, and go on another time
            for process in left:
                process.wait()
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The report


@torch.no_grad()
def losses_by_position(model, x, y, piece):
    """Cross-entropy (B,T) of each token of y after all of x up to it: in pieces that carry the state, in fp32."""
    state, losses = None, []
    for tokens, targets in zip(x.split(piece, dim=1), y.split(piece, dim=1)):
        hidden, state = model.hidden(tokens, state)
        rows = zip(hidden.flatten(0, 1).split(1024), targets.flatten().split(1024))  # logits of a few at a time
        part = [F.cross_entropy(model.logits(h).float(), target, reduction="none") for h, target in rows]
        losses.append(torch.cat(part).view_as(targets))
    return torch.cat(losses, dim=1)


def curve(training, data, length, device):
    """Validation loss at each position, averaged over windows of `length` tokens, and the precision of training and of
    this; None, None where training diverged."""
    if training.diverged():
        return None, None
    config, T = training.arm.train, training.arm.model.seq_len
    checkpoint = load_checkpoint(training.folder / "ckpt.pt")                     # best.pt was picked on this text
    model, precision = load_model(checkpoint, device).eval(), checkpoint["config"]["precision"]
    seen = T if model.config.pos == "learned" else length
    windows, total = Windows(data.val, length, seed=0), 0.0
    count = min(windows.total, -(-config.eval_tokens // length))
    for i in range(0, count, config.piece):
        x, y = windows.batch(range(i, min(i + config.piece, count)), model.config.vocab_size, device)
        with autocast(device, precision):
            total += losses_by_position(model, x[:, :seen], y[:, :seen], T).cpu().double().sum(0)
    return (total / count).tolist(), precision


def bins(T, length):
    """(start, end) of ranges of positions: powers of two, cut at T."""
    edges = sorted({0, T, length, *(2**i for i in range(length.bit_length()) if 2**i < length)})
    return [*zip(edges, edges[1:])]


def evaluate(arm, tuning, trainings, data, length, device):
    """All that is known of an arm. Of losses there is one a seed, None if it diverged or has no such position."""
    T = arm.model.seq_len
    curves, precisions = zip(*(curve(training, data, length, device) for training in trainings))

    def means(start, end):
        return [statistics.mean(c[start:end]) if c and end <= len(c) else None for c in curves]
    speeds = [record["tokens_per_s"] for t in trainings for record in t.records() if "tokens_per_s" in record]
    return {"name": arm.name, "arguments": arm.arguments, "parameters": arm.parameters(), "lr": trainings[0].lr,
            "tuning": {t.lr: t.loss() if t.loss() < math.inf else None for t in tuning}, "precisions": precisions,
            "tokens_per_s": statistics.median(speeds) if speeds else None,
            "within": means(0, T), "beyond": means(T, length) if length > T else [None],
            "bins": [means(start, end) for start, end in bins(T, length)], "by_position": curves}


def mean(losses):
    return math.inf if None in losses else statistics.mean(losses)


def cell(losses):
    spread = f" ({max(losses) - min(losses):.3f})" if None not in losses and len(losses) > 1 else ""
    return "none" if None in losses else f"{mean(losses):.3f}{spread}"


def report(results, T, length):
    table("Validation loss in nats a token: mean over the seeds (max - min)",
          [{"arm": r["name"], "parameters": f"{r['parameters'] / 1e6:.2f} M", "lr": r["lr"],
            f"positions 0 to {T - 1}": cell(r["within"]), f"{T} to {length - 1}": cell(r["beyond"]),
            "training, tokens/s": r["tokens_per_s"]} for r in results])
    names = [str(start) if end == start + 1 else f"{start} to {end - 1}" for start, end in bins(T, length)]
    table("The same by position, mean over the seeds",
          [{"arm": r["name"]} | dict(zip(names, (cell([mean(losses)]) for losses in r["bins"]))) for r in results])


def plot(results, path, T, length, title):
    """Loss against position: a line for the mean of the seeds, a shade for their range, and where training ended."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for result in results:
        points = [(math.sqrt((start + 1) * end), mean(losses), min(losses), max(losses))
                  for (start, end), losses in zip(bins(T, length), result["bins"]) if None not in losses]
        if points:
            where, means, low, high = zip(*points)
            line, = axes.plot(where, means, label=result["name"])
            axes.fill_between(where, low, high, color=line.get_color(), alpha=0.2)
    axes.axvline(T, color="gray", linestyle="--", label=f"seq_len in training, {T}")
    axes.set(xscale="log", xlabel="position in the window", ylabel="validation loss (nats per token)")
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    say(f"wrote {path}")


def check(arms, config):
    """What can be known before training: UserError for what cannot work, a warning for what is not equal."""
    if config.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs a package: pip install matplotlib, or leave it out")
    device, text = pick_device(config.device), arms[0].text()
    data = Dataset(Path(text["data_dir"]) / text["dataset"])
    for arm in arms:
        data.give_vocabulary(arm.model)
    Windows(data.val, config.longer * text["seq_len"], seed=0)                    # is there one?
    epochs = text["tokens"] / Windows(data.train, text["seq_len"], seed=0).tokens
    if epochs > 1:
        say(f"warning: a training is {epochs:.3g} epochs: the loss that picks the lr is on text seen before")
    sizes = {arm.parameters(): arm.name for arm in arms}
    if max(sizes) > 1.03 * min(sizes):
        say(f"warning: arms differ by more than 3 % in parameters: {sizes[min(sizes)]} has {min(sizes):,}, "
            f"{sizes[max(sizes)]} {max(sizes):,}")
    return data, device


@out_of_memory("take a larger --grad_accum, or a smaller --longer")
def main():
    config, arms = parse(sys.argv[1:])
    data, device = check(arms, config)
    found, results = train_all(arms, config), []
    text, T = arms[0].text(), arms[0].model.seq_len
    length = config.longer * T
    for arm in tqdm(arms, desc="evaluating", disable=None, leave=False):
        tuning, trainings = found[arm.name]
        if trainings:
            results.append(evaluate(arm, tuning, trainings, data, length, device))
    if not results:
        raise UserError("every arm diverged at every learning rate: try lower --lrs")
    results.sort(key=lambda result: mean(result["within"]))
    precisions = sorted({p for result in results for p in result["precisions"] if p})
    title = (f"{text['dataset']}, {text['tokens']:,} tokens of training, seeds: {config.seeds}; {machine(device)}, "
             f"{' and '.join(precisions)}, {config.jobs} at a time")
    write_json(Path(config.out_dir, "results.json"), {"title": title, "seq_len": T, "length": length, "arms": results})
    print(title)
    report(results, T, length)
    if config.plot:
        plot(results, Path(config.plot), T, length, title)


if __name__ == "__main__":
    command(main)
