"""What README.md says of commands, files and presets is so."""
import ast
import dataclasses
import gzip
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # comes with datasets

import configurator
import eval
import model
import prepare
import sample
import train
from experiments import bench, compare, recall
from test_sample import one_thread  # noqa: F401 (a fixture)
from test_train import as_it_was  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONFIGS = {"eval.py": (eval.EvalConfig,), "prepare.py": (prepare.PrepareConfig,), "sample.py": (sample.SampleConfig,),
           "train.py": (train.TrainConfig, model.ModelConfig),
           "experiments.bench": (bench.BenchConfig, model.ModelConfig, train.TrainConfig),
           "experiments.compare": (compare.CompareConfig,),
           "experiments.recall": (recall.RecallConfig,)}
FOLDERS = (ROOT, ROOT / "support", ROOT / "experiments")
TEXTS = [README, *(path.read_text() for folder in (*FOLDERS, ROOT / "config") for path in folder.glob("*.py"))]
PRESETS = re.findall(r"^\| `(config/\w+\.py)` \| .*? \| ([\d.]+) M \|", README, re.MULTILINE)


def commands():
    found = {line.strip().split("   ")[0] for text in TEXTS for line in text.splitlines()
             if line.startswith(("    python ", "    torchrun "))}
    return sorted(command.split(" # ")[0] for command in found)


@pytest.mark.parametrize("command", commands())
def test_every_command_shown_has_known_keys_and_legal_values(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    program, *argv = words[next(i for i, word in enumerate(words) if word in CONFIGS):]
    if program == "experiments.compare":                                                 # its arms are no config files
        compare.parse(argv)
    elif "--help" not in argv:
        configurator.configure(argv, *CONFIGS[program])


@pytest.mark.parametrize("name, lines", re.findall(r"^\| \[([\w/]+\.py)\]\([\w/]+\.py\) \| (\d+) \|", README, re.MULTILINE))
def test_the_line_counts_of_the_file_map_are_right_to_ten_percent(name, lines):
    assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 0.1 * int(lines)


@pytest.mark.parametrize("config, millions", PRESETS)
def test_the_presets_have_the_parameters_of_the_table(config, millions, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, model_config = configurator.configure([config], train.TrainConfig, model.ModelConfig)
    assert f"{sum(p.numel() for p in model.LM(model_config).parameters()) / 1e6:.2f}" == millions


# Every command and python block, in the README's order and in one folder: each finds what those before it made


ITEM = re.compile(r"^```python\n(?P<code>.*?)^```|^ {4}(?P<line>(?:python|torchrun|make|pip|source) [^\n]*)|`(?P<span>"
                  r"(?:python|torchrun)\s[^`]*(?:\.py|-m\sexperiments)[^`]*|(?:make|pip)\s[^`]+)`", re.MULTILINE | re.DOTALL)
NOT_RUN = {"make test": "it is what runs this", "pip install": "needs the network", "source": "for the shell only"}
MODEL = ["--dim=16", "--depth=2", "--n_heads=2"]
CUT = {"prepare.py": ["--processes=1"],
       "train.py": [*MODEL, "--seq_len=32", "--batch_size=2", "--grad_accum=1", "--max_steps=2", "--warmup_steps=1",
                    "--eval_tokens=64", "--device=cpu", "--precision=fp32"],
       "sample.py": ["--max_new_tokens=5", "--device=cpu"],
       "eval.py": ["--device=cpu"],
       "experiments.bench": [*MODEL, "--seq_lens=16", "--positions=8", "--tokens=32", "--repeats=1", "--eval_tokens=64",
                    "--device=cpu"],
       "experiments.compare": [*MODEL, "--seq_len=8", "--batch_size=2", "--max_steps=2", "--warmup_steps=1", "--eval_tokens=64",
                      "--lrs=0.01", "--seeds=1", "--device=cpu", "--precision=fp32"],
       "experiments.recall": ["--only=elu d32,elu d64", "--epochs=1", "--seeds=1", "--workers=1", "--device=cpu"]}
WITHOUT = {"--tasks": "lm_eval", "--tensorboard": "tensorboard", "--wandb_project": "wandb"}  # one line names them


def shown():
    """("code", text) or ("command", words), each once."""
    demo = re.findall(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0]
    found = []
    for match in ITEM.finditer(README):
        kind, text = match.lastgroup, match[match.lastgroup]
        if kind == "code":
            found.append((kind, text))
        elif " ".join(text.split()).startswith("make demo"):
            found += [("command", tuple(shlex.split(line))) for line in demo.replace("$(PY)", "python").splitlines()]
        elif not " ".join(text.split()).startswith(tuple(NOT_RUN)):
            found.append(("command", tuple(shlex.split(text, comments=True))))
    return list(dict.fromkeys(found))


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The folder of somebody who has cloned the repository and has texts and shards of C4: small ones, no network."""
    for name in ("config", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("assets", "texts", "c4", "python"):
        (tmp_path / name).mkdir()
    (tmp_path / "DATA").symlink_to("c4")
    text = "A text of mine, of some length, with Größe in it. " * 200
    for path in ("mine.txt", "texts/a.txt", "texts/b.txt", "python/a.py", "python/val.py"):
        (tmp_path / path).write_text(text)
    for i in range(60):
        (tmp_path / f"python/{i}.py").write_text(f"x = {i}\n" * 20)
    for split in ("train", "validation"):
        with gzip.open(tmp_path / f"c4/c4-{split}.00000-of-00001.json.gz", "wt") as file:
            file.write(json.dumps({"text": text}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)                   # as where it is missing
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(tmp_path / "python"))
    monkeypatch.setattr(compare, "PRESETS", compare.PRESETS[:1])
    monkeypatch.setattr(bench, "machine_peaks", lambda device, dtype: (1e12, 1e10))
    monkeypatch.setattr(model, "FEATURE_MAPS", dict(model.FEATURE_MAPS))
    for name in ("SMALL", "FULL"):
        setting = getattr(recall, name)
        train, test = ([part._replace(examples=setting.batch_size) for part in parts[:2]]
                       for parts in (setting.train, setting.test))
        monkeypatch.setattr(recall, name, dataclasses.replace(setting, train=train, test=test, lrs=(1e-2,),
                                                              decode_batch=2, decode_after=64))


def run(words, monkeypatch, capfd):
    """Runs a command, cut down: exit code and what it printed."""
    at = next(i for i, word in enumerate(words) if word in CUT)
    program, flags = words[at], [*words[at + 1:], *CUT[words[at]]]
    given = " ".join(flags)
    if program == "prepare.py" and not re.search("tokenizer|verify|stdlib", given):
        flags += ["--tokenizer=bytes"]                                            # gpt2's vocabulary may be far
        flags += ["--data_files=c4/*.gz"] * ("data_files" not in given)
    if words[0] == "torchrun" or "wandb" in given:                                # W&B stays in the first folder
        start = [sys.executable]
        if words[0] == "torchrun":
            start += ["-m", "torch.distributed.run", *words[1:at], "--nproc_per_node=2"]
            flags += ["--resume=false"]                                           # without torchrun it came first
        result = subprocess.run([*start, ROOT / program, *flags], capture_output=True, text=True)
        return result.returncode, result.stdout + result.stderr
    capfd.readouterr()
    code = 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [program, *flags])
        try:
            configurator.command(sys.modules[program.removesuffix(".py")].main)
        except SystemExit as error:
            code = error.code
    return code, "".join(capfd.readouterr())


@pytest.mark.slow
def test_all_that_the_readme_shows_runs_in_its_order(reader, monkeypatch, capfd):
    for kind, item in shown():
        if kind == "code":
            if "save_pretrained" not in item or importlib.util.find_spec("safetensors"):
                exec(item, {})
            continue
        code, printed = run(item, monkeypatch, capfd)
        missing = [package for flag, package in WITHOUT.items() if any(word.startswith(flag) for word in item)
                   and (package == "lm_eval" or not importlib.util.find_spec(package))]
        if missing:
            assert code == 2 and f"pip install {missing[0]}" in printed, (item, printed)
        else:
            assert code == 0 and "is finished" not in printed, (item, printed)


def test_an_indented_line_is_a_command_or_the_equation():
    """What looks like a command and is none of the programs above would not be run."""
    lines = [line for line in re.sub(r"```.*?```", "", README, flags=re.DOTALL).splitlines() if line.startswith("    ")]
    assert [line for line in lines if not ITEM.fullmatch(line)] == [line for line in lines if "_t = " in line]


def messages(path):
    """The texts of a source file, with ... for what a format string fills in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_messages_of_the_troubleshooting_table_are_those_of_the_programs():
    section = README.split("\n## Troubleshooting\n")[1].split("\n## ")[0]
    texts = "\n".join(text for folder in FOLDERS for path in folder.glob("*.py")
                      for text in messages(path))
    shown = re.findall("`(.+?)`", "".join(re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)))
    assert len(shown) > 20
    assert [message for message in shown if not re.search(".*".join(map(re.escape, message.split("..."))), texts)] == []


def test_citation_cff_is_whole_and_names_the_papers_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": "LAT contributors"}] and citation["message"]
    papers = {paper["url"] for paper in citation["references"] if paper["title"] and paper["authors"]}
    assert papers == set(re.findall(r"https://arxiv\.org/abs/[\d.]+", README))
