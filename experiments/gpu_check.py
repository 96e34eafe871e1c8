"""Is everything as fast on this GPU as it was? The kernel tests, then each preset beside the same model with softmax.

    make gpu-check                                  under 4 minutes on one H100; before a commit that a GPU's path is in
    python -m experiments.gpu_check --save=True     keeps the ratios of this run as those to compare with

Each preset trains and decodes by experiments/bench.py, in bf16 and compiled, at T = 1024, its steps alternating with
those of the same model with softmax. The ratio of the two is compared with what experiments/gpu_ratios.json keeps for
this card. What is more than 5 % below says so, and the exit code is 1, as where a test fails. While the tests run,
each preset is compiled once; what is timed then has the GPU for itself, and finds its code in Inductor's cache.
"""
import os
import subprocess
import sys
import tempfile
import time
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

from configurator import Failed, UserError, command, configure, help_first

help_first(__name__, __file__, config_file=False)

from support.files import check_target, read_json, write_json                     # support comes before torch
from support.machine import device_name, pick_device, say
from support.report import table

ROOT = Path(__file__).resolve().parent.parent
RATIOS = ROOT / "experiments/gpu_ratios.json"
PRESETS = ["base", "based", "retnet", "deltanet", "gated_deltanet", "hybrid", "hybrid_softmax", "tiny"]
SIZES = ["--parts=train,decode", "--seq_lens=1024", "--tokens=32768", "--positions=1024", "--prefill=1024",
         "--memory=False", "--repeats=5"]
TRY = ["--dim=32", "--n_heads=2", "--depth=3", "--feature_dim=8", "--vocab_size=300", "--parts=train,decode",
       "--seq_lens=64", "--tokens=128", "--positions=64", "--prefill=64", "--memory=False", "--repeats=1",
       "--precision=fp32"]                                                        # for --quick: as on a laptop
BELOW = 0.95                                                                      # of the ratio kept: worth a word


@dataclass
class CheckConfig:
    presets: str = ",".join(PRESETS)  # of config/, with commas
    tests: bool = True               # also run the kernel tests
    save: bool = False               # keep the ratios of this run for this card
    json: str = ""                   # also write all figures to this file
    quick: bool = False              # tiny models, on a CPU too: tries the check itself, its ratios mean nothing
    device: str = "auto"             # as for train.py


def bench(preset, config, target, once=False):
    """The command that measures a preset and writes `target`; once: only to compile it."""
    sizes = TRY if config.quick else SIZES
    return [sys.executable, "-m", "experiments.bench", f"config/{preset}.py", *sizes, f"--device={config.device}",
            f"--json={target}", *["--repeats=1"] * once]


def run(words, env):
    """(Exit code, output) of a command."""
    done = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def kernel_tests(count):
    """Commands that run the kernel tests, each a share of them: most of their time is compiling."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_support_kernels.py"]
    code, output = run([*words, "--collect-only"], os.environ)
    names = [line for line in output.splitlines() if "::" in line]
    if code or not names:
        raise UserError(f"the kernel tests cannot be collected: {(output.strip() or 'no word').splitlines()[-1]}")
    shares = [names[i::count] for i in range(min(count, len(names)))]
    return [[*words[:-1], *share] for share in shares]


def prepare(presets, config, env, folder):
    """Kernel tests and the compiling of all presets, side by side. The tests' output where one of them failed."""
    cores = os.cpu_count() or 1
    tests = kernel_tests(max(1, cores // 2)) if config.tests else []
    warm = [bench(preset, config, folder / f"warm-{preset}.json", once=True) for preset in presets]
    own = env | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    with (futures.ThreadPoolExecutor(max(1, len(tests))) as test_pool,
          futures.ThreadPoolExecutor(max(1, min(4, cores // 4))) as warm_pool):   # of memory 4 take what a GPU has
        tested = test_pool.map(lambda words: run(words, own), tests)
        compiled = warm_pool.map(lambda words: run(words, own), warm)
        for preset, (code, output) in zip(presets, compiled):
            if code:
                raise Failed(f"{preset} does not run: {(output.strip() or 'no word').splitlines()[-1]}")
        return [output for code, output in tested if code not in (0, 5)]          # 5: all were deselected


def verdict(preset, figures, kept):
    """A row of the table: the ratios of a preset, those kept, and what is to be said of them."""
    row, words = {"preset": preset}, []
    for part in ("train", "decode"):
        ratio = figures[part][0]["ratio"]
        before = kept.get(preset, {}).get(part)
        row[f"{part}, tokens/s"] = figures[part][0]["tokens/s"]
        row[f"{part}, times softmax"] = ratio
        row[f"{part}, kept"] = before or "none"
        if before and ratio < BELOW * before:
            words.append(f"{part} is {1 - ratio / before:.0%} below")
    return row | {"": ", ".join(words) or "ok"}


def main():
    start = time.monotonic()
    config, = configure(sys.argv[1:], CheckConfig, config_file=False)
    presets = config.presets.split(",")
    for preset in presets:
        if not (ROOT / f"config/{preset}.py").exists():
            raise UserError(f"--presets: there is no config/{preset}.py; take some of {','.join(PRESETS)}")
    if config.json:
        check_target(Path(config.json), "json")
    device = pick_device(config.device)
    if device.type != "cuda" and not config.quick:
        raise UserError("gpu_check times kernels that only an Nvidia GPU runs, and there is none: --quick=True tries "
                        "the check itself")
    card = device_name(device)
    kept = read_json(RATIOS) or {}
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
        env = os.environ | env
        failures = prepare(presets, config, env, folder)
        for output in failures:
            print(output)
        say(f"tests and compiling took {time.monotonic() - start:.0f} s")
        for preset in presets:
            code, output = run(bench(preset, config, folder / f"{preset}.json"), env)
            figures[preset] = read_json(folder / f"{preset}.json", "train", "decode")
            if code or figures[preset] is None:
                raise Failed(f"{preset} does not run: {(output.strip() or 'no word').splitlines()[-1]}")
    rows = [verdict(preset, figures[preset], kept.get(card, {})) for preset in presets]
    table(f"{card}: training and decoding beside the same model with softmax, T = 1024", rows)
    say(f"{time.monotonic() - start:.0f} s in all")
    if config.json:
        write_json(Path(config.json), {"card": card, "figures": figures}, indent=1)
    if config.save:
        ratios = {preset: {part: found[part][0]["ratio"] for part in ("train", "decode")}
                  for preset, found in figures.items()}
        write_json(RATIOS, kept | {card: kept.get(card, {}) | ratios}, indent=1)
    slower = [row["preset"] for row in rows if row[""] != "ok"]
    if slower or failures:
        raise Failed(f"{len(failures)} shares of the kernel tests failed; slower than kept: "
                     f"{', '.join(slower) or 'none'}")
    if card not in kept and not config.save:
        say(f"no ratios are kept for {card}: --save=True keeps these")


if __name__ == "__main__":
    command(main)
