"""experiments/compare.py: training loss picks the lr, a position's loss is the model's, a killed sweep ends in the same table."""
import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import forked
import model
from checkpoint import load_checkpoint, load_model
from configurator import UserError, command
from experiments import compare
from model import LM, ModelConfig
from support.dataset import Dataset, Windows
from support.files import locked
from test_train import as_it_was, data  # noqa: F401 (fixtures)

ROOT = Path(compare.__file__).parent.parent
ARM = "config/hybrid.py,feature_dim=8,window=4"
TINY = ["--dataset=text", "--dim=16", "--depth=2", "--n_heads=2", "--seq_len=8", "--batch_size=4", "--grad_accum=1",
        "--warmup_steps=2", "--max_steps=30", "--log_interval=1", "--save_interval=10", "--eval_tokens=256",
        "--max_skips=2", "--precision=fp32", "--device=cpu", "--lrs=0.01,1e30", "--seeds=1", "--jobs=2"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(*argv):
    """`python -m experiments.compare` in this process: the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare.py", *argv])
        patch.setattr(compare, "subprocess", forked)
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
    assert found.pop("seconds") > 0 and found["complete"]
    for arm in found["arms"]:
        costs = arm.pop("costs")
        assert costs["tokens_per_s"] > 0 and costs["decoding_tokens_per_s"] > 0 and arm.pop("at_equal_time")
        arm["state_bytes"] = costs["state_bytes"]
        arm.pop("by_time")
    return found


# The command line


def test_an_arm_is_a_file_and_its_own_settings_which_win_over_flags():
    config, arms = compare.parse(["config/softmax.py", "config/hybrid.py,dim=64,mixers=linear,window,feature_dim=8",
                                  "--dim=32", "--n_heads=2", "--dataset=text", "--jobs=3", "--precision=fp32"])
    assert [arm.name for arm in arms] == ["softmax", "hybrid,dim=64,mixers=linear,window,feature_dim=8"]
    assert [arm.model.dim for arm in arms] == [32, 64] and arms[1].model.mixers == ["linear", "window"]
    assert [arm.train.precision for arm in arms] == ["fp32"] * 2 and config.jobs == 3
    training = compare.Training(arms[1], 1e-2, 7, config)
    assert training.folder == Path("out/compare", arms[1].name, "lr0.01-seed7")
    assert training.command[:3] == [sys.executable, str(ROOT / "train.py"), "config/hybrid.py"]
    assert {"--dim=32", "--dim=64", "--lr=0.01", "--seed=7", f"--out_dir={training.folder}"} < {*training.command}
    assert not any(flag.startswith("--jobs") for flag in training.command)


def test_rates_are_those_given_or_an_arms_own_and_its_half():
    def rates(*argv):
        return [arm.rates for arm in compare.parse([*argv])[1]]
    assert rates("config/base.py", "config/base.py,max_steps=20000") == [[0.005, 0.01]] * 2
    assert rates("config/tiny.py") == [[0.01, 0.02]] and rates("config/tiny.py", "--lrs=4e-2,1e-2") == [[0.01, 0.04]]


def test_without_arms_seven_presets_are_compared_small_and_flags_win():
    _, arms = compare.parse(["--max_steps=7"])
    assert [arm.rates for arm in arms] == [[0.01, 0.02]] * 7
    assert [arm.name for arm in arms] == ["base", "softmax", "based", "retnet", "deltanet",
                                          "gated_deltanet,feature_dim=24", "hybrid,feature_dim=24"]
    assert {(arm.model.dim, arm.train.dataset, arm.train.max_steps) for arm in arms} == {(128, "stdlib", 7)}
    for arm in arms:
        arm.model.vocab_size = 257
    sizes = [arm.parameters() for arm in arms]
    assert max(sizes) <= 1.03 * min(sizes)


def test_a_mixer_in_the_users_own_file_is_an_arm_named_by_a_flag_or_in_its_config_file(monkeypatch, tmp_path):
    plugin = tmp_path / "compare_own.py"
    plugin.write_text("import model\nmodel.MIXERS['own'] = model.MIXERS['linear']")
    preset = tmp_path / "preset.py"
    preset.write_text(f"mixers = ['own']\nplugin = {str(plugin)!r}\n")
    for words in (["config/base.py,mixers=own", f"--plugin={plugin}"], [str(preset)]):
        monkeypatch.setattr(model, "MIXERS", dict(model.MIXERS))
        monkeypatch.delitem(sys.modules, "plugin_compare_own", raising=False)
        _, [arm] = compare.parse(words)
        assert arm.model.mixers == ["own"] and {*words} & {*arm.arguments}                # and train.py is given it too
        model.MIXERS.pop("own")
    monkeypatch.delitem(sys.modules, "plugin_compare_own", raising=False)
    with pytest.raises(UserError, match="needs --plugin=FILE"):
        compare.parse(["config/base.py,mixers=own"])


@pytest.mark.parametrize("argv, wanted", [
    (["config/sofmax.py"], "config/sofmax.py: no such config file; is it config/softmax.py?"),
    (["config/softmax.py,windw=8"], "--windw is not a known key; the nearest is window"),
    (["--seedss=2"], "the nearest is seeds"), (["softmax"], "an arm is FILE.py"),
    (["config/base.py", "config/base.py"], "two arms are called base"),
    (["config/base.py", "--lr=1e-3"], "lr is not a setting of an arm"),
    (["config/base.py,jobs=2"], "jobs is not a setting of an arm"), (["config/base.py,seed=2"], "seed is not a setting"),
    (["config/base.py,out_dir=x"], "out_dir is not a setting of an arm"),
    (["config/base.py", "config/tiny.py"], "tiny has dataset=stdlib and base c4"),
    (["config/base.py", "config/base.py,max_steps=3"], "base,max_steps=3 has tokens="),
    (["--lrs=0.1,x"], "lrs must be"), (["--lrs=0.1,1e-1"], "lrs must be"), (["--lrs=0"], "lrs must be"),
    (["config/base.py,resume=false"], "with resume=False trainings are not equal"),
    (["config/base.py", "--init_from=out/tiny"], "with init_from=out/tiny trainings are not equal"),
    (["--jobs=0"], "jobs must be at least 1"), (["config/base.py,causal=false"], "causal=False"),
    (["config/base.py,dataset=none-such"], "there is no finished dataset in data/none-such")])
def test_a_mistake_is_one_line_before_anything_is_trained(argv, wanted, monkeypatch, capsys):
    monkeypatch.setattr(compare, "train_all", None)
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert wanted in err and err.count("\n") == 1


def test_a_file_may_hold_the_arms_and_settings_for_all_and_flags_win(tmp_path, capsys):
    file = tmp_path / "sweep.py"
    file.write_text("arms = ['config/base.py', 'config/softmax.py,dim=64']\nlrs = '0.01'\ndim = 32\nseeds = 2\n")
    config, arms = compare.parse([str(file), "--seeds=5", "--n_heads=2"])
    assert [arm.name for arm in arms] == ["base", "softmax,dim=64"] and [arm.model.dim for arm in arms] == [32, 64]
    assert config.seeds == 5 and [arm.rates for arm in arms] == [[0.01]] * 2 and arms[0].model.n_heads == 2
    for text, argv, wanted in (("arms = 'config/base.py'", [], "arms must be a list"),
                               ("arms = ['config/base.py']", ["config/base.py"], "leave out config/base.py"),
                               ("arms = ['config/base.py']; dmi = 3", [], "the nearest is dim")):
        file.write_text(text)
        with pytest.raises(UserError, match=wanted):
            compare.parse([str(file), *argv])


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/sweeps").glob("*.py")), ids=lambda path: path.stem)
def test_a_sweep_in_the_repository_compares_what_can_be_compared(path):
    _, arms = compare.parse([str(path)])
    assert len(arms) > 5


@pytest.mark.parametrize("line, wanted", [("eval_only = True", "with eval_only=True trainings are not equal"),
                                          ("jobs = 2", "arm.py:2: jobs: jobs is not a setting of an arm"), ("", "")])
def test_the_file_of_an_arm_is_checked_as_flags_are(line, wanted, tmp_path):
    (tmp_path / "arm.py").write_text(f"lr = 1e-3; seed = 3; out_dir = 'out/mine'\n{line}\n")
    if not wanted:
        config, (arm,) = compare.parse([str(tmp_path / "arm.py")])
        assert config.out_dir == "out/compare" and arm.rates == [5e-4, 1e-3]
        return
    with pytest.raises(UserError, match=wanted):
        compare.parse([str(tmp_path / "arm.py")])


@pytest.mark.parametrize("flag", ["--plot={}/file/loss.png", "--plot={}/folder", "--out_dir={}/file"])
def test_what_cannot_be_written_is_known_before_all_training(flag, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(compare, "train_all", None)
    out = [f"--out_dir={tmp_path}/out"] * ("out_dir" not in flag)
    assert run(ARM, *TINY, f"--data_dir={data}", *out, flag.format(tmp_path)) == 2
    err = capsys.readouterr().err
    assert f"cannot write {tmp_path}/f" in err and err.count("\n") == 1


@pytest.mark.parametrize("name, flag", [("results.json", "--out_dir={}"), ("photo.png", "--plot={}/photo.png")])
def test_a_file_of_the_users_own_is_not_written_over(name, flag, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / name).write_text('{"mine": 1}')
    monkeypatch.setattr(compare, "train_all", None)
    out = [f"--out_dir={tmp_path}/out"] * ("out_dir" not in flag)
    assert run(ARM, *TINY, f"--data_dir={data}", *out, flag.format(tmp_path)) == 2
    err = capsys.readouterr().err
    assert f"{name} exists, and --" in err and err.count("\n") == 1
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_more_than_an_epoch_is_said(data, tmp_path, capsys):  # noqa: F811
    steps = Windows(Dataset(data / "text").train, 8, seed=0).total
    for more, warned in ((0, False), (1, True)):
        config, arms = compare.parse([ARM, *TINY, f"--data_dir={data}", f"--out_dir={tmp_path}", "--batch_size=1",
                                      f"--max_steps={steps + more}"])
        compare.check(arms, config)
        assert ("the loss that picks the lr is on text seen before" in capsys.readouterr().err) == warned


# The learning rate


def trained(folder, lr, records):
    config, (arm,) = compare.parse(["config/base.py", f"--out_dir={folder}"])
    training = compare.Training(arm, lr, 1, config)
    training.folder.mkdir(parents=True)
    (training.folder / "metrics.jsonl").write_text("".join(json.dumps(r | {"tokens": 0}) + "\n" for r in records))
    return training


def curve_of(*losses, val_loss):
    records = [{"step": i + 1, "loss": loss, "lr": 1.0} for i, loss in enumerate(losses)]
    return [*records, {"step": len(losses), "val_loss": val_loss}]


def test_the_learning_rate_is_taken_by_training_loss_and_not_by_validation(tmp_path, capsys):
    found = [trained(tmp_path, 0.01, curve_of(*[1.0] * 18, 3.0, 3.0, val_loss=1.0)),      # the end counts
             trained(tmp_path, 0.02, curve_of(*[9.0] * 18, 2.0, 2.5, val_loss=5.0)),
             trained(tmp_path, 0.04, curve_of(*[1.0] * 18, 2.3, 2.3, val_loss=1.0))]
    assert [training.loss() for training in found] == [3.0, 2.25, 2.3]
    arm = dataclasses.replace(found[0].arm, rates=[0.01, 0.02, 0.04])
    tuning, chosen = compare.sweep(arm, 2, lambda arm, runs: found[:] if len(runs) == 3 else runs)
    assert tuning == found and chosen == [(0.02, 2), (0.02, 3)]


def test_only_regular_records_of_steps_that_were_made_count(tmp_path):
    records = curve_of(*[9.0] * 4, 2.0, 7.0, val_loss=1.0)
    spike = {"step": 5, "loss": 8.0, "grad_norm": 1.0, "spike": True, "skipped": False}
    assert trained(tmp_path / "a", 0.1, [*records[:5], spike]).loss() == 2.0
    skipped = {"step": 6, "loss": None, "spike": True, "skipped": True}
    assert trained(tmp_path / "b", 0.1, [*records, skipped]).loss() == 2.0
    assert trained(tmp_path / "c", 0.1, []).loss() == math.inf


def test_a_training_that_diverged_is_not_taken(tmp_path, capsys):
    found = trained(tmp_path, 0.02, curve_of(1.0, 1.0, val_loss=1.0))
    found.marker.write_text(shlex.join(found.command[2:-1]))
    assert found.diverged() and found.loss() == math.inf
    found.run(None, None, None)                                                      # it would again
    arm = dataclasses.replace(found.arm, rates=[0.02, 0.04])
    assert compare.sweep(arm, 2, lambda arm, runs: [found, found]) == ([found, found], [])
    assert "diverged at every lr" in capsys.readouterr().err
    found.command.insert(4, "--max_steps=3")                                         # another command may do better
    assert not found.diverged()


def search(rates, loss):
    """The rates that sweep tries, in its order, and those it takes for the report."""
    tried = []

    def train(arm, runs):
        tried.extend(runs)
        return [SimpleNamespace(lr=lr, seed=seed, loss=lambda lr=lr: loss(lr)) for lr, seed in runs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.Training, "loss", lambda training: training.loss())
        _, chosen = compare.sweep(SimpleNamespace(name="arm", rates=rates), 1, train)
    return [lr for lr, seed in tried if seed == 1], [training.lr for training in chosen]


def test_a_rate_is_searched_until_the_best_has_one_on_both_sides(capsys):
    assert search([0.01, 0.02], lambda lr: abs(lr - 0.003)) == ([0.01, 0.02, 0.005, 0.0025, 0.00125], [0.0025])
    assert search([0.01, 0.02], lambda lr: abs(lr - 0.05)) == ([0.01, 0.02, 0.04, 0.08], [0.04])
    assert search([0.01, 0.02], lambda lr: -lr if lr < 0.05 else math.inf) == ([0.01, 0.02, 0.04, 0.08], [0.04])
    assert search([0.01, 0.02, 0.04], lambda lr: abs(lr - 0.02)) == ([0.01, 0.02, 0.04], [0.02])
    assert search([0.01], lambda lr: lr) == ([0.01], [0.01]) and "warning" not in capsys.readouterr().err
    tried, chosen = search([0.01, 0.02], lambda lr: 1.0)                              # it has an end
    assert len(tried) == 2 + compare.BEYOND and chosen == [tried[-1]] and "beyond" in capsys.readouterr().err


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
    assert compare.bins(16, 40) == [(0, 8), (8, 16), (16, 32), (32, 40)]
    for T, length in ((8, 32), (8, 8), (100, 400), (1, 4), (5, 20)):
        bins = compare.bins(T, length)
        assert [i for start, end in bins for i in range(start, end)] == list(range(length))
        assert not any(start < T < end for start, end in bins)


def test_the_report_is_of_fresh_seeds_at_the_rate_taken_on_the_last_weights(sweep, data):  # noqa: F811
    arm, = sweep.results["arms"]
    assert arm["lr"] == 0.01 and arm["tuning"]["1e+30"] is None and arm["tuning"]["0.01"] < math.log(257)
    assert sorted(path.name for path in sweep.folder.glob("hybrid*/*")) == [
        "lr0.005-seed1", "lr0.01-seed1", "lr0.01-seed2", "lr1e+30-seed1"]
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
    found = Dataset(data / "text")
    found.give_vocabulary(arm.model)
    training, text = compare.Training(arm, 0.01, 2, config), compare.Text(found, 32, 256, torch.device("cpu"))
    save(training, LM(arm.model), found)
    training.evaluate(text, checkpoints=True)
    result = compare.summarise(arm, [], [training], {}, 32)
    (losses,), (beyond,), (again,) = (result[key] for key in ("by_position", "beyond", "beyond_overlapping"))
    assert not any(map(math.isnan, losses[:8])) and all(map(math.isnan, losses[8:])) and math.isnan(beyond)
    assert compare.cell([beyond], result) == "none" and again == pytest.approx(math.log(257), rel=0.05)
    assert compare.cell([beyond], {"diverged": [2]}) == "diverged"


def test_a_seed_that_diverged_is_none_of_the_mean(data, tmp_path):  # noqa: F811
    config, (arm,) = compare.parse(["config/base.py", *TINY, f"--data_dir={data}", f"--out_dir={tmp_path}"])
    found = Dataset(data / "text")
    found.give_vocabulary(arm.model)
    trainings = [compare.Training(arm, 0.01, seed, config) for seed in (2, 3)]
    for training in trainings:
        save(training, LM(arm.model), found)
    trainings[1].marker.write_text(shlex.join(trainings[1].command[2:-1]))
    for training in trainings:
        training.evaluate(compare.Text(found, 16, 64, torch.device("cpu")), checkpoints=True)
    result = compare.summarise(arm, [], trainings, {}, 16)
    assert result["diverged"] == [3] and [math.isnan(loss) for loss in result["within"]] == [False, True]
    assert compare.cell(result["within"], result) == compare.cell(result["beyond"], result) == "diverged"
    assert result["precisions"] == ["fp32", None]


def save(training, model, data):  # noqa: F811
    training.folder.mkdir(parents=True)
    torch.save({"model": model.state_dict(), "model_config": dataclasses.asdict(model.config), "config":
                {"precision": "fp32"}, "data": data.fingerprint} | dict.fromkeys(
                    ("optimizer", "step", "rng", "best_loss", "recent_losses", "skips")), training.folder / "ckpt.pt")


@pytest.mark.parametrize("T", [1, 5, 6, 7])
def test_overlapping_windows_predict_each_token_beyond_from_half_a_window_or_more(T):
    torch.manual_seed(0)
    model = LM(ModelConfig(vocab_size=50, dim=16, depth=1, n_heads=2, seq_len=T, mixers="softmax", pos="rope")).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = torch.randint(50, (2, 4 * T + 1))
    half, losses = max(1, T // 2), []
    for position in range(T, 4 * T):                                                 # each once
        start = min(3 * T, (position - T) // half * half + half)
        logits = model(tokens[:, start:start + T])[0][:, position - start]
        losses.append(F.cross_entropy(logits, tokens[:, position + 1]))
    with torch.no_grad():
        found = compare.overlapping(model, tokens[:, :-1], tokens[:, 1:], T, rows=3)
    assert found == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_each_source_of_validation_is_read_as_much_as_the_others_and_told_apart(tmp_path, capsys):
    names = {"mix": 2000, "python": 300, "python ": 300, "tiny": 9}
    files = [FakeFile(tmp_path / f"val-0000{i}.bin", range(size)) for i, size in enumerate(names.values())]
    data = SimpleNamespace(val=files, manifest={"files": {
        file.path.name: {"source": name.strip()} for file, name in zip(files, names)}})
    text = compare.Text(data, 16, 16 * 40, torch.device("cpu"))
    assert {name: count for name, (_, count) in text.sources.items()} == {"mix": 20, "python": 20}
    assert "not read, because they are shorter than the windows of 16 tokens: tiny" in capsys.readouterr().err
    with pytest.raises(UserError, match="3000 tokens, and the longest validation text has 2000: use a smaller --longer"):
        compare.Text(data, 3000, 100, torch.device("cpu"))


class FakeFile(np.ndarray):
    def __new__(cls, path, tokens):
        array = np.array(tokens, np.uint16).view(cls)
        array.path = path
        return array


def test_the_loss_at_equal_time_is_of_the_last_tenth_of_it(tmp_path):
    training = trained(tmp_path, 0.1, curve_of(*range(100, 0, -1), val_loss=9.0))
    training.arm.train.batch_size, training.arm.model.seq_len = 4, 8                  # 32 tokens a step
    assert training.loss_at(100 * 32 / 10, 10) == statistics.mean(range(1, 11))       # to the end
    assert training.loss_at(50 * 32 / 10, 10) == statistics.mean(range(51, 56))
    assert training.loss_at(50 * 32 / 10, 5) == statistics.mean(range(76, 79)) and training.loss_at(0.1, 10) is None


def result_of(name, mixers, *within, diverged=()):
    return {"name": name, "mixers": mixers, "within": [*within], "diverged": [*diverged], "seeds": [1, 2]}


def test_arms_are_compared_by_seed_to_the_first_that_is_all_softmax_and_a_diverged_one_comes_last():
    arms = [result_of("a", ["linear"], 1.0, 2.0), result_of("b", ["softmax"], 2.0, 2.5),
            result_of("c", ["linear", "softmax"], math.nan, 0.1, diverged=[2])]
    assert compare.rank(arms) == "b" and [arm["name"] for arm in arms] == ["a", "b", "c"]
    assert arms[0]["difference"] == [-1.0, -0.5] and arms[1]["difference"] == [0, 0]
    assert compare.cell(arms[0]["difference"], arms[0], "+.3f") == "-0.750 (0.500)"
    assert compare.cell(arms[2]["difference"], arms[2], "+.3f") == "diverged"
    assert compare.rank([arms[0], arms[2]]) == "a"


def test_without_longer_windows_nothing_is_said_of_positions_beyond(sweep, capsys):
    arm = sweep.results["arms"][0] | {"costs": {"tokens_per_s": 100}, "beyond_overlapping": [math.nan]}
    compare.report([arm], arm["name"], 8, 32)
    assert "| 8 to 31 | the same in overlapping windows of 8 |" in capsys.readouterr().out
    compare.report([arm], arm["name"], 8, 8)
    out = capsys.readouterr().out
    assert "| positions 0 to 7 |" in out and "| 8 to" not in out and "overlapping" not in out
    assert ", 8 windows of 32 tokens; " in sweep.results["title"]


def test_trainings_of_several_precisions_are_named(sweep, tmp_path, monkeypatch, capsys):
    arm = sweep.results["arms"][0] | {"costs": {}, "beyond_overlapping": [math.nan], "precisions": ["fp32"]}
    training = SimpleNamespace(diverged=lambda: False)
    monkeypatch.setattr(compare, "train_all",
                        lambda arms, *_: ({arm.name: ([], [training]) for arm in arms}, True))
    monkeypatch.setattr(compare, "measure_costs", lambda *_: {})
    monkeypatch.setattr(compare, "add_equal_time", lambda *_: 1.0)
    monkeypatch.setattr(compare, "summarise", lambda arm, *_: found[arm.name])
    for other in ("fp32", "bf16"):
        found = {"base": arm, "softmax": arm | {"precisions": [other]}}
        assert run("config/base.py", "config/softmax.py", *sweep.flags[1:], f"--out_dir={tmp_path}") == 0
        assert ("warning: trainings in bf16 and fp32 are compared" in capsys.readouterr().err) == (other == "bf16")


def test_the_picture_is_a_png(sweep):
    pytest.importorskip("matplotlib")
    assert (sweep.folder / "deep/loss.png").read_bytes().startswith(b"\x89PNG")


# Going on


@pytest.mark.slow
def test_a_killed_sweep_that_is_started_again_ends_in_the_same_table(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "PAUSE", 0.5)
    flags = [*sweep.flags, f"--out_dir={tmp_path}"]
    process = subprocess.Popen([sys.executable, "-m", "experiments.compare", *flags], stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not list(tmp_path.glob("hybrid*/lr0.01-seed1/ckpt.pt")):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()                                                               # its trainings go on
        process.wait()
    assert not (tmp_path / "results.json").exists()
    assert run(*flags) == 0
    again = results(tmp_path)
    assert again["arms"] == sweep.results["arms"]
    assert "| hybrid,feature_dim=8,window=4 |" in capsys.readouterr().out


def test_a_training_that_fails_ends_the_comparison_with_its_last_line(sweep, tmp_path, monkeypatch, capsys):
    program = tmp_path / "train.py"
    program.write_text("import sys; print('one'); print('train.py: no luck', file=sys.stderr); sys.exit(2)")
    monkeypatch.setattr(compare, "PROGRAM", program)
    assert run(*sweep.flags, f"--out_dir={tmp_path}/sweep") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("compare.py: ")
    assert "/log.txt ends, with exit code 2: train.py: no luck" in last


def test_a_folder_of_another_run_is_noticed_before_anything_is_trained(sweep, monkeypatch, capsys):
    monkeypatch.setattr(compare, "train_all", None)
    assert run(*sweep.flags, f"--out_dir={sweep.folder}", "--weight_decay=0.3", "--lrs=0.3") == 2
    err = capsys.readouterr().err
    assert "weight_decay was 0.1, now 0.3: use another --out_dir" in err and err.count("\n") == 1


def test_of_a_finished_training_no_checkpoint_is_needed(sweep, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(sweep.folder, tmp_path / "copy")
    for path in folder.glob("*/lr*/*.pt"):
        path.unlink()
    monkeypatch.setattr(compare, "PROGRAM", tmp_path / "no such program")
    assert run(*sweep.flags, f"--out_dir={folder}") == 0
    assert results(folder)["arms"] == sweep.results["arms"]
    assert run(*sweep.flags, f"--out_dir={folder}", "--longer=2") == 2
    assert "was evaluated with another --longer, and its checkpoint is deleted" in capsys.readouterr().err


def test_a_lost_checkpoint_and_too_long_windows_are_told_with_their_fixes(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "train_all", None)
    folder = shutil.copytree(sweep.folder, tmp_path / "copy")
    checkpoint = next(path for path in folder.glob("*/lr*/ckpt.pt") if (path.parent / "best.pt").exists())
    (checkpoint.parent / "finished.json").unlink()

    def told(*flags):
        assert run(*sweep.flags, f"--out_dir={folder}", *flags) == 2
        err = capsys.readouterr().err
        return err if err.count("\n") == 1 else ""
    assert "use a smaller --longer" in told("--longer=100000")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert f"delete {checkpoint.parent}, and the same command trains it again" in told()
    checkpoint.unlink()
    assert f"delete {checkpoint.parent}, and the same command trains it again" in told()


@pytest.mark.slow
def test_a_folder_where_another_trains_holds_back_no_other(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(compare, "PAUSE", 1)
    first, second = (tmp_path / name / "lr1e+30-seed1" for name in ("base", "softmax"))
    waited = []

    def other():
        with locked(first):
            while not ((second / "diverged").exists() and refused() > 1):              # however long that takes
                time.sleep(0.1)
            waited.append(True)

    def refused():
        return (first / "log.txt").read_text().count("is running in") if (first / "log.txt").exists() else 0
    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    flags = [*TINY, f"--data_dir={data}", f"--out_dir={tmp_path}", "--lrs=1e30", "--jobs=1"]
    assert run("config/base.py", "config/softmax.py", *flags) == 2                    # and it diverges: an end, too
    thread.join()
    err = capsys.readouterr().err
    assert waited and err.count("is running there: waiting for it to end") == 1
    assert err.endswith("every arm diverged at every learning rate: try lower --lrs\n")


# The processes, with a train.py that only says so


FAKE = """
import json, os, pathlib, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
out, lr = pathlib.Path(flags["out_dir"]), float(flags["lr"])
def write():
    record = {"step": 1, "tokens": 0, "loss": abs(lr - 0.02), "lr": lr}
    (out / "metrics.jsonl").write_text(json.dumps(record) + "\\n")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(body, *flags): the sweeps of config/base.py with a train.py that runs body."""
    def fake(body, *flags):
        (tmp_path / "train.py").write_text(FAKE + body)
        monkeypatch.setattr(compare, "PROGRAM", tmp_path / "train.py")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        config, arms = compare.parse(["config/base.py", f"--out_dir={tmp_path}/out", *flags])
        monkeypatch.setattr(compare.Training, "evaluate", lambda self, *_: setattr(self, "losses", {"text": None}))
        found, complete = compare.train_all(arms, config, SimpleNamespace(device=torch.device("cpu"), identity=None))
        return found["base"], complete
    return fake


@pytest.mark.parametrize("jobs", [1, 3])
def test_so_many_trainings_run_at_once_as_there_are_jobs(jobs, fake, tmp_path):
    (tuning, chosen), complete = fake(f"jobs = {jobs}" + """
(out / "started").touch()
(out / "running").touch()
while len(list(out.parent.glob("*/started"))) < jobs:                                # the first so many wait for each other
    time.sleep(0.05)
(out / "peak").write_text(str(len(list(out.parent.glob("*/running")))))
(out / "running").unlink()
write()
""", f"--jobs={jobs}", "--lrs=0.01,0.02,0.04", "--seeds=2")
    assert complete and [(t.lr, t.seed) for t in tuning + chosen] == [(0.01, 1), (0.02, 1), (0.04, 1), (0.02, 2), (0.02, 3)]
    assert max(int(path.read_text()) for path in tmp_path.glob("out/base/*/peak")) == jobs


def test_each_gpu_has_its_own_trainings_and_compiled_code_is_shared(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "visible_gpus", lambda device: ["3", "GPU-7"])
    fake("""
(out / "gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
(out / "cache").write_text(os.environ["TORCHINDUCTOR_CACHE_DIR"])
while len(list(out.parent.glob("*/gpu"))) < 4:                                       # all four at once
    time.sleep(0.05)
write()
""", "--jobs=2", "--lrs=0.01", "--seeds=4")
    gpus = [path.read_text() for path in tmp_path.glob("out/base/*/gpu")]
    caches = {path.read_text() for path in tmp_path.glob("out/base/*/cache")}
    assert sorted(gpus) == ["3", "3", "GPU-7", "GPU-7"] and caches == {str(tmp_path / "out/inductor")}


def test_when_the_time_is_up_trainings_are_stopped_and_what_is_finished_is_kept(fake, tmp_path, monkeypatch):
    base = tmp_path / "out/base"
    monkeypatch.setattr(compare.Clock, "is_late", lambda clock: bool([*base.glob("*/pid")]))
    (tuning, chosen), complete = fake("""
if not list(out.parent.glob("*/metrics.jsonl")):                                     # the first that is started
    write()
    sys.exit()
(out / "pid").write_text(str(os.getpid()))
while True:
    time.sleep(60)
""", "--jobs=1", "--lrs=0.01", "--seeds=3")
    finished, = base.glob("*/metrics.jsonl")
    assert not complete and tuning == [] and [training.folder for training in chosen] == [finished.parent]
    stopped, = base.glob("*/pid")                                                    # and no third was started
    with pytest.raises(ProcessLookupError):
        os.kill(int(stopped.read_text()), 0)


@pytest.mark.parametrize("cause", ["SIGTERM", "a training that fails"])
def test_an_end_ends_the_trainings_too(cause, fake, tmp_path):
    def kill():
        while not list(tmp_path.glob("out/base/*/pid")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
    if cause == "SIGTERM":
        threading.Thread(target=kill).start()
    with pytest.raises(KeyboardInterrupt if cause == "SIGTERM" else UserError) as end:
        fake(f"""
if lr == 0.01 and {cause != "SIGTERM"}:
    while not list(out.parent.glob("*/pid")):
        time.sleep(0.05)
    sys.exit(1)
(out / "pid.tmp").write_text(str(os.getpid()))
(out / "pid.tmp").rename(out / "pid")
time.sleep(60)
""", "--jobs=2", "--lrs=0.01,0.02,0.04")
    assert cause == "SIGTERM" or str(end.value).endswith("lr0.01-seed1/log.txt ends, with exit code 1: no output")
    pids = [int(path.read_text()) for path in tmp_path.glob("out/base/*/pid")]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
