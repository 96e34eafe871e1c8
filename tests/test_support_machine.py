"""support/machine.py: what a machine has is found and used, and what it lacks is one line."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from checkpoint import load_checkpoint
from configurator import UserError
from support import machine
from test_train import as_it_was, at_step, data, losses, run  # noqa: F401 (fixtures)


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "WORLD", 2)
    with pytest.raises(UserError, match="device=cuda:1 would put all processes on one GPU: leave it out"):
        machine.pick_device("cuda:1")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. And so on"), MemoryError(), None])
def test_out_of_memory_names_the_flags_that_help(run, monkeypatch, error):
    def too_much():
        if error:
            raise error
        torch.empty(2**60, dtype=torch.uint8)
    at_step(monkeypatch, 4, too_much)
    result = run()
    words = ("out of memory", "--grad_accum", "--batch_size", "--seq_len")
    assert result.code == 2 and all(word in result.err.splitlines()[-1] for word in words)


def test_an_error_of_ours_keeps_its_traceback(run, monkeypatch):
    at_step(monkeypatch, 4, lambda: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError):
        run()


def test_precision_auto_takes_bf16_only_where_it_is_faster(monkeypatch, capsys):
    cpu = torch.device("cpu")
    for speedup, auto in ((0.003, "fp32"), (1.0, "fp32"), (1.4, "bf16"), (3.5, "bf16")):
        monkeypatch.setattr(machine, "bf16_speedup", lambda device: speedup)
        assert [machine.pick_precision(p, cpu) for p in ("auto", "fp32", "bf16")] == [auto, "fp32", "bf16"]
        assert ("run at 0.003 times the speed of fp32" in capsys.readouterr().err) == (speedup < 1)


def test_a_probe_that_answers_differently_later_does_not_change_the_run(run, monkeypatch):
    monkeypatch.setattr(machine, "bf16_speedup", lambda device: 1.0)
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run("--precision=auto").code == 143
    monkeypatch.setattr(machine, "bf16_speedup", lambda device: 9.0)
    result = run("--precision=auto")
    assert result.code == 0 and "fp32 on cpu" in result.err and "continuing at step 5" in result.err


def test_bf16_learns_and_its_checkpoint_is_fp32(run, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "bf16_speedup", lambda device: 0.01)
    result = run("--precision=bf16", at="bf16")
    run(at="fp32")
    assert "warning: bf16" in result.err and losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)
    checkpoint = load_checkpoint(tmp_path / "bf16/out/ckpt.pt")
    assert all(p.dtype == torch.float32 for p in checkpoint["model"].values())


def test_without_a_compiler_the_run_says_so_and_goes_on(run, tmp_path, monkeypatch):
    def no_compiler(*args, **options):
        raise RuntimeError("no C compiler found\nand much more")
    run(at="plain")
    monkeypatch.setattr(torch, "compile", no_compiler)
    result = run("--compile", at="compiled")
    assert result.code == 0 and "not compiled, which is slower but the same: no C compiler found\n" in result.err
    assert losses(tmp_path / "plain") == losses(tmp_path / "compiled")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_blocks_give_the_same_curve_and_plain_names(run, tmp_path):
    flags = "--mixers=softmax", "--mlp_ratio=0", "--pos=none", "--max_steps=3", "--eval_interval=3"  # little to compile
    run(*flags, at="plain")
    result = run(*flags, "--compile", at="compiled")
    assert result.code == 0 and "not compiled" not in result.err
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    names = [load_checkpoint(tmp_path / at / "out/ckpt.pt")["model"].keys() for at in ("plain", "compiled")]
    assert names[0] == names[1]


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="of glibc's malloc")
def test_a_large_tensor_takes_memory_that_was_freed_before():
    script = """if True:
        import resource, torch
        from support.machine import pick_device
        pick_device("cpu")
        faults = []
        for _ in range(16):                                                       # the first ones may find no hole
            torch.zeros(2**24)                                                    # 64 MB, 16,384 pages
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        new = [after - before for before, after in zip(faults, faults[1:])]
        assert sum(pages < 1000 for pages in new) >= 5, faults"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(train.__file__).parent)


def test_a_rank_in_the_environment_without_torchrun_does_not_silence_the_run():
    subprocess.run([sys.executable, "-c", "import train; assert train.RANK == 0"], check=True,
                   cwd=Path(train.__file__).parent, env=os.environ | {"RANK": "1"})


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


LEFT_OVER = [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "1"}, {"WORLD_SIZE": "two"},
             *[TORCHRUN | {"WORLD_SIZE": n} for n in ("0", "-1", "\u0662", "9" * 11)],
             TORCHRUN | {"RANK": "x"}, TORCHRUN | {"LOCAL_RANK": ""}]


def test_what_another_program_left_in_the_environment_makes_no_processes_of_torchrun():
    script = f"""if True:
        import importlib, os
        from support import machine
        before = dict(os.environ)
        for left_over in {LEFT_OVER!r}:
            os.environ.clear()
            os.environ.update(before | left_over)
            importlib.reload(machine)
            assert (machine.RANK, machine.WORLD) == (0, 1), left_over
        os.environ.update({TORCHRUN!r} | {{"RANK": "1"}})
        importlib.reload(machine)
        assert (machine.RANK, machine.WORLD) == (1, 2)"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(train.__file__).parent)


def test_a_rank_beyond_the_world_is_refused_at_once(tmp_path):
    done = subprocess.run([sys.executable, train.__file__, "--batch_size=4", "--grad_accum=2"], cwd=tmp_path,
                          env=os.environ | TORCHRUN | {"RANK": "5"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("train.py: RANK=5 must be below WORLD_SIZE=2: ")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_wait_for_others_say_so_and_what_to_type_for_one_alone(tmp_path, rank):
    environment = os.environ | TORCHRUN | {"RANK": rank, "MASTER_PORT": "29871"}
    process = subprocess.Popen([sys.executable, train.__file__, "--batch_size=4", "--grad_accum=2"], cwd=tmp_path, env=environment,
                               stderr=subprocess.PIPE, text=True)
    try:
        assert "waiting for 2 processes at localhost:29871" in (line := process.stderr.readline()) and "unset WORLD_SIZE" in line
    finally:
        process.kill()
        process.communicate()


def test_a_torch_that_cannot_shard_on_this_device_is_one_line_that_says_so(monkeypatch):
    def fully_shard(module, mesh):
        raise AttributeError("module 'torch.cpu' has no attribute 'Event'")
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", fully_shard)
    monkeypatch.setattr(machine.dist, "init_device_mesh", lambda *args: None)
    with pytest.raises(UserError, match="shard does not work with torch .* on cpu .*no attribute 'Event'.*leave --shard out"):
        machine.shard(None, torch.device("cpu"))


def test_control_characters_of_a_name_do_not_reach_the_terminal(capsys):
    machine.say("wrote \x1b[2Jout")
    assert "\x1b" not in capsys.readouterr().err
