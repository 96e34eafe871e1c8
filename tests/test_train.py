"""train.py: the curve depends on the config alone; a kill, a full disk or a rotten file loses and hides nothing."""
import copy
import fcntl
import hashlib
import itertools
import json
import math
import os
import pty
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model
import train
from checkpoint import load_checkpoint
from configurator import command
from model import LM, ModelConfig
from support.dataset import load_tokenizer, open_split, read_manifest, write_sealed
from support.optim import lr_at
from support.report import Log

PROGRAM = Path(train.__file__)
MODEL = ["--dim=16", "--depth=1", "--n_heads=2", "--seq_len=16"]
RUN = ["--batch_size=4", "--grad_accum=1", "--max_steps=12", "--warmup_steps=2", "--lr=1e-2", "--log_interval=1",
       "--eval_interval=6", "--save_interval=3", "--eval_tokens=256", "--precision=fp32", "--device=cpu",
       "--dataset=text"]
BYTES = load_tokenizer("bytes")
DIVERGED = train.Diverged.code


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """One thread (bytes are only promised at a fixed count), nothing slow, and no signal handlers left behind."""
    threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    monkeypatch.setattr(train, "plot_losses", lambda out_dir: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data_dir with the dataset "text", as prepare.py makes it."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "squares.txt").write_text("".join(f"{i} · {i} is {i * i}\n" for i in range(2000)))
    subprocess.run([sys.executable, PROGRAM.with_name("prepare.py"), "--dataset=text", "--data_files=squares.txt",
                    "--tokenizer=bytes", "--data_dir=.", "--processes=1"], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def run(data, tmp_path, monkeypatch, capsys):
    """run(*flags, at="a") is `python train.py` in the folder a of tmp_path, within this process: code, out, err."""
    def run(*flags, at="run"):
        (tmp_path / at).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / at)
        monkeypatch.setattr(sys, "argv", ["train.py", *MODEL, *RUN, f"--data_dir={data}", "--out_dir=out", *flags])
        capsys.readouterr()
        code = 0
        try:
            command(train.main)
        except SystemExit as error:
            code = error.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())
    return run


@pytest.fixture
def refusal(run, tmp_path):
    """The one line of a run that must end with exit code 2 and leave its folder as it was."""
    def refusal(*flags, at="run"):
        before = contents(tmp_path / at)
        result = run(*flags, at=at)
        assert result.code == 2 and result.err.startswith("train.py: ") and result.err.count("\n") == 1, result
        assert contents(tmp_path / at) == before
        return result.err
    return refusal


def contents(folder):
    """Name -> bytes of all files of the run in folder; of metrics.jsonl all but the wall clock."""
    files = {path.name: path.read_bytes() for path in (folder / "out").glob("*")}
    return files | {name: records(folder) for name in files if name == "metrics.jsonl"}


def records(folder):
    """metrics.jsonl without the wall clock; NaN and Infinity, which JSON lacks, are errors."""
    lines = (folder / "out/metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return [{key: r[key] for key in r if key not in ("tokens_per_s", "time")} for r in parsed]


def losses(folder):
    return [r["loss"] for r in records(folder) if "loss" in r]


def at_step(monkeypatch, step, action):
    """Calls action in the middle of a step."""
    def train_step(*args):
        action() if args[3] == step else None
        return original(*args)
    original = train.train_step
    monkeypatch.setattr(train, "train_step", train_step)


def write_dataset(folder, train=range(200), val=range(200), vocab_size=257, tokenizer_hash=BYTES.hash):
    """A dataset of these token ids, consistent with its manifest."""
    folder.mkdir(parents=True)
    name = "bytes" if tokenizer_hash == BYTES.hash else "mine.json"
    content = {"version": 1, "tokenizer": name, "tokenizer_hash": tokenizer_hash, "vocab_size": vocab_size,
               "dtype": "uint16", "files": {}}
    for split, ids in (("train", train), ("val", val)):
        np.array(ids, "<u2").tofile(folder / f"{split}.bin")
        digest = hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()
        content["files"][f"{split}.bin"] = {"split": split, "tokens": len(ids), "documents": int(len(ids) > 0),
                                            "bytes": 2 * len(ids), "sha256": digest}
    write_sealed(folder / "manifest.json", content)
    return [f"--data_dir={folder.parent}", f"--dataset={folder.name}"]


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def test_grad_accum_gives_the_same_loss_curve(run, tmp_path):
    for pieces in (1, 2, 4):
        assert run(f"--grad_accum={pieces}", at=str(pieces)).code == 0
    curve = losses(tmp_path / "1")
    assert len(curve) == 12 and curve[-1] < curve[0] - 0.5
    assert losses(tmp_path / "2") == pytest.approx(curve, rel=1e-5) == losses(tmp_path / "4")


# ----------------------------------------------------------------------------------------------------------------------
# Stopping and going on


@pytest.mark.parametrize("number, dropout, best", [(signal.SIGTERM, 0, 12), (signal.SIGINT, 0.3, 6)])
def test_a_signal_saves_and_the_same_command_goes_on_byte_for_byte(run, tmp_path, monkeypatch, number, dropout, best):
    def worse(*args, evaluate=train.evaluate):
        result = evaluate(*args)
        return result | {"val_loss": -result["val_loss"]}
    if best == 6:
        monkeypatch.setattr(train, "evaluate", worse)
    flags = f"--dropout={dropout}", "--keep_last=2"
    assert run(*flags, at="undisturbed").code == 0 and load_checkpoint(Path("out/best.pt"))["step"] == best
    for step in (4, 5, 11):                                                       # a plain one, a save, the last
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: os.kill(os.getpid(), number))
            assert run(*flags).code == 128 + number
        assert load_checkpoint(Path("out/ckpt.pt"))["step"] == step + 1
    Path("out/ckpt-00000012.pt").unlink()                                         # as if killed before it got this name
    assert run(*flags).code == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "undisturbed")


def test_a_second_interrupt_leaves_at_once_with_the_last_checkpoint_whole(run, tmp_path, monkeypatch):
    interrupt, save = lambda: os.kill(os.getpid(), signal.SIGINT), torch.save
    run(at="undisturbed")
    with monkeypatch.context() as patch:
        at_step(patch, 4, interrupt)
        at_step(patch, 4, lambda: patch.setattr(torch, "save", lambda *args: (save(*args), interrupt())))
        result = run()
    assert result.code == 130 and result.err.endswith("train.py: interrupted\n") and "Traceback" not in result.err
    assert load_checkpoint(Path("out/ckpt.pt"))["step"] == 3 and not list(Path("out").glob("*.tmp"))
    assert run().code == 0 and contents(tmp_path / "run") == contents(tmp_path / "undisturbed")


def test_a_step_is_saved_before_its_evaluation_which_a_kill_may_end(run, tmp_path, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt
    run(at="undisturbed")
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", die)
        assert run("--save_interval=99").code == 130
    assert load_checkpoint(Path("out/ckpt.pt"))["step"] == 6
    assert run().code == 0 and records(tmp_path / "run") == records(tmp_path / "undisturbed")


PLACES = ["clock", "clock", "before fsync", "after fsync", "before replace", "after replace", "after link",
          "before save", "in save", "after save", "in write", "after write"]


def kill_at_random(folder, flags, kills, seed):
    """Starts the same command again and again in forks of this process and kills it, in each place in turn, by the
    clock or at a random call; a run that gets through all the same is followed by another. Prints how many died where.
    """
    import torch._dynamo  # noqa: F401  an optimiser's first use loads it: here once, instead of a second in every fork
    torch.set_num_threads(1)
    train.plot_losses, os.fsync, sys.argv = lambda out_dir: None, lambda file: None, ["train.py", *flags]
    rng = random.Random(seed)

    def start(at, place):
        nth, delay = rng.randrange(1, 7), rng.uniform(0, 0.3)
        pid = os.fork()
        if pid == 0:
            os.chdir(at)
            os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            code = 1
            try:
                if place not in (None, "clock"):
                    die(place, nth, rng)
                command(train.main)
                code = 0
            finally:
                os._exit(code)
        if place == "clock":
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), (at / "stderr").read_text()
        return status == signal.SIGKILL

    (folder / "undisturbed").mkdir()
    assert not start(folder / "undisturbed", None)
    places, turn, run = Counter(), itertools.cycle(PLACES), itertools.count()
    while places.total() < kills:
        at = folder / f"killed{next(run)}"
        at.mkdir()
        while start(at, place := next(turn) if places.total() < kills else None):
            places[place] += 1
    print(json.dumps(places))


def die(place, n, rng):
    """From now on, the nth call of a function that makes files durable is this process's last: before it, after it, or
    with half of its bytes written."""
    when, name = place.split()
    owner = {"save": torch, "write": Log}.get(name, os)
    original, calls = getattr(owner, name), itertools.count(1)

    def dying(*args, **options):
        if last := next(calls) == n:
            old_size = args[0].path.stat().st_size if name == "write" else 0
        result = None if last and when == "before" else original(*args, **options)
        if last and when == "in":
            path = args[0].path if name == "write" else Path(args[1].name)
            os.truncate(path, rng.randrange(old_size, path.stat().st_size))
        return os.kill(os.getpid(), signal.SIGKILL) if last else result
    setattr(owner, name, dying)


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.long)])
def test_killed_at_random_moments_the_run_comes_out_byte_for_byte_the_same(data, tmp_path, kills):
    flags = [*MODEL, *RUN, "--max_steps=80", "--eval_interval=10", "--save_interval=2", "--keep_last=2",
             "--dropout=0.2", "--optimizer=muon", f"--data_dir={data}", "--out_dir=out"]
    driver = f"from test_train import *; kill_at_random(Path({str(tmp_path)!r}), {flags!r}, {kills}, seed={kills})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(PROGRAM.parent)])}
    result = subprocess.run([sys.executable, "-c", driver], env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    places = Counter(json.loads(result.stdout))
    print(places, "in", len(list(tmp_path.glob("killed*"))), "runs")
    assert places.total() >= kills and set(places) == set(PLACES)
    for folder in tmp_path.glob("killed*"):
        assert contents(folder) == contents(tmp_path / "undisturbed")


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.fixture
def torchrun(data, tmp_path):
    """torchrun(*flags) starts train.py in two processes in tmp_path: the Popen of torchrun."""
    started = []

    def torchrun(*flags, program=PROGRAM, restarts=False):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   f"--max-restarts={int(restarts)}", program]
        started.append(subprocess.Popen(
            [*command, *MODEL, *RUN, "--batch_size=8", "--grad_accum=4", "--dropout=0.1", f"--data_dir={data}", *flags], cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True))
        return started[-1]
    yield torchrun
    for process in started:
        process.kill()


def finish(process):
    """The stderr of a run of torchrun that must end well."""
    err = process.communicate()[1]
    assert process.returncode == 0, err
    return err


def workers(parent):
    """rank -> process id of the workers of torchrun."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"PPid:\t{parent.pid}\n" in (path / "status").read_text():
                found[int(re.search(rb"\0RANK=(\d+)\0", (path / "environ").read_bytes())[1])] = int(path.name)
        except (OSError, TypeError):                                              # gone again, or torchrun's own helper
            continue
    return found


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_train_the_run_of_one_up_to_rounding(run, torchrun, tmp_path):
    flags = "--eval_tokens=300", "--dropout=0", "--out_dir=out"                   # 19 windows: no even number of pieces
    run("--batch_size=8", *flags, at="one")
    (tmp_path / "out").mkdir()
    err = finish(torchrun(*flags))
    assert err.count("step 12/12: ") == 1 and ", 2 processes" in err, err
    one, two = records(tmp_path / "one"), records(tmp_path)
    assert len(one) == len(two) == 14
    for mine, theirs in zip(one, two):
        assert mine == pytest.approx(theirs, rel=1e-5)
    mine, theirs = (load_checkpoint(folder / "out/ckpt.pt") for folder in (tmp_path / "one", tmp_path))
    assert mine["model"].keys() == theirs["model"].keys()
    assert all(torch.allclose(mine["model"][name], theirs["model"][name], atol=1e-5) for name in mine["model"])


@pytest.mark.slow
def test_shards_go_on_from_a_whole_checkpoint_and_save_whole_ones(run, torchrun, tmp_path, monkeypatch):
    flags = "--batch_size=8", "--depth=2", "--grad_clip=0.5", "--dropout=0", "--out_dir=out"
    run(*flags, at="one")
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(*flags, at=".").code == 143
    process = torchrun(*flags, "--shard")
    if torch.__version__.startswith("2.6."):                                      # its FSDP2 needs a GPU
        err = process.communicate()[1]
        assert process.returncode and err.startswith("train.py: shard does not work with torch 2.6."), err
        return
    err = finish(process)
    assert "2 processes, continuing at step 5" in err, err
    one, two = records(tmp_path / "one"), records(tmp_path)
    assert len(one) == len(two) == 14 and any(r.get("grad_norm", 0) > 0.6 for r in one[6:])  # clipped
    for mine, theirs in zip(one, two):
        assert mine == pytest.approx(theirs, rel=1e-5)
    mine, theirs = (load_checkpoint(folder / "out/ckpt.pt") for folder in (tmp_path / "one", tmp_path))
    for mine, theirs in ((mine["model"], theirs["model"]), *zip(*(c["optimizer"]["state"].values() for c in (mine, theirs)))):
        assert mine.keys() == theirs.keys()
        assert all(type(theirs[name]) is torch.Tensor for name in mine)
        assert all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in mine)


def test_an_empty_out_dir_is_refused(refusal):
    """As --out_dir=$OUT gives it where OUT is not set: the run would lie in the folder one stands in."""
    assert "out_dir must name a folder (. is the one you are in), got none" in refusal("--out_dir=")


def test_shards_with_muon_say_what_does_not_go_together(monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    with pytest.raises(ValueError, match="shard does not work with optimizer=muon, which needs whole matrices"):
        train.TrainConfig(shard=True, optimizer="muon")


@pytest.mark.parametrize("flags", [["--shard"], ["--shard", "--optimizer=muon"]])
def test_shards_of_one_process_are_refused(refusal, flags):
    assert "shard splits a model over several processes of torchrun" in refusal(*flags)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc")
def test_killed_or_stopped_in_one_process_all_end_and_the_restart_comes_out_the_same(torchrun, tmp_path):
    finish(torchrun("--out_dir=undisturbed/out", "--max_steps=200"))
    process = torchrun("--out_dir=run/out", "--max_steps=200")

    def kill_after_a_save(rank, number):
        wait_for(tmp_path / "run/out/ckpt.pt", process)
        before = (tmp_path / "run/out/ckpt.pt").stat().st_mtime_ns
        while (tmp_path / "run/out/ckpt.pt").stat().st_mtime_ns == before:
            assert process.poll() is None, process.stderr.read()
        os.kill(workers(process)[rank], number)
    for rank, number in ((0, signal.SIGKILL), (1, signal.SIGTERM)):
        kill_after_a_save(rank, number)
        err = process.communicate()[1]
        words = "train.py: another process of this run has died" if number == signal.SIGKILL else "stopped at step"
        assert process.returncode == 1 and err.count(words) == 1 and "Error: [" not in err, err
        step = load_checkpoint(tmp_path / "run/out/ckpt.pt")["step"]
        assert step < 300 and not (tmp_path / "run/out/loss.png").exists()
        process = torchrun("--out_dir=run/out", "--max_steps=200", restarts=number == signal.SIGTERM)
    kill_after_a_save(1, signal.SIGKILL)                                          # and torchrun starts it again
    err = finish(process)
    assert f"continuing at step {step}" in err and err.count("continuing at") == 2
    mine, theirs = contents(tmp_path / "run"), contents(tmp_path / "undisturbed")
    for folder in (mine, theirs):
        folder.pop("loss.png")                                                    # it names the folder
    assert not [name for name in mine if name.endswith(".tmp")]
    assert mine["metrics.jsonl"] == theirs["metrics.jsonl"]
    mine, theirs = (load_checkpoint(tmp_path / name / "out/ckpt.pt")["model"] for name in ("run", "undisturbed"))
    assert same(mine, theirs)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux can hold threads back")
@pytest.mark.parametrize("code", [0, 143])
def test_a_thread_of_gloo_that_is_late_does_not_abort_its_process_at_the_end(torchrun, tmp_path, code):
    (tmp_path / "train.py").write_text(f"""if True:
        import os, runpy, sys, torch, torch.distributed as dist
        sys.path.insert(0, {str(PROGRAM.parent)!r})
        import configurator
        def reduce_and_end(*args, **options):                                     # first in main, in its group
            os.sched_setaffinity(0, {{int(os.environ["RANK"]) % os.cpu_count()}})
            for i in range(20):
                dist.all_reduce(torch.ones(1))
                for thread in {{*map(int, os.listdir("/proc/self/task"))}} - {{os.getpid()}} if i == 0 else ():
                    os.sched_setaffinity(thread, os.sched_getaffinity(0))
                    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
            raise SystemExit({code})
        configurator.configure = reduce_and_end
        runpy.run_path({str(PROGRAM)!r}, run_name="__main__")""")
    err = torchrun(program="train.py").communicate()[1]
    assert "terminate called" not in err and ("exitcode  : 143 " if code else "") in err, err


@pytest.mark.slow
def test_what_the_user_can_mend_is_one_line_of_all_processes_and_none_hangs(torchrun, tmp_path):
    (tmp_path / "file").write_text("")
    for flags, message in ((["--batch_size=6"], "batch_size=6 must be a multiple of 2 processes times 2 pieces each"),
                           (["--out_dir=file/out"], "cannot write to file/out"),     # found by rank 0 alone
                           (["--resume"], "no checkpoint out/base/ckpt.pt")):
        process = torchrun(*flags)
        err = process.communicate()[1]
        assert process.returncode == 1 and err.count("train.py: ") == 1 and f"train.py: {message}" in err, err
        assert f"traceback : {message}" in err.split("Root Cause")[1], err           # the end of torchrun's report
        assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, and what may change


def test_a_changed_config_or_dataset_is_refused_with_the_difference_named(run, refusal, tmp_path):
    run()
    assert "lr was 0.01, now 0.02" in refusal("--lr=2e-2") and "dim was 16, now 32" in refusal("--dim=32", "--resume")
    other = write_dataset(tmp_path / "other/text")
    assert "the files of the dataset have changed" in refusal(other[0])
    foreign = write_dataset(tmp_path / "foreign/text", tokenizer_hash="0" * 64)
    assert "use --dataset of the same tokenizer" in refusal(*foreign)
    assert "would mean something else: dim was 16, now 32." in refusal("--dim=32", "--resume=changed", "--max_steps=15")
    assert "another shape: blocks." in refusal("--dim=32", "--resume=changed_model", "--max_steps=15")
    assert "another optimizer" in refusal("--optimizer=muon", "--resume=changed", "--max_steps=15")
    result = run("--resume=changed", other[0], "--lr=2e-2", "--max_steps=15")
    assert result.code == 0 and "continuing at step 12" in result.err
    assert [r["step"] for r in records(tmp_path / "run") if "loss" in r] == list(range(1, 16))
    assert torch.load("out/ckpt.pt", weights_only=True)["config"]["lr"] == 0.02


def test_a_run_that_starts_over_says_how_to_go_on_and_torchruns_restart_of_it_goes_on(run, monkeypatch):
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert "stopped at step 5; leave out --resume=false to resume" in run("--resume=false").err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "continuing at step 5" in run("--resume=false").err


def test_changed_settings_keep_a_better_best_and_the_last_evaluation_but_not_on_other_data(run, tmp_path, monkeypatch):
    run("--max_steps=8")
    best, log = load_checkpoint(Path("out/best.pt")), records(tmp_path / "run")
    worse = {"val_loss": best["best_loss"] + 1, "ppl": 2.0, "bits_per_byte": 2.0}
    monkeypatch.setattr(train, "evaluate", lambda *args: worse)
    assert best["step"] == 8 and run("--max_steps=10", "--eval_interval=99", "--resume=changed").code == 0
    assert load_checkpoint(Path("out/best.pt"))["step"] == 8 and records(tmp_path / "run")[:len(log)] == log
    run("--max_steps=12", "--resume=changed", *write_dataset(tmp_path / "other/text"))
    assert load_checkpoint(Path("out/best.pt"))["step"] == 12


def test_changed_settings_are_each_said_and_a_batch_of_another_size_continues_in_the_text_where_it_was(run, tmp_path):
    run("--max_steps=6")
    result = run("--resume=changed", "--batch_size=8", "--lr=5e-3", "--max_steps=8")
    for words in ("max_steps was 6, now 8", "batch_size was 4, now 8", "lr was 0.01, now 0.005",
                  "continues at sequence 24: no text is repeated or skipped"):
        assert words in result.err
    checkpoint = load_checkpoint(Path("out/ckpt.pt"))
    assert (checkpoint["sequences"], checkpoint["tokens"]) == (24 + 16, 64 * 6 + 128 * 2)
    assert [r["tokens"] for r in records(tmp_path / "run") if "lr" in r] == [64, 128, 192, 256, 320, 384, 512, 640]


def test_another_length_of_sequences_says_what_of_the_text_comes_again(run, tmp_path):
    run("--max_steps=6")
    result = run("--resume=changed", "--seq_len=32", "--max_steps=8")
    assert "cut and ordered differently, and the run continues at sequence 12" in result.err
    assert load_checkpoint(Path("out/ckpt.pt"))["tokens"] == 64 * 6 + 128 * 2


def test_a_checkpoint_without_a_count_of_sequences_resumes_as_before(run, tmp_path):
    for at in ("new", "old"):
        run("--max_steps=6", "--optimizer=muon", "--mixers=linear window", "--depth=2", at=at)
        if at == "old":
            checkpoint = load_checkpoint(Path("out/ckpt.pt"))
            names = [*checkpoint["optimizer"]["state"]]
            checkpoint["optimizer"]["state"] = dict(enumerate(checkpoint["optimizer"]["state"].values()))
            for group in checkpoint["optimizer"]["param_groups"]:
                group["params"] = [names.index(name) for name in group["params"]]
            del checkpoint["sequences"], checkpoint["tokens"]
            torch.save(checkpoint, "out/ckpt.pt")
        assert run("--resume=changed", "--max_steps=9", "--optimizer=muon", "--mixers=linear window", "--depth=2", at=at).code == 0
    assert (tmp_path / "new/out/ckpt.pt").read_bytes() == (tmp_path / "old/out/ckpt.pt").read_bytes()


@pytest.mark.parametrize("flags, words", [
    (["--n_heads=4"], "n_heads was 2, now 4"), (["--feature_map=relu", "--pos=none"], "pos was rope, now none; feature_map was elu, now relu"),
    (["--mixers=softmax"], "mixers was ['linear'], now ['softmax']"), (["--pos=sinusoidal"], "pos was rope, now sinusoidal")])
def test_what_gives_the_weights_another_meaning_is_refused_without_the_word_for_it(run, refusal, flags, words):
    run("--max_steps=3")
    line = refusal("--resume=changed", "--max_steps=6", *flags)
    assert words in line and "--resume=changed_model" in line
    assert run("--resume=changed_model", "--max_steps=6", *flags).code == 0


def test_untied_weights_are_not_tied_and_tied_ones_may_be_untied(run, refusal):
    run("--max_steps=3", "--out_dir=tied")
    run("--max_steps=3", "--tied=false", "--out_dir=untied")
    result = run("--tied=false", "--resume=changed", "--max_steps=6", "--out_dir=tied")
    assert result.code == 0 and "the optimizer state is reset for unembed.weight" in result.err and "tied was True, now False" in result.err
    for flags in (["--resume=changed", "--max_steps=6", "--out_dir=untied"], ["--init_from=untied", "--tied=true", "--out_dir=new"]):
        assert "untied: its embed.weight and unembed.weight differ" in refusal(*flags)


PLUGIN = """
import torch, model

class Mean(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.out = torch.nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, state, ropes):
        totals = x.float().cumsum(1) + (0 if state is None else state)
        return self.out(totals.to(x.dtype)), totals[:, -1:].clone()

model.MIXERS["mean"] = Mean
"""


@pytest.mark.parametrize("right, wrong, message", [
    ("x.float().cumsum(1)", "x.float().roll(-1, 1)", "read in two calls, a text gives other results than in one"),
    ("totals[:, -1:].clone()", "None", "read in two calls, a text gives other results than in one"),
    (", totals[:, -1:].clone()", "", "a mixer must return two things, its output and its new state")])
def test_a_mixer_that_sees_later_tokens_or_loses_its_state_is_refused_before_training(refusal, monkeypatch, tmp_path, right,
                                                                                     wrong, message):
    monkeypatch.setattr(model, "MIXERS", dict(model.MIXERS))
    monkeypatch.delitem(sys.modules, "plugin_mine", raising=False)
    assert right in PLUGIN
    (tmp_path / "mine.py").write_text(PLUGIN.replace(right, wrong))
    flags = "--mixers=mean linear", "--depth=2", f"--plugin={tmp_path}/mine.py"
    assert f"{tmp_path}/mine.py: {message}" in refusal(*flags)
    sys.modules.pop("plugin_mine")


def test_a_mixer_in_the_users_own_file_is_trained_and_named_on_the_command_line_alone(run, refusal, monkeypatch, tmp_path):
    monkeypatch.setattr(model, "MIXERS", dict(model.MIXERS))
    (tmp_path / "mine.py").write_text(PLUGIN)
    assert run("--mixers=mean").code == 2
    flags = "--mixers=mean linear", "--depth=2", f"--plugin={tmp_path}/mine.py", "--max_steps=3"
    assert run(*flags).code == 0
    model.MIXERS.pop("mean")
    sys.modules.pop("plugin_mine")
    assert "needs --plugin=FILE" in refusal("--init_from=out", "--out_dir=new")     # config of the checkpoint: not read
    assert run(*flags, "--max_steps=6", "--resume=changed").code == 0


def test_a_loop_of_links_is_no_plugin_and_no_model(run, refusal):
    run("--max_steps=1")
    Path("loop").symlink_to("loop")
    assert "there is no plugin loop" in refusal("--plugin=loop")
    assert "loop" in refusal("--init_from=loop") and "loop" in refusal("--out_dir=loop/x")


@pytest.mark.parametrize("content, words", [(None, "there is no plugin mine.py"), ("x = = 1", "SyntaxError"),
                                            ("import model\n1 / 0", "the plugin mine.py fails, line 2: ZeroDivisionError"),
                                            ("import sys\nsys.exit(3)", "the plugin mine.py fails, line 2: SystemExit: 3")])
def test_a_plugin_that_fails_is_one_line(run, refusal, tmp_path, content, words):
    (tmp_path / "run").mkdir()
    if content:
        (tmp_path / "run/mine.py").write_text(content)
    assert words in refusal("--plugin=mine.py")


def test_settings_that_do_not_change_the_result_may_change(run, tmp_path, monkeypatch):
    run(at="undisturbed")
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run()
    (tmp_path / "run/out").rename(tmp_path / "run/moved")
    result = run("--out_dir=moved", "--grad_accum=2", "--log_interval=4", "--save_interval=5", "--keep_last=2")
    assert result.code == 0 and "continuing at step 5" in result.err
    theirs = load_checkpoint(tmp_path / "undisturbed/out/ckpt.pt")["model"]
    mine = load_checkpoint(Path("moved/ckpt.pt"))["model"]
    assert all(torch.allclose(theirs[name], mine[name], atol=1e-5) for name in theirs)


def test_a_finished_run_says_so_and_stays_as_it_is(run, tmp_path):
    run()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("out").iterdir()}
    for flags in ([], ["--resume"], ["--resume=changed", "--max_steps=6"]):
        result = run(*flags)
        assert result.code == 0 and "is finished, at step 12" in result.err and "tokens/s" not in result.err
        assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path("out").iterdir()}


def test_starting_over_is_only_by_resume_false_and_leaves_nothing_of_the_old_run(run, refusal, tmp_path):
    assert "no checkpoint out/ckpt.pt" in refusal("--resume")
    run("--seed=1", "--keep_last=3")
    for name in ("mine.pt", "mine.tmp", "ckpt-mine.pt"):
        Path("out", name).write_text("not train.py's")
    Path("out/ckpt.pt.tmp").write_text("half a checkpoint")
    assert run("--max_steps=1", "--resume=false").code == 0
    assert sorted(contents(tmp_path / "run")) == ["best.pt", "ckpt-mine.pt", "ckpt.pt", "metrics.jsonl", "mine.pt",
                                                  "mine.tmp"]
    assert len(losses(tmp_path / "run")) == 1
    Path("out/ckpt.pt").unlink()
    assert "copy it to ckpt.pt" in refusal("--max_steps=1")
    Path("out/best.pt").unlink()
    assert "the log of a run that had one" in refusal("--max_steps=1")


@pytest.mark.parametrize("flags, message", [
    (["--batchsize=4"], "nearest is batch_size"), (["--lr=high"], "--lr must be a number"),
    (["--max_steps=1.5"], "must be a whole number"), (["--dataset="], "name of a folder"),
    (["--grad_accum=3"], "multiple of grad_accum"),
    (["--seed=1e40"], "must be a whole number"), ([f"--seed={2**64}"], "below 2**63"), (["--max_steps=0"], "at least 1"),
    (["--causal=false"], "next-token"), (["--device=tpu"], "--device=cpu"),
    (["--device=meta"], "device must be auto, cpu"), (["--beta1=1"], "beta1 and beta2 must be below 1, got 1.0"),
    (["--batch_size=10**30", "--grad_accum=10**30"], "batch_size must be below"),
    (["--dim=10**20"], "out of memory (a size is more than any machine has)"), (["--expand_v=1e30"], "than any machine has): use"), (["--depth=10**30"], "out of memory (the model takes"), (["--depth=10**9"], "--depth"),
    (["--batch_size=10**9"], "out of memory (a piece of a batch takes"), (["--lr=1e99", "--optimizer=muon"], "lr must be in the range of fp32"),
    (["--lr=1e30", "--weight_decay=1e30"], "lr times weight_decay"), (["--lr=-1"], "lr must be at least 0"), (["--mlp_ratio=1e30"], "out of memory"), (["--expand_v=1e30"], "out of memory"),
    (["--mlp_ratio=1e17"], "out of memory"), (["--seq_len=100000"], "too short for"),
    (["--dataset=none"], "prepare.py --dataset=none"), (["--seq_len=100000"], "use --seq_len below"),
    (["--out_dir=/proc/x"], "cannot write"), (["--out_dir=" + 300 * "x"], "name too long"), (["--dataset=" + 300 * "x"], "name too long"),
    (["--out_dir=a\0b"], "embedded null byte"), (["nofile.py"], "no such config file"),
    (["--eval_only"], "no checkpoint"), (["--vocab_size=300"], "vocab_size=300 is not that of the dataset, 257")])
def test_bad_input_is_one_line_with_exit_code_2_and_writes_nothing(refusal, flags, message):
    assert message in refusal(*flags)


def test_an_out_dir_below_a_file_is_named(refusal, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"cannot write to {tmp_path}/file/out" in refusal(f"--out_dir={tmp_path}/file/out")


@pytest.mark.slow
def test_two_runs_in_one_out_dir_are_refused_and_an_evaluation_beside_one_is_not(run, data, tmp_path, monkeypatch):
    def beside(*flags):
        command = [sys.executable, PROGRAM, *MODEL, *RUN, f"--data_dir={data}", "--out_dir=out", *flags]
        result = subprocess.run(command, text=True, capture_output=True)
        results.append((result.returncode, result.stdout + result.stderr))
    results = []
    run(at="undisturbed")
    for flags in ([], ["--resume=false"], ["--eval_only"]):
        at_step(monkeypatch, 4, lambda flags=flags: beside(*flags))
    assert run().code == 0 and sorted(code for code, _ in results) == [0, 2, 2]
    assert all("another train.py is running in out" in text for code, text in results if code)
    assert contents(tmp_path / "run") == contents(tmp_path / "undisturbed")


def test_a_bad_dataset_is_found_before_training(refusal, tmp_path):
    flags = write_dataset(tmp_path / "data/bad", train=range(1000))
    (tmp_path / "data/bad").rename(tmp_path / "good")

    def damaged(name, damage):
        shutil.rmtree(tmp_path / "data/bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "data/bad")
        damage(tmp_path / "data/bad" / name)
        line = refusal(*flags)
        assert name in line and "prepare.py" in line
        return line
    assert "is missing" in damaged("train.bin", Path.unlink)
    assert "has 1,999 bytes instead of 2,000" in damaged("train.bin", lambda path: os.truncate(path, 1999))
    for name, position, bit in (("train.bin", 0, 0), ("train.bin", 1999, 7), ("val.bin", 200, 3)):
        assert "has changed since it was made" in damaged(name, lambda path: flip(path, position, bit))
    assert "checksum does not fit" in damaged("manifest.json", lambda path: flip(path, path.read_bytes().index(b"257")))
    assert "no train documents" in refusal(*write_dataset(tmp_path / "empty/bad", train=[]))


def test_ids_above_the_vocabulary_and_files_that_change_under_the_run_end_it(run, tmp_path, monkeypatch):
    result = run(*write_dataset(tmp_path / "data/big", train=[300] * 200))
    assert result.code == 2 and "token 300 in the data is not below vocab_size=257" in result.err.splitlines()[-1]
    for change in (lambda path: os.truncate(path, 100), Path.unlink, lambda path: flip(path, 100)):
        shutil.rmtree(tmp_path / "data")
        flags = write_dataset(tmp_path / "data/gone")
        with monkeypatch.context() as patch:
            at_step(patch, 4, lambda: change(tmp_path / "data/gone/train.bin"))
            result = run(*flags, "--resume=false")
        assert result.code == 2 and "train.bin changed while it was being read" in result.err.splitlines()[-1]
        assert load_checkpoint(Path("out/ckpt.pt"))["step"] == 3


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, (dict, list)):
        return len(a) == len(b) and all(same(a[key], b[key]) for key in (a if isinstance(a, dict) else range(len(a))))
    return a == b


def test_a_checkpoint_holds_what_the_contract_says(run):
    run("--keep_last=3", "--compile=auto")
    assert sorted(path.name for path in Path("out").glob("*.pt")) == [
        "best.pt", "ckpt-00000006.pt", "ckpt-00000009.pt", "ckpt-00000012.pt", "ckpt.pt"]
    for path in Path("out").glob("*.pt"):
        checkpoint = torch.load(path, weights_only=True)
        assert {"model", "model_config", "optimizer", "step", "config", "rng", "data"} <= checkpoint.keys()
        model = LM(ModelConfig(**checkpoint["model_config"]))
        assert checkpoint["model"].keys() == model.state_dict().keys()
        model.load_state_dict(checkpoint["model"])
    assert checkpoint["data"]["tokenizer"] == "bytes" and checkpoint["config"]["lr"] == 0.01
    rates = {group["lr"] for group in torch.load("out/ckpt.pt")["optimizer"]["param_groups"]}
    assert rates == {lr_at(11, train.TrainConfig(**checkpoint["config"]))}


@pytest.mark.parametrize("file, room", [("ckpt.pt", 30_000), ("metrics.jsonl", None)])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_goes_on(run, tmp_path, monkeypatch, file, room):
    run(at="undisturbed")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room or Path("out", file).stat().st_size + 20, unlimited[1]))
    try:
        with monkeypatch.context() as patch:
            at_step(patch, 4, fill)
            result = run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert result.code == 2 and f"cannot write out/{file}" in result.err.splitlines()[-1], result.err
    assert load_checkpoint(Path("out/ckpt.pt"))["step"] == 3 and not list(Path("out").glob("*.tmp"))
    assert run().code == 0 and contents(tmp_path / "run") == contents(tmp_path / "undisturbed")


# ----------------------------------------------------------------------------------------------------------------------
# Losses that are not finite, and spikes


def poison(monkeypatch, steps, how):
    """Makes the loss or the gradient of these training steps NaN."""
    forward, calls = LM.forward, itertools.count()

    def poisoned(self, idx, targets=None, state=None):
        loss, state = forward(self, idx, targets, state)
        if self.training and next(calls) in steps:
            zero = (0 * self.norm.weight.sum()).sqrt()                            # with the gradient 0 * infinity
            loss = loss * math.nan if how == "loss" else loss + zero
        return loss, state
    monkeypatch.setattr(LM, "forward", poisoned)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(run, tmp_path, monkeypatch, how):
    poison(monkeypatch, (3, 4, 8), how)
    states, step = [], train.train_step

    def kept(model, optimizer, *args):
        result = step(model, optimizer, *args)
        states.append(copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]]))
        return result
    monkeypatch.setattr(train, "train_step", kept)
    assert run("--save_interval=1", "--keep_last=99").code == 0
    weights = [torch.load(path, weights_only=True) for path in sorted(Path("out").glob("ckpt-*.pt"))]
    assert [checkpoint["step"] for checkpoint in weights] == [1, 2, 3, 6, 7, 8, 10, 11, 12]
    unchanged = [i + 1 for i in range(1, 12) if same(states[i], states[i - 1])]
    assert unchanged[:3] == [4, 5, 9] and weights[-1]["skips"] == [3, 0]
    skipped = [r for r in records(tmp_path / "run") if r.get("skipped")]
    assert [(r["step"], r["skips"]) for r in skipped] == [(4, 1), (5, 2), (9, 3)]
    assert all(r["loss" if how == "loss" else "grad_norm"] is None for r in skipped)
    assert all(torch.isfinite(p).all() for p in weights[-1]["model"].values())


def test_too_many_in_a_row_stop_the_run_with_a_good_checkpoint(run, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, range(4, 99), "loss")
        result = run("--max_skips=5", "--save_interval=2")
    assert result.code == DIVERGED and "5 steps in a row were skipped" in result.err.splitlines()[-1]
    checkpoint = load_checkpoint(Path("out/ckpt.pt"))
    assert checkpoint["step"] == 4 and checkpoint["skips"] == [0, 0]
    checkpoint["skips"] = [4, 4]                                                  # as of a Ctrl-C in the row
    torch.save(checkpoint, "out/ckpt.pt")
    assert run("--max_skips=5", "--resume=changed").code == 0
    assert load_checkpoint(Path("out/ckpt.pt"))["skips"] == [4, 0]


def weights_give_a_loss(path="out/ckpt.pt"):
    checkpoint = load_checkpoint(Path(path))
    model = LM(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    loss = model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))[0]
    loss.backward()
    return all(p.grad.isfinite().all() for p in model.parameters()) and loss.item() < 20


RUIN = ["--grad_clip=0", "--save_interval=1", "--max_skips=99"]


def test_a_ruined_checkpoint_is_not_resumed_from(run):
    run("--max_steps=3")
    checkpoint = load_checkpoint(Path("out/ckpt.pt"))
    checkpoint["model"]["embed.weight"].fill_(math.nan)
    torch.save(checkpoint, "out/ckpt.pt")
    result = run("--max_steps=12", "--resume=changed")
    assert result.code == DIVERGED and "train.py: out/ckpt.pt gives no good loss: copy an earlier one" in result.err
    assert load_checkpoint(Path("out/ckpt.pt"))["step"] == 3


@pytest.mark.parametrize("lr", ["1e38", "1e30", "1e15", "1e5"])                      # 1e30 leaves the loss finite, 1e5 huge
def test_ruined_weights_are_never_saved_and_a_run_that_ends_with_them_fails_and_starts_again(run, lr):
    result = run(f"--lr={lr}", *RUIN)
    assert result.code == DIVERGED and "nothing was saved: lower --lr" in result.err.splitlines()[-1]
    assert not list(Path("out").glob("*.pt"))
    assert run(f"--lr={lr}", *RUIN).code == DIVERGED                                         # the same command starts again


@pytest.mark.parametrize("lr", ["1e38", "1e30", "1e15", "1e5"])
@pytest.mark.parametrize("end", ["finish", "SIGTERM", "SIGINT"])
def test_a_good_checkpoint_outlives_a_run_that_is_ruined_after_it(run, monkeypatch, lr, end):
    assert run("--max_steps=3").code == 0
    before = Path("out/ckpt.pt").read_bytes()
    if end != "finish":
        at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), getattr(signal, end)))
    result = run("--resume=changed", f"--lr={lr}", *RUIN)
    assert "out/ckpt.pt is the last good checkpoint, of step 3" in result.err.splitlines()[-1]
    assert result.code == {"finish": DIVERGED, "SIGTERM": 143, "SIGINT": 130}[end]
    assert Path("out/ckpt.pt").read_bytes() == before and weights_give_a_loss()
    assert weights_give_a_loss("out/best.pt")


def test_what_is_saved_is_known_to_give_a_finite_loss_on_text_that_comes_next(run, tmp_path, monkeypatch):
    """The step itself was good, and its weights are not: saved are those before it."""
    original = train.train_step

    def ruining(model, optimizer, *args):
        result = original(model, optimizer, *args)
        if args[1] == 5:
            with torch.no_grad():
                model.embed.weight[0, 0] = math.nan
        return result
    monkeypatch.setattr(train, "train_step", ruining)
    result = run()
    assert result.code == DIVERGED and "step 6 is not saved: its weights give no good loss" in result.err
    assert load_checkpoint(Path("out/ckpt.pt"))["step"] == 3 and weights_give_a_loss()
    assert not [r for r in records(tmp_path / "run") if "val_loss" in r]


def test_the_same_command_starts_again_after_a_kill_in_a_run_whose_first_steps_were_skipped(run, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        poison(patch, range(4), "loss")
        at_step(patch, 8, die)
        patch.setattr(train.Run, "save_latest", lambda self: None)
        assert run("--save_interval=1", "--eval_interval=99").code == 130
    assert max(r["step"] for r in Log.read(Path("out/metrics.jsonl"))) == 8
    assert run("--save_interval=1", "--eval_interval=99").code == 0


def test_a_spike_is_6_sigma_above_the_last_128_losses():
    spikes, rng = train.Spikes(), np.random.default_rng(0)
    usual = rng.normal(3, 0.1, 300)
    assert not any(spikes(loss) for loss in [100, *usual])
    assert not spikes(3.4) and spikes(3.8) and not train.Spikes(usual[:50])(100)
    resumed = train.Spikes(list(spikes.recent))
    assert [spikes(loss) for loss in (3.5, 9, 3)] == [resumed(loss) for loss in (3.5, 9, 3)]


@pytest.mark.parametrize("skip", [False, True])
def test_spikes_are_logged_and_skipped_on_demand(run, tmp_path, monkeypatch, skip):
    monkeypatch.setattr(train.Spikes, "__call__", lambda self, loss, calls=itertools.count(1): next(calls) == 5)
    run(f"--skip_spikes={skip}", "--eval_interval=1")
    assert [(r["step"], r["skipped"]) for r in records(tmp_path / "run") if r.get("spike")] == [(5, skip)]
    before, after = (r["val_loss"] for r in records(tmp_path / "run") if "val_loss" in r and r["step"] in (4, 5))
    assert (before == after) == skip


# ----------------------------------------------------------------------------------------------------------------------
# What is reported


def test_metrics_have_the_fields_of_the_contract(run):
    run("--log_interval=2")
    raw = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    steps = [r for r in raw if "loss" in r]
    assert [r["step"] for r in steps] == [2, 4, 6, 8, 10, 12]
    assert all(r.keys() == {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "time"} for r in steps)
    assert all(r["tokens"] == 64 * r["step"] for r in raw)
    config = train.TrainConfig(lr=1e-2, warmup_steps=2, max_steps=12)
    assert [r["lr"] for r in steps] == [lr_at(r["step"] - 1, config) for r in steps]
    evaluations = [r for r in raw if "val_loss" in r]
    assert [r["step"] for r in evaluations] == [6, 12]
    for r in evaluations:
        assert r.keys() == {"step", "tokens", "val_loss", "ppl", "bits_per_byte"}
        assert r["ppl"] == pytest.approx(math.exp(r["val_loss"]))
    best = torch.load("out/best.pt", weights_only=True)
    assert best["best_loss"] == min(r["val_loss"] for r in evaluations)


def test_a_warmup_that_never_ends_is_said_to_end_with_so_much_of_the_peak(run, tmp_path):
    assert "warmup_steps" not in run("--warmup_steps=11", at="shorter").err
    for steps, share in ((12, 12 / 13), (23, 0.5)):
        said = f"warmup_steps={steps} covers the whole run (max_steps=12): the learning rate only rises, to {share:.0%} of its peak; try --warmup_steps=1\n"
        assert said in run(f"--warmup_steps={steps}", at=str(steps)).err
        assert max(r["lr"] for r in records(tmp_path / str(steps)) if "lr" in r) == pytest.approx(1e-2 * share)


def test_eval_only_repeats_the_evaluation_in_the_log(run, tmp_path):
    run()
    before = contents(tmp_path / "run")
    result = run("--eval_only")
    evaluation = {key: value for key, value in records(tmp_path / "run")[-1].items() if key != "tokens"}
    assert json.loads(result.out) == evaluation and contents(tmp_path / "run") == before


def test_eval_only_evaluates_what_it_is_told_to_at_the_length_it_is_told_to(run, refusal):
    run("--max_steps=3")
    run("--max_steps=6", "--dim=32", "--out_dir=other")
    theirs = json.loads(Path("other/metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    for flags in (["--init_from=other"], ["--init_from=other/ckpt.pt", "--out_dir=nowhere"], ["--out_dir=other"]):
        assert json.loads(run("--eval_only", "--dim=32", *flags).out)["val_loss"] == theirs
    long = json.loads(run("--eval_only", "--seq_len=64").out)["val_loss"]
    assert long == json.loads(run("--eval_only", "--seq_len=64").out)["val_loss"] != json.loads(run("--eval_only").out)["val_loss"]
    assert "its dim is 16, not 64" in refusal("--eval_only", "--dim=64")
    assert "its dim is 32, not 16" in refusal("--eval_only", "--init_from=other")
    assert "its feature_map is elu, not relu" in refusal("--eval_only", "--feature_map=relu", "--pos=none")
    assert "its tied is True, not False" in refusal("--eval_only", "--tied=False")
    assert "there is no none" in refusal("--eval_only", "--init_from=none")


def test_bits_per_byte_and_a_fixed_evaluation_set(tmp_path):
    """A uniform model over 257 tokens needs log2(257) bits a token; this text has 200 tokens for 400 bytes."""
    write_dataset(tmp_path / "text")
    manifest = read_manifest(tmp_path / "text")
    files, model = open_split(tmp_path / "text", manifest, "val"), LM(ModelConfig(257, 8, 1, 1, seq_len=16))

    def evaluate(batch_size=1, grad_accum=1, eval_tokens=96):
        config = train.TrainConfig(batch_size=batch_size, grad_accum=grad_accum, eval_tokens=eval_tokens)
        return train.evaluate(model, files, manifest, config, torch.device("cpu"))
    results = [evaluate(*split)["val_loss"] for split in ((1, 1), (4, 2), (64, 1), (5, 5))]
    assert results == pytest.approx([results[0]] * 4, rel=1e-6) and results[0] != evaluate(eval_tokens=16)["val_loss"]
    torch.nn.init.zeros_(model.embed.weight)
    assert evaluate() == pytest.approx({"val_loss": math.log(257), "ppl": 257, "bits_per_byte": math.log2(257) / 2})


@pytest.mark.slow
@pytest.mark.parametrize("program", ["pipe", "terminal", "terminal of 0 columns"])
def test_progress_is_lines_in_a_pipe_and_a_bar_on_a_terminal(data, tmp_path, program):
    flags = [*MODEL, *RUN, f"--data_dir={data}", "--out_dir=out"]
    reader, writer = pty.openpty() if program != "pipe" else os.pipe()
    if program == "terminal":
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 150, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen([sys.executable, PROGRAM, *flags], cwd=tmp_path, env=environment, stderr=writer, stdout=writer)
    os.close(writer)
    text = b""
    try:
        while piece := os.read(reader, 4096):
            text += piece
    except OSError:                                                               # how a terminal says end of file
        pass
    os.close(reader)
    text = text.decode()
    assert process.wait() == 0 and "step 12: val_loss" in text and "loss curve: out/loss.png" in text
    assert Path(tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    if program != "pipe":
        assert re.search(r"%\|.*\| 12/12 \[\d\d:\d\d<00:00, loss \d\.\d{3}, [\d,]+ tok/s, \d\.\d GB\]", text)
    else:
        assert "%|" not in text and "\r" not in text
        said = re.findall(r"^step (\d+)/12: loss .* tokens/s, [\d.]+ GB(, \d+ seconds? left)?$", text, re.MULTILINE)
        assert [int(step) for step, _ in said] == [*range(1, 13)]
        assert [int(step) for step, left in said if not left] == [1, 12]          # the first step measures too much


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_reads_nothing_back_from_the_device_so_that_a_gpu_never_waits(run, monkeypatch, optimizer):
    """Only where it is due: one wait for each log_interval."""
    def step(*args):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__float__", "__bool__", "__int__", "numpy", "cpu"):
                patch.setattr(torch.Tensor, name, lambda self, name=name: pytest.fail(f"a step calls {name}"))
            return original(*args)
    original = train.train_step
    monkeypatch.setattr(train, "train_step", step)
    assert run(f"--optimizer={optimizer}", "--log_interval=5").code == 0


# ----------------------------------------------------------------------------------------------------------------------
# Starting from another model


def weights(path):
    return load_checkpoint(Path(path))["model"]


def test_fine_tuning_starts_from_the_weights_and_settings_of_the_source_with_a_fresh_optimiser(run, tmp_path):
    assert run("--max_steps=6", "--mlp=relu2").err.count(" epochs, from new weights\n") == 1
    result = run("--init_from=out", "--out_dir=tuned", "--max_steps=3", "--lr=0", "--save_interval=1")
    assert result.code == 0 and " epochs, from out\n" in result.err and "out: the same settings; kept" in result.err and "itself" not in result.err
    source, tuned = load_checkpoint(Path("out/best.pt")), load_checkpoint(Path("tuned/ckpt.pt"))
    assert tuned["model_config"]["mlp"] == "relu2" and tuned["step"] == 3
    assert {float(s["step"]) for s in tuned["optimizer"]["state"].values()} == {3.0}     # not 9
    assert all(torch.equal(tuned["model"][key], source["model"][key]) for key in source["model"])
    first = json.loads(Path("tuned/metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(source["best_loss"], abs=1e-6)


def test_a_fine_tuning_run_goes_on_without_its_source_and_ends_in_the_same_weights(run, tmp_path, monkeypatch):
    run("--max_steps=6", "--mlp=relu2")
    flags = ("--init_from=out", "--max_steps=6")
    run(*flags, "--out_dir=whole")
    def die():
        raise KeyboardInterrupt
    for step in (0, 4):                                                           # before the first save of a step, and later
        with monkeypatch.context() as patch:
            at_step(patch, step, die)
            assert run(*flags, "--out_dir=killed").code == 130
        shutil.rmtree("out", ignore_errors=True) if step else None
    assert run(*flags, "--out_dir=killed").code == 0
    whole, killed = weights("whole/ckpt.pt"), weights("killed/ckpt.pt")
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_a_softmax_model_becomes_a_linear_one_that_keeps_all_weights_and_says_what_is_new(run):
    run("--mixers=softmax", "--max_steps=6")
    result = run("--init_from=out", "--mixers=linear", "--out_dir=linear", "--max_steps=1", "--lr=0", "--eval_interval=1")
    assert "mixers was ['softmax'], now ['linear']; kept 9 of 9 tensors; new: nothing; left out: nothing" in result.err
    assert re.search(r"out itself: val_loss \d", result.err)
    softmax, linear = weights("out/best.pt"), weights("linear/ckpt.pt")
    assert all(torch.equal(linear[key], softmax[key]) for key in softmax)
    result = run("--init_from=out/best.pt", "--mixers=linear", "--decay=gated", "--expand_v=2", "--out_dir=gated",
                 "--max_steps=1", "--lr=0")
    new = "mixer.decay.weight, mixer.decay_bias, mixer.log_A, mixer.out.weight, mixer.qkv.weight"
    assert f"new: {new}; left out: mixer.out.weight, mixer.qkv.weight" in result.err


@pytest.mark.parametrize("flags, message", [
    (["--init_from=none", "--out_dir=new"], "there is no none: train first"),
    (["--init_from=out/none", "--out_dir=new"], "there is no out/none: train first"),
    (["--init_from=out"], "init_from=out lies in out_dir"), (["--init_from=out/best.pt"], "use another --out_dir"),
    (["--init_from=out", "--out_dir=new", "--dim=32"], "another shape (dim was 16, now 32): blocks.0.mlp.out.weight and"),
    (["--init_from=out", "--out_dir=new", "--depth=2"], "depth was 1, now 2"),
    (["--init_from=out", "--out_dir=new", "--norm=layer"], "norm was rms, now layer"),
    (["--init_from=out", "--out_dir=new", "--data_dir=.", "--dataset=other"], "prepare it again with the model's --tok")])
def test_a_source_that_does_not_fit_is_one_line(run, refusal, monkeypatch, tmp_path, flags, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run("--max_steps=1")
    write_dataset(Path("other"), tokenizer_hash="another")
    assert message in refusal(*flags)
    assert not Path("new/ckpt.pt").exists()
