"""Compares configs at equal tokens, each at its own tuned learning rate, over seeds, also beyond the trained length.

    python -m experiments.compare                                          seven small presets on Python's source
    python -m experiments.compare --max_steps=1000 --out_dir=out/longer    the same, with a setting for all
    python -m experiments.compare experiments/sweeps/which_preset.py --minutes=8    as far as 8 minutes of GPUs go
    python -m experiments.compare config/softmax.py config/hybrid.py,window=256 --batch_size=32 --out_dir=out/two

The first needs `python prepare.py --dataset=stdlib` and takes an hour or two on two cores.

An arm is a config file, with its own settings after commas. A file can also list the arms, with settings for all of
them, as in experiments/sweeps. Each training is a plain train.py command, logged in log.txt of its folder,
out_dir/ARM/lrLR-seedSEED. --jobs of them run at a time on each visible GPU, or on the CPU. The same command resumes: it
continues trainings that were stopped, skips finished ones, and waits for those that another process is running.
A finished training needs only its metrics.jsonl and finished.json, so its folder can be moved to another machine
without the checkpoints.

Learning rates are tuned with seed 1: those of --lrs, then twice the largest or half the smallest, until the best one
has a neighbour on both sides. The best has the lowest *training* loss over the last tenth of the logged steps. In less
than an epoch that is unseen text, so nothing is tuned on the validation text of the report. New seeds, from 2 on, are
then trained at that rate, and only these are reported. With a single rate there is no tuning, and seeds count from 1.

The report uses windows of `longer` times seq_len validation tokens, equally many from each validation file. Each token
is predicted from all tokens before it in its window. The losses up to seq_len and beyond are means over the same
windows. Models with softmax layers or learned positions are also evaluated as in eval.py, in windows of seq_len
that overlap by half. Costs are measured with nothing else running. The training loss at equal time is the mean over the
last tenth of the time that the fastest arm needs; the learning rate of a slower arm has not reached zero by then.

`python train.py --help` lists the settings of arms. As flags they apply to all arms.
"""
import concurrent.futures as futures
import json
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from configurator import UserError, command, configure, help_first, joined, read_config_file

help_first(__name__, __file__)

from support.checks import at_least                                               # support comes before torch
from support.dataset import Dataset, Windows
from support.files import check_target, read_json, replacing, write_json
from support.machine import (Diverged, autocast, device_name, out_of_memory, pick_device, pick_precision, say,
                             seconds)
from support.measure import cast_for_decoding, decoding_calls
from support.report import Log, check_picture, picture, table
from support.side_by_side import BUSY, Slots, end_with_parent, environment, visible_gpus

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import LM, ModelConfig, state_bytes
from checkpoint import changes, load_checkpoint, load_model, plugin_first
from train import TrainConfig
from eval import default_context

PROGRAM = Path(__file__).resolve().parent.with_name("train.py")
SMALL = "experiments/sweeps/small.py"
BEYOND = 8                                                                        # rates to try beyond those given
PAUSE = 10                                                                        # seconds, while another runs it


@dataclass
class CompareConfig:
    lrs: str = ""                    # learning rates to try first, as 0.01,0.02; empty: each arm's own and half of it
    seeds: int = 3                   # reported trainings per arm, at its best learning rate
    jobs: int = 1                    # trainings to run at a time on each GPU, or on the CPU, whose cores they share
    minutes: float = 0.0             # stop training after so many minutes, and report what is finished; 0: no limit
    longer: int = 4                  # length of the validation windows, in units of seq_len
    out_dir: str = "out/compare"     # folder of the trainings and results.json
    checkpoints: bool = True         # False: delete the checkpoints of a training once its losses are known
    plot: str = ""                   # also draw loss against position and time to this file; needs matplotlib
    device: str = "auto"             # as for train.py; auto and cuda take every visible GPU
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as for train.py

    def __post_init__(self):
        at_least(self, 1, "seeds", "jobs", "longer")
        if self.minutes < 0:
            raise ValueError(f"minutes must not be negative, got {self.minutes}")
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
        tokens = self.train.max_steps * self.tokens_per_step()
        return same | {"seq_len": self.model.seq_len, "tokens": tokens}

    def tokens_per_step(self):
        return self.train.batch_size * self.model.seq_len

    def parameters(self):
        with torch.device("meta"):
            return sum(p.numel() for p in LM(self.model).parameters())

    def first_reported_seed(self):
        return 1 if len(self.rates) == 1 else 2


def key_of(flag):
    return flag.lstrip("-").partition("=")[0]


def expand(words):
    """(The arms among the words that are no flags, flags for all), of a file that holds `arms` or of the words."""
    words = words or [SMALL]
    file = words[0]
    settings = {}
    if file.endswith(".py") and "," not in file:
        settings = {key: value for _, key, value, _ in read_config_file(file)}
    if "arms" not in settings:
        return words, []
    if len(words) > 1:
        raise UserError(f"{file} holds the arms: leave out {words[1]}, or make a file of arms that has it as well")
    arms = settings.pop("arms")
    if not (isinstance(arms, list) and arms and all(isinstance(arm, str) for arm in arms)):
        raise UserError(f"{file}: arms must be a list of config files, with settings of their own after commas")
    return arms, [f"--{key}={value}" for key, value in settings.items()]


def parse(argv):
    """(CompareConfig, Arms) of a command line. UserError for what train.py would refuse, before anything is trained."""
    argv = joined(argv, CompareConfig, TrainConfig, ModelConfig)
    flags = [word for word in argv if word.startswith("-")]
    mine = {field.name for field in fields(CompareConfig)}
    taken = mine - {"device", "precision"}                                        # these train.py is given as well
    texts, from_file = expand([word for word in argv if not word.startswith("-")])
    flags = from_file + flags
    config, = configure([flag for flag in flags if key_of(flag) in mine], CompareConfig)
    passed = [flag for flag in flags if key_of(flag) not in taken]
    arms = [parse_arm(text, passed, taken, config.rates) for text in texts]
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
    _, train, model = configure(arguments, CompareConfig, TrainConfig, ModelConfig, inherit=plugin_first)
    own = {"lr", "seed", "out_dir"}                                               # a file may say them: ours win
    given = [(where, key) for where, key, *_ in read_config_file(file) if key not in own]
    for where, key in given + [(word, key_of(word)) for word in arguments[1:]]:
        if key in taken | {"lr", "seed"}:
            raise UserError(f"{where}: {key} is not a setting of an arm: --lrs, --seeds and the like are the same for "
                            "all")
    for key in ("resume", "eval_only", "init_from"):
        if getattr(train, key) != getattr(TrainConfig, key):
            raise UserError(f"{text}: with {key}={getattr(train, key)} trainings are not equal: leave it out")
    if not model.causal:
        raise UserError(f"{text}: causal=False sees the token it should predict")
    name = ",".join([Path(file).stem, *settings]).replace("/", "_")
    rates = rates or sorted({train.lr / 2, train.lr})
    return Arm(name, arguments, rates, train, model)


def check(arms, config):
    """What can be known before training: UserError for what cannot work, a warning for what is not equal. The Text of
    the report."""
    device = pick_device(config.device)
    settings = arms[0].text()
    data = Dataset(Path(settings["data_dir"]) / settings["dataset"])
    for arm in arms:
        data.give_vocabulary(arm.model)
        check_folders(arm, config.out_dir, data.fingerprint)
    text = Text(data, config.longer * settings["seq_len"], settings["eval_tokens"], device)
    epochs = settings["tokens"] / Windows(data.train, settings["seq_len"], seed=0).tokens
    if epochs > 1:
        say(f"warning: a training is {epochs:.3g} epochs: the loss that picks the lr is on text seen before")
    sizes = {arm.parameters(): arm.name for arm in arms}
    if max(sizes) > 1.03 * min(sizes):
        say(f"warning: arms differ by more than 3 % in parameters: {sizes[min(sizes)]} has {min(sizes):,}, "
            f"{sizes[max(sizes)]} {max(sizes):,}")
    for arm in arms:
        check_target(Path(config.out_dir, arm.name, "log.txt"), "out_dir")
    check_target(Path(config.out_dir, "results.json"), "out_dir", lambda path: read_json(path, "arms"))
    if config.plot:
        check_picture(config.plot)
    return text


def check_folders(arm, out_dir, data):
    """UserError where a training of this arm is there already, with other settings or without a sound checkpoint."""
    for folder in sorted(Path(out_dir, arm.name).glob("lr*-seed*")):
        path = folder / "finished.json"
        saved = read_json(path, "config", "model_config", "data")
        if saved is None:
            path = folder / "ckpt.pt"
            if not path.exists() and not (folder / "best.pt").exists():
                continue
            try:
                saved = load_checkpoint(path)
            except UserError:
                raise UserError(f"{path} is missing or damaged: delete {folder}, and the same command trains it again"
                                ) from None
        same = ["lr", "seed"] + ["precision"] * (arm.train.precision == "auto")   # of its folder; as train.py does it
        train = replace(arm.train, **{key: saved["config"][key] for key in same})
        if changed := changes(saved, train, arm.model, data):
            raise UserError(f"{path} belongs to another run: {'; '.join(changed.values())}: use another --out_dir")


# ----------------------------------------------------------------------------------------------------------------------
# Trainings


class Training:
    """One run of train.py: its command, its folder, and how it goes."""

    def __init__(self, arm, lr, seed, config, number=0):
        self.arm = arm
        self.lr = lr
        self.seed = seed
        self.folder = Path(config.out_dir, arm.name, f"lr{lr!r}-seed{seed}")
        self.command = [sys.executable, str(PROGRAM), *arm.arguments, f"--lr={lr!r}", f"--seed={seed}",
                        f"--out_dir={self.folder}"]
        self.priority = seed, number, lr                                          # every arm's first seed comes first
        self.marker = self.folder / "diverged"                                    # holds the command that did
        self.losses = read_json(self.folder / "finished.json", "config", "model_config", "data")
        self.ended = False
        self.found = self.seen = self.step()                                      # for the progress bar

    def records(self):
        return Log.read(self.folder / "metrics.jsonl")

    def regular_records(self):
        """Without spikes, skipped steps and evaluations."""
        records = self.records()
        skipped = {record["step"] for record in records if record.get("skipped")}
        return [r for r in records if "lr" in r and r["step"] not in skipped]

    def step(self):
        return max((record["step"] for record in self.records()), default=0)

    def diverged(self):
        """Did this command end so? It would again."""
        return self.marker.exists() and self.marker.read_text() == self.own_arguments()

    def own_arguments(self):
        return shlex.join(self.command[2:-1])                                     # without the folder

    def loss(self):
        """Mean training loss over the last tenth of the logged steps; infinite where it is no number."""
        losses = [record["loss"] for record in self.regular_records()]
        last = losses[-math.ceil(len(losses) / 10):]
        if self.diverged() or not last or None in last:
            return math.inf
        return statistics.mean(last)

    def loss_at(self, seconds, tokens_per_s):
        """The same over the last tenth of this time; None where nothing was logged in it."""
        seconds_per_step = self.arm.tokens_per_step() / tokens_per_s
        times = [(record["step"] * seconds_per_step, record["loss"]) for record in self.regular_records()]
        last = [loss for time_of_step, loss in times if 0.9 * seconds < time_of_step <= 1.0001 * seconds]
        if not last or None in last:
            return None
        return statistics.mean(last)

    def run(self, slots, stopped, cache):
        """To its end, in one of the slots. Where another process is at it, by hand or from a killed compare.py, when
        that has ended."""
        told = False
        while not (self.diverged() or self.losses):
            with slots.take(self.priority) as gpu:
                if self.diverged():                                               # meanwhile, in another compare.py
                    break
                threads = max(1, torch.get_num_threads() // slots.count)
                code, last = self.call(stopped, gpu, threads, cache)
            if code == BUSY:
                told or say(f"{self.folder}: another train.py is running there: waiting for it to end")
                told = True
                stopped.wait(PAUSE)
            elif code == Diverged.code:
                with replacing(self.marker) as temporary:
                    temporary.write_text(self.own_arguments())
            elif code:
                raise UserError(f"{self.folder}/log.txt ends, with exit code {code}: {last}")
            else:
                break
        self.seen = self.arm.train.max_steps
        self.ended = True
        say(f"{self.arm.name}, lr {self.lr}, seed {self.seed}: "
            + ("diverged" if self.diverged() else f"training loss {self.loss():.4f}"))

    def call(self, stopped, gpu, threads, cache):
        """Exit code and last line of the command; when `stopped` is set it is told to save and end."""
        if stopped.is_set():
            raise futures.CancelledError
        self.folder.mkdir(parents=True, exist_ok=True)
        self.marker.unlink(missing_ok=True)                                       # of another command
        with open(self.folder / "log.txt", "a+", errors="replace") as log:
            log.write(f"$ {shlex.join(self.command)}\n")
            log.flush()
            start = log.tell()
            process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       env=environment(gpu, threads, cache), preexec_fn=end_with_parent)
            while process.poll() is None and not stopped.wait(0.5):
                self.seen = self.step()
            if stopped.is_set():
                process.terminate()
                process.wait()
                raise futures.CancelledError
            log.seek(start)
            lines = log.read().splitlines()
            return process.returncode, lines[-1] if lines else "no output"

    def is_reported(self):
        return self.seed >= self.arm.first_reported_seed()

    def forget_other_losses(self, text):
        """Drops losses that were measured on other windows, so that they are measured again."""
        if self.losses and self.is_reported() and self.losses.get("text") != text.identity:
            if not (self.folder / "ckpt.pt").exists():
                raise UserError(f"{self.folder} was evaluated with another --longer, and its checkpoint is deleted: "
                                "use that --longer again, or delete the folder to train it again")
            self.losses = None

    def evaluate(self, text, checkpoints):
        """Writes finished.json: the settings, and the losses of the last weights where they are reported."""
        if self.diverged():
            return
        checkpoint = load_checkpoint(self.folder / "ckpt.pt")
        found = {key: checkpoint[key] for key in ("config", "model_config", "data")}
        if self.is_reported():
            found |= {"text": text.identity} | read(checkpoint, self.arm, text)
        self.losses = plain_json(found)
        write_json(self.folder / "finished.json", self.losses)
        for path in () if checkpoints else self.folder.glob("*.pt"):
            path.unlink()


def plain_json(value):
    """value as JSON gives it back, NaN as None."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def next_rate(losses):
    """The learning rate to try after those of {lr: loss}, or None: is there one on both sides of the best?"""
    rates = sorted(losses)
    best = min(rates, key=losses.get)
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return None
    return best / 2 if best == rates[0] else best * 2


def sweep(arm, seeds, train):
    """(Its trainings of seed 1, those to report), by train(arm, [(lr, seed)]), which runs them."""
    if len(arm.rates) == 1:
        return [], train(arm, [(arm.rates[0], seed + 1) for seed in range(seeds)])
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


def train_all(arms, config, text):
    """({arm's name: (its trainings of seed 1 for tuning, those to report)}, whether all is trained), evaluated.

    A training has a thread, which waits for a slot, then for train.py; so has a sweep, which waits for its trainings.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)                     # ends the trainings, as Ctrl-C does
    slots = Slots(visible_gpus(text.device), config.jobs)
    stopped = threading.Event()
    known = []
    cache = Path(config.out_dir, "inductor").absolute()

    def train(arm, runs):
        trainings = [Training(arm, lr, seed, config, arms.index(arm)) for lr, seed in runs]
        known.extend(trainings)
        for training in trainings:
            training.forget_other_losses(text)
        tasks = [pool.submit(training.run, slots, stopped, cache) for training in trainings]
        for task in futures.as_completed(tasks):
            task.result()
        return trainings

    def evaluate_ended():
        for training in list(known):
            if training.ended and not training.losses:
                training.evaluate(text, config.checkpoints)

    tuned = [arm for arm in arms if len(arm.rates) > 1]
    count = config.seeds * len(arms) + sum(len(arm.rates) for arm in tuned)
    planned = count * arms[0].train.max_steps
    say(f"{count} trainings{' or more' * bool(tuned)}, {slots.count} at a time")
    threads = sum(1 + max(len(arm.rates), config.seeds) for arm in arms)
    with (futures.ThreadPoolExecutor(threads) as pool,
          tqdm(unit="step", disable=None, smoothing=0) as bar):
        sweeps = [pool.submit(sweep, arm, config.seeds, train) for arm in arms]
        clock = Clock(config.minutes)
        try:
            while not all(task.done() for task in sweeps) and not clock.is_late():
                for task in futures.wait(sweeps, timeout=1, return_when=futures.FIRST_EXCEPTION).done:
                    task.result()
                evaluate_ended()
                extra = sum(t.arm.train.max_steps for t in known if t.seed == 1 and t.lr not in t.arm.rates)
                bar.total = planned + extra
                bar.initial = sum(t.found for t in known)
                done = sum(t.seen for t in known)
                bar.update(done - bar.n)
                if bar.disable:
                    clock.tell(done - bar.initial, bar.total - bar.initial)
        finally:
            stopped.set()
    evaluate_ended()
    complete = all(task.done() and not task.cancelled() and not task.exception() for task in sweeps)
    return by_arm(arms, known), complete


def by_arm(arms, trainings):
    """{arm's name: (its ended trainings for tuning, those to report)}, ordered by learning rate and seed."""
    found = {}
    for arm in arms:
        ended = [training for training in trainings if training.arm is arm and training.ended]
        ended.sort(key=lambda training: (training.lr, training.seed))
        tuning = [training for training in ended if not training.is_reported()]
        reported = [training for training in ended if training.is_reported()]
        found[arm.name] = tuning, reported
    return found


class Clock:
    """Whether the time is up; and where there is no progress bar, a line now and then."""

    def __init__(self, minutes, every=30):
        self.start = self.told = time.monotonic()
        self.end = self.start + 60 * minutes if minutes else math.inf
        self.every = every

    def is_late(self):
        return time.monotonic() > self.end

    def tell(self, done, total):
        now = time.monotonic()
        if now - self.told > self.every and done:
            left = (total - done) * (now - self.start) / done
            say(f"{done:,} of {total:,} steps, about {left / 60:.1f} minutes left")
            self.told = now


# ----------------------------------------------------------------------------------------------------------------------
# The losses of a finished training


class Text:
    """The windows of validation text that are read: of each source of it equally many."""

    def __init__(self, data, length, tokens, device):
        self.length = length
        self.device = device
        files = {}                                                                # {source: its files}
        for file in data.val:
            entry = data.manifest["files"][file.path.name]
            files.setdefault(entry["source"], []).append(file)
        sizes = {name: sum(map(len, some)) for name, some in files.items()}
        long_enough = {name: some for name, some in files.items() if sizes[name] > length}
        if not long_enough:
            longest = max(sizes.values())
            raise UserError(f"the report reads windows of --longer times seq_len, {length} tokens, and the longest "
                            f"validation text has {longest}: use a smaller --longer")
        if short := files.keys() - long_enough.keys():
            say(f"not read, because they are shorter than the windows of {length} tokens: {', '.join(sorted(short))}")
        self.sources = {}                                                         # {name: (windows, how many of them)}
        for name, some in long_enough.items():
            windows = Windows(some, length, seed=0)
            count = min(windows.total, math.ceil(tokens / length / len(long_enough)))
            self.sources[name] = windows, count
        self.windows = sum(count for _, count in self.sources.values())
        self.identity = [length] + [[name, count] for name, (_, count) in self.sources.items()]


@torch.no_grad()
def losses_by_position(model, x, y, piece):
    """Cross-entropy (B,T) of each token of y after all of x up to it: in pieces that carry the state, in fp32."""
    state = None
    losses = []
    for tokens, targets in zip(x.split(piece, dim=1), y.split(piece, dim=1)):
        hidden, state = model.hidden(tokens, state)
        part = []
        few_tokens = zip(hidden.flatten(0, 1).split(1024), targets.flatten().split(1024))
        for rows, wanted in few_tokens:                                           # the logits of all may not fit
            logits = model.logits(rows).float()
            part.append(F.cross_entropy(logits, wanted, reduction="none"))
        losses.append(torch.cat(part).view_as(targets))
    return torch.cat(losses, dim=1)


def overlapping(model, x, y, T, rows):
    """Mean loss of the tokens beyond T in windows of T that overlap by half, `rows` of them at once."""
    half = max(1, T // 2)

    def windows(tokens):
        later = tokens.unfold(1, T, half)[:, 1:]                                  # the first is within T
        return later.flatten(0, 1).split(rows)
    losses = []
    for inputs, targets in zip(windows(x), windows(y)):
        last = losses_by_position(model, inputs, targets, T)
        losses.append(last[:, T - half:].flatten())
    rest = (x.shape[1] - T) % half
    if rest:
        last = losses_by_position(model, x[:, -T:], y[:, -T:], T)
        losses.append(last[:, T - rest:].flatten())
    return torch.cat(losses).mean().item()


@torch.no_grad()
def read(checkpoint, arm, text):
    """Of the weights of a checkpoint: mean loss by position, the same beyond seq_len in overlapping windows, the loss
    within seq_len of each source, and the precision of training and of this. NaN for what is not."""
    T = arm.model.seq_len
    length = text.length
    rows = arm.train.piece
    model = load_model(checkpoint, text.device).eval()
    precision = checkpoint["config"]["precision"]
    again = default_context(model) and length > T
    seen = T if model.config.pos == "learned" else length
    curves = []
    over = []
    by_source = {}
    for name, (windows, count) in text.sources.items():
        total = 0.0
        total_again = 0.0 if again else math.nan
        for i in range(0, count, rows):
            numbers = range(i, min(i + rows, count))
            x, y = windows.batch(numbers, model.config.vocab_size, text.device)
            with autocast(text.device, precision):
                losses = losses_by_position(model, x[:, :seen], y[:, :seen], T)
                if again:
                    total_again += overlapping(model, x, y, T, rows) * len(x)
            total += losses.cpu().double().sum(0)
        curve = F.pad(total / count, (0, length - seen), value=math.nan)
        curves.append(curve)
        over.append(total_again / count)
        by_source[name] = curve[:T].mean().item()
    mean = torch.stack(curves).mean(0).tolist()
    return {
        "by_position": [round(loss, 6) for loss in mean],
        "overlapping": statistics.fmean(over),
        "by_source": by_source,
        "precision": precision,
    }


# ----------------------------------------------------------------------------------------------------------------------
# What an arm costs, with nothing else running


def measure_costs(arms, config, device):
    """{arm's name: costs}: tokens/s of training by train.py and of decoding one text, bytes of its state."""
    paths = {arm.name: Path(config.out_dir, "costs", f"{arm.name}.json") for arm in arms}
    slots = Slots(visible_gpus(device), 1)

    def training_part(arm):
        costs = read_json(paths[arm.name])
        if costs is None or costs.get("machine") != device_name(device):
            costs = {"machine": device_name(device), "tokens_per_s": training_speed(arm, config, slots)}
            write_json(paths[arm.name], costs)
        return costs
    say("measuring what each arm costs, with nothing else running")
    with futures.ThreadPoolExecutor(slots.count) as pool:
        parts = list(pool.map(training_part, arms))
    costs = {arm.name: part for arm, part in zip(arms, parts)}
    for arm in tqdm(arms, desc="decoding", disable=None, leave=False):
        if "state_bytes" not in costs[arm.name]:
            costs[arm.name] |= decoding_costs(arm, config, device)
            write_json(paths[arm.name], costs[arm.name])
    return costs


def training_speed(arm, config, slots, steps=60):
    """Median tokens/s of train.py, after what is compiled, with a GPU or the CPU for itself; None if it diverges."""
    steps = min(steps, arm.train.max_steps)
    training = Training(arm, arm.rates[0], 1, config)
    training.folder = Path(config.out_dir, "costs", arm.name)
    training.command[-1] = f"--out_dir={training.folder}"
    training.command += [f"--max_steps={steps}", f"--log_interval={max(1, steps // 6)}", "--eval_tokens=1",
                         "--resume=false"]
    with slots.take(arm.name) as gpu:
        threads = max(1, torch.get_num_threads() // slots.count)
        cache = Path(config.out_dir, "inductor").absolute()
        code, last = training.call(threading.Event(), gpu, threads, cache)
    if code not in (0, Diverged.code):
        raise UserError(f"{training.folder}/log.txt ends, with exit code {code}: {last}")
    for path in training.folder.glob("*.pt"):
        path.unlink()
    speeds = [record["tokens_per_s"] for record in training.regular_records()]
    return statistics.median(speeds[1:] or speeds) if speeds else None


def decoding_costs(arm, config, device, steps=64):
    """Tokens/s of one text after seq_len tokens, and bytes of the state after seq_len and 16 times that."""
    precision = pick_precision(config.precision, device) if device.type == "cuda" else "fp32"  # as sample.py
    T = arm.model.seq_len
    longer = replace(arm.model, seq_len=16 * T + 1000)
    model = cast_for_decoding(LM(longer).to(device), precision)
    prompt = torch.randint(arm.model.vocab_size, (1, T), device=device)
    decode = decoding_calls(model, prompt, steps, device, precision)
    times = [seconds(decode, device) / steps for _ in range(3)]
    return {
        "decoding_tokens_per_s": 1 / statistics.median(times),
        "decoding_precision": precision,
        "state_bytes": [state_size(model, tokens, device, precision) for tokens in (T, 16 * T)],
    }


@torch.no_grad()
def state_size(model, tokens, device, precision):
    """Bytes of the state of a text of so many tokens, read in pieces as generate does."""
    state = None
    idx = torch.zeros(1, tokens, dtype=torch.long, device=device)
    with autocast(device, precision):
        for piece in idx.split(4096, dim=1):
            _, state = model.hidden(piece, state)
    return state_bytes(state["layers"])


# ----------------------------------------------------------------------------------------------------------------------
# The report


def bins(T, length):
    """(start, end) of ranges of positions: powers of two from 8 on, cut at T."""
    powers = [2**i for i in range(3, length.bit_length())]
    edges = sorted({0, T, length, *(power for power in powers if power < length)})
    return [*zip(edges, edges[1:])]


def summarise(arm, tuning, trainings, costs, length):
    """All that is known of an arm. Of losses there is one a seed, NaN if it diverged or has no such position."""
    T = arm.model.seq_len
    unknown = {"by_position": [None] * length, "overlapping": None, "by_source": {}, "precision": None}
    found = [unknown if training.diverged() else training.losses for training in trainings]
    curves = [numbers(one["by_position"]) for one in found]
    curves = torch.tensor(curves, dtype=torch.float64)                            # (seeds, length)

    def part(start, end):
        return curves[:, start:end].mean(1).tolist()
    names = {name: None for one in found for name in one["by_source"]}
    return {
        "name": arm.name,
        "arguments": arm.arguments,
        "mixers": arm.model.mixers,
        "parameters": arm.parameters(),
        "lr": trainings[0].lr,
        "tuning": {training.lr: training.loss() for training in tuning},
        "seeds": [training.seed for training in trainings],
        "precisions": [one["precision"] for one in found],
        "diverged": [training.seed for training in trainings if training.diverged()],
        "costs": costs or {},
        "by_source": {name: [one["by_source"].get(name, math.nan) for one in found] for name in names},
        "within": part(0, T),
        "beyond": part(T, length),
        "beyond_overlapping": numbers(one["overlapping"] for one in found),
        "bins": [part(start, end) for start, end in bins(T, length)],
        "by_position": curves.tolist(),
    }


def numbers(values):
    """values with NaN for None, which is how JSON has it."""
    return [math.nan if value is None else value for value in values]


def add_equal_time(arms, results, found):
    """Gives each result the training loss of every seed at the time in which the fastest arm finishes, its seconds,
    and the curve of its first seed."""
    speeds = {r["name"]: r["costs"].get("tokens_per_s") for r in results}
    fastest = max(filter(None, speeds.values()), default=math.nan)
    seconds = arms[0].text()["tokens"] / fastest
    for r in results:
        speed = speeds[r["name"]]
        _, trainings = found[r["name"]]
        if not speed:
            continue
        sound = [training for training in trainings if not training.diverged()]
        r["at_equal_time"] = numbers(training.loss_at(seconds, speed) for training in sound)
        seconds_per_step = trainings[0].arm.tokens_per_step() / speed
        records = sound[0].regular_records() if sound else []
        r["by_time"] = [(record["step"] * seconds_per_step, record["loss"]) for record in records]
    return seconds


def rank(results):
    """Sorts them, gives each its difference to a reference, seed by seed, and names that: the first of softmax alone,
    or else the first."""
    reference = next((r for r in results if {*r["mixers"]} == {"softmax"}), results[0])
    of_seed = dict(zip(reference["seeds"], reference["within"]))
    for r in results:
        theirs = [of_seed.get(seed, math.nan) for seed in r["seeds"]]
        r["difference"] = [loss - other for loss, other in zip(r["within"], theirs)]
    results.sort(key=lambda r: (bool(r["diverged"]), statistics.fmean(r["within"])))
    return reference["name"]


def cell(losses, result, form=".3f", spread=True):
    """Mean (max - min) for a table."""
    if not losses or math.isnan(statistics.fmean(losses)):
        return "diverged" if result["diverged"] else "none"
    end = f" ({max(losses) - min(losses):.3f})" if spread and len(losses) > 1 else ""
    return f"{statistics.fmean(losses):{form}}{end}"


def report(results, reference, T, length, seconds=math.nan):
    rows = []
    for r in results:
        row = {
            "arm": r["name"],
            "parameters": f"{r['parameters'] / 1e6:.2f} M",
            "lr": r["lr"],
            "seeds": " ".join(map(str, r["seeds"])),
            f"positions 0 to {T - 1}": cell(r["within"], r),
            f"minus {reference}, by seed": cell(r["difference"], r, "+.3f"),
        }
        if length > T:
            row[f"{T} to {length - 1}"] = cell(r["beyond"], r)
            row[f"the same in overlapping windows of {T}"] = cell(r["beyond_overlapping"], r)
        if 1 < len(r["by_source"]) <= 4:
            row |= {name: cell(losses, r) for name, losses in r["by_source"].items()}
        rows.append(row)
    table("Validation loss in nats a token: mean over the seeds (max - min)", rows)

    names = [str(start) if end == start + 1 else f"{start} to {end - 1}" for start, end in bins(T, length)]
    rows = []
    for r in results:
        cells = [cell(losses, r, spread=False) for losses in r["bins"]]
        rows.append({"arm": r["name"]} | dict(zip(names, cells)))
    table("The same by position, mean over the seeds", rows)

    rows = []
    for r in results:
        small, large = r["costs"].get("state_bytes", ("none", "none"))
        rows.append({
            "arm": r["name"],
            "training, tokens/s": r["costs"].get("tokens_per_s") or "none",
            f"training loss after {seconds:.3g} s": cell(r.get("at_equal_time", []), r),
            f"state after {T:,} tokens, bytes": small,
            f"after {16 * T:,}": large,
            "decoding, tokens/s": r["costs"].get("decoding_tokens_per_s", "none"),
        })
    table("What it costs: one training, one text at a time", rows)


def plot(results, path, T, length, title):
    """Loss against position, the mean of the seeds and a shade for their range; and training loss against time."""
    def draw_arm(panels, result):
        curve = zip(bins(T, length), result["bins"])
        points = [(math.sqrt((start + 1) * end), losses) for (start, end), losses in curve
                  if not math.isnan(statistics.fmean(losses))]
        where = [position for position, _ in points]
        means = [statistics.fmean(losses) for _, losses in points]
        low = [min(losses) for _, losses in points]
        high = [max(losses) for _, losses in points]
        line, = panels[0].plot(where, means, label=result["name"])
        panels[0].fill_between(where, low, high, color=line.get_color(), alpha=0.2)
        by_time = [point for point in result.get("by_time", []) if None not in point]
        panels[1].plot(*smoothed(by_time), color=line.get_color())

    def draw(panels):
        for result in results:
            draw_arm(panels, result)
        panels[0].axvline(T, color="gray", linestyle="--", label=f"seq_len in training, {T}")
        panels[0].set(xscale="log", xlabel="position in the window", ylabel="validation loss (nats per token)")
        panels[1].set(xscale="log", xlabel="seconds of training", ylabel="training loss (nats per token)")
        panels[0].figure.suptitle(title, fontsize=9, parse_math=False)
        for panel in panels:
            panel.grid(alpha=0.3, which="both")
        panels[0].legend(fontsize=7)
    picture(path, draw, ncols=2, figsize=(13, 5))


def smoothed(points, width=5):
    """The x and the y of [(x, y)], as means of `width` points that follow each other."""
    groups = [points[i:i + width] for i in range(0, len(points), width)]
    xs = [statistics.fmean(x for x, _ in group) for group in groups]
    ys = [statistics.fmean(y for _, y in group) for group in groups]
    return xs, ys


@out_of_memory("use a larger --grad_accum, or a smaller --longer")
def main():
    config, arms = parse(sys.argv[1:])
    text = check(arms, config)
    found, complete = train_all(arms, config, text)
    said = arms[0].text()
    T = arms[0].model.seq_len
    reported = []
    for arm in arms:
        _, trainings = found[arm.name]
        if not all(training.diverged() for training in trainings):
            reported.append(arm)
    if not reported:
        raise UserError("every arm diverged at every learning rate: try lower --lrs" if complete else
                        "no training was finished in that time: the same command with more --minutes resumes")
    costs = measure_costs(reported, config, text.device) if complete else {}
    results = []
    for arm in reported:
        tuning, trainings = found[arm.name]
        results.append(summarise(arm, tuning, trainings, costs.get(arm.name), text.length))
    seconds = add_equal_time(arms, results, found)
    reference = rank(results)
    precisions = sorted({p for r in results for p in r["precisions"] if p})
    if len(precisions) > 1:
        say(f"warning: trainings in {' and '.join(precisions)} are compared: --precision and another --out_dir fix it")
    title = (f"{said['dataset']}, {said['tokens']:,} tokens of training, seeds: {config.seeds}, {text.windows} windows "
             f"of {text.length} tokens; {device_name(text.device)}, {' and '.join(precisions)}, "
             f"{config.jobs} at a time")
    written = {
        "title": title,
        "seq_len": T,
        "length": text.length,
        "windows": text.windows,
        "reference": reference,
        "seconds": seconds,
        "complete": complete,
        "arms": results,
    }
    write_json(Path(config.out_dir, "results.json"), plain_json(written))
    print(title)
    report(results, reference, T, text.length, seconds)
    if config.plot:
        plot(results, Path(config.plot), T, text.length, title)
    if not complete:
        say("some trainings are not finished: the same command resumes")


if __name__ == "__main__":
    command(main)
