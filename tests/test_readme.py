"""What README.md says of commands, files and presets is so."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # comes with datasets

import bench
import configurator
import eval
import model
import prepare
import recall
import sample
import test_sample
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONFIGS = {"eval.py": (eval.EvalConfig,), "prepare.py": (prepare.PrepareConfig,), "recall.py": (recall.RecallConfig,),
           "sample.py": (sample.SampleConfig,),
           "train.py": (train.TrainConfig, model.ModelConfig),
           "bench.py": (bench.BenchConfig, model.ModelConfig, train.TrainConfig)}
TEXTS = {"README.md": README} | {path.name: path.read_text() for path in [*ROOT.glob("*.py"), *(ROOT / "config").glob("*.py")]}


def commands():
    found = {line.strip().split("   ")[0] for text in TEXTS.values() for line in text.splitlines()
             if line.startswith(("    python ", "    torchrun "))}
    return sorted(command.split(" # ")[0] for command in found)


@pytest.mark.parametrize("command", commands())
def test_every_command_shown_has_known_keys_and_legal_values(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    program, *argv = words[next(i for i, word in enumerate(words) if word in CONFIGS):]
    if "--help" not in argv:
        configurator.configure(argv, *CONFIGS[program])


@pytest.mark.parametrize("name, lines", re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", README, re.MULTILINE))
def test_the_line_counts_of_the_file_map_are_right_to_ten_percent(name, lines):
    assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 0.1 * int(lines)


@pytest.mark.parametrize("config, millions", re.findall(r"^\| `(config/\w+\.py)` \| .*? \| ([\d.]+) M \|", README, re.MULTILINE))
def test_the_presets_have_the_parameters_of_the_table(config, millions, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, model_config = configurator.configure([config], train.TrainConfig, model.ModelConfig)
    assert f"{sum(p.numel() for p in model.LM(model_config).parameters()) / 1e6:.2f}" == millions


def test_the_python_examples_of_the_readme_run(monkeypatch, tmp_path):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    test_sample.write_checkpoint(tmp_path / "out/tiny")
    monkeypatch.setattr(model, "FEATURE_MAPS", dict(model.FEATURE_MAPS))
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(example, {})


@pytest.mark.slow
def test_the_three_commands_of_fine_tuning_run(tmp_path):
    section = README.split("\n## Fine-tuning\n")[1].split("\n## ")[0]
    commands = [line.split() for line in section.splitlines() if line.startswith("    python ")][:3]
    (tmp_path / "mine.txt").write_text("A text of mine, of some length. " * 200)
    (tmp_path / "config").symlink_to(ROOT / "config")
    test_sample.write_checkpoint(tmp_path / "out/tiny")
    short = {"prepare.py": [], "train.py": ["--max_steps=2", "--device=cpu"], "sample.py": ["--max_new_tokens=9", "--device=cpu"]}
    for _, program, *flags in commands:
        shell = shlex.split(shlex.join([sys.executable, str(ROOT / program)]) + " " + " ".join(flags)) + short[program]
        result = subprocess.run(shell, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert result.returncode == 0, result
    assert result.stdout.startswith("def ")


def test_citation_cff_is_whole_and_names_the_papers_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": "LAT contributors"}] and citation["message"]
    papers = {paper["url"] for paper in citation["references"] if paper["title"] and paper["authors"]}
    assert papers == set(re.findall(r"https://arxiv\.org/abs/[\d.]+", README))
