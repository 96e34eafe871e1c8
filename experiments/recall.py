"""The recall-throughput tradeoff, measured: associative recall (MQAR) against state size and decoding speed.

    python -m experiments.recall                        a small version: minutes on two CPU cores
    python -m experiments.recall --full                 the published setting [1, Figure 2], for a GPU
    python -m experiments.recall --full --minutes=10    what fits in ten minutes; the same command resumes
    python -m experiments.recall --smoke                a short run of each kind in the published sizes, to try a GPU

A sequence states pairs of a key and a value, then asks for each key once; at each question the model must say the
value:

    key 7  value 91  key 3  value 64  .  .  key 3 (answer: 64)  .  key 7 (answer: 91)  .  .        . is a random token

A model can only answer from what its state has kept, so accuracy against the bytes of the state is the price of a small
state, and accuracy against decoding speed is what it buys. Models are LM of model.py with two layers: the gated
convolution, which can put a key beside its value, then the mixer in question; x + norm(x) follows each, as in the
published code, where an identity takes the place of the MLP.

Each run is one JSON file in out_dir, written when it is done; finished runs are not repeated. A run stops early at a
mean accuracy of 0.99 over the test settings, as in [1]; the remaining learning rates of that configuration and seed are
then skipped, since they could not change the figure. Learning rates are tried in the order given; a run that is 0.1
behind a finished one of the same configuration and seed at half time is stopped. Test accuracy picks the learning rate,
as published.

Runs share every visible GPU, or the cores of the CPU.

Differs from [1] and its code:
- no dropout on attention weights; the last, smaller batch of a part is left out
- bf16 autocast on a GPU where theirs is fp32 (delta rules: bf16)
- delta rules: no scale K^-1/2 of q, eps 1e-6 in the output norm (theirs 1e-5), F.normalize for q and k (theirs
  x rsqrt(sum x^2 + 1e-6)); decays are drawn from 0.01 to 16 (theirs 0 to 16)
- bytes of a state are those of all tensors kept; theirs leave out the short convolutions of delta rules (2 kB more here
  at d64), and count 3 inputs of the first convolution where 2 are kept
Their window of 64 sees 65 tokens, itself included, and so does ours here.

  [1] Arora et al. 2024, Simple linear attention language models balance the recall-throughput tradeoff, 2402.18668
"""
import dataclasses
import difflib
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Literal, NamedTuple

from configurator import UserError, command, configure, first_line, help_first

help_first(__name__, __file__, config_file=False)

from support.advice import usable_cores                                           # support comes before torch
from support.files import read_json, write_json
from support.machine import (allow_recompiles, autocast, device_name, pick_device, pick_precision, race, say,
                             use_tf32)
from support.report import picture, table
from support.side_by_side import visible_gpus, watch_parent
from support.speedups import captured

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from tqdm import tqdm

from model import LM, ModelConfig, state_bytes


@dataclass
class RecallConfig:
    full: bool = False               # run the published setting: hours on a CPU
    smoke: bool = False              # run a few steps in the published sizes, to see in a minute or two that all works
    minutes: float = 0.0             # stop training after so many minutes; 0: no limit
    only: str = ""                   # configurations or families to run, with commas: based, "elu d64"; empty: all
    seeds: int = 0                   # runs per configuration and learning rate; 0: as in the setting
    epochs: int = 0                  # passes over the training set; 0: as in the setting
    workers: int = 0                 # processes that share the machine; 0: one per core, at most 6 per GPU
    device: str = "auto"             # as for train.py
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as for train.py, but auto is fp32 on a CPU
    compile: bool = True             # use torch.compile and CUDA graphs; neither is used on a CPU
    out_dir: str = ""                # folder of the runs; empty: out/recall/small, full or smoke

    def __post_init__(self):
        for key in ("minutes", "seeds", "epochs", "workers"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if self.full and self.smoke:
            raise ValueError("full and smoke are different settings: use one of them")


# ----------------------------------------------------------------------------------------------------------------------
# The settings


class Part(NamedTuple):
    """Sequences of one shape: T tokens, of which 2 pairs are the pairs and `pairs` are questions."""
    T: int
    pairs: int
    examples: int

    def name(self):
        return f"{self.T}x{self.pairs}"


@dataclass
class Setting:
    vocab_size: int
    train: tuple           # Parts, in the order in which every epoch goes through them: easy before hard
    test: tuple
    batch_size: int
    epochs: int
    lrs: tuple             # best guess first
    seeds: int             # runs of each model and learning rate
    models: tuple          # names: a family, dSIZE the model's width, fSIZE the feature_dim
    decode_batch: int      # sequences decoded at once
    decode_after: int      # tokens that they have read before
    more_seeds: dict = field(default_factory=dict)  # {name: seeds}, where runs differ most

    def seeds_of(self, name):
        return self.more_seeds.get(name, self.seeds)

    def config(self, name):
        family, *sizes = name.split()
        longest = max(part.T for part in self.test)
        fields = dict(vocab_size=self.vocab_size, seq_len=longest, depth=2, n_heads=1, pos="none", norm="layer",
                      mlp_ratio=0, dropout=0.1)
        fields |= FAMILIES[family]
        for size in sizes:
            key = {"d": "dim", "f": "feature_dim"}[size[0]]
            fields[key] = int(size[1:])
        return ModelConfig(**fields)


FAMILIES = {
    "softmax": dict(mixers="conv softmax"),
    "elu": dict(mixers="conv linear"),
    "window16": dict(mixers="conv window", window=16),
    "window64": dict(mixers="conv window", window=65),
    "based": dict(mixers="conv linear", feature_map="taylor"),
    "deltanet": dict(mixers="conv linear", n_heads=2, feature_map="silu_l2", delta=True, normaliser="rms",
                     short_conv=True),
}
FAMILIES["gated_deltanet"] = FAMILIES["deltanet"] | dict(decay="gated", expand_v=2.0)
FULL = Setting(                                                                   # [1, Figure 2]
    vocab_size=8192, batch_size=256, epochs=32, lrs=(10 ** -2.5, 1e-2, 1e-3, 10 ** -1.5), seeds=2,
    decode_batch=1024, decode_after=1024, more_seeds={"gated_deltanet d64": 3},
    train=(
        Part(64, 4, 100_000),
        Part(128, 8, 20_000),
        Part(256, 16, 20_000),
        Part(256, 32, 20_000),
        Part(256, 64, 20_000),
    ),
    test=(
        Part(64, 4, 1000),
        Part(64, 8, 1000),
        Part(64, 16, 1000),
        Part(128, 32, 1000),
        Part(256, 64, 1000),
        Part(512, 128, 1000),
        Part(1024, 256, 1000),
    ),
    models=("based d64 f16", "gated_deltanet d64", "softmax d64", "deltanet d64", "based d64 f8", "elu d64",
            "window64 d128", "based d128 f16", "gated_deltanet d128", "deltanet d128", "elu d128", "based d48 f8",
            "softmax d128"))
SMALL = Setting(
    vocab_size=256, batch_size=64, epochs=6, lrs=(1e-2,), seeds=2, decode_batch=16, decode_after=4096,
    train=(
        Part(32, 4, 4096),
        Part(64, 8, 2048),
        Part(64, 16, 2048),
    ),
    test=(
        Part(32, 4, 256),
        Part(64, 8, 256),
        Part(64, 16, 256),
        Part(128, 32, 256),
    ),
    models=("softmax d32", "based d32 f8", "gated_deltanet d32", "deltanet d32", "elu d32", "window16 d32"))
SMOKE = dataclasses.replace(
    FULL, epochs=1, lrs=FULL.lrs[:1], seeds=1, more_seeds={},
    train=tuple(part._replace(examples=512) for part in FULL.train),
    test=tuple(part._replace(examples=64) for part in FULL.test),
    models=("based d64 f16", "gated_deltanet d64", "softmax d64", "window64 d128"))

# Read off the figures of [1] and of its code's page, +-0.01: bytes of the state, accuracy.
PUBLISHED = {"based d48 f8": (9.4e3, 0.67), "based d64 f8": (12.5e3, 0.72), "based d64 f16": (40.5e3, 0.91),
             "based d128 f16": (80e3, 0.985), "deltanet d64": (9.0e3, 0.79), "deltanet d128": (34e3, 0.96),
             "gated_deltanet d64": (17e3, 0.89), "gated_deltanet d128": (67e3, 0.99), "window64 d128": (67e3, 0.515)}
SOLVED = 0.99
BEHIND = 0.1


# ----------------------------------------------------------------------------------------------------------------------
# The data


def distinct(n, count, size, generator, log_weight=0.0):
    """n rows of `size` different numbers below count, drawn one after the other with the given log weights.

    The order of weights plus Gumbel noise is the order of such draws, so one topk makes them all at once.
    """
    uniform = torch.rand(n, count, generator=generator, device=generator.device).clamp(min=1e-20)
    noise = uniform.log().neg().log().neg()
    return (noise + log_weight).topk(size, dim=1).indices


def make_part(part, vocab_size, generator, rows=4096):
    """The sequences of a Part: tokens (n,T), where the questions are (n,pairs), and their answers (n,pairs).

    Keys are different numbers in 1..vocab/2 - 1, values different numbers from vocab/2 on. The pairs come first. In the
    rest, every second place can hold a question; the gap of each, in such places, is drawn without replacement from a
    power law, p(gap) ~ (gap + 1)^(0.01 - 1). All other places are random tokens.
    """
    T = part.T
    pairs = part.pairs
    half = vocab_size // 2
    device = generator.device
    space = T // 2 - pairs
    assert pairs <= min(space, half - 1), f"{pairs} pairs do not fit {T} tokens of {vocab_size} kinds"
    log_weight = (0.01 - 1) * torch.arange(1, space + 1, device=device).log()
    made = []
    for start in range(0, part.examples, rows):
        n = min(rows, part.examples - start)
        keys = 1 + distinct(n, half - 1, pairs, generator)
        values = half + distinct(n, half, pairs, generator)
        where = 2 * pairs + 2 * distinct(n, space, pairs, generator, log_weight)
        tokens = torch.randint(vocab_size, (n, T), generator=generator, device=device)
        tokens[:, :2 * pairs] = torch.stack([keys, values], dim=-1).flatten(1)
        made.append((tokens.scatter(1, where, keys), where, values))
    return tuple(torch.cat(tensors) for tensors in zip(*made))


def make_data(parts, vocab_size, seed, device):
    generator = torch.Generator(device).manual_seed(seed)
    return [make_part(part, vocab_size, generator) for part in parts]


# ----------------------------------------------------------------------------------------------------------------------
# One configuration: a model that is trained from new weights for each learning rate and seed


def hidden(model, tokens):
    return model.hidden(tokens)[0]


def answer_logits(model, x, where):
    """Logits at the questions alone: x (B,T,D), where (B,pairs) -> (B,pairs,vocab). Only they count: 1 token in 9."""
    asked = x.gather(1, where[..., None].expand(-1, -1, x.shape[-1]))             # (B,pairs,D)
    return model.logits(asked)


def answer_loss(model, x, where, answers):
    logits = answer_logits(model, x, where).flatten(0, 1)
    return F.cross_entropy(logits.float(), answers.flatten())


class PublishedBlock(nn.Module):
    """x + mixer(norm(x)), then x + norm(x), as in the published code; dropout is on the embedding alone."""

    def __init__(self, block, dim):
        super().__init__()
        self.norm1 = block.norm1
        self.mixer = block.mixer
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x, state, ropes):
        y, state = self.mixer(self.norm1(x), state, ropes)
        x = x + y
        return x + self.norm2(x), state


class PublishedModel(LM):
    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(PublishedBlock(block, config.dim) for block in self.blocks)


def new_model(config, seed):
    torch.manual_seed(seed)
    return PublishedModel(config)


class Trainer:
    """Trains one configuration again and again. On a GPU each shape of batch is compiled once, and captured once as a
    CUDA graph of forward, backward and AdamW: 700 steps an epoch of mostly tiny kernels cost what the kernels cost.

    Graphs read and write the same memory at every replay, so parameters, optimiser state, lr and batch stay where they
    are and are only overwritten. What lives within a step alone comes from one pool for all graphs of the process.
    """
    pool = None

    def __init__(self, config, setting, device, precision, use_graphs=False, compiled=False):
        self.config = config
        self.setting = setting
        self.device = device
        self.precision = precision
        self.model = new_model(config, 0).to(device).train()
        cuda = device.type == "cuda"
        lr = torch.zeros((), device=device) if cuda else 0.0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr, weight_decay=0.1, fused=True, capturable=cuda)
        self.total = torch.zeros((), device=device)                               # loss since it was last read
        self.graphs = {}
        self.use_graphs = use_graphs
        self.hidden = hidden
        self.loss = answer_loss
        if compiled:
            allow_recompiles(256)                                                 # shapes times configurations
            self.hidden = torch.compile(hidden, dynamic=False)
            self.loss = torch.compile(answer_loss, dynamic=False)

    @torch.no_grad()
    def reset(self, seed):
        """New weights and a new optimiser state, in the same memory: the graphs know it by address."""
        fresh = dict(new_model(self.config, seed).named_parameters())
        for name, p in self.model.named_parameters():
            p.copy_(fresh[name])
            for value in self.optimizer.state.get(p, {}).values():
                value.zero_()
        self.total.zero_()

    def set_lr(self, lr):
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)                                                 # graphs know it by address, too
        else:
            group["lr"] = lr

    def compute(self, batch):
        tokens, where, answers = batch
        with autocast(self.device, self.precision):
            loss = self.loss(self.model, self.hidden(self.model, tokens), where, answers)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.use_graphs)
        self.total += loss.detach()

    def step(self, batch):
        if not self.use_graphs:
            return self.compute(batch)
        shape = batch[0].shape[1], batch[1].shape[1]
        if shape not in self.graphs:
            self.graphs[shape] = self.capture(batch)
        graph, static = self.graphs[shape]
        for mine, new in zip(static, batch):
            mine.copy_(new)
        graph.replay()

    def capture(self, batch):
        """The graph of one step at this shape of batch. Warming up trains, so what it changed is put back."""
        static = [x.clone() for x in batch]
        lr = self.optimizer.param_groups[0]["lr"]
        lr_before = lr.clone()
        total_before = self.total.clone()
        weights_before = [p.detach().clone() for p in self.model.parameters()]
        moments_before = {}
        for p, state in self.optimizer.state.items():
            moments_before[p] = {key: value.clone() for key, value in state.items()}
        lr.zero_()

        def warm_up():
            for _ in range(3):
                self.compute(static)
        Trainer.pool = Trainer.pool or torch.cuda.graph_pool_handle()
        graph, _ = captured(lambda: self.compute(static), warm_up, Trainer.pool)
        with torch.no_grad():
            for p, before in zip(self.model.parameters(), weights_before):
                p.copy_(before)
                for key, value in self.optimizer.state[p].items():
                    if p in moments_before:
                        value.copy_(moments_before[p][key])
                    else:
                        value.zero_()
            self.total.copy_(total_before)
            lr.copy_(lr_before)
        return graph, static

    def batches(self, part):
        """Whole batches, in the order in which they were made. The last one is cut off where it is smaller."""
        size = self.setting.batch_size
        for start in range(0, len(part[0]) - size + 1, size):
            yield [x[start:start + size] for x in part]

    @torch.no_grad()
    def test(self, data):
        """Accuracy of each test part."""
        self.model.eval()
        right = []
        for tokens, where, answers in data:
            hits = []
            rows = max(1, 2 ** 18 // tokens.shape[1])
            for idx, asked, wanted in zip(tokens.split(rows), where.split(rows), answers.split(rows)):
                with autocast(self.device, self.precision):
                    logits = answer_logits(self.model, hidden(self.model, idx), asked)
                hits.append((logits.argmax(-1) == wanted).float().sum())
            right.append(sum(hits) / answers.numel())
        self.model.train()
        return [round(x, 5) for x in torch.stack(right).tolist()]

    def run(self, lr, seed, train_data, test_data, epochs, deadline, rival=None, tell=lambda epoch: None):
        """Trains from new weights; the record of the run, or None where the time ran out.

        Cosine per epoch, to zero after the last one. rival: the history of a finished run to keep up with.
        """
        self.reset(seed)
        torch.manual_seed(seed + 1)                                               # dropout
        record = {"lr": lr, "seed": seed, "history": [], "end": "all epochs"}
        half = max(1, epochs // 2)
        start = time.perf_counter()
        for epoch in range(epochs):
            self.set_lr(lr * (1 + math.cos(math.pi * epoch / epochs)) / 2)
            steps = 0
            for part in train_data:
                for batch in self.batches(part):
                    self.step(batch)
                    steps += 1
                    if steps % 64 == 0 and time.time() > deadline:
                        return None
            accuracy = self.test(test_data)
            loss = self.total.item() / max(1, steps)
            mean = statistics.mean(accuracy)
            self.total.zero_()
            record["history"].append({"epoch": epoch + 1, "loss": loss, "mean": mean, "accuracy": accuracy})
            tell(epoch + 1)
            if not math.isfinite(loss):
                record["end"] = "diverged"
            elif mean > SOLVED:
                record["end"] = "solved"
            elif rival and epoch + 1 == half and mean < rival[:half][-1]["mean"] - BEHIND:
                record["end"] = "behind"
            if record["end"] != "all epochs":
                break
        record["seconds"] = round(time.perf_counter() - start, 2)
        return record | record["history"][-1]                                     # the last epoch: none is picked


# ----------------------------------------------------------------------------------------------------------------------
# What a configuration costs


@torch.no_grad()
def state_size(config):
    """Bytes of the state of one sequence in fp32, after as many tokens as the longest test has."""
    model = new_model(config, 0).eval()
    _, state = model.hidden(torch.zeros(1, config.seq_len, dtype=torch.long))
    return state_bytes(state["layers"])


@torch.no_grad()
def decoding_speed(config, batch, after, device, precision, repeats=5, steps=8):
    """Tokens per second of `batch` sequences decoded at once, when each has read `after` tokens.

    Every step starts from the same state, which is what a step costs at that length; a softmax cache is copied to grow.
    On a GPU the step is one CUDA graph: launches would hide the difference. Median of `repeats`, after a warm-up.
    """
    model = new_model(config, 0).to(device).eval()
    tokens = torch.randint(config.vocab_size, (batch, after), device=device)
    with autocast(device, precision):
        states = [model.hidden(piece)[1] for piece in tokens.split(64)]

    def joined(*parts):
        first = parts[0]
        return torch.cat(parts) if torch.is_tensor(first) and first.dim() else first
    state = tree_map(joined, *states)
    del states

    def step():
        with autocast(device, precision):
            model(tokens[:, -1:], state=state)
    step()
    if device.type == "cuda":
        try:
            step = captured(step)[0].replay
        except RuntimeError as error:
            say(f"decoding is measured with its launches, which hide differences: {first_line(error)}")
    times, = race([lambda: [step() for _ in range(steps)]], device, repeats)
    return steps * batch / statistics.median(times)


# ----------------------------------------------------------------------------------------------------------------------
# All runs, on several processes: each keeps its configurations, and tries them all at one rate before the next


def run_file(folder, name, lr, seed):
    return folder / f"{name.replace(' ', '-')}-lr{lr:.1e}-seed{seed}.json"


def read_runs(folder, setting, names):
    """The finished runs, as {(name, lr, seed): record}. UserError where one was made with other settings."""
    runs = {}
    for name in names:
        for path in sorted(folder.glob(f"{name.replace(' ', '-')}-lr*.json")):
            record = read_json(path, "setting", "lr", "seed", "mean", "accuracy", "end", "history", "seconds", "epoch")
            if record is None:
                say(f"warning: {path} is damaged and will be run again")
            elif record["setting"] != fingerprint(setting, name):
                raise UserError(f"{path} was made with other settings: use another --out_dir, or delete it")
            else:
                runs[name, record["lr"], record["seed"]] = record
    return runs


def fingerprint(setting, name):
    """What a run depends on, as JSON gives it back."""
    same = {key: getattr(setting, key) for key in ("vocab_size", "train", "test", "batch_size", "epochs")}
    same |= {"after a mixer": "x + norm(x)", "model": dataclasses.asdict(setting.config(name))}
    return json.loads(json.dumps(same))


def all_runs(names, setting):
    """(name, lr, seed) of every run that may be needed."""
    return [(name, lr, seed) for lr in setting.lrs for name in names for seed in range(setting.seeds_of(name))]


def others(runs, name, seed):
    """The runs of a configuration and seed, at whatever learning rate."""
    return [run for (its_name, _, its_seed), run in runs.items() if (its_name, its_seed) == (name, seed)]


def needless(runs, name, lr, seed):
    """A run that is done, or that cannot change the figure: another learning rate has solved the task."""
    return (name, lr, seed) in runs or any(run["end"] == "solved" for run in others(runs, name, seed))


class Worker(NamedTuple):
    """What one worker process does: its runs, in this order, and where."""
    number: int
    runs: list             # of (name, lr, seed); all rates of a name and seed are one worker's
    setting: Setting
    folder: Path
    device: str
    gpu: str | None        # CUDA_VISIBLE_DEVICES
    precision: str
    use_graphs: bool
    threads: int
    deadline: float


def work(worker, epochs_done):
    """Makes the runs of a Worker. epochs_done: shared memory, a number for each worker."""
    setting = worker.setting
    folder = worker.folder
    torch.set_num_threads(worker.threads)
    device = torch.device(worker.device)
    use_tf32(device, worker.precision)
    train_data = make_data(setting.train, setting.vocab_size, 123, device)
    test_data = make_data(setting.test, setting.vocab_size, 456, device)
    names = dict.fromkeys(name for name, _, _ in worker.runs)
    runs = read_runs(folder, setting, names)
    trainers = {}
    for name, lr, seed in worker.runs:
        before = epochs_done[worker.number]

        def tell(epoch):
            epochs_done[worker.number] = before + epoch
        if not needless(runs, name, lr, seed):
            if time.time() > worker.deadline:
                return
            if name not in trainers:
                trainers[name] = usable(name, setting, device, worker.precision, worker.use_graphs, train_data)
            rivals = [run["history"] for run in others(runs, name, seed)]
            rival = max(rivals, key=lambda history: history[-1]["mean"], default=None)
            record = trainers[name].run(lr, seed, train_data, test_data, setting.epochs, worker.deadline, rival, tell)
            if record is None:
                return
            record |= {"name": name, "precision": worker.precision, "graphs": trainers[name].use_graphs,
                       "setting": fingerprint(setting, name), "machine": device_name(device)}
            write_json(run_file(folder, name, lr, seed), record)
            runs[name, lr, seed] = record
        tell(setting.epochs)


def start(worker, epochs_done):
    """work() as a process of its own, which ends when the program does, even by kill -9."""
    watch_parent()
    work(worker, epochs_done)


def usable(name, setting, device, precision, fast, data):
    """The fastest Trainer that works here, tried on every shape of batch: CUDA graphs, compiled or not, or plain."""
    graphs = [dict(use_graphs=True, compiled=True), dict(use_graphs=True)]
    for kind in [*(graphs if fast and device.type == "cuda" else ()), {}]:
        start = time.perf_counter()
        try:
            trainer = Trainer(setting.config(name), setting, device, precision, **kind)
            for part in data if kind else ():
                trainer.step(next(trainer.batches(part)))
            if kind:
                torch.cuda.synchronize()
                say(f"{name}: captured{' and compiled' if trainer.hidden is not hidden else ''} in "
                    f"{time.perf_counter() - start:.0f} s")
            return trainer
        except Exception as error:  # no compiler, a kernel that cannot be captured, ...: slower, but the same
            if not kind:
                raise
            say(f"{name}: {' and '.join(kind)} did not work: {type(error).__name__}: {first_line(error)}")


def plan(names, setting, folder, device, precision, args, deadline):
    """The Workers: one for each core or so, on a CPU or spread over the GPUs."""
    gpus = visible_gpus(device)
    runs = all_runs(names, setting)
    units = list(dict.fromkeys((name, seed) for name, _, seed in runs))
    count = min(args.workers or min(6 * len(gpus), usable_cores()), len(units))
    threads = max(1, torch.get_num_threads() // count)
    workers = []
    for i in range(count):
        mine = {*units[i::count]}
        its_runs = [(name, lr, seed) for name, lr, seed in runs if (name, seed) in mine]
        gpu = gpus[i % len(gpus)]
        workers.append(Worker(i, its_runs, setting, folder, str(device), gpu, precision, args.compile, threads,
                              deadline))
    return workers


def run_all(workers):
    """Starts the workers and shows how far they are."""
    folder = workers[0].folder
    setting = workers[0].setting
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str((folder / "inductor").absolute())  # compiled code is shared
    spawn = multiprocessing.get_context("spawn")                                  # CUDA does not outlive a fork
    cells = spawn.RawArray("q", len(workers))
    shown = {*folder.glob("*-lr*.json")}
    total = sum(len(worker.runs) for worker in workers) * setting.epochs
    processes = [spawn.Process(target=start, args=(worker, cells), daemon=True) for worker in workers]
    with tqdm(total=total, desc="epochs", unit="epoch", disable=None, smoothing=0.05) as bar:
        try:
            for worker, process in zip(workers, processes):
                if worker.gpu is not None:
                    os.environ["CUDA_VISIBLE_DEVICES"] = worker.gpu               # the process inherits it
                process.start()
            while running := [process.sentinel for process in processes if process.is_alive()]:
                connection.wait(running, timeout=1)
                bar.update(sum(cells) - bar.n)
                for path in sorted({*folder.glob("*-lr*.json")} - shown):
                    run = json.loads(path.read_text())
                    say(f"{run['name']:20} lr {run['lr']:.1e} seed {run['seed']}: accuracy {run['mean']:.3f} "
                        f"after {run['epoch']} epochs")
                    shown.add(path)
        finally:
            for process in processes:                                             # Ctrl-C: they need not finish
                if process.is_alive():
                    process.terminate()
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise UserError(f"a worker stopped with exit code {failed[0]}, for the reason above: finished runs are kept, "
                        "and the same command resumes")


# ----------------------------------------------------------------------------------------------------------------------
# What came out


def summarise(names, setting, runs, costs):
    """A row for each configuration that has a run: the best learning rate's mean accuracy, averaged over the seeds."""
    rows = []
    for name in names:
        best = {}
        for (its_name, _, seed), run in runs.items():
            if its_name == name:
                best[seed] = max(best.get(seed, run), run, key=lambda run: run["mean"])
        if not best:
            continue
        means = [run["mean"] for run in best.values()]
        accuracies = zip(*(run["accuracy"] for run in best.values()))
        _, published = PUBLISHED.get(name, (None, ""))
        row = {
            "model": name,
            "state, bytes": costs[name]["bytes"],
            "tokens/s": costs[name]["tokens_per_s"],
            "accuracy": statistics.mean(means),
            "lowest": min(means),
            "highest": max(means),
            "over seeds": f"{min(means):.3f} to {max(means):.3f}" * (len(means) > 1),
            "published": published,
            "lr": ", ".join(sorted({f"{run['lr']:.1e}" for run in best.values()})),
        }
        rows.append(row | {part.name(): statistics.mean(column) for part, column in zip(setting.test, accuracies)})
    return sorted(rows, key=lambda row: -row["accuracy"])


def plot_tradeoff(rows, path, title, after, with_published):
    """Accuracy against bytes of state, and against decoding speed; bars are the range over seeds, crosses published."""
    families = list(dict.fromkeys(row["model"].split()[0] for row in rows))

    def draw_family(panel, key, family, color, labels, obstacles):
        mine = [row for row in rows if row["model"].split()[0] == family]
        mine.sort(key=lambda row: row[key])
        for row in mine:
            x, y = row[key], row["accuracy"]
            below, above = y - row["lowest"], row["highest"] - y
            panel.errorbar(x, y, [[below], [above]], fmt="o", color=color, capsize=3)
            labels.append((x, y, row["model"], color))
            obstacles += [(x, y - below), (x, y - below / 2), (x, y), (x, y + above / 2), (x, y + above)]
            if with_published and key == "state, bytes" and row["model"] in PUBLISHED:
                obstacles.append(PUBLISHED[row["model"]])
                panel.plot(*PUBLISHED[row["model"]], "x", color=color, markersize=8)
        panel.plot([row[key] for row in mine], [row["accuracy"] for row in mine], color=color)

    def draw_panel(panel, key):
        labels = []
        obstacles = []
        for i, family in enumerate(families):
            draw_family(panel, key, family, f"C{i}", labels, obstacles)
        panel.set(xscale="log", ylim=(None, 1.05))
        panel.margins(x=0.25)
        panel.grid(alpha=0.3, which="both")
        readable_ticks(panel)
        place_labels(panel, labels, obstacles)

    def draw(panels):
        draw_panel(panels[0], "state, bytes")
        draw_panel(panels[1], "tokens/s")
        if with_published:
            panels[0].plot([], [], "x", color="gray", markersize=8, label="published, in the color of its point")
            panels[0].legend(fontsize=8, loc="lower right")
        panels[0].set(xlabel="state of a sequence, bytes (fp32)", ylabel="accuracy, mean over test settings")
        panels[0].set_title(title)
        panels[1].set(xlabel=f"decoding, tokens per second, after {after} tokens")
    picture(path, draw, ncols=2, figsize=(15, 7), sharey=True)


def readable_ticks(panel):
    """1, 2 and 5 times the powers of ten, as 20k, on a logarithmic x axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(
        lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x >= 1e3 else f"{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def place_labels(panel, labels, obstacles):
    """Writes each (x, y, text, color) near its point, where it covers no label and no obstacle (x, y), if it can."""
    panel.figure.canvas.draw()                                                    # transData is right only then
    pixels = panel.figure.dpi / 72                                                # of a point of type
    points = [panel.transData.transform(point) for point in obstacles]
    taken = []
    for x, y, text, color in labels:
        px, py = panel.transData.transform((x, y))
        width, height = 4.4 * len(text), 8
        places = []
        for far in (8, 14, 22, 32):
            places += [(far, -3), (-far - width, -3)]
            for up in (far, -far - height):
                places += [(4, up), (-4 - width, up), (-width / 2, up)]

        def box(place):
            left = px + place[0] * pixels
            bottom = py + place[1] * pixels
            return left, bottom, left + width * pixels, bottom + height * pixels
        best = next((place for place in places if is_free(box(place), taken, points)), places[0])
        taken.append(box(best))
        panel.annotate(text, (x, y), best, textcoords="offset points", fontsize=7.5, color=color)


def is_free(box, taken, points, margin=4):
    left, bottom, right, top = box
    meets_box = any(left < r and l < right and bottom < t and b < top for l, b, r, t in taken)
    return not meets_box and not any(left - margin < x < right + margin and bottom - margin < y < top + margin
                                     for x, y in points)


def measure_costs(names, setting, folder, device, precision):
    """Bytes and decoding speed of each configuration, measured one after the other before training starts."""
    path = folder / "costs.json"
    costs = read_json(path)
    if costs is None and path.exists():
        say(f"warning: {path} is damaged and will be measured again")
    costs = {name: cost for name, cost in (costs or {}).items()
             if isinstance(cost, dict) and {"bytes", "tokens_per_s", "machine"} <= {*cost}}
    todo = [name for name in names if costs.get(name, {}).get("machine") != device_name(device)]
    for name in tqdm(todo, desc="decoding", disable=None, leave=False):
        config = setting.config(name)
        batch = setting.decode_batch
        after = setting.decode_after
        costs[name] = {
            "bytes": state_size(config),
            "machine": device_name(device),
            "batch": batch,
            "after": after,
            "tokens_per_s": decoding_speed(config, batch, after, device, precision),
        }
        write_json(path, costs)
    return costs


def pick_names(only, models):
    """The configurations that --only names, by themselves or by their family. UserError for a word that names none."""
    if not only:
        return list(models)
    names = []
    for word in map(str.strip, only.split(",")):
        found = [name for name in models if word in (name, name.split()[0])]
        if not found:
            known = [*models, *dict.fromkeys(name.split()[0] for name in models)]
            near = difflib.get_close_matches(word, known, 1, 0)[0]
            raise UserError(f"--only={only}: {word!r} names no configuration; is it {near!r}? There are "
                            f"{', '.join(models)}, or their first words")
        names += [name for name in found if name not in names]
    return names


def main():
    start = time.time()
    args, = configure(sys.argv[1:], RecallConfig, config_file=False)
    kind = "small"
    if args.full:
        kind = "full"
    if args.smoke:
        kind = "smoke"
    setting = {"small": SMALL, "full": FULL, "smoke": SMOKE}[kind]
    setting = dataclasses.replace(setting, epochs=args.epochs or setting.epochs, seeds=args.seeds or setting.seeds,
                                  more_seeds={} if args.seeds else setting.more_seeds)
    names = pick_names(args.only, setting.models)
    device = pick_device(args.device)
    precision = "fp32" if args.precision == "auto" and device.type != "cuda" else pick_precision(args.precision, device)
    folder = Path(args.out_dir or f"out/recall/{kind}")
    folder.mkdir(parents=True, exist_ok=True)
    read_runs(folder, setting, names)
    costs = measure_costs(names, setting, folder, device, precision)
    deadline = start + 60 * args.minutes if args.minutes else math.inf
    run_all(plan(names, setting, folder, device, precision, args, deadline))
    runs = read_runs(folder, setting, names)
    rows = summarise(names, setting, runs, costs)
    if not rows:
        raise UserError("no run was finished in that time: the same command with more --minutes resumes")
    shown = [{key: row[key] for key in row if key not in ("lowest", "highest")} for row in rows]
    table(f"MQAR, {kind} setting", shown)
    missing = sum(not needless(runs, *run) for run in all_runs(names, setting))
    say(f"{device_name(device)}, {precision}: {len(runs)} runs in "
        f"{sum(run['seconds'] for run in runs.values()):.0f} s of training, this call {time.time() - start:.0f} s"
        + f"; {missing} runs are missing, the same command resumes" * bool(missing))
    plot_tradeoff(rows, folder / "recall.png", f"MQAR, {kind} setting", setting.decode_after, kind == "full")


if __name__ == "__main__":
    command(main)
