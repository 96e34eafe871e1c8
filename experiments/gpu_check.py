"""Is everything as fast on this GPU as it was? The kernel tests, then each preset beside the softmax preset.

    make gpu-check                                  before a commit that changes what a GPU runs
    python -m experiments.gpu_check --save=True     keeps the ratios of this run as those to compare with

Each preset trains and decodes as experiments/bench.py measures it, in bf16 and compiled (decoding recorded, not
compiled), at T = 1024, its runs alternating with those of the softmax preset. The ratio of the two is compared with
what experiments/gpu_ratios.json keeps for this card. What is more than 5 % below says so, and the exit code is 1, as
where a test fails. While the tests run, each preset is compiled in a process of its own (--warm); what is timed then
has the GPU for itself, and finds its code in Inductor's cache. On one H100 with 16 cores and empty caches, all of it
took 238 s.
"""
import os
import statistics
import subprocess
import sys
import time
from concurrent import futures
from dataclasses import dataclass, replace
from pathlib import Path

from configurator import Failed, UserError, command, configure, help_first

help_first(__name__, __file__, config_file=False)

from support.advice import usable_cores                                           # support comes before torch
from support.files import check_target, read_json, write_json
from support.machine import allow_recompiles, device_name, pick_device, race, say, use_tf32
from support.report import table

from tqdm import tqdm

from experiments.bench import decoding, read_settings, training

ROOT = Path(__file__).resolve().parent.parent
RATIOS = ROOT / "experiments/gpu_ratios.json"
PRESETS = ["base", "based", "retnet", "deltanet", "gated_deltanet", "hybrid", "hybrid_softmax", "tiny"]
SIZES = ["--tokens=32768", "--prefill=1024", "--precision=bf16"]
TRY = ["--dim=32", "--n_heads=2", "--depth=3", "--feature_dim=8", "--vocab_size=300", "--tokens=2048", "--prefill=64",
       "--precision=fp32"]                                                        # for --quick: as on a laptop
REPEATS = 5
BELOW = 0.95                                                                      # of the ratio kept: exit code 1


@dataclass
class CheckConfig:
    presets: str = ""                # presets of config/, with commas; empty: all but softmax, the peer of each
    tests: bool = True               # also run the kernel tests
    save: bool = False               # keep the ratios of this run for this card
    json: str = ""                   # also write all figures to this file
    quick: bool = False              # tiny models, on a CPU too: tries the check itself, its ratios mean nothing
    warm: bool = False               # only compile the presets: what the check itself starts
    device: str = "auto"             # as for train.py

    def __post_init__(self):
        self.names = self.presets.split(",") if self.presets else PRESETS
        for name in self.names:
            if not (ROOT / f"config/{name}.py").exists():
                raise ValueError(f"presets: there is no config/{name}.py; use some of {','.join(PRESETS)}")


# ----------------------------------------------------------------------------------------------------------------------
# The kernel tests, and the compiling of all presets, side by side


def run(words):
    """(Exit code, output) of a command, in one thread of PyTorch's."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    done = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def kernel_tests(count):
    """Commands that run the kernel tests, each a share of them: most of their time is compiling."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = ["tests/test_support_kernels.py", "tests/test_support_speedups.py"]
    code, output = run([*words, *files, "--collect-only"])
    names = [line for line in output.splitlines() if "::" in line]
    if code or not names:
        raise UserError(f"the kernel tests cannot be collected: {last_line(output)}")
    shares = [names[i::count] for i in range(min(count, len(names)))]
    return [[*words, *share] for share in shares]


def last_line(output):
    return (output.strip() or "no output").splitlines()[-1]


def prepare(config):
    """Runs the tests and compiles the presets. Returns the output of those tests that failed."""
    tests = kernel_tests(max(1, usable_cores() // 2)) if config.tests else []
    own = [sys.executable, "-m", "experiments.gpu_check", "--warm=True", f"--device={config.device}",
           f"--quick={config.quick}"]
    warm = [[*own, f"--presets={name}"] for name in ["softmax", *config.names]]
    with futures.ThreadPoolExecutor(len(tests) or 1) as test_pool, futures.ThreadPoolExecutor(4) as warm_pool:
        tested = test_pool.map(run, tests)
        compiled = warm_pool.map(run, warm)
        for words, (code, output) in zip(warm, compiled):
            if code:
                raise Failed(f"{words[-1]} does not run: {last_line(output)}")
        return [output for code, output in tested if code not in (0, 5)]          # 5: all were deselected


# ----------------------------------------------------------------------------------------------------------------------
# What is timed


def calls(preset, config, device):
    """{"train", "decode": (a call, the tokens that it trains on or makes)} of a preset."""
    sizes = TRY if config.quick else SIZES
    bench, _, model = read_settings([f"{ROOT}/config/{preset}.py", *sizes])
    T = 64 if config.quick else 1024
    mixers = ["fixed_cache" if mixer == "softmax" else mixer for mixer in model.mixers]  # caches allocated before
    decode, _, _ = decoding(replace(model, mixers=mixers), T, 1, bench, device)
    return {"train": training(model, T, bench, device), "decode": (decode, 32)}


def compare(mine, peer, device):
    """{part: {"tokens/s", "softmax", "ratio"}} of two results of calls()."""
    figures = {}
    for part, (call, tokens) in mine.items():
        peer_call, peer_tokens = peer[part]
        times, peer_times = map(statistics.median, race([call, peer_call], device, REPEATS))
        speed, peer_speed = tokens / times, peer_tokens / peer_times
        figures[part] = {"tokens/s": speed, "softmax": peer_speed, "ratio": round(speed / peer_speed, 3)}
    return figures


def verdict(preset, figures, kept):
    """A row of the table: the ratios of a preset, those kept, and what is to be said of them."""
    row, words = {"preset": preset}, []
    for part, found in figures.items():
        before = kept.get(preset, {}).get(part)
        row[f"{part}, tokens/s"] = found["tokens/s"]
        row[f"{part}, times softmax"] = found["ratio"]
        row[f"{part}, kept"] = before or "none"
        if before and found["ratio"] < BELOW * before:
            words.append(f"{part} is {1 - found['ratio'] / before:.0%} below")
    return row | {"": ", ".join(words) or "ok"}


def main():
    start = time.monotonic()
    config, = configure(sys.argv[1:], CheckConfig, config_file=False)
    if config.json:
        check_target(config.json, "json", lambda path: read_json(path, "card", "figures"))
    device = pick_device(config.device)
    if device.type != "cuda" and not config.quick:
        raise UserError("gpu_check times kernels that only an Nvidia GPU runs, and there is none: --quick=True tries "
                        "the check itself")
    use_tf32(device, "bf16")
    allow_recompiles(64)                                                          # all presets compile Block.forward
    if config.warm:
        for name in config.names:
            for call, _ in calls(name, config, device).values():
                call()
        return
    card = device_name(device)
    kept = read_json(RATIOS) or {}
    failures = prepare(config)
    for output in failures:
        print(output)
    say(f"tests and compiling took {time.monotonic() - start:.0f} s")
    peer = calls("softmax", config, device)
    figures = {}
    for name in tqdm(config.names, desc="presets", disable=None, leave=False):
        figures[name] = compare(calls(name, config, device), peer, device)
    rows = [verdict(name, found, kept.get(card, {})) for name, found in figures.items()]
    table(f"{card}: training and decoding beside the softmax preset, T = 1024", rows)
    say(f"{time.monotonic() - start:.0f} s in all")
    if config.json:
        write_json(Path(config.json), {"card": card, "figures": figures}, indent=1)
    if config.save:
        ratios = {name: {part: found["ratio"] for part, found in parts.items()} for name, parts in figures.items()}
        write_json(RATIOS, kept | {card: kept.get(card, {}) | ratios}, indent=1)
    slower = [row["preset"] for row in rows if row[""] != "ok"]
    if slower or failures:
        raise Failed(f"{len(failures)} shares of the kernel tests failed; slower than kept: "
                     f"{', '.join(slower) or 'none'}")
    if card not in kept and not config.save:
        say(f"no ratios are kept for {card}: --save=True keeps these")


if __name__ == "__main__":
    command(main)
