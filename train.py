"""Trains a language model on the tokens that prepare.py wrote, on a CPU, a CUDA GPU or a Mac.

    python train.py config/tiny.py                    the demo: a small model on Python's own source
    python train.py config/base.py --lr=3e-4          any key of --help can be set in the file or by a flag
    python train.py config/base.py                    the same command again continues a run that was stopped
    python train.py config/base.py --eval_only        the validation loss of out_dir's checkpoint
    python train.py config/finetune.py --init_from=out/base --dataset=mine    goes on from its weights, on other text
    torchrun --standalone --nproc_per_node=2 train.py config/base.py    the same run on two GPUs, or CPU processes

Everything of a run is in out_dir: ckpt.pt (the latest state), best.pt (the lowest validation loss), metrics.jsonl (one
JSON object per logged step) and loss.png. The batch of a step depends only on (seed, step), so a resumed run needs no
data state; grad_accum and the processes of torchrun only split it. Only the process of rank 0 writes.
"""
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, command, configure, help_first

help_first(__name__, __file__, "model.py")

from support.dataset import Dataset, Windows, load_tokenizer                      # support comes before torch
from support.files import leftovers, locked, replacing
from support.machine import (RANK, WORLD, autocast, compile_blocks, gather, out_of_memory, peak_memory, pick_device,
                             pick_precision, processes, progress, reduce, run_and_leave, say, stop_at_signals, whole)
from support.optim import load_optimizer, lr_at, make_optimizer
from support.report import Log, plot_losses, wanted_trackers

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import LM, ModelConfig
from checkpoint import KEPT, keep, load_checkpoint, load_model, load_pretrained, load_weights, plain


@dataclass
class TrainConfig:
    dataset: str = "c4"              # a folder of data_dir, written by prepare.py --dataset=...
    data_dir: str = "data"           # where the datasets are
    out_dir: str = "out/base"        # where the run is kept
    init_from: str = ""              # start from the weights of an out_dir, a checkpoint, a shared folder or a hub id
    batch_size: int = 64             # sequences in an optimiser step, over everything
    grad_accum: int = 4              # pieces a batch is cut into, to save memory; the result is the same
    max_steps: int = 20000           # optimiser steps
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices, AdamW for the rest
    lr: float = 2e-4                 # peak learning rate
    warmup_steps: int = 200          # steps of linear warmup
    decay_frac: float = 1.0          # last part of the run in which lr falls linearly to zero; 1 is all after warmup
    weight_decay: float = 0.1        # on matrices only
    beta1: float = 0.9               # AdamW
    beta2: float = 0.95              # AdamW
    grad_clip: float = 1.0           # largest norm of the gradient; 0 leaves it as it is
    seed: int = 1337                 # of the initial weights, the order of the data, and dropout
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of matrix products; auto is bf16 where it is faster
    device: str = "auto"             # cpu, cuda, cuda:1, mps; auto takes the best there is
    compile: bool | Literal["auto"] = "auto"  # torch.compile the blocks; auto does so on CUDA
    shard: bool = False              # torchrun: split weights, gradients and optimiser over the processes (FSDP2)
    log_interval: int = 10           # steps between log lines
    eval_interval: int = 500         # steps between evaluations
    eval_tokens: int = 2**17         # tokens of validation text in an evaluation, always the same ones
    save_interval: int = 500         # steps between checkpoints; one is also saved before each evaluation
    keep_last: int = 1               # checkpoints to keep: ckpt.pt, and ckpt-STEP.pt for those before it
    max_skips: int = 20              # steps in a row with a non-finite loss or gradient before the run stops
    skip_spikes: bool = False        # also skip steps whose loss is 6 sigma above the last 128; they are logged anyway
    resume: bool | Literal["auto", "changed"] = "auto"  # auto continues a run of the same config; True: there must be one; False: start over; changed: continue with other settings
    tensorboard: bool = False        # also log to out_dir/tensorboard, with samples and the loss curve
    wandb_project: str = ""          # also log to this project of Weights & Biases; WANDB_MODE=offline needs no account
    eval_only: bool = False          # evaluate the checkpoint in out_dir and stop

    def __post_init__(self):
        for key in ("batch_size", "grad_accum", "max_steps", "log_interval", "eval_interval", "eval_tokens",
                    "save_interval", "keep_last", "max_skips"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        for key in ("warmup_steps", "lr", "weight_decay", "grad_clip", "seed"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if not 0 <= self.decay_frac <= 1:
            raise ValueError(f"decay_frac must be in 0..1, got {self.decay_frac}")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 0 and below 1, got {getattr(self, key)}")
        if not self.dataset:
            raise ValueError("dataset must be the name of a folder in data_dir, got none")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if self.batch_size % (self.passes * WORLD):
            several = f"{WORLD} processes times {self.passes} pieces each"
            pieces = f"grad_accum={self.grad_accum}" if WORLD == 1 else several
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of {pieces}")
        if self.shard and (WORLD == 1 or self.optimizer == "muon"):
            raise ValueError("shard splits a model over several processes of torchrun, with --optimizer=adamw: "
                             "leave it out")

    @property
    def passes(self):
        """Pieces of a batch that each process goes through, one after the other."""
        return -(-self.grad_accum // WORLD)

    @property
    def piece(self):
        """Sequences in a piece."""
        return self.batch_size // (self.passes * WORLD)


# Settings that change where a run is kept, how often it reports and how fast it goes, but not what it learns.
FREE = {"data_dir", "out_dir", "grad_accum", "device", "compile", "log_interval", "save_interval", "keep_last",
        "resume", "eval_only", "shard", "tensorboard", "wandb_project"}


# ----------------------------------------------------------------------------------------------------------------------
# The run: its loop, then what a step and an evaluation are


class Run:
    """A training run: the model, the optimiser, how far it has come, and the files in out_dir that hold them."""

    def __init__(self, config, model_config, data, device):
        self.config, self.model_config, self.data, self.device = config, model_config, data, device
        self.out_dir = Path(config.out_dir)
        self.latest, self.best = self.out_dir / "ckpt.pt", self.out_dir / "best.pt"
        self.windows = Windows(data.train, model_config.seq_len, config.seed)
        torch.manual_seed(config.seed)
        self.model = LM(model_config).to("cpu" if config.shard else device)       # a GPU may never hold it whole
        self.parallel = self.model                                                # what train_step calls; see spread
        self.optimizer = make_optimizer(self.model, config)
        self.step, self.best_loss, self.spikes, self.skips, self.skips_in_a_row = 0, math.inf, Spikes(), 0, 0
        self.tokens_per_step = config.batch_size * model_config.seq_len

    def train(self):
        """To max_steps, or to the first signal. Each step: make it, log it, save it, evaluate."""
        config, signals, stop = self.config, stop_at_signals(), 0
        with self.progress_bar() as bar:
            if config.init_from and self.step == 0:                               # what it starts from is a result too
                self.save(self.latest)
                self.evaluate()
            clock = Clock(self.step, self.tokens_per_step)
            while True:
                # First in the loop, since a resumed run may have been killed between the save and the evaluation.
                if self.step and not stop and self.is_due(config.eval_interval):
                    self.evaluate()
                    clock = Clock(self.step, self.tokens_per_step)
                if self.step >= config.max_steps or stop:
                    break
                loss, grad_norm = self.one_step()
                bar.update(self.tokens_per_step)
                if self.is_due(config.log_interval):
                    self.report(bar, loss, grad_norm, clock.tokens_per_s(self.step))
                stop = reduce(max(signals, default=0), dist.ReduceOp.MAX)         # once a step: a stop has its save
                due = self.is_due(config.save_interval) or self.is_due(config.eval_interval)
                good = not self.skips_in_a_row or self.step >= config.max_steps   # else these weights may be the cause
                if stop or due and good:
                    self.save(self.latest)
        if RANK == 0:
            if not stop:
                plot_losses(self.out_dir)
            for tracker in self.log.trackers:
                tracker.close(self.step, self.out_dir / "loss.png")
        if stop:
            then = "leave out --resume=false to go on" if config.resume is False else "the same command continues"
            say(f"stopped at step {self.step}; {then}")
            raise SystemExit(128 + stop)

    def is_due(self, interval):
        return self.step % interval == 0 or self.step >= self.config.max_steps

    def one_step(self):
        loss, grad_norm, spike, skip = train_step(self.parallel, self.optimizer, self.windows, self.step, self.config,
                                                  self.device, self.spikes)
        self.step += 1
        self.skips, self.skips_in_a_row = self.skips + skip, self.skips_in_a_row + 1 if skip else 0
        if spike or skip:
            self.write(loss=loss, grad_norm=grad_norm, spike=spike, skipped=skip, skips=self.skips)
            say(f"step {self.step}: loss {loss:.4f}, gradient norm {grad_norm:.3g}" + ", skipped" * skip)
        if self.skips_in_a_row >= self.config.max_skips:
            then = f"and --resume=changed, {self.latest} is from before" if self.latest.exists() else "from the start"
            raise UserError(f"{self.skips_in_a_row} steps in a row were skipped, for a loss or gradient that was not "
                            f"finite or a spike: try a lower --lr {then}")
        return loss, grad_norm

    def evaluate(self):
        result = evaluate(self.model, self.data.val, self.data.manifest, self.config, self.device)
        say(f"step {self.step}: " + ", ".join(f"{key} {value:.4f}" for key, value in result.items()))
        if result["val_loss"] < self.best_loss:
            self.best_loss = result["val_loss"]
            self.save(self.best)
        self.write(**result)
        if RANK == 0 and self.log.trackers and not self.config.shard:             # shards take all processes to sample
            text = self.sample()
            for tracker in self.log.trackers:
                tracker.text(self.step, text)

    def sample(self, count=100):
        """A text of the model as it is now, always with the same dice."""
        self.model.eval()
        idx = torch.tensor([[self.tokenizer.eot]], device=self.device)
        if self.model_config.pos == "learned":
            count = min(count, self.model_config.seq_len - 1)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        with torch.compiler.set_stance("force_eager"), autocast(self.device, self.config.precision):
            tokens = [int(token) for token, _ in self.model.generate(idx, count, temperature=0.8, generator=generator)]
        self.model.train()
        return self.tokenizer.decode_bytes(tokens).decode(errors="replace")

    def write(self, **record):
        """One record of this step, by one process."""
        if RANK == 0:
            self.log.write(step=self.step, tokens=self.step * self.tokens_per_step, **record)

    def progress_bar(self):
        size = shutil.get_terminal_size()                                         # tqdm would hide itself at 0 x 0
        return progress(total=self.tokens_per_step * self.config.max_steps, initial=self.tokens_per_step * self.step,
                        unit="tok", unit_scale=True, ncols=size.columns, nrows=size.lines)

    def report(self, bar, loss, grad_norm, speed):
        """To the log; to the bar on a terminal, and as a line where the output goes to a file."""
        lr, memory = lr_at(self.step - 1, self.config), f"{peak_memory(self.device) / 1e9:.2f} GB"
        self.write(loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=round(speed), time=round(time.time(), 3))
        bar.set_postfix(loss=f"{loss:.3f}", mem=memory)
        if bar.disable:
            left = (self.config.max_steps - self.step) * self.tokens_per_step / speed
            say(f"step {self.step}/{self.config.max_steps}: loss {loss:.4f}, lr {lr:.2e}, {speed:,.0f} tokens/s, "
                f"{memory}, {left / 60:.1f} min left")

    def save(self, path):
        model, optimizer = whole(self.model.state_dict()), whole(self.optimizer.state_dict())
        if RANK:
            return
        with replacing(path) as temporary:
            torch.save(plain({
                "model": model, "model_config": dataclasses.asdict(self.model_config), "optimizer": optimizer,
                "step": self.step, "best_loss": self.best_loss, "recent_losses": list(self.spikes.recent),
                "skips": [self.skips, self.skips_in_a_row], "config": dataclasses.asdict(self.config),
                "rng": {"cpu": torch.get_rng_state()}, "data": self.data.fingerprint}), temporary)
        if path == self.latest:
            keep(self.latest, self.step, self.config.keep_last)

    def restore(self, checkpoint):
        load_weights(self.model, checkpoint)
        if checkpoint["config"].get("optimizer", "adamw") != self.config.optimizer:  # resume=changed
            raise UserError(f"{self.latest} was trained with another optimizer: take --init_from={self.latest} and "
                            "another --out_dir to start from its weights")
        load_optimizer(self.optimizer, checkpoint["optimizer"])
        self.step, self.best_loss = checkpoint["step"], checkpoint["best_loss"]
        self.spikes, (self.skips, self.skips_in_a_row) = Spikes(checkpoint["recent_losses"]), checkpoint["skips"]
        torch.set_rng_state(checkpoint["rng"]["cpu"].cpu())                       # for the bytes: steps seed their own
        if self.config.resume == "changed":
            self.skips_in_a_row, self.best_loss = 0, self.loss_of_best()

    def loss_of_best(self):
        """That of best.pt, which may be of an evaluation after ckpt.pt was saved; infinity where ours are of others."""
        if not self.best.exists():
            return math.inf
        best = load_checkpoint(self.best)
        same = (best["data"] == self.data.fingerprint and best["config"].get("eval_tokens") == self.config.eval_tokens
                and best["model_config"]["seq_len"] == self.model_config.seq_len)
        return best["best_loss"] if same else math.inf

    def open_folder(self, fresh):
        """Clears away what a killed run left half-written (fresh: and the run itself); opens the log."""
        if RANK:
            return
        wanted = wanted_trackers(self.config)
        self.tokenizer = load_tokenizer(self.data.manifest["tokenizer"]) if wanted else None  # of the samples they get
        trackers = [tracker(self, fresh) for tracker in wanted]
        try:
            old = [self.latest, self.best, self.out_dir / "loss.png", *self.out_dir.glob(KEPT)] if fresh else []
            ours = ("ckpt.pt", "best.pt", "loss.png", "metrics.jsonl", "wandb_id", KEPT)
            halves = [path for name in ours for path in leftovers(self.out_dir, name)]
            for stale in [*old, *halves, *(path for name in ours for path in self.out_dir.glob(name + ".tmp"))]:
                stale.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to out_dir={self.out_dir}: {error.strerror}") from None
        again = self.step == 0 or self.is_due(self.config.eval_interval)
        self.log = Log(self.out_dir / "metrics.jsonl", self.step, trackers, again)
        if not fresh:
            keep(self.latest, self.step, self.config.keep_last)                   # a kill may have come just before it

    def spread(self):
        """Over the processes: the model whole in each, gradients averaged while backward still runs; or in shards."""
        if len({*gather(self.step)}) > 1:                                         # none goes on before all have read
            raise UserError(f"the processes find different checkpoints: out_dir={self.out_dir} must be one folder, on "
                            "a file system that all machines share")
        if self.config.shard:
            from torch.distributed.fsdp import fully_shard                        # here: they take 0.8 s to import
            from torch.distributed.tensor import distribute_tensor
            mesh, saved = dist.init_device_mesh(self.device.type, (WORLD,)), self.optimizer.state_dict()
            for module in (*self.model.blocks, self.model):                       # a block is whole only while in use
                fully_shard(module, mesh=mesh)
            self.optimizer = make_optimizer(self.model, self.config)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            for i, state in saved["state"].items():
                for key, value in state.items():
                    if value.shape == parameters[i].shape:
                        state[key] = distribute_tensor(value.to(self.device), mesh, parameters[i].placements)
            load_optimizer(self.optimizer, saved)
        elif WORLD > 1:
            self.parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True)


def train_step(model, optimizer, windows, step, config, device, spikes):
    """One optimiser step, or none where the loss or the gradient is not finite.

    Returns: the loss, the norm of its gradient before clipping, whether the loss is a spike, whether it was skipped.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, config)
    torch.manual_seed(int(np.random.default_rng((config.seed, step, RANK)).integers(2**63)))  # dropout differs by rank
    first, loss = step * config.batch_size + RANK * config.passes * config.piece, 0.0
    vocab_size = getattr(model, "module", model).config.vocab_size
    for i in range(config.passes):
        start = first + i * config.piece
        x, y = windows.batch(range(start, start + config.piece), vocab_size, device)
        alone = isinstance(model, DistributedDataParallel) and i < config.passes - 1
        with autocast(device, config.precision), model.no_sync() if alone else nullcontext():
            part = model(x, y)[0] / config.passes                                 # the mean over the whole batch
        part.backward()                                                           # DDP: the last averages over ranks
        loss += part.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    grad_norm = float(grad_norm.full_tensor() if config.shard else grad_norm)
    loss = float(reduce(loss, device=device)) / WORLD
    spike = spikes(loss)
    skip = not math.isfinite(loss) or not math.isfinite(grad_norm) or spike and config.skip_spikes
    if not skip:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm, spike, skip


@torch.no_grad()
def evaluate(model, files, manifest, config, device):
    """val_loss (nats per token), ppl and bits_per_byte, over evenly spaced windows of the validation files."""
    model.eval()
    windows, T = Windows(files, model.config.seq_len, seed=0), model.config.seq_len
    count = min(windows.total, -(-config.eval_tokens // T))
    size, total = max(1, min(config.piece, count)), 0.0
    for i in progress(range(0, count, size * WORLD), desc="evaluating", leave=False):
        numbers = range(i, min(i + size * WORLD, count))[RANK::WORLD]
        x, y = windows.batch(numbers or [0], model.config.vocab_size, device)     # all processes run it equally often
        with autocast(device, config.precision):
            total += float(model(x, y)[0]) * len(numbers)
    model.train()
    loss = reduce(total) / count
    entries = [entry for entry in manifest["files"].values() if entry["split"] == "val"]
    tokens, text = (sum(entry[key] for entry in entries) for key in ("tokens", "bytes"))
    return {"val_loss": loss, "ppl": math.exp(min(loss, 100)), "bits_per_byte": loss / math.log(2) * tokens / text}


class Clock:
    """Tokens per second between calls."""

    def __init__(self, step, tokens_per_step):
        self.step, self.tokens_per_step, self.time = step, tokens_per_step, time.perf_counter()

    def tokens_per_s(self, step):
        before, self.step, self.time = (self.step, self.time), step, time.perf_counter()
        return (step - before[0]) * self.tokens_per_step / (self.time - before[1])


class Spikes:
    """Watches the loss: is it 6 standard deviations above the last 128?"""

    def __init__(self, recent=()):
        self.recent = deque(recent, maxlen=128)

    def __call__(self, loss):
        mean, sigma = (np.mean(self.recent), np.std(self.recent)) if len(self.recent) == 128 else (0, math.inf)
        if math.isfinite(loss):
            self.recent.append(loss)
        return bool(loss > mean + 6 * sigma)


# ----------------------------------------------------------------------------------------------------------------------
# Where a run begins: anew, from another model, or where it stopped


def settings_to_start_from(config):
    """Defaults for the model of a run that starts from another: the settings of that one."""
    folder = Path(config.out_dir)
    if not config.init_from:
        return {}
    if folder.resolve() in (Path(config.init_from).resolve(), Path(config.init_from).resolve().parent):
        raise UserError(f"init_from={config.init_from} lies in out_dir, which the new run will write: "
                        "take another --out_dir")
    if config.resume is not False and (folder / "ckpt.pt").exists():              # started: its source may be gone
        return load_checkpoint(folder / "ckpt.pt")["model_config"]
    return dataclasses.asdict(load_pretrained(config.init_from).config)


def start_from(model, source, name):
    """Copies the weights of source into model, and says what changed.

    Outside the mixers everything must fit. In a mixer what has the same name and shape is kept and the rest stays new,
    so that another mixer can start from what a trained one has learned: qkv and out mean the same in all attentions.
    """
    mine, theirs = model.state_dict(), source.state_dict()
    kept = {key for key in mine if key in theirs and mine[key].shape == theirs[key].shape}
    here, there = (dataclasses.asdict(m.config) for m in (model, source))
    changed = "; ".join(f"{key} was {there[key]}, now {here[key]}" for key in here if here[key] != there[key])
    if unfit := sorted(key for key in {*mine, *theirs} - kept if ".mixer." not in key):
        raise UserError(f"{name} holds a model of another shape ({changed}): {unfit[0]} and {len(unfit) - 1} others do "
                        "not fit; leave out what is set differently here")
    model.load_state_dict({key: theirs[key] for key in kept}, strict=False)

    def names(keys):
        return ", ".join(sorted({re.sub(r"blocks\.\d+\.", "", key) for key in keys})) or "nothing"
    say(f"{name}: {changed or 'the same settings'}; kept {len(kept)} of {len(theirs)} tensors; new: "
        f"{names(mine.keys() - kept)}; left out: {names(theirs.keys() - kept)}")


def find_checkpoint(config, model_config, data):
    """The checkpoint of out_dir that this command continues (or evaluates), or None. UserError if it should not."""
    latest = Path(config.out_dir) / "ckpt.pt"
    if config.resume is False and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        config.resume = "auto"                                                    # torchrun's restart of our own run
    if config.eval_only or config.resume in (True, "changed") or config.resume == "auto" and latest.exists():
        checkpoint = load_checkpoint(latest)
        if config.precision == "auto":                                            # a probe may answer differently today
            config.precision = checkpoint["config"]["precision"]
        if checkpoint["data"]["tokenizer_hash"] != data["tokenizer_hash"]:
            raise UserError(f"{latest} was trained on {checkpoint['data']['tokenizer']} tokens, and this dataset holds "
                            f"{data['tokenizer']} tokens: take --dataset of the same tokenizer")
        if not config.eval_only and config.resume != "changed":
            refuse_changes(latest, checkpoint, config, model_config, data)
        return checkpoint
    others = [*latest.parent.glob("best.pt"), *sorted(latest.parent.glob(KEPT))]
    log = Log.read(latest.with_name("metrics.jsonl")) if config.resume == "auto" else []
    if not others and any("val_loss" in record or record["step"] > config.save_interval for record in log):
        raise UserError(f"{latest.parent} has no checkpoint, but the log of a run that had one: move metrics.jsonl "
                        "away, take another --out_dir, or --resume=false to start over")
    if config.resume == "auto" and others:
        raise UserError(f"there is no {latest}, but there is {others[-1].name}: copy it to ckpt.pt to go on from "
                        "there, or take --resume=false to start over")
    return None


def refuse_changes(path, checkpoint, config, model_config, data):
    """UserError that names what differs between a checkpoint and the run that wants to continue it."""
    then = checkpoint["config"] | checkpoint["model_config"] | checkpoint["data"]
    now = dataclasses.asdict(config) | dataclasses.asdict(model_config) | data
    others = [key for key in now if key not in FREE and then.get(key) != now[key]]
    changed = ["the files of the dataset are others" if key == "sha256" else
               f"{key} was {then.get(key)}, now {now[key]}" for key in others]
    if changed:
        raise UserError(f"{path} is of another run: {'; '.join(changed)}. Take another --out_dir, the settings of "
                        "then, --resume=changed to go on with the new ones, or --resume=false to start over")


def is_finished(config, step):
    """Is the last step made, and its evaluation, which comes after the save, in the log?"""
    records = Log.read(Path(config.out_dir, "metrics.jsonl"))
    return step >= config.max_steps and any(r["step"] == step and "val_loss" in r for r in records)


# ----------------------------------------------------------------------------------------------------------------------
# The program


@out_of_memory("take a larger --grad_accum (the result is the same), or a smaller --batch_size, --seq_len or --dim")
@processes()
def main():
    config, model_config = configure(sys.argv[1:], TrainConfig, ModelConfig, inherit=settings_to_start_from)
    if not model_config.causal:
        raise UserError("causal=False sees the token it should predict: train.py trains next-token models only")
    wanted_trackers(config)                                                       # complain now, not after preparations
    data = Dataset(Path(config.data_dir) / config.dataset)
    data.give_vocabulary(model_config)
    device = pick_device(config.device)
    # Two processes in one folder would each rename over what the other saved. Evaluating only reads.
    with nullcontext() if config.eval_only or RANK else locked(Path(config.out_dir), "train.py", "--out_dir"):
        checkpoint = find_checkpoint(config, model_config, data.fingerprint)
        config.precision = gather(pick_precision(config.precision, device))[0]     # a probe may differ between machines
        if device.type == "cuda" and config.precision == "bf16":
            torch.set_float32_matmul_precision("high")                            # bf16 values are exact in TF32
        if config.eval_only:
            evaluate_only(config, checkpoint, data, device)
        elif checkpoint and is_finished(config, checkpoint["step"]):
            say(f"the run in {config.out_dir} is finished, at step {checkpoint['step']}: --resume=changed with a "
                "larger --max_steps goes on, another --out_dir starts another run, --resume=false starts this one over")
            if RANK == 0 and not Path(config.out_dir, "loss.png").exists():
                plot_losses(Path(config.out_dir))
        else:
            train(config, model_config, checkpoint, data, device)


def evaluate_only(config, checkpoint, data, device):
    model = load_model(checkpoint, device)
    compile_blocks(model, config.compile, device)
    result = {"step": checkpoint["step"]} | evaluate(model, data.val, data.manifest, config, device)
    if RANK == 0:
        print(json.dumps(result))


def train(config, model_config, checkpoint, data, device):
    Windows(data.val, model_config.seq_len, 0)                                    # complain now, not when evaluating
    run = Run(config, model_config, data, device)
    if checkpoint:
        run.restore(checkpoint)
    elif config.init_from:
        source = load_pretrained(config.init_from)
        start_from(run.model, source, config.init_from)
        if model_config != source.config:
            result = evaluate(source.to(device), data.val, data.manifest, config, device)
            say(f"{config.init_from} itself: val_loss {result['val_loss']:.4f}")
    compile_blocks(run.model, config.compile, device)
    run.spread()
    run.open_folder(fresh=not checkpoint)
    say(f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M parameters, {config.precision} on {device}, "
        f"{run.tokens_per_step:,} tokens a step, "
        f"{run.tokens_per_step * config.max_steps / run.windows.tokens:.2g} epochs"
        + f", {WORLD} processes" * (WORLD > 1)
        + (f", continuing at step {run.step}" if checkpoint else f", from {config.init_from or 'new weights'}"))
    run.train()
    say(f"done: python sample.py --out_dir={run.out_dir}")


if __name__ == "__main__":
    command(main) if WORLD == 1 else run_and_leave(main)
