"""experiments/gpu_check.py: what is slower than kept is named, and every preset of config/ is checked."""
import json
import sys
from pathlib import Path

import pytest

from configurator import Failed, UserError
from experiments import gpu_check

CONFIGS = Path(__file__).resolve().parent.parent / "config"


def figures(train, decode):
    return {part: {"tokens/s": 1e5, "ratio": ratio} for part, ratio in (("train", train), ("decode", decode))}


def test_every_preset_is_checked():
    left_out = {"softmax", "finetune"}                                                # the peer of all; no model of its own
    assert {path.stem for path in CONFIGS.glob("*.py")} - left_out == {*gpu_check.PRESETS}


def test_what_is_more_than_5_percent_below_says_so():
    kept = {"base": {"train": 1.0, "decode": 2.0}}
    assert gpu_check.verdict("base", figures(0.96, 1.91), kept)[""] == "ok"
    assert gpu_check.verdict("base", figures(0.94, 2.5), kept)[""] == "train is 6% below"
    assert gpu_check.verdict("base", figures(0.5, 1.0), kept)[""] == "train is 50% below, decode is 50% below"
    row = gpu_check.verdict("based", figures(0.5, 1.0), kept)
    assert row[""] == "ok" and row["train, kept"] == row["decode, kept"] == "none"


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *flags])
    gpu_check.main()


def test_what_cannot_be_checked_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "mine.json").write_text("[1]")
    for flags, wanted in ((["--presets=base,bse"], "there is no config/bse.py"), (["--device=cpu"], "--quick=True tries"),
                          ([f"--json={tmp_path}"], "it is a folder"),
                          ([f"--json={tmp_path}/mine.json"], "mine.json exists, and --json wrote no such file")):
        with pytest.raises((UserError, ValueError), match=wanted):
            run(monkeypatch, *flags)


def test_ratios_are_kept_for_the_card_and_slower_ones_fail(monkeypatch, tmp_path, capsys):
    measured = {"base": figures(1.1, 1.2), "based": figures(1.0, 1.0)}

    monkeypatch.setattr(gpu_check, "prepare", lambda config: [])
    monkeypatch.setattr(gpu_check, "calls", lambda preset, config, device: preset)
    monkeypatch.setattr(gpu_check, "compare", lambda preset, peer, device: measured[preset])
    monkeypatch.setattr(gpu_check, "RATIOS", tmp_path / "ratios.json")
    monkeypatch.setattr(gpu_check, "device_name", lambda device: "card")
    (tmp_path / "ratios.json").write_text('{"other card": {"base": {"train": 9.0, "decode": 9.0}}}')
    flags = ["--presets=base,based", "--quick=True", "--tests=False", "--device=cpu"]
    run(monkeypatch, *flags)
    assert "no ratios are kept for card" in capsys.readouterr().err
    run(monkeypatch, *flags, "--save=True")
    kept = json.loads((tmp_path / "ratios.json").read_text())
    assert kept["card"] == {"base": {"train": 1.1, "decode": 1.2}, "based": {"train": 1.0, "decode": 1.0}}
    assert kept["other card"]["base"]["train"] == 9.0
    run(monkeypatch, *flags, f"--json={tmp_path}/all.json")
    assert json.loads((tmp_path / "all.json").read_text())["card"] == "card"
    measured["based"] = figures(1.0, 0.9)
    with pytest.raises(Failed, match="slower than kept: based"):
        run(monkeypatch, *flags)
    assert "decode is 10% below" in capsys.readouterr().out


@pytest.mark.slow
def test_the_check_itself_runs_without_a_gpu(monkeypatch, tmp_path):
    run(monkeypatch, "--presets=hybrid", "--quick=True", "--tests=False", "--device=cpu", f"--json={tmp_path}/all.json")
    found = json.loads((tmp_path / "all.json").read_text())["figures"]["hybrid"]
    assert found["train"]["ratio"] > 0 and found["decode"]["softmax"] > 0


def test_the_ratio_is_of_tokens_a_second(monkeypatch):
    monkeypatch.setattr(gpu_check, "race", lambda calls, device, repeats: [[2.0], [1.0]])
    found = gpu_check.compare({"train": (None, 100)}, {"train": (None, 25)}, None)
    assert found == {"train": {"tokens/s": 50, "softmax": 25, "ratio": 2}}
