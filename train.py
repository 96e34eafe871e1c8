"""Trains a language model on the tokens that prepare.py wrote, on a CPU, a CUDA GPU or a Mac.

    python train.py config/tiny.py                    the demo: a small model on Python's own source
    python train.py config/base.py --lr=3e-4          any key of --help can be set in the file or by a flag
    python train.py config/base.py                    the same command again resumes a run that was stopped
    python train.py config/base.py --eval_only        the validation loss of out_dir's checkpoint
    python train.py config/finetune.py --init_from=out/base --dataset=mine    starts from its weights, on other text
    torchrun --standalone --nproc_per_node=2 train.py config/base.py    the same run on two GPUs, or CPU processes

All files of a run are in out_dir: ckpt.pt (the latest state), best.pt (the lowest validation loss), metrics.jsonl (one
JSON object per logged step) and loss.png. The batch of a step depends only on (seed, step), so a resumed run needs no
data state; grad_accum and the processes of torchrun only split it. Only the process of rank 0 writes.
"""
import math
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, command, configure, help_first, shell

help_first(__name__, __file__, "model.py")

from support.checks import at_least, check_choices, check_mixers, require         # support comes before torch
from support.dataset import Dataset, Windows, load_tokenizer
from support.files import locked
from support.machine import (RANK, WORLD, Diverged, autocast, check_memory, compile_blocks, gather, mean,
                             out_of_memory, peak_memory, pick_device, pick_precision, processes, progress, reduce,
                             run_and_leave, say, shard, stop_at_signals, use_tf32)
from support.optim import Spikes, load_named_state, lr_at, make_optimizer, named_state, split_state
from support.report import Journal, plot_losses, print_json, wanted_trackers

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import LM, ModelConfig
from checkpoint import (CHANGED, check_evaluation, clear, find_checkpoint, is_finished, keep, load_model,
                        load_pretrained, refuse_changes, restore_run, save_run, settings_to_start_from, start_from)


@dataclass
class TrainConfig:
    # Data and folders
    dataset: str = "c4"              # name of the dataset: a folder of data_dir that prepare.py wrote
    data_dir: str = "data"           # folder that holds the datasets
    out_dir: str = "out/base"        # folder of the run: its checkpoints, log and loss curve
    init_from: str = ""              # start from the weights of this out_dir, checkpoint file, shared folder or hub id
    plugin: str = ""                 # Python file to run first, which may add to MIXERS and FEATURE_MAPS of model.py

    # Training
    batch_size: int = 64             # sequences per optimiser step, over all pieces and processes
    grad_accum: int = 4              # divides a batch into pieces, to save memory; in nanoGPT it multiplies the batch
    max_steps: int = 20000           # optimiser steps in the run
    optimizer: Literal["adamw", "muon"] = "adamw"  # adamw; or muon for the blocks' matrices, with adamw for the rest
    lr: float = 2e-4                 # peak learning rate
    warmup_steps: int = 200          # steps of linear warmup
    decay_frac: float = 1.0          # share of the steps after warmup, at their end, in which lr falls linearly to zero
    weight_decay: float = 0.1        # weight decay, on matrices only
    beta1: float = 0.9               # AdamW: decay of the running mean of the gradient
    beta2: float = 0.95              # AdamW: decay of the running mean of its square
    grad_clip: float = 1.0           # clip the norm of the gradient to this; 0: do not clip
    seed: int = 1337                 # seed of the initial weights, the order of the data, and dropout

    # The machine
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # precision of matrix products; auto: bf16 where it is faster
    device: str = "auto"             # cpu, cuda, cuda:1 or mps; auto picks the best available
    compile: bool | Literal["auto"] = "auto"  # compile the blocks with torch.compile; auto: on CUDA only
    shard: bool = False              # with torchrun: shard weights, gradients and optimiser over the processes (FSDP2)

    # Logs and checkpoints
    log_interval: int = 10           # steps between log lines
    eval_interval: int = 500         # steps between evaluations
    eval_tokens: int = 2**17         # tokens of validation text per evaluation, always the same ones
    save_interval: int = 500         # steps between checkpoints; each evaluation also saves one first
    keep_last: int = 1               # number of checkpoints to keep: ckpt.pt, and those before it as ckpt-STEP.pt
    max_skips: int = 20              # stop the run after so many skips in a row: steps of non-finite loss or gradient
    skip_spikes: bool = False        # also skip steps whose loss is 6 sigma above the last 128; all are logged anyway
    resume: bool | Literal["auto", "changed", "changed_model"] = "auto"  # auto: resume if out_dir has a run of the same settings; True: there must be one; False: start over; changed: resume with new settings; changed_model: even with settings that change what the weights mean
    tensorboard: bool = False        # also log to out_dir/tensorboard, with samples and the loss curve
    wandb_project: str = ""          # also log to this project of Weights & Biases; WANDB_MODE=offline needs no account
    eval_only: bool = False          # evaluate the checkpoint in out_dir, or init_from, and stop

    # What changes where a run is kept, how often it reports and how fast it goes, but not what it learns.
    FREE = {"data_dir", "out_dir", "grad_accum", "device", "compile", "log_interval", "save_interval",
            "keep_last", "resume", "eval_only", "shard", "tensorboard", "wandb_project", "plugin"}

    def __post_init__(self):
        check_choices(self)
        at_least(self, 1, "batch_size", "grad_accum", "max_steps", "log_interval", "eval_interval", "eval_tokens",
                 "save_interval", "keep_last", "max_skips")
        at_least(self, 0, "warmup_steps", "lr", "weight_decay", "grad_clip", "seed", "decay_frac", "beta1", "beta2")
        products = {"lr": self.lr, "weight_decay": self.weight_decay, "grad_clip": self.grad_clip,
                    "lr times weight_decay": self.lr * self.weight_decay}
        for key, value in products.items():
            require(value <= 1e38, f"{key} must be in the range of fp32, to 1e38, got {value}")
        require(self.decay_frac <= 1, f"decay_frac must be in 0..1, got {self.decay_frac}")
        require(max(self.beta1, self.beta2) < 1, f"beta1 and beta2 must be below 1, got {self.beta1} and {self.beta2}")
        require(self.out_dir, "out_dir must name a folder (. is the one you are in), got none")
        require(self.dataset, "dataset must be the name of a folder in data_dir, got none")
        require(self.seed < 2**63, f"seed must be below 2**63, got {self.seed}")
        require(self.batch_size < 2**31, f"batch_size must be below 2**31, got {self.batch_size}")
        pieces = f"{WORLD} processes times {self.passes} pieces each" if WORLD > 1 else f"grad_accum={self.grad_accum}"
        require(self.batch_size % (self.passes * WORLD) == 0,
                f"batch_size={self.batch_size} must be a multiple of {pieces}")
        if self.shard:
            require(WORLD > 1, "shard splits a model over several processes of torchrun: leave it out")
            require(self.optimizer != "muon", "shard does not work with optimizer=muon, which needs whole matrices: "
                    "use --optimizer=adamw, or leave --shard out")

    @property
    def passes(self):
        """Pieces of a batch that each process goes through, one after the other."""
        return -(-self.grad_accum // WORLD)

    @property
    def piece(self):
        """Sequences in a piece."""
        return self.batch_size // (self.passes * WORLD)


RUINED = 100  # nats per token: no model that has learned anything has such a loss; one of random weights has log(vocab)


# ----------------------------------------------------------------------------------------------------------------------
# The run: its loop, then what a step and an evaluation are


class Run:
    """A training run: the model, the optimiser, its progress, and the files in out_dir that hold them."""

    def __init__(self, config, model_config, data, device):
        self.config = config
        self.model_config = model_config
        self.data = data
        self.device = device
        self.out_dir = Path(config.out_dir)
        self.latest = self.out_dir / "ckpt.pt"
        self.best = self.out_dir / "best.pt"
        self.windows = Windows(data.train, model_config.seq_len, config.seed)
        torch.manual_seed(config.seed)
        self.model = LM(model_config).to("cpu" if config.shard else device)       # a GPU may never hold it whole
        if config.plugin:
            check_mixers(self.model, config.plugin)
        self.parallel = self.model                                                # what train_step calls; see spread
        self.optimizer = make_optimizer(self.model, config)
        self.step = 0
        self.sequences = 0                                                        # consumed: the next batch starts here
        self.tokens = 0
        self.saved = None                                                         # the step that ckpt.pt holds
        self.best_loss = math.inf
        self.unread = []                                                          # what steps gave, still on the device
        self.finite = True                                                        # the loss and gradient read last
        self.spikes = Spikes()
        self.skips = 0
        self.skips_in_a_row = 0

    def train(self):
        """Trains to max_steps, or to the first signal: a step, then reading, logging, saving, evaluating where due."""
        config = self.config
        signals = stop_at_signals()
        stop = 0
        if self.saved is not None and not self.is_sound():
            raise Diverged(f"{self.latest} gives no good loss: copy an earlier one over it, or use --resume=false")
        if self.saved is None and config.init_from:                               # what it starts from is a result too
            self.save_latest()
            if self.saved is None:
                raise Diverged(f"{config.init_from} gives no good loss: use another --init_from")
        with self.journal.progress(self.step, self.tokens):
            pace = self.journal.pace
            while True:
                # First in the loop, since a resumed run may have been killed between the save and the evaluation.
                if self.saved == self.step and self.is_due(config.eval_interval) and not stop:
                    self.evaluate()
                    pace.restart(self.step, self.tokens)
                if self.step >= config.max_steps or stop:
                    break
                self.one_step()
                stop = reduce(max(signals, default=0), dist.ReduceOp.MAX)         # once a step: a stop has its save
                save = stop or self.is_due(config.save_interval) or self.is_due(config.eval_interval)
                if save or self.is_due(config.log_interval) or pace.is_due(self.step):
                    self.read()
                    pace.forecast(self.step, self.tokens)
                if save:
                    self.save_latest()
        if RANK == 0 and not stop:
            plot_losses(self.out_dir)
        self.journal.close(self.step, self.out_dir)
        self.end(stop)

    def end(self, stop):
        """Where the run was stopped, or its last weights are bad, says so and exits."""
        then = "leave out --resume=false to resume" if self.config.resume is False else "the same command resumes"
        if self.saved != self.step:
            then = f"its weights give no good loss, and {self.last_good()}"
        if stop:
            say(f"stopped at step {self.step}; {then}")
            raise SystemExit(128 + stop)
        if self.saved != self.step:
            raise Diverged(f"the run ended at step {self.step}, where {then}")

    def last_good(self):
        if self.saved is None:
            return "nothing was saved: lower --lr, with --resume=false"
        return f"{self.latest} is the last good checkpoint, of step {self.saved}: lower --lr, with --resume=changed"

    def is_due(self, interval):
        return self.step % interval == 0 or self.step >= self.config.max_steps

    def one_step(self):
        result = train_step(self.parallel, self.optimizer, self.windows, self.step, self.config, self.device,
                            self.sequences, self.spikes)
        self.step += 1
        self.sequences += self.config.batch_size
        self.tokens += self.config.batch_size * self.model_config.seq_len
        self.unread.append((self.step, self.tokens, *result))
        self.journal.bar.update()

    def read(self):
        """What the steps since the last call gave: one wait for the device instead of one each."""
        unread, self.unread = self.unread, []
        if not unread:
            return
        numbers = torch.stack([torch.stack([loss, grad_norm]) for _, _, loss, grad_norm, _ in unread]).tolist()
        for (step, tokens, _, _, spike), (loss, grad_norm) in zip(unread, numbers):
            self.finite = math.isfinite(loss) and math.isfinite(grad_norm)
            skip = not self.finite or bool(spike)
            if spike is None:
                spike = self.spikes(loss)
            self.skips += skip
            self.skips_in_a_row = self.skips_in_a_row + 1 if skip else 0
            if spike or skip:
                self.journal.write(step, tokens, loss=loss, grad_norm=grad_norm, spike=spike, skipped=skip,
                                   skips=self.skips)
                say(f"step {step}: loss {loss:.4f}, gradient norm {grad_norm:.3g}" + ", skipped" * skip)
            if self.skips_in_a_row >= self.config.max_skips:
                raise Diverged(f"{self.skips_in_a_row} steps in a row were skipped, for a loss or gradient that was "
                               f"not finite or a spike: {self.last_good()}")
            if step % self.config.log_interval == 0 or step >= self.config.max_steps:
                self.journal.report(step, tokens, loss, lr_at(step - 1, self.config), grad_norm,
                                    peak_memory(self.device))

    def evaluate(self):
        result = evaluate(self.model, self.data.val, self.data.manifest, self.config, self.device)
        say(f"step {self.step}: " + ", ".join(f"{key} {value:.4f}" for key, value in result.items()))
        if result["val_loss"] < self.best_loss:
            self.best_loss = result["val_loss"]
            save_run(self, self.best)
        self.journal.write(self.step, self.tokens, **result)
        if self.journal.trackers and not self.config.shard:                       # shards take all processes to sample
            self.journal.text(self.step, self.sample())

    def sample(self, count=100):
        """A text by the model as it is now, always with the same random numbers."""
        tokenizer = load_tokenizer(self.data.manifest["tokenizer"])
        idx = torch.tensor([[tokenizer.eot]], device=self.device)
        if self.model_config.pos == "learned":
            count = min(count, self.model_config.seq_len - 1)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        with self.reading():
            tokens = [int(token) for token, _ in self.model.generate(idx, count, temperature=0.8, generator=generator)]
        return tokenizer.decode_bytes(tokens).decode(errors="replace")

    @contextmanager
    def reading(self):
        """The model without dropout, and without a compilation of its own for what is done rarely."""
        self.model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast(self.device, self.config.precision):
            yield
        self.model.train()

    def save_latest(self):
        """Saves ckpt.pt, but never bad weights over good ones."""
        if not self.finite or not self.is_sound():
            say(f"step {self.step} is not saved: its weights give no good loss")
            return
        save_run(self, self.latest)
        self.saved = self.step
        if RANK == 0:
            keep(self.latest, self.step, self.config.keep_last)

    def is_sound(self):
        """Whether the weights give a good loss and can be trained further: of 1e30 they may only give the loss."""
        first = self.sequences + RANK * self.config.passes * self.config.piece    # of the batch that comes next
        x, y = self.windows.batch(range(first, first + self.config.piece), self.model_config.vocab_size, self.device)
        parameters = [p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters()]  # of shards
        with self.reading():
            norms = torch.stack(torch._foreach_norm(parameters))                  # a square of 1e20 overflows
            loss = float(self.model(x, y)[0])
        sound = loss < RUINED and bool(norms.isfinite().all())
        return bool(reduce(int(sound), dist.ReduceOp.MIN))

    def open_folder(self, fresh):
        """Clears away what a killed run left half-written (fresh: and the run itself); opens the log."""
        if RANK == 0:
            clear(self.out_dir, fresh)
        self.journal = Journal(self, fresh)
        if RANK == 0 and not fresh:
            keep(self.latest, self.step, self.config.keep_last)                   # a kill may have come just before it

    def spread(self):
        """Distributes the model: whole in each process, with gradients averaged during backward, or in shards."""
        if len({*gather(self.step)}) > 1:                                         # also waits until all have read
            raise UserError(f"the processes find different checkpoints: out_dir={self.out_dir} must be one folder, on "
                            "a file system that all machines share")
        if self.config.shard:
            state = named_state(self.optimizer)
            mesh = shard(self.model, self.device)
            self.optimizer = make_optimizer(self.model, self.config)
            load_named_state(self.optimizer, split_state(state, self.model, mesh, self.device), [])
        elif WORLD > 1:
            self.parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True)


def train_step(model, optimizer, windows, step, config, device, first, spikes):
    """One optimiser step on the sequences from `first` on, or none where the loss or the gradient is not finite.

    Nothing here waits for a GPU, unless skip_spikes does: the optimiser decides there whether to skip.
    Returns: the loss and the norm of its gradient before clipping, on the device; with skip_spikes, whether the loss
    was a spike, and the step skipped for it.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, config)
    torch.manual_seed(int(np.random.default_rng((config.seed, step, RANK)).integers(2**63)))  # dropout differs by rank
    vocab_size = getattr(model, "module", model).config.vocab_size
    loss = 0.0
    for i in range(config.passes):
        start = first + (RANK * config.passes + i) * config.piece
        x, y = windows.batch(range(start, start + config.piece), vocab_size, device)
        alone = isinstance(model, DistributedDataParallel) and i < config.passes - 1
        with autocast(device, config.precision), model.no_sync() if alone else nullcontext():
            part = model(x, y)[0] / config.passes                                 # the mean over the whole batch
        part.backward()                                                           # DDP: the last averages over ranks
        loss = loss + part.detach()
    loss = mean(loss)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    if config.shard:
        grad_norm = grad_norm.full_tensor()
    bad = ~(loss.isfinite() & grad_norm.isfinite())
    spike = spikes(float(loss)) if config.skip_spikes else None
    if config.shard or device.type == "mps":                                      # their AdamW cannot be told to skip
        if not spike and not bad:
            optimizer.step()
    elif not spike:
        optimizer.step(skip=bad)
    optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm, spike


@torch.no_grad()
def evaluate(model, files, manifest, config, device):
    """val_loss (nats per token), ppl and bits_per_byte, over evenly spaced windows of the validation files."""
    model.eval()
    T = model.config.seq_len
    windows = Windows(files, T, seed=0)
    count = min(windows.total, -(-config.eval_tokens // T))
    size = max(1, min(config.piece, count))
    total = 0.0
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


# ----------------------------------------------------------------------------------------------------------------------
# The program


@out_of_memory("use a larger --grad_accum (same result), or a smaller --batch_size, --seq_len, --dim or --depth")
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
        checkpoint = find_checkpoint(config, data.fingerprint)
        if checkpoint and not config.eval_only and config.resume not in CHANGED:
            refuse_changes(Path(config.out_dir, "ckpt.pt"), checkpoint, config, model_config, data.fingerprint)
        config.precision = gather(pick_precision(config.precision, device))[0]     # a probe may differ between machines
        use_tf32(device, config.precision)
        if config.eval_only:
            evaluate_only(config, model_config, checkpoint, data, device)
        elif checkpoint and is_finished(config, checkpoint["step"]):
            say(f"the run in {config.out_dir} is finished, at step {checkpoint['step']}: --resume=changed with a "
                "larger --max_steps continues it, another --out_dir starts another run, --resume=false starts over")
            if RANK == 0 and not Path(config.out_dir, "loss.png").exists():
                plot_losses(Path(config.out_dir))
        else:
            train(config, model_config, checkpoint, data, device)


def evaluate_only(config, model_config, checkpoint, data, device):
    """Prints the validation loss of out_dir's checkpoint, or of init_from, at the seq_len that was asked for."""
    source = config.init_from or Path(config.out_dir, "ckpt.pt")
    model = load_model(checkpoint, device) if checkpoint else load_pretrained(source, device)
    check_evaluation(source, model, model_config)
    model.config.seq_len = model_config.seq_len
    model.config.chunk_size = model_config.chunk_size
    compile_blocks(model, config.compile, device)
    result = {"step": checkpoint["step"]} if checkpoint else {}
    result |= evaluate(model, data.val, data.manifest, config, device)
    if not math.isfinite(result["val_loss"]):
        say(f"{source} is ruined: its loss is not finite")
        raise SystemExit(1)
    if RANK == 0:
        print_json(result)


def train(config, model_config, checkpoint, data, device):
    Windows(data.val, model_config.seq_len, 0)                                    # complain now, not when evaluating
    check_memory(LM, model_config, config, device)
    run = Run(config, model_config, data, device)
    if checkpoint:
        restore_run(run, checkpoint)
    elif config.init_from:
        source = load_pretrained(config.init_from)
        start_from(run.model, source, config.init_from)
        if model_config != source.config:
            result = evaluate(source.to(device), data.val, data.manifest, config, device)
            say(f"{config.init_from} itself: val_loss {result['val_loss']:.4f}")
    compile_blocks(run.model, config.compile, device)
    run.spread()
    run.open_folder(fresh=not checkpoint)
    tokens = config.batch_size * model_config.seq_len
    sequences = run.sequences + (config.max_steps - run.step) * config.batch_size
    say(f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M parameters, {config.precision} on {device}, "
        f"{tokens:,} tokens a step, {sequences / run.windows.total:.2g} epochs"
        + f", {WORLD} processes" * (WORLD > 1)
        + (f", continuing at step {run.step}" if checkpoint else f", from {config.init_from or 'new weights'}"))
    run.train()
    flags = [f"--out_dir={run.out_dir}"] + [f"--plugin={config.plugin}"] * bool(config.plugin)
    say("done: python sample.py " + shell(*flags))


if __name__ == "__main__":
    command(main) if WORLD == 1 else run_and_leave(main)
