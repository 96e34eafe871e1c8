"""Measures this machine: what a config does, beside the same model with softmax attention, in the same run.

    python -m experiments.bench                                     the base model: all but the paper card
    python -m experiments.bench config/gated_deltanet.py --seq_lens=1024,4096 --parts=train
    python -m experiments.bench --precision=bf16 --compile=true --json=bench.json --plot=bench.png
    python -m experiments.bench --parts=card --out_dir=out/base     its perplexity, memory a sequence, tokens/s

Every figure is the median of `repeats` runs after a warm-up, ours alternating with the peer's, with the spread (max -
min) / median where it is above 10 %. Training is forward, backward and the AdamW step; on a GPU a run is four of them,
as in train.py, where no step waits for the one before it. "of peak" is 6 FLOPs for each parameter and token, over the
rate of a large matrix product measured at the start. "FLOPs" is the operations of the softmax model over those that
both models share: the ratio if attention ran at the speed of the rest, and ours cost nothing.

Decoding is what LM.generate runs, weights cast as sample.py casts them; --compile=True compiles its step too. The
softmax model decodes by it too, with a cache that was allocated before, so that its step can be recorded as a CUDA
graph as ours is. A limit is the tokens/s at which weights and states are read once for each token, at a bandwidth
measured at the start.
"""
import dataclasses
import itertools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, command, configure, first_line, help_first

help_first(__name__, __file__, "model.py", "train.py")

from support import kernels, speedups                                             # support comes before torch
from support.dataset import Windows, open_split, read_manifest
from support.files import check_target, read_json, write_json
from support.machine import (autocast, compile_blocks, peak_memory, pick_device, pick_precision, race, say, seconds,
                             use_tf32)
from support.measure import cast_for_decoding, decoding_calls
from support.optim import make_optimizer
from support.report import check_picture, picture, spread, table

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import (FEATURE_MAPS, LM, MIXERS, ModelConfig, SoftmaxAttention, linear_attention_chunked, merge_heads,
                   normalised, rotate, split_heads, state_bytes)
from checkpoint import load_checkpoint, load_model, plugin_first
from train import TrainConfig, evaluate


@dataclass
class BenchConfig:
    parts: str = "train,eval,decode,op"  # what to measure: train, eval, decode, op; or card: out_dir's checkpoint
    seq_lens: str = "256,1024,4096"  # lengths T at which to train, evaluate and run the operation
    positions: str = "100,10000"     # lengths of the text before the tokens that are decoded
    prefill: int = 4096              # most tokens of such a text to read; a longer one repeats the cache of these
    tokens: int = 8192               # tokens per step: tokens / T sequences
    decode_batch: str = "1"          # numbers of texts to decode at once
    repeats: int = 5                 # measurements per figure
    memory: bool = True              # also measure the memory of training
    device: str = "auto"             # as for train.py
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # as for train.py
    compile: bool | Literal["auto"] = "auto"  # as for train.py
    json: str = ""                   # also write the figures to this file
    plot: str = ""                   # also draw the figures to this file; needs matplotlib

    def __post_init__(self):
        for key in ("tokens", "prefill", "repeats"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        try:
            self.lengths = whole_numbers(self.seq_lens)
            self.past = whole_numbers(self.positions)
            self.batches = whole_numbers(self.decode_batch)
        except ValueError:
            raise ValueError("seq_lens, positions and decode_batch are whole numbers with commas: 256,1024") from None
        if min(self.lengths + self.past + self.batches) < 1:
            raise ValueError("seq_lens, positions and decode_batch must be at least 1")
        unknown = set(self.parts.split(",")) - {"train", "eval", "decode", "op", "card"}
        if unknown:
            raise ValueError(f"parts are train, eval, decode, op and card, not {', '.join(sorted(unknown))}")

    @property
    def dtype(self):
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def whole_numbers(text):
    return [int(number) for number in text.split(",")]


# ----------------------------------------------------------------------------------------------------------------------
# Peaks of the machine


def machine_peaks(device, dtype):
    """(FLOP/s of a matrix product, bytes/s of the fastest way to read a matrix that no cache holds)."""
    n, rows = (8192, 2**18) if device.type == "cuda" else (2048, 2**15)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    matrix = torch.randn(rows, 4096, device=device).to(dtype)
    vector = torch.randn(4096, device=device).to(dtype)
    calls = [
        lambda: a @ b,
        lambda: matrix @ vector,
        lambda: matrix.sum(-1),
    ]
    product, *reads = race(calls, device, 7)
    size = matrix.numel() * matrix.element_size()
    return 2 * n ** 3 / min(product), size / min(map(min, reads))


# ----------------------------------------------------------------------------------------------------------------------
# What is measured: each function returns a call for race()


def training(config, T, bench, device):
    """(A call that trains, the tokens that it trains on)."""
    model = LM(dataclasses.replace(config, seq_len=T)).to(device)
    compile_blocks(model, bench.compile, device)
    optimizer = make_optimizer(model, TrainConfig())
    idx = random_tokens(config, bench.tokens // T, T, device)

    def step():
        with autocast(device, bench.precision):
            loss, _ = model(idx, idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    steps = 4 if device.type == "cuda" else 1

    def train():
        for _ in range(steps):
            step()
    return train, steps * idx.numel()


def evaluation(config, T, bench, device):
    """(A call that evaluates, the tokens that it evaluates)."""
    model = LM(dataclasses.replace(config, seq_len=T)).to(device).eval()
    compile_blocks(model, bench.compile, device)
    idx = random_tokens(config, bench.tokens // T, T, device)

    @torch.no_grad()
    def step():
        with autocast(device, bench.precision):
            model(idx, idx)
    return step, idx.numel()


class FixedCache(SoftmaxAttention):
    """Softmax attention whose cache was allocated before, with one place for the next token, which is written there
    again and again: a step at this length, without copies of the cache, of fixed shapes."""

    def forward(self, x, state, ropes):
        if state is None or x.shape[1] > 1:
            return super().forward(x, state, ropes)
        conv_state, (keys, values) = state
        qkv = self.qkv(x)
        if self.config.short_conv:
            qkv, conv_state = self.conv(qkv, conv_state)
        q, k, v = split_heads(qkv, self.config.n_heads, [self.config.dim] * 3)
        rope = ropes.get(q.shape[-1])
        keys[:, :, -1:] = rotate(k, rope)
        values[:, :, -1:] = v
        y = speedups.cached_attention(rotate(q, rope), keys, values)
        return self.out(merge_heads(y)), (conv_state, (keys, values))


MIXERS["fixed_cache"] = FixedCache


def decoding(config, past, B, bench, device, steps=32):
    """(A call that decodes `steps` tokens in B texts of `past`, seconds to read a token, bytes of one text's state)."""
    read = min(past, bench.prefill)
    model = LM(dataclasses.replace(config, seq_len=past + 1000 * steps)).to(device)
    model = cast_for_decoding(model, bench.precision)
    prompt = random_tokens(config, B, read, device)
    seen = {}

    @torch.no_grad()
    def fill():
        with autocast(device, bench.precision):
            seen["state"] = model.hidden(prompt)[1]
    fill()
    took = seconds(fill, device) / (B * read)
    short = seen["state"]
    layers = [longer(*pair, past) for pair in zip(short["layers"], itertools.cycle(config.mixers))]
    state = {"tokens": torch.full_like(short["tokens"], past), "layers": layers}
    size = state_bytes(layers) / B
    compiled = bench.compile is True
    call = decoding_calls(model, prompt[:, :1], steps, device, bench.precision, state, compiled=compiled)
    return call, took, size


def longer(layer, mixer, past):
    """The state of a layer after `past` tokens, from that after fewer: only a cache is longer, and is repeated."""
    if mixer not in ("softmax", "fixed_cache"):
        return layer
    conv_state, cache = layer
    length = past + (mixer == "fixed_cache")
    copies = -(-length // cache[0].shape[2])
    repeated = [z.repeat(1, 1, copies, 1) for z in cache]
    return conv_state, tuple(z[:, :, :length].contiguous() for z in repeated)


def attention(q, k, v, log_decay=None, beta=None, feature_map="elu", normalise=False):
    """The operation as the linear mixer runs it: the feature map and the chunked form."""
    phi = FEATURE_MAPS[feature_map]
    q, k, *_ = phi.pairs(q, k, None)
    if normalise:
        return normalised(linear_attention_chunked, q, k, v, q, k)[0]
    return linear_attention_chunked(q, k, v, log_decay, beta)[0]


def operations(T, bench, device):
    """{name: (forward, forward and backward)} of the operation alone, on the same inputs: 8 heads of 64."""
    B = max(1, bench.tokens // T)

    def inputs(width):
        return torch.randn(B, 8, T, width, device=device, dtype=bench.dtype).requires_grad_()
    q, k, v = inputs(64), inputs(64), inputs(64)
    q16, k16 = inputs(16), inputs(16)
    g = F.logsigmoid(torch.randn(B, 8, T, device=device) + 4).requires_grad_()
    beta = torch.rand(B, 8, T, device=device).requires_grad_()
    upstream = torch.randn_like(v)                                    # a sum's gradient, of stride 0, is slow

    ours = attention
    compiled = bench.compile is True or bench.compile == "auto" and device.type == "cuda"
    if compiled and not kernels.available(q, v):
        ours = torch.compile(attention, dynamic=False)

    def calls(attend, *inputs, **options):
        @torch.no_grad()
        def forward():
            attend(*inputs, **options)

        def both():
            wanted = [x for x in inputs if x is not None]
            torch.autograd.grad(attend(*inputs, **options), wanted, upstream)
        return forward, both
    table = {
        "softmax (SDPA)": calls(F.scaled_dot_product_attention, q, k, v, is_causal=True),
        "elu, normalised": calls(ours, q, k, v, feature_map="elu", normalise=True),
        "taylor 16, normalised": calls(ours, q16, k16, v, feature_map="taylor", normalise=True),
        "gated": calls(ours, q, k, v, g, feature_map="identity"),
        "delta rule": calls(ours, q, k, v, None, beta, feature_map="silu_l2"),
        "gated delta rule": calls(ours, q, k, v, g, beta, feature_map="silu_l2"),
    }
    if device.type == "cuda":
        table |= peers(q, k, v, g, beta, calls)
    return table


def peers(q, k, v, g, beta, calls):
    """flash-linear-attention's kernels on the same inputs, where it is installed. Its layout is (B,T,H,d)."""
    try:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return {}

    def theirs(x):
        return x.detach().transpose(1, 2).contiguous().requires_grad_()
    q, k, v, g = theirs(q), theirs(k), theirs(v), theirs(g)
    beta = theirs(beta.to(q.dtype))

    def gated(*inputs):
        return chunk_simple_gla(*inputs)[0]

    def delta(*inputs):
        return chunk_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)[0]

    def gated_delta(*inputs):
        return chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)[0]
    return {
        "fla gated": calls(gated, q, k, v, g),
        "fla delta rule": calls(delta, q, k, v, beta),
        "fla gated delta rule": calls(gated_delta, q, k, v, g, beta),
    }


def random_tokens(config, B, T, device):
    return torch.randint(config.vocab_size, (max(1, B), T), device=device)


def memory_per_sequence(config, T, bench, device):
    """Bytes that a sequence more adds to a training step: on a GPU its peak, on a CPU what backward needs kept."""
    if device.type == "cuda":
        def peak(B):
            train, _ = training(config, T, dataclasses.replace(bench, tokens=B * T, compile=False), device)
            train()
            torch.cuda.reset_peak_memory_stats()
            train()
            return torch.cuda.max_memory_allocated()
        return (peak(3) - peak(1)) / 2
    storages = {}
    model = LM(dataclasses.replace(config, seq_len=T))
    idx = random_tokens(config, 1, T, device)
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


def measure(bench, config, device):
    """{part: rows} and what they were measured on, printed as tables."""
    pos = "rope" if config.pos == "none" else config.pos
    peer = dataclasses.replace(config, mixers=["softmax"], pos=pos)
    flops, bandwidth = machine_peaks(device, bench.dtype)
    parameters = sum(p.numel() for p in LM(config).parameters())
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    print(f"{name}, {bench.precision}, torch {torch.__version__}: matrix products {flops / 1e12:.3g} TFLOP/s, memory "
          f"{bandwidth / 1e9:,.0f} GB/s; {parameters / 1e6:.2f} M parameters, vocabulary {config.vocab_size:,}, "
          f"mixers {' '.join(config.mixers)}")
    figures = {
        "machine": name,
        "precision": bench.precision,
        "torch": torch.__version__,
        "flops": flops,
        "bandwidth": bandwidth,
        "parameters": parameters,
        "config": dataclasses.asdict(config),
    }
    parts = {
        "train": ("Training", passes, bench.lengths),
        "eval": ("Evaluation", passes, bench.lengths),
        "decode": ("Decoding", decodings, list(itertools.product(bench.batches, bench.past))),
        "op": ("The operation alone, 8 heads of 64", operation_rows, bench.lengths),
    }
    for part in [part for part in parts if part in bench.parts.split(",")]:
        title, rows, sizes = parts[part]
        figures[part] = []
        for size in tqdm(sizes, desc=part, disable=None, leave=False):
            figures[part] += rows(size, part, (config, peer), bench, device, figures)
        table(title, figures[part])
    return figures


def passes(T, part, configs, bench, device, figures):
    """Training steps, or evaluations, at length T."""
    make, flops = (training, 6) if part == "train" else (evaluation, 2)
    calls, (tokens, _) = zip(*[make(config, T, bench, device) for config in configs])
    mine, theirs = race(calls, device, bench.repeats)
    speed = tokens / statistics.median(mine)
    peer_speed = tokens / statistics.median(theirs)
    parameters = figures["parameters"]
    row = {
        "T": T,
        "tokens/s": speed,
        "softmax": peer_speed,
        "ratio": round(speed / peer_speed, 2),
        "spread": spread(mine, theirs),
        "of peak": round(speed * parameters * flops / figures["flops"], 2),
    }
    if part == "train":
        ours, peer = configs
        linear_layers = (ours.mixers * ours.depth)[:ours.depth].count("linear")
        row["FLOPs"] = round(1 + linear_layers * T * ours.dim / parameters, 2)  # causal: T/2 keys
        if bench.memory:
            row["MB a sequence"] = memory_per_sequence(ours, T, bench, device) / 1e6
            row["softmax MB"] = memory_per_sequence(peer, T, bench, device) / 1e6
    yield row


def decodings(batch_and_past, part, configs, bench, device, figures):
    """Tokens after a text of this length, in this number of texts."""
    B, past = batch_and_past
    ours, peer = configs
    peer = dataclasses.replace(peer, mixers=["fixed_cache"])
    call, read, state = decoding(ours, past, B, bench, device)
    peer_call, peer_read, cache = decoding(peer, past, B, bench, device)
    mine, theirs = race([call, peer_call], device, bench.repeats)
    speed = 32 * B / statistics.median(mine)
    peer_speed = 32 * B / statistics.median(theirs)
    weights = figures["parameters"] * bench.dtype.itemsize
    limit = B * figures["bandwidth"] / (weights + B * state)
    peer_limit = B * figures["bandwidth"] / (weights + B * cache)
    yield {
        "texts": B,
        "after": past,
        "tokens/s": speed,
        "of its limit": round(speed / limit, 2),
        "softmax": peer_speed,
        "of softmax's limit": round(peer_speed / peer_limit, 2),
        "softmax's limit": peer_limit,
        "ratio": round(speed / peer_speed, 2),
        "spread": spread(mine, theirs),
        "prefill tokens/s": 1 / read,
        "softmax prefill": 1 / peer_read,
        "MB a text": state / 1e6,
        "softmax MB": cache / 1e6,
    }


def operation_rows(T, part, configs, bench, device, figures):
    """The operation in all its variants at length T, each beside SDPA."""
    works = {}
    for name, (forward, both) in operations(T, bench, device).items():
        try:                                                          # fla's kernels refuse some machines
            forward()
            both()
            works[name] = forward, both
        except Exception as error:
            if not name.startswith("fla"):
                raise
            say(f"{name}: {first_line(error)[:100]}")
    times = race(list(itertools.chain(*works.values())), device, bench.repeats)
    sdpa = statistics.median(times[1])
    for name, *columns in zip(works, times[::2], times[1::2]):
        forward, both = map(statistics.median, columns)
        yield {
            "T": T,
            "operation": name,
            "forward, ms": forward * 1e3,
            "and backward, ms": both * 1e3,
            "times SDPA's speed": round(sdpa / both, 2),
            "spread": spread(*columns),
        }


def card(bench, train_config, device):
    """The paper card's three figures, of the best checkpoint in out_dir on its dataset's validation text."""
    paths = [Path(train_config.out_dir, name) for name in ("best.pt", "ckpt.pt")]
    checkpoint = load_checkpoint(next((path for path in paths if path.exists()), paths[1]))
    folder = Path(train_config.data_dir, checkpoint["config"]["dataset"])
    manifest = read_manifest(folder)
    model, files = load_model(checkpoint, device), open_split(folder, manifest, "val")
    compile_blocks(model, bench.compile, device)
    T = model.config.seq_len
    settings = dataclasses.replace(train_config, precision=bench.precision)
    count = min(Windows(files, T, 0).total, -(-settings.eval_tokens // T))
    results = []

    def evaluate_once():
        results.append(evaluate(model, files, manifest, settings, device))
    times, = race([evaluate_once], device, bench.repeats)
    row = {
        "perplexity": results[-1]["ppl"],
        "tokens": count * T,
        "T": T,
        "tokens/s evaluating": count * T / statistics.median(times),
        "spread": spread(times),
        "MB a sequence in training": memory_per_sequence(model.config, T, bench, device) / 1e6,
    }
    table(f"The paper card, {checkpoint['config']['dataset']}", [row])
    return row


def plot_costs(figures, path):
    """Cost of a token against T, training; and of its decoding, what one text's state takes: ours and softmax's."""
    mixers = " ".join(figures["config"]["mixers"])

    def draw_part(panel, part, x, keys, cost):
        texts = figures[part][0].get("texts")
        rows = [row for row in figures[part] if row.get("texts") == texts]
        where = [row[x] for row in rows]
        for key, label in zip(keys, (mixers, "softmax")):
            panel.plot(where, [cost(row[key]) for row in rows], marker="o", label=label)
        panel.set(xscale="log", yscale="log")
        panel.legend()
        panel.grid(alpha=0.3, which="both")

    def draw(axes):
        panels = list(axes[0])
        if "train" in figures:
            draw_part(panels[0], "train", "T", ("tokens/s", "softmax"), lambda speed: 1e6 / speed)
            panels.pop(0).set(xlabel="length T", ylabel="microseconds a token, training")
        if "decode" in figures:
            draw_part(panels[0], "decode", "after", ("MB a text", "softmax MB"), float)
            panels[0].set(xlabel="tokens before", ylabel="MB of state a text, decoding")
        axes[0, 0].figure.suptitle(figures["machine"])
    count = len({"train", "decode"} & {*figures})
    picture(path, draw, ncols=count, figsize=(5 * count, 4), squeeze=False)


def vocabulary(config, train_config):
    """Gives config its dataset's vocabulary, unless it was given one; of a dataset not prepared, what it would have."""
    if config.vocab_size == ModelConfig.vocab_size:
        try:
            config.vocab_size = read_manifest(Path(train_config.data_dir, train_config.dataset))["vocab_size"]
        except UserError:
            config.vocab_size = 257 if train_config.dataset == "stdlib" else config.vocab_size


def read_settings(argv):
    """The BenchConfig, TrainConfig and ModelConfig of a command line; the model has its dataset's vocabulary."""
    bench, train_config, config = configure(argv, BenchConfig, TrainConfig, ModelConfig, inherit=plugin_first)
    vocabulary(config, train_config)
    return bench, train_config, config


def main():
    bench, train_config, config = read_settings(sys.argv[1:])
    device, parts = pick_device(bench.device), bench.parts.split(",")
    bench.precision = pick_precision(bench.precision, device)
    use_tf32(device, bench.precision)
    if bench.plot and not {"train", "decode"} & set(parts):
        raise UserError("--plot draws training and decoding: add train or decode to --parts")
    if bench.json:
        check_target(bench.json, "json", lambda path: read_json(path, "machine") or read_json(path, "card"))
    if bench.plot:
        check_picture(bench.plot)
    figures = {"card": card(bench, train_config, device)} if "card" in parts else {}
    if parts != ["card"]:
        figures |= measure(bench, config, device)
    say(f"peak memory of this process: {peak_memory(device) / 1e9:.2f} GB")
    if bench.json:
        write_json(Path(bench.json), figures, indent=1)
    if bench.plot:
        plot_costs(figures, Path(bench.plot))


if __name__ == "__main__":
    command(main)
