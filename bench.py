"""Measures this machine: what a config does, beside the same model with softmax attention, in the same run.

    python bench.py                                            the base model: training, evaluation, decoding, the operation
    python bench.py config/gated_deltanet.py --seq_lens=1024,4096 --parts=train
    python bench.py --precision=bf16 --compile=true --json=bench.json --plot=bench.png

Every figure is the median of `repeats` runs after a warm-up, ours and the peer's in turn, with the spread (max - min) /
median where it is above 10 %. Training is forward, backward and the AdamW step. "of peak" is 6 FLOPs for each parameter
and token, over the rate of a large matrix product measured at the start; for decoding it is the time to read all
weights once, at a bandwidth measured at the start, over the time of a step.
"""
import dataclasses
import json
import statistics
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin starve where a core is shared

import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import UserError, command, configure
from model import LM, ModelConfig, linear_attention_chunked
from train import (TrainConfig, autocast, compile_blocks, make_optimizer, peak_memory, pick_device, pick_precision,
                   replacing, say)


@dataclass
class BenchConfig:
    parts: str = "train,eval,decode,op"  # what to measure
    seq_lens: str = "256,1024,4096"  # lengths T to train, evaluate and run the operation at
    positions: str = "100,10000"     # lengths of the text before the tokens that are decoded
    tokens: int = 8192               # tokens in a step: tokens / T sequences
    decode_batch: int = 1            # texts decoded at once
    repeats: int = 5                 # measurements of each figure
    device: str = "auto"             # as for train.py
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as for train.py
    compile: bool | Literal["auto"] = "auto"  # as for train.py
    json: str = ""                   # also write the figures to this file
    plot: str = ""                   # also draw them to this file: needs matplotlib

    def __post_init__(self):
        for key in ("tokens", "decode_batch", "repeats"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        try:
            self.lengths, self.past = ([int(n) for n in text.split(",")] for text in (self.seq_lens, self.positions))
        except ValueError:
            raise ValueError("seq_lens and positions are whole numbers separated by commas, as in 256,1024") from None
        if unknown := set(self.parts.split(",")) - {"train", "eval", "decode", "op"}:
            raise ValueError(f"parts are train, eval, decode and op, not {', '.join(sorted(unknown))}")


# ----------------------------------------------------------------------------------------------------------------------
# Clocks


def seconds(call, device):
    """Wall time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(calls, device, repeats):
    """Times of each call, run in turn `repeats` times after a warm-up, so that a drifting machine favours none."""
    for call in calls:
        call(), call()
    times = [[seconds(call, device) for call in calls] for _ in range(repeats)]
    return [list(column) for column in zip(*times)]


def machine_peaks(device, dtype):
    """(FLOP/s of a matrix product, bytes/s of a matrix-vector product that reads far more than any cache holds)."""
    n, rows = (8192, 2**18) if device.type == "cuda" else (2048, 2**15)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    matrix, vector = torch.randn(rows, 4096, device=device).to(dtype), torch.randn(4096, device=device).to(dtype)
    flops = 2 * n ** 3 / min(race([lambda: a @ b], device, 7)[0])
    return flops, matrix.numel() * matrix.element_size() / min(race([lambda: matrix @ vector], device, 7)[0])


# ----------------------------------------------------------------------------------------------------------------------
# What is measured: each function returns a call for race()


def training(config, T, bench, device):
    model = LM(dataclasses.replace(config, seq_len=T)).to(device)
    compile_blocks(model, bench.compile, device)
    optimizer, idx = make_optimizer(model, TrainConfig()), random_tokens(config, bench.tokens // T, T, device)

    def step():
        with autocast(device, bench.precision):
            loss, _ = model(idx, idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def evaluation(config, T, bench, device):
    model = LM(dataclasses.replace(config, seq_len=T)).to(device).eval()
    compile_blocks(model, bench.compile, device)
    idx = random_tokens(config, bench.tokens // T, T, device)

    @torch.no_grad()
    def step():
        with autocast(device, bench.precision):
            model(idx, idx)
    return step


def decoding(config, past, bench, device, steps=32):
    """Decodes `steps` tokens after a text of `past`: the prompt is short, and then the state is made as long."""
    dtype = torch.bfloat16 if bench.precision == "bf16" else torch.float32
    model = LM(dataclasses.replace(config, seq_len=past + 2 * steps)).to(device, dtype).eval()
    prompt = random_tokens(config, bench.decode_batch, min(past, 64), device)
    token = prompt[:, :1]

    def grow(layer, mixer):
        if mixer != "softmax":
            return layer
        return tuple(z.repeat(1, 1, -(-past // z.shape[2]), 1)[:, :, :past].contiguous() for z in layer)
    with torch.no_grad():
        state = model(prompt)[1]
    pattern = config.mixers * config.depth
    state = {"tokens": torch.full_like(state["tokens"], past), "layers": [grow(*pair) for pair in zip(state["layers"], pattern)]}

    @torch.no_grad()
    def step():
        now = state
        for _ in range(steps):
            _, now = model(token, state=now)
    return step


def operation(attend, T, bench, device):
    """Forward and backward of the operation alone: elu+1 with its normaliser, or softmax, 8 heads of 64."""
    dtype = torch.bfloat16 if bench.precision == "bf16" else torch.float32
    q, k, v = (torch.randn(bench.tokens // T, 8, T, 64, device=device, dtype=dtype).requires_grad_() for _ in range(3))

    def step():
        torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
    return step


def elu_attention(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return linear_attention_chunked(q, k, v, divide_by=(q, k))[0]


def softmax_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def random_tokens(config, B, T, device):
    return torch.randint(config.vocab_size, (max(1, B), T), device=device)


def memory_per_sequence(config, T, bench, device):
    """Bytes that one more sequence adds to a training step: on a GPU its peak, on a CPU what backward needs of forward."""
    if device.type == "cuda":
        def peak(B):
            step = training(config, T, dataclasses.replace(bench, tokens=B * T, compile=False), device)
            step()
            torch.cuda.reset_peak_memory_stats()
            step()
            return torch.cuda.max_memory_allocated()
        return (peak(3) - peak(1)) / 2
    storages = {}
    model, idx = LM(dataclasses.replace(config, seq_len=T)), random_tokens(config, 1, T, device)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def saved(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor), autocast(device, bench.precision):
        x, _ = model.hidden(idx)
    return sum(storages.values())


# ----------------------------------------------------------------------------------------------------------------------
# The tables


def show(cell):
    return f"{cell:,.0f}" if isinstance(cell, (int, float)) and abs(cell) >= 100 else f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def table(title, rows):
    """Prints rows (dicts with the same keys) as a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(show, row.values()))} |")
    sys.stdout.flush()


def spread(*columns):
    widest = max((max(times) - min(times)) / statistics.median(times) for times in columns)
    return f"{widest:.0%}" if widest > 0.1 else ""


def measure(bench, config, device):
    peer = dataclasses.replace(config, mixers=["softmax"], pos="rope" if config.pos == "none" else config.pos)
    flops, bandwidth = machine_peaks(device, torch.bfloat16 if bench.precision == "bf16" else torch.float32)
    parameters = sum(p.numel() for p in LM(config).parameters())
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    print(f"{name}, {bench.precision}, torch {torch.__version__}: matrix products {flops / 1e12:.3g} TFLOP/s, memory "
          f"{bandwidth / 1e9:,.0f} GB/s; {parameters / 1e6:.2f} M parameters, mixers {' '.join(config.mixers)}")
    figures = {"machine": name, "precision": bench.precision, "torch": torch.__version__, "flops": flops,
               "bandwidth": bandwidth, "parameters": parameters, "config": dataclasses.asdict(config)}
    parts = bench.parts.split(",")
    for part, make in (("train", training), ("eval", evaluation)):
        rows = []
        for T in tqdm(bench.lengths if part in parts else [], desc=part, disable=None, leave=False):
            mine, theirs = race([make(c, T, bench, device) for c in (config, peer)], device, bench.repeats)
            speed, peer_speed = (max(1, bench.tokens // T) * T / statistics.median(times) for times in (mine, theirs))
            row = {"T": T, "tokens/s": speed, "softmax": peer_speed, "ratio": round(speed / peer_speed, 2),
                   "spread": spread(mine, theirs), "of peak": round(speed * parameters * (6 if part == "train" else 2) / flops, 2)}
            if part == "train":
                row |= {f"MB a sequence": memory_per_sequence(config, T, bench, device) / 1e6,
                        "softmax MB": memory_per_sequence(peer, T, bench, device) / 1e6}
            rows.append(row)
        if rows:
            table({"train": "Training", "eval": "Evaluation"}[part], rows)
            figures[part] = rows
    if "decode" in parts:
        rows = []
        for past in tqdm(bench.past, desc="decode", disable=None, leave=False):
            mine, theirs = race([decoding(c, past, bench, device) for c in (config, peer)], device, bench.repeats)
            speed, peer_speed = (32 * bench.decode_batch / statistics.median(times) for times in (mine, theirs))
            limit = bandwidth / (parameters * (2 if bench.precision == "bf16" else 4)) * bench.decode_batch
            rows.append({"after": past, "tokens/s": speed, "softmax": peer_speed, "ratio": round(speed / peer_speed, 2),
                         "spread": spread(mine, theirs), "of peak": round(speed / limit, 2)})
        table(f"Decoding, {bench.decode_batch} at once", rows)
        figures["decode"] = rows
    if "op" in parts:
        rows = []
        for T in tqdm(bench.lengths, desc="op", disable=None, leave=False):
            forms = (elu_attention, softmax_attention)
            if bench.compile is True or bench.compile == "auto" and device.type == "cuda":
                forms = (torch.compile(elu_attention, dynamic=False), softmax_attention)
            mine, theirs = race([operation(f, T, bench, device) for f in forms], device, bench.repeats)
            rows.append({"T": T, "linear, ms": statistics.median(mine) * 1e3, "softmax, ms": statistics.median(theirs) * 1e3,
                         "ratio": round(statistics.median(theirs) / statistics.median(mine), 2), "spread": spread(mine, theirs)})
        table("The operation alone, forward and backward, 8 heads of 64", rows)
        figures["op"] = rows
    return figures


def plot(figures, path):
    """Tokens per second against T, ours and softmax."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for key, label in (("tokens/s", " ".join(figures["config"]["mixers"])), ("softmax", "softmax")):
        axes.plot([row["T"] for row in figures["train"]], [row[key] for row in figures["train"]], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="sequence length T", ylabel="training tokens per second", title=figures["machine"])
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")


def main():
    bench, config, _ = configure(sys.argv[1:], BenchConfig, ModelConfig, TrainConfig, doc=__doc__)
    device = pick_device(bench.device)
    bench.precision = pick_precision(bench.precision, device)
    if device.type == "cuda" and bench.precision == "bf16":
        torch.set_float32_matmul_precision("high")
    if bench.plot and "train" not in bench.parts.split(","):
        raise UserError("--plot draws the training speeds: add train to --parts")
    figures = measure(bench, config, device)
    say(f"peak memory of this process: {peak_memory(device) / 1e9:.2f} GB")
    if bench.json:
        with replacing(Path(bench.json)) as temporary:
            temporary.write_text(json.dumps(figures, indent=1))
    if bench.plot:
        plot(figures, bench.plot)


if __name__ == "__main__":
    command(main)
