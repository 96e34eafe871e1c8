"""Compares configs at equal tokens, each at its own tuned learning rate, over seeds, also beyond the trained length.

    python -m experiments.compare                                               seven small presets on Python's source
    python -m experiments.compare --max_steps=1000 --out_dir=out/longer         the same, with a setting for all
    python -m experiments.compare config/softmax.py config/hybrid.py,window=256 --batch_size=32 --out_dir=out/two

The first takes an hour or two on two cores. The first two want `python prepare.py --dataset=stdlib`, the third
`python prepare.py`: the first shard of C4.

An arm is a config file, with settings of its own after commas. Every training is the plain command train.py, which
stands in the log.txt of its folder, out_dir/ARM/lrLR-seedSEED: so one that was stopped goes on, one that is finished is
not repeated, and one that another process is at is waited for.

Seed 1 tries the rates of --lrs, then twice the largest or half the smallest until the best has one on both sides; a
single rate is taken as it is. The best has the lowest *training* loss over the last tenth of the logged steps: in less
than an epoch that is text not seen before, and nothing is tuned on the validation text of the report. Fresh seeds, 2
and on, are then trained at that rate, and only these are reported.

The report reads windows of `longer` times seq_len validation tokens. A token is predicted from all before it in its
window; the loss to seq_len and the loss beyond are means over the positions of the same windows. A model with softmax
layers or learned positions is also read as eval.py does, in windows of seq_len that overlap by half.
The settings of arms, which are also flags for all, are in `python train.py --help`.
"""
import concurrent.futures as futures
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from configurator import UserError, command, configure, help_first, joined, read_config_file

help_first(__name__, __file__)

from support.dataset import Dataset, Windows                                      # support comes before torch
from support.files import replacing, write_json
from support.machine import autocast, device_name, out_of_memory, pick_device, say
from support.report import Log, picture, table

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import LM, ModelConfig, state_bytes
from checkpoint import load_checkpoint, load_model
from train import TrainConfig, refuse_changes
from eval import default_context

PROGRAM = Path(__file__).resolve().parent.with_name("train.py")
PRESETS = ["config/base.py", "config/softmax.py", "config/based.py", "config/retnet.py", "config/deltanet.py",
           "config/gated_deltanet.py,feature_dim=24", "config/hybrid.py,feature_dim=24"]
SMALL = ["--dataset=stdlib", "--dim=128", "--n_heads=4", "--seq_len=256", "--window=64", "--batch_size=8",
         "--grad_accum=1", "--optimizer=muon", "--warmup_steps=50", "--max_steps=500"]  # for PRESETS; flags win
BEYOND = 8                                                                        # rates to try beyond those given
DIVERGED, BUSY = "steps in a row were skipped", "is at work in"                  # how train.py says so
PAUSE = 10                                                                        # seconds, when another is at work


@dataclass
class CompareConfig:
    lrs: str = ""                    # learning rates to begin with, as 0.01,0.02; empty: each arm's own and its half
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
        try:
            self.rates = sorted(float(lr) for lr in self.lrs.split(",") if self.lrs)
        except ValueError:
            self.rates = [math.nan]
        if len({lr for lr in self.rates if 0 < lr < math.inf}) < len(self.rates):
            raise ValueError(f"lrs must be different numbers above 0 with commas, 0.01,0.02, got {self.lrs!r}")


# ----------------------------------------------------------------------------------------------------------------------
# The command line, and what can be known before training


@dataclass
class Arm:
    name: str                        # the file's stem and its own settings
    arguments: list                  # of train.py, but for lr, seed and out_dir
    rates: list                      # where its search for a learning rate begins
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
    argv = joined(argv, CompareConfig, TrainConfig, ModelConfig)
    flags, texts = ([word for word in argv if word.startswith("-") == dashed] for dashed in (True, False))
    mine = {field.name for field in fields(CompareConfig)}
    taken = mine - {"device", "precision"}                                        # these train.py is given as well
    config, = configure(["--lrs=0.01,0.02"] * (not texts)
                        + [flag for flag in flags if key_of(flag) in mine], CompareConfig)
    passed = SMALL * (not texts) + [flag for flag in flags if key_of(flag) not in taken]
    arms = [parse_arm(text, passed, taken, config.rates) for text in texts or PRESETS]
    names = [arm.name for arm in arms]
    for arm in arms:
        if names.count(arm.name) > 1:
            raise UserError(f"two arms are called {arm.name}: give one of them another file name, or leave it out")
        for key, value in arm.text().items():
            if value != arms[0].text()[key]:
                raise UserError(f"{arm.name} has {key}={value} and {arms[0].name} {arms[0].text()[key]}: arms are "
                                "compared on the same text, so set it for all by flags")
    return config, arms


def parse_arm(text, passed, taken, rates):
    """The Arm that a word of the command line names."""
    file, *settings = re.split(r",(?=\w+=)", text)                                # mixers=linear,window is one setting
    if not file.endswith(".py"):
        raise UserError(f"{text} is not understood: an arm is FILE.py or FILE.py,key=value, a flag is --key=value")
    arguments = [file, *passed, *(f"--{setting}" for setting in settings)]
    _, train, model = configure(arguments, CompareConfig, TrainConfig, ModelConfig)
    own = {"lr", "seed", "out_dir"}                                               # a file may say them: ours win
    given = [(where, key) for where, key, *_ in read_config_file(file) if key not in own]
    for where, key in given + [(word, key_of(word)) for word in arguments[1:]]:
        if key in taken | {"lr", "seed"}:
            raise UserError(f"{where}: {key} is no setting of an arm: --lrs, --seeds and the like are the same for all")
    for key in ("resume", "eval_only", "init_from"):
        if getattr(train, key) != getattr(TrainConfig, key):
            raise UserError(f"{text}: with {key}={getattr(train, key)} trainings are not equal: leave it out")
    if not model.causal:
        raise UserError(f"{text}: causal=False sees the token it should predict")
    return Arm(",".join([Path(file).stem, *settings]).replace("/", "_"), arguments,
               rates or sorted({train.lr / 2, train.lr}), train, model)


def check(arms, config):
    """What can be known before training: UserError for what cannot work, a warning for what is not equal. The windows
    of the report, how many of them, and the device."""
    if config.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs a package: pip install matplotlib, or leave it out")
    device, text = pick_device(config.device), arms[0].text()
    data = Dataset(Path(text["data_dir"]) / text["dataset"])
    for arm in arms:
        data.give_vocabulary(arm.model)
        check_folders(arm, config.out_dir, data.fingerprint)
    try:
        windows = Windows(data.val, config.longer * text["seq_len"], seed=0)
    except UserError as error:
        raise UserError(f"the report reads windows of {config.longer} times seq_len: take a smaller --longer ({error})"
                        ) from None
    epochs = text["tokens"] / (Windows(data.train, text["seq_len"], seed=0).total * text["seq_len"])
    if epochs > 1:
        say(f"warning: a training is {epochs:.3g} epochs: the loss that picks the lr is on text seen before")
    sizes = {arm.parameters(): arm.name for arm in arms}
    if max(sizes) > 1.03 * min(sizes):
        say(f"warning: arms differ by more than 3 % in parameters: {sizes[min(sizes)]} has {min(sizes):,}, "
            f"{sizes[max(sizes)]} {max(sizes):,}")
    for arm in arms:
        check_target(Path(config.out_dir, arm.name, "log.txt"), "out_dir")
    if config.plot:
        check_target(Path(config.plot), "plot")
    return windows, min(windows.total, -(-arms[0].train.eval_tokens // windows.seq_len)), device


def check_folders(arm, out_dir, data):
    """UserError where a training of this arm is there already, with other settings or without a sound checkpoint."""
    for folder in sorted(Path(out_dir, arm.name).glob("lr*-seed*")):
        path = folder / "ckpt.pt"
        if not path.exists() and not (folder / "best.pt").exists():
            continue
        try:
            checkpoint = load_checkpoint(path)
        except UserError:
            raise UserError(f"{path} is missing or damaged: delete {folder}, and the same command trains it anew"
                            ) from None
        same = ["lr", "seed"] + ["precision"] * (arm.train.precision == "auto")   # of its folder; as train.py does it
        train = replace(arm.train, **{key: checkpoint["config"][key] for key in same})
        try:
            refuse_changes(path, checkpoint, train, arm.model, data)
        except UserError as error:
            raise UserError(f"{str(error).partition('. Take')[0]}: take another --out_dir") from None


def check_target(path, flag):
    """UserError where path could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        tempfile.TemporaryFile(dir=path.parent).close()
    except (OSError, ValueError) as error:                                        # ValueError: a NUL byte in the name
        raise UserError(f"cannot write {path} ({getattr(error, 'strerror', error)}): use another --{flag}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Trainings


class Training:
    """One run of train.py: its command, its folder, and how it goes."""

    def __init__(self, arm, lr, seed, config):
        self.arm, self.lr, self.seed = arm, lr, seed
        self.folder = Path(config.out_dir, arm.name, f"lr{lr!r}-seed{seed}")
        self.command = [sys.executable, str(PROGRAM), *arm.arguments, f"--lr={lr!r}", f"--seed={seed}",
                        f"--out_dir={self.folder}"]
        self.marker = self.folder / "diverged"                                    # holds the command that did
        self.found = self.seen = self.step()                                      # for the progress bar

    def records(self):
        return Log.read(self.folder / "metrics.jsonl")

    def step(self):
        return max((record["step"] for record in self.records()), default=0)

    def diverged(self):
        """Did this command end so? It would again."""
        return self.marker.exists() and self.marker.read_text() == shlex.join(self.command[2:-1])

    def loss(self):
        """Mean training loss over the last tenth of the logged steps; infinite where it is no number."""
        records = self.records()
        skipped = {record["step"] for record in records if record.get("skipped")}
        losses = [r["loss"] for r in records if "lr" in r and r["step"] not in skipped]  # others: spikes, evaluations
        last = losses[-math.ceil(len(losses) / 10):]
        return math.inf if self.diverged() or not last or None in last else statistics.mean(last)

    def run(self, slots, stopped):
        """To its end, in one of the slots. Where another process is at it, by hand or from a killed compare.py, when
        that has ended."""
        told = False
        while not self.diverged():
            with slots:
                if self.diverged():                                               # meanwhile, in another compare.py
                    break
                code, lines = self.call(stopped)
            if code == 2 and any(BUSY in line for line in lines):
                told or say(f"{self.folder}: another train.py is at work there, and is waited for")
                told = True
                stopped.wait(PAUSE)
            elif code == 3 or code == 2 and any(DIVERGED in line for line in lines):
                with replacing(self.marker) as temporary:
                    temporary.write_text(shlex.join(self.command[2:-1]))
            elif code:
                raise UserError(f"{self.folder}/log.txt ends, with exit code {code}: {(lines or ['no word'])[-1]}")
            else:
                break
        self.seen = self.arm.train.max_steps
        say(f"{self.arm.name}, lr {self.lr}, seed {self.seed}: "
            + ("diverged" if self.diverged() else f"training loss {self.loss():.4f}"))

    def call(self, stopped):
        """Exit code and lines of the command; when `stopped` is set it is told to save and end."""
        if stopped.is_set():
            raise futures.CancelledError
        self.folder.mkdir(parents=True, exist_ok=True)
        self.marker.unlink(missing_ok=True)                                       # of another command
        with open(self.folder / "log.txt", "a+", errors="replace") as log:
            log.write(f"$ {shlex.join(self.command)}\n")
            log.flush()
            start = log.tell()
            process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            while process.poll() is None and not stopped.wait(0.5):
                self.seen = self.step()
            if stopped.is_set():
                process.terminate()
                process.wait()
                raise futures.CancelledError
            log.seek(start)
            return process.returncode, log.read().splitlines()


def next_rate(losses):
    """The learning rate to try after those of {lr: loss}, or None: is there one on both sides of the best?"""
    rates = sorted(losses)
    best = min(rates, key=losses.get)
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return None
    return best / 2 if best == rates[0] else best * 2


def sweep(arm, seeds, train):
    """(Its trainings of seed 1, those to report), by train(arm, [(lr, seed)]), which runs them."""
    tuning = train(arm, [(lr, 1) for lr in arm.rates])
    while lr := next_rate({training.lr: training.loss() for training in tuning}):
        if len(tuning) == len(arm.rates) + BEYOND:
            say(f"warning: {arm.name} still gets better, or diverges, {BEYOND} learning rates beyond those given")
            break
        tuning += train(arm, [(lr, 1)])
    tuning.sort(key=lambda training: training.lr)
    best = min(tuning, key=Training.loss)
    losses = ", ".join(f"{training.lr}: {training.loss():.4f}" for training in tuning)
    if best.loss() == math.inf:
        say(f"warning: {arm.name} diverged at every lr ({losses}), and is left out: try lower --lrs")
        return tuning, []
    say(f"{arm.name}: lr {best.lr} (training loss by lr: {losses})")
    return tuning, train(arm, [(best.lr, seed + 2) for seed in range(seeds)])


def train_all(arms, config):
    """For each arm what sweep gives, when all is trained. A training has a thread, which waits for a slot, then for
    train.py; so has a sweep, which waits for its trainings."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)                     # ends the trainings, as Ctrl-C does
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // config.jobs))
    slots, stopped, known = threading.Semaphore(config.jobs), threading.Event(), []

    def train(arm, runs):
        trainings = [Training(arm, lr, seed, config) for lr, seed in runs]
        known.extend(trainings)
        for task in futures.as_completed([pool.submit(training.run, slots, stopped) for training in trainings]):
            task.result()
        return trainings

    planned = sum(arm.train.max_steps * (len(arm.rates) + config.seeds) for arm in arms)
    threads = sum(1 + max(len(arm.rates), config.seeds) for arm in arms)
    with futures.ThreadPoolExecutor(threads) as pool, tqdm(unit="step", disable=None, smoothing=0) as bar:
        sweeps = [pool.submit(sweep, arm, config.seeds, train) for arm in arms]
        try:
            while not all(task.done() for task in sweeps):
                for task in futures.wait(sweeps, timeout=1, return_when=futures.FIRST_EXCEPTION).done:
                    task.result()
                extra = sum(t.arm.train.max_steps for t in known if t.seed == 1 and t.lr not in t.arm.rates)
                bar.total, bar.initial = planned + extra, sum(t.found for t in known)
                bar.update(sum(t.seen for t in known) - bar.n)
            return [task.result() for task in sweeps]
        finally:
            stopped.set()


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


def overlapping(model, x, y, T, rows):
    """Mean loss of the tokens beyond T in windows of T that overlap by half, `rows` of them at once."""
    half = max(1, T // 2)
    pieces = (tokens.unfold(1, T, half)[:, 1:].flatten(0, 1).split(rows) for tokens in (x, y))  # the first is within T
    losses = [losses_by_position(model, *piece, T)[:, T - half:].flatten() for piece in zip(*pieces)]
    if rest := (x.shape[1] - T) % half:
        losses.append(losses_by_position(model, x[:, -T:], y[:, -T:], T)[:, T - rest:].flatten())
    return torch.cat(losses).mean().item()


@torch.no_grad()
def read(training, windows, count, device):
    """Of the last weights: mean loss by position over the first `count` windows, the same beyond seq_len in overlapping
    windows, bytes of the state of a text of seq_len, and the precision of training and of this. NaN for what is not."""
    config, T, length = training.arm.train, training.arm.model.seq_len, windows.seq_len
    if training.diverged():
        return torch.full((length,), math.nan, dtype=torch.float64), math.nan, None, None
    checkpoint = load_checkpoint(training.folder / "ckpt.pt")                     # best.pt was picked on this text
    model, precision = load_model(checkpoint, device).eval(), checkpoint["config"]["precision"]
    again = default_context(model) and length > T
    seen = T if model.config.pos == "learned" else length
    total, total_again = 0.0, 0.0 if again else math.nan
    for i in range(0, count, config.piece):
        x, y = windows.batch(range(i, min(i + config.piece, count)), model.config.vocab_size, device)
        with autocast(device, precision):
            total += losses_by_position(model, x[:, :seen], y[:, :seen], T).cpu().double().sum(0)
            total_again += overlapping(model, x, y, T, config.piece) * len(x) if again else 0.0
    state = state_bytes(model.hidden(x[:1, :T])[1])
    return F.pad(total / count, (0, length - seen), value=math.nan), total_again / count, state, precision


def bins(T, length):
    """(start, end) of ranges of positions: powers of two from 8 on, cut at T."""
    edges = sorted({0, T, length, *(2**i for i in range(3, length.bit_length()) if 2**i < length)})
    return [*zip(edges, edges[1:])]


def evaluate(arm, tuning, trainings, windows, count, device):
    """All that is known of an arm. Of losses there is one a seed, NaN if it diverged or has no such position."""
    T, length = arm.model.seq_len, windows.seq_len
    curves, again, states, precisions = zip(*(read(training, windows, count, device) for training in trainings))
    curves = torch.stack(curves)                                                  # (seeds, length)

    def part(start, end):
        return curves[:, start:end].mean(1).tolist()
    speeds = [record["tokens_per_s"] for t in trainings for record in t.records() if "tokens_per_s" in record]
    return {"name": arm.name, "arguments": arm.arguments, "mixers": arm.model.mixers, "parameters": arm.parameters(),
            "state_bytes": next(filter(None, states), None), "lr": trainings[0].lr,
            "tuning": {t.lr: t.loss() for t in tuning}, "precisions": precisions,
            "diverged": [t.seed for t in trainings if t.diverged()],
            "tokens_per_s": statistics.median(speeds) if speeds else None,
            "within": part(0, T), "beyond": part(T, length), "beyond_overlapping": again,
            "bins": [part(start, end) for start, end in bins(T, length)], "by_position": curves.tolist()}


def rank(results):
    """Sorts them, gives each its difference to a reference, seed by seed, and names that: the first of softmax alone,
    or else the first."""
    reference = next((r for r in results if {*r["mixers"]} == {"softmax"}), results[0])
    for r in results:
        r["difference"] = [loss - other for loss, other in zip(r["within"], reference["within"])]
    results.sort(key=lambda r: (bool(r["diverged"]), statistics.fmean(r["within"])))
    return reference["name"]


def cell(losses, result, form=".3f", spread=True):
    """Mean (max - min) for a table."""
    if math.isnan(statistics.fmean(losses)):
        return "diverged" if result["diverged"] else "none"
    end = f" ({max(losses) - min(losses):.3f})" if spread and len(losses) > 1 else ""
    return f"{statistics.fmean(losses):{form}}{end}"


def report(results, reference, T, length):
    rows = []
    for r in results:
        rows.append({"arm": r["name"], "parameters": f"{r['parameters'] / 1e6:.2f} M", "lr": r["lr"],
                     f"state of {T} tokens, bytes": r["state_bytes"] or "none",
                     f"positions 0 to {T - 1}": cell(r["within"], r),
                     f"minus {reference}, by seed": cell(r["difference"], r, "+.3f")})
        if length > T:
            rows[-1] |= {f"{T} to {length - 1}": cell(r["beyond"], r),
                         f"the same in overlapping windows of {T}": cell(r["beyond_overlapping"], r)}
        rows[-1] |= {"training, tokens/s": r["tokens_per_s"] or "none"}
    table("Validation loss in nats a token: mean over the seeds (max - min)", rows)
    names = [str(start) if end == start + 1 else f"{start} to {end - 1}" for start, end in bins(T, length)]
    table("The same by position, mean over the seeds",
          [{"arm": r["name"]} | {name: cell(losses, r, spread=False) for name, losses in zip(names, r["bins"])}
           for r in results])


def plot_positions(results, path, T, length, title):
    """Loss against position: a line for the mean of the seeds, a shade for their range, and where training ended."""
    def draw(axes):
        for result in results:
            points = [(math.sqrt((start + 1) * end), statistics.fmean(losses), min(losses), max(losses))
                      for (start, end), losses in zip(bins(T, length), result["bins"])
                      if not math.isnan(statistics.fmean(losses))]
            if points:
                where, means, low, high = zip(*points)
                line, = axes.plot(where, means, label=result["name"])
                axes.fill_between(where, low, high, color=line.get_color(), alpha=0.2)
        axes.axvline(T, color="gray", linestyle="--", label=f"seq_len in training, {T}")
        axes.set(xscale="log", xlabel="position in the window", ylabel="validation loss (nats per token)")
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    picture(path, draw, figsize=(8, 5))


@out_of_memory("take a larger --grad_accum, or a smaller --longer")
def main():
    config, arms = parse(sys.argv[1:])
    windows, count, device = check(arms, config)
    found, results = train_all(arms, config), []
    text, T, length = arms[0].text(), arms[0].model.seq_len, windows.seq_len
    for arm, (tuning, trainings) in zip(tqdm(arms, desc="evaluating", disable=None, leave=False), found):
        if trainings:
            results.append(evaluate(arm, tuning, trainings, windows, count, device))
    if not results:
        raise UserError("every arm diverged at every learning rate: try lower --lrs")
    reference = rank(results)
    precisions = sorted({p for r in results for p in r["precisions"] if p})
    if len(precisions) > 1:
        say(f"warning: trainings in {' and '.join(precisions)} are compared: --precision and another --out_dir mend it")
    title = (f"{text['dataset']}, {text['tokens']:,} tokens of training, seeds: {config.seeds}, {count} windows of "
             f"{length} tokens; {device_name(device)}, {' and '.join(precisions)}, {config.jobs} at a time")
    written = {"title": title, "seq_len": T, "length": length, "windows": count, "reference": reference,
               "arms": results}
    write_json(Path(config.out_dir, "results.json"), json.loads(json.dumps(written), parse_constant=lambda name: None))
    print(title)
    report(results, reference, T, length)
    if config.plot:
        plot_positions(results, Path(config.plot), T, length, title)


if __name__ == "__main__":
    command(main)
