"""compare.py: training loss picks the lr, a position's loss is the model's, a killed sweep ends in the same table."""
import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import compare
import prepare
from checkpoint import load_checkpoint, load_model
from configurator import UserError, command
from model import LM, ModelConfig
from test_train import as_it_was, data  # noqa: F401 (fixtures)
from train import Dataset, Windows

ROOT = Path(compare.__file__).parent
ARM = "config/hybrid.py,feature_dim=8,window=4"
TINY = ["--dataset=text", "--dim=16", "--depth=2", "--n_heads=2", "--seq_len=8", "--batch_size=4", "--grad_accum=1",
        "--warmup_steps=2", "--max_steps=30", "--log_interval=1", "--save_interval=10", "--eval_tokens=256",
        "--max_skips=2", "--precision=fp32", "--device=cpu", "--lrs=0.01,1e30", "--seeds=1"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(*argv):
    """`python compare.py` in this process: the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare.py", *argv])
        patch.chdir(ROOT)
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            command(compare.main)
        except SystemExit as error:
            return error.code
    return 0


@pytest.fixture(scope="module")
def sweep(data, tmp_path_factory):  # noqa: F811
    """A finished sweep: its flags, its folder, results.json without the clock."""
    folder, threads = tmp_path_factory.mktemp("sweep"), torch.get_num_threads()
    torch.set_num_threads(1)
    flags = [ARM, *TINY, f"--data_dir={data}"]
    assert run(*flags, f"--out_dir={folder}", f"--plot={folder}/deep/loss.png") == 0
    torch.set_num_threads(threads)
    return SimpleNamespace(flags=flags, folder=folder, results=results(folder))


def results(folder):
    found = json.loads((folder / "results.json").read_text())
    for arm in found["arms"]:
        assert arm.pop("tokens_per_s") > 0
    return found


# The command line


def test_an_arm_is_a_file_and_its_own_settings_which_win_over_flags():
    config, arms = compare.parse(["config/softmax.py", "config/hybrid.py,dim=64,mixers=linear,window,feature_dim=8",
                                  "--dim=32", "--n_heads=2", "--dataset=text", "--jobs=3", "--precision=fp32"])
    assert [arm.name for arm in arms] == ["softmax", "hybrid,dim=64,mixers=linear,window,feature_dim=8"]
    assert [arm.model.dim for arm in arms] == [32, 64] and arms[1].model.mixers == ["linear", "window"]
    assert [arm.train.precision for arm in arms] == ["fp32"] * 2 and config.jobs == 3
    training = compare.Training(arms[1], "1e-2", 7, config)
    assert training.folder == Path("out/compare", arms[1].name, "lr1e-2-seed7")
    assert training.command[:3] == [sys.executable, str(ROOT / "train.py"), "config/hybrid.py"]
    assert {"--dim=32", "--dim=64", "--lr=1e-2", "--seed=7", f"--out_dir={training.folder}"} < {*training.command}
    assert not any(flag.startswith("--jobs") for flag in training.command)


def test_without_arms_seven_presets_are_compared_small_and_flags_win():
    _, arms = compare.parse(["--max_steps=7"])
    assert [arm.name for arm in arms] == ["base", "softmax", "based", "retnet", "deltanet",
                                          "gated_deltanet,feature_dim=24", "hybrid,feature_dim=24"]
    assert {(arm.model.dim, arm.train.dataset, arm.train.max_steps) for arm in arms} == {(128, "stdlib", 7)}
    for arm in arms:
        arm.model.vocab_size = 257
    sizes = [arm.parameters() for arm in arms]
    assert max(sizes) <= 1.03 * min(sizes)


@pytest.mark.parametrize("argv, wanted", [
    (["config/sofmax.py"], "config/sofmax.py: no such config file; is it config/softmax.py?"),
    (["config/softmax.py,windw=8"], "--windw is not a known key; the nearest is window"),
    (["--seedss=2"], "the nearest is seeds"), (["softmax"], "an arm is FILE.py"),
    (["config/base.py", "config/base.py"], "two arms are called base"),
    (["config/base.py", "--lr=1e-3"], "lr is no setting of an arm"),
    (["config/base.py,jobs=2"], "jobs is no setting of an arm"), (["config/base.py,seed=2"], "seed is no setting"),
    (["config/base.py,out_dir=x"], "out_dir is no setting of an arm"),
    (["config/base.py", "config/tiny.py"], "tiny has dataset=stdlib and base c4"),
    (["config/base.py", "config/base.py,max_steps=3"], "base,max_steps=3 has tokens="),
    (["--lrs=0.1,x"], "lrs must be"), (["--lrs=0.1,1e-1"], "lrs must be"), (["--lrs=0"], "lrs must be"),
    (["--jobs=0"], "jobs must be at least 1"), (["config/base.py,causal=false"], "causal=False"),
    (["config/base.py,dataset=none-such"], "there is no finished dataset in data/none-such")])
def test_a_mistake_is_one_line_before_anything_is_trained(argv, wanted, monkeypatch, capsys):
    monkeypatch.setattr(compare, "train_all", None)
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert wanted in err and err.count("\n") == 1


# The learning rate


def trained(folder, lr, records, log=""):
    config, (arm,) = compare.parse(["config/base.py", f"--out_dir={folder}"])
    training = compare.Training(arm, lr, 1, config)
    training.folder.mkdir(parents=True)
    (training.folder / "metrics.jsonl").write_text("".join(json.dumps(r | {"tokens": 0}) + "\n" for r in records))
    (training.folder / "log.txt").write_text(f"$ {shlex.join(training.command)}\n{log}\n")
    return training


def curve_of(*losses, val_loss):
    records = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    return [*records, {"step": len(losses), "val_loss": val_loss}]


def test_the_learning_rate_is_taken_by_training_loss_and_not_by_validation(tmp_path, capsys):
    a = trained(tmp_path, "0.01", curve_of(*[1.0] * 18, 3.0, 3.0, val_loss=1.0))      # the end counts
    b = trained(tmp_path, "0.02", curve_of(*[9.0] * 18, 2.0, 2.5, val_loss=5.0))
    c = trained(tmp_path, "0.04", curve_of(*[1.0] * 18, 2.3, 2.3, val_loss=1.0))
    assert [training.loss() for training in (a, b, c)] == [3.0, 2.25, 2.3]
    assert compare.pick([a, b, c]) is b and "at an end of --lrs" not in capsys.readouterr().err
    assert compare.pick([b, c]) is b and "at an end of --lrs" in capsys.readouterr().err


def test_a_training_that_diverged_is_not_taken(tmp_path, capsys):
    a = trained(tmp_path, "0.01", curve_of(3.0, 3.0, val_loss=3.0))
    b = trained(tmp_path, "0.02", curve_of(1.0, 1.0, val_loss=1.0), f"train.py: 20 {compare.DIVERGED}, for a loss")
    c = trained(tmp_path, "0.04", curve_of(1.0, None, val_loss=1.0))
    assert compare.pick([a, b, c]) is a
    assert compare.pick([b, c]) is None and "diverged at every lr" in capsys.readouterr().err
    b.command.append("--max_steps=3")                                                # another command may do better
    assert not b.diverged()
    with open(b.folder / "log.txt", "r+") as log:
        log.write(f"$ {shlex.join(b.command)}\n{log.read()}")                         # the earlier of two
    assert not b.diverged()


# The report


@pytest.mark.parametrize("options", [dict(mixers="softmax", pos="rope"), dict(mixers="window conv", window=5),
                                     dict(mixers="linear", feature_map="taylor", feature_dim=4),
                                     dict(mixers="linear", feature_map="silu_l2", delta=True, decay="gated",
                                          normaliser="rms", short_conv=True)])
def test_the_loss_of_a_position_far_beyond_seq_len_is_that_of_one_pass_over_all_before_it(options):
    torch.manual_seed(0)
    model = LM(ModelConfig(vocab_size=50, dim=16, depth=2, n_heads=2, seq_len=8, **options)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = torch.randint(50, (3, 34))
    x, y = tokens[:, :-1], tokens[:, 1:]
    found = compare.losses_by_position(model, x, y, piece=8)
    full = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), reduction="none").view(3, 33)
    torch.testing.assert_close(found, full, atol=1e-4, rtol=1e-4)
    assert found.std() > 0.1 and not found.requires_grad


def test_bins_cover_every_position_once_and_none_straddles_seq_len():
    for T, length in ((8, 32), (8, 8), (100, 400), (1, 4)):
        bins = compare.bins(T, length)
        assert [i for start, end in bins for i in range(start, end)] == list(range(length))
        assert not any(start < T < end for start, end in bins)


def test_the_report_is_of_fresh_seeds_at_the_rate_taken_on_the_last_weights(sweep, data):  # noqa: F811
    arm, = sweep.results["arms"]
    assert arm["lr"] == "0.01" and arm["tuning"]["1e30"] is None and arm["tuning"]["0.01"] < math.log(257)
    assert sorted(path.name for path in sweep.folder.glob("hybrid*/*")) == [
        "lr0.01-seed1", "lr0.01-seed2", "lr1e30-seed1"]
    model = load_model(load_checkpoint(next(sweep.folder.glob("hybrid*/lr0.01-seed2/ckpt.pt"))), "cpu").eval()
    windows = Windows(Dataset(data / "text").val, 32, seed=0)
    x, y = windows.batch(range(8), 257, torch.device("cpu"))                         # eval_tokens / 32
    losses = F.cross_entropy(model(x)[0].mT, y, reduction="none").mean(0).detach()
    assert arm["within"] == pytest.approx([float(losses[:8].mean())], rel=1e-5)
    assert arm["beyond"] == pytest.approx([float(losses[8:].mean())], rel=1e-5)
    assert arm["by_position"][0] == pytest.approx(losses.tolist(), rel=1e-4)


def test_learned_positions_are_reported_to_seq_len(data, tmp_path):  # noqa: F811
    config, (arm,) = compare.parse(["config/base.py", *TINY, f"--data_dir={data}", "--pos=learned",
                                    f"--out_dir={tmp_path}"])
    arm.model.vocab_size, training = 257, compare.Training(arm, "0.01", 1, config)
    found = Dataset(data / "text")
    training.folder.mkdir(parents=True)
    torch.save({"model": LM(arm.model).state_dict(), "model_config": dataclasses.asdict(arm.model), "config":
                {"precision": "fp32"}, "data": found.fingerprint} | dict.fromkeys(
                    ("optimizer", "step", "rng", "best_loss", "recent_losses", "skips")), training.folder / "ckpt.pt")
    result = compare.evaluate(arm, [], [training], found, 32, torch.device("cpu"))
    assert len(result["by_position"][0]) == 8 and result["beyond"] == [None] and None not in result["within"]
    assert compare.cell(result["beyond"]) == "none"


def test_the_picture_is_a_png(sweep):
    pytest.importorskip("matplotlib")
    assert (sweep.folder / "deep/loss.png").read_bytes().startswith(b"\x89PNG")


# Going on


@pytest.mark.slow
def test_a_killed_sweep_that_is_started_again_ends_in_the_same_table(sweep, tmp_path, capsys):
    flags = [*sweep.flags, f"--out_dir={tmp_path}"]
    process = subprocess.Popen([sys.executable, "compare.py", *flags], start_new_session=True,
                               stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not list(tmp_path.glob("hybrid*/lr0.01-seed1/ckpt.pt")):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "results.json").exists()
    assert run(*flags) == 0
    again = results(tmp_path)
    assert again["arms"] == sweep.results["arms"]
    assert "| hybrid,feature_dim=8,window=4 |" in capsys.readouterr().out


def test_a_training_that_fails_ends_the_comparison_with_its_last_line(sweep, capsys):
    assert run(*sweep.flags, f"--out_dir={sweep.folder}", "--weight_decay=0.3") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("compare.py: ") and "lr0.01-seed1/log.txt ends, with exit code 2: train.py: " in last
    assert "weight_decay was 0.1, now 0.3" in last


def test_a_folder_in_which_another_process_trains_is_waited_for(tmp_path):
    training = trained(tmp_path, "0.01", [])
    with prepare.locked(training.folder), pytest.raises(UserError) as error, prepare.locked(training.folder):
        pass
    with open(training.folder / "log.txt", "a") as log:
        log.write(f"train.py: {error.value}\nstep 3: a line of that other process\n")
    training.process = SimpleNamespace(poll=lambda: 2)
    assert training.is_busy()
    training.process = SimpleNamespace(poll=lambda: 0)
    assert not training.is_busy()
