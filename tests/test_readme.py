"""What README.md and docs/ say of commands, files and presets is so."""
import ast
import dataclasses
import gzip
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml  # comes with datasets
from torch._subclasses import FakeTensorMode

import checkpoint
import configurator
import eval
import forked
import model
import prepare
import sample
import train
from experiments import bench, compare, gpu_check, parity, python_source, recall
from test_sample import one_thread  # noqa: F401 (a fixture)
from test_train import as_it_was  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS, TROUBLESHOOTING = ((ROOT / name).read_text() for name in
                                    ("README.md", "docs/results.md", "docs/troubleshooting.md"))
TABLE = json.loads((ROOT / "docs/presets.json").read_text())
CONFIGS = {"eval.py": (eval.EvalConfig,), "prepare.py": (prepare.PrepareConfig,),
           "sample.py": (sample.SampleConfig,),
           "train.py": (train.TrainConfig, model.ModelConfig),
           "experiments.bench": (bench.BenchConfig, model.ModelConfig, train.TrainConfig),
           "experiments.compare": (compare.CompareConfig,),
           "experiments.gpu_check": (gpu_check.CheckConfig,),
           "experiments.parity": (parity.ParityConfig,),
           "experiments.python_source": (python_source.SourceConfig,),
           "experiments.recall": (recall.RecallConfig,)}
FOLDERS = [ROOT, *(ROOT / name for name in ("support", "experiments", "config"))]
SOURCES = [path for folder in FOLDERS for path in sorted(folder.glob("*.py"))]

# A python or torchrun command in an indented line or in a code span; a python block; make, pip and source by the way.
ITEM = re.compile(r"^```python\n(?P<code>.*?)^```|^ {4}(?P<line>(?:python|torchrun|make|pip|source) [^\n]*)|`(?P<span>"
                  r"(?:python|torchrun)\s[^`]*(?:\.py|-m experiments\.)[^`]*|(?:make|pip)\s[^`]+)`",
                  re.MULTILINE | re.DOTALL)


def program_at(words):
    """The index of the program's name among the words of a command: train.py, or experiments.bench after -m."""
    return next((i for i, word in enumerate(words) if word in CONFIGS), None)


def commands():
    """The words of every command of a program of ours, in README, docs/ and the docstrings of the sources."""
    docs = [match["line"] or match["span"] for text in (README, RESULTS, TROUBLESHOOTING)
            for match in ITEM.finditer(text) if match["line"] or match["span"]]
    sources = [line.strip().split("   ")[0] for path in SOURCES for line in path.read_text().splitlines()
               if line.startswith(("    python ", "    torchrun "))]
    found = {tuple(shlex.split(command, comments=True)) for command in docs + sources}
    return sorted(words for words in found if words[0] in ("python", "torchrun"))


def mixer_of_ones_own():
    code, = [match["code"] for match in ITEM.finditer(README) if "MIXERS[" in (match["code"] or "")]
    return code


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_shown_has_known_keys_and_legal_values(words, tmp_path, monkeypatch):
    for name in ("config", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "tasks").mkdir()
    for name, text in (("tasks/mine.yaml", ""), ("mine.py", mixer_of_ones_own())):
        (tmp_path / name).write_text(text)
    for name in ("MIXERS", "FEATURE_MAPS"):                                       # mine.py adds to them
        monkeypatch.setattr(model, name, dict(getattr(model, name)))
    monkeypatch.chdir(tmp_path)
    at = program_at(words)
    assert at is not None, "no program of this repository"
    program, argv = words[at], list(words[at + 1:])
    if program == "experiments.compare":                                          # its arms are no config files
        compare.parse(argv)
    elif "--help" not in argv:
        plugin = any(word.startswith("--plugin=") for word in argv)
        configurator.configure(argv, *CONFIGS[program], inherit=checkpoint.settings_to_start_from if plugin else None)


def test_the_readme_has_at_most_250_lines_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 250
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert link.startswith("https://") or target.exists(), f"{path.name}: {link}"
            if anchor and not link.startswith("https://"):
                titles = re.findall("^#+ (.*)$", target.read_text(), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_the_cpu_wheel_that_the_readme_names_is_of_the_torch_in_requirements():
    """Of any other, make demo would fetch the build with CUDA in its place."""
    required, = re.findall(r"^torch==[\d.]+$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert re.findall(r"torch==[\d.]*\d", README) == [required]


def test_every_file_and_folder_has_a_place_in_the_file_table():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    places = {name.split("/")[0] for name in tracked.stdout.split() if name.endswith(".py") or "/" in name}
    shown = set(re.findall(r"\[([\w.]+)/?\]\(\1\)", README.split("## The files")[1].split("\n## ")[0]))
    assert places - shown - {".ci", "assets"} == set() and shown <= places


# The table of presets


def table_of_presets():
    """The table of README, made from docs/presets.json: a dash where nothing was measured."""
    columns = TABLE["columns"]
    rows = [["preset", "mixers", *columns]]
    for preset, mixers in TABLE["presets"].items():
        name, _, flag = preset.partition(" ")
        link = f"[{name}](config/{name}.py)" + (f" `{flag}`" if flag else "")
        rows.append([link, mixers, *(column["values"].get(preset, "–") for column in columns.values())])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def test_the_table_of_presets_is_made_from_presets_json():
    table = table_of_presets()
    assert table in README, f"README.md should hold\n\n{table}"


@pytest.mark.parametrize("preset", TABLE["presets"])
def test_a_preset_has_the_parameters_and_the_state_of_the_table(preset, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *flags = preset.split()
    _, config = configurator.configure([f"config/{name}.py", *flags], train.TrainConfig, model.ModelConfig)
    with FakeTensorMode():                                                        # shapes without numbers: fast
        lm = model.LM(config)
        _, state = lm(torch.zeros(1, 1024, dtype=torch.long))
    assert f"{sum(p.numel() for p in lm.parameters()) / 1e6:.1f}" in ("44.6", "44.7")
    grows = ", grows" * ("softmax" in config.mixers)
    shown = TABLE["columns"]["state at 1,024 tokens"]["values"][preset]
    assert shown == f"{model.state_bytes(state) / 1e6:.2f} MB{grows}"


# Every command and python block, in README's order and then docs/results.md's, in one folder: each finds what those before
# it made


NOT_RUN = {"make test": "it is what runs this", "make gpu-check": "needs a GPU", "pip": "needs the network", "source": "for the shell only"}
MODEL = ["--dim=16", "--depth=2", "--n_heads=2"]
CUT = {"prepare.py": ["--processes=1"],
       "train.py": [*MODEL, "--seq_len=32", "--batch_size=2", "--grad_accum=1", "--max_steps=2", "--warmup_steps=1",
                    "--eval_tokens=64", "--device=cpu", "--precision=fp32", "--compile=false"],
       "sample.py": ["--max_new_tokens=5", "--device=cpu"],
       "eval.py": ["--device=cpu"],
       "experiments.bench": [*MODEL, "--seq_lens=16", "--positions=8", "--tokens=32", "--repeats=1",
                             "--eval_tokens=64", "--device=cpu", "--compile=false"],
       "experiments.compare": [*MODEL, "--seq_len=8", "--batch_size=2", "--max_steps=2", "--warmup_steps=1",
                               "--eval_tokens=64", "--lrs=0.01", "--seeds=1", "--device=cpu", "--precision=fp32"],
       "experiments.python_source": ["--root=packages"],
       "experiments.recall": ["--only=elu", "--epochs=1", "--seeds=1", "--workers=1", "--device=cpu"]}
WITHOUT = {"--tasks": "lm_eval", "--tensorboard": "tensorboard", "--wandb_project": "wandb"}  # one line names them


def shown():
    """("code", text) or ("command", words), each once, but those that need the network."""
    demo = re.findall(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0]
    found = []
    for match in ITEM.finditer(README + RESULTS):
        kind, text = match.lastgroup, match[match.lastgroup]
        if kind == "code":
            found.append((kind, text))
        elif " ".join(text.split()).startswith("make demo"):
            lines = demo.replace("\t$(PY)", "python").splitlines()
            found += [("command", tuple(shlex.split(line))) for line in lines if line.startswith("python ")]
        elif "--hub=" not in text and not " ".join(text.split()).startswith(tuple(NOT_RUN)):
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
    for path in ("letters.txt", "texts/a.txt", "texts/b.txt", "python/a.py", "python/val.py", "shakespeare_train.txt",
                 "shakespeare_val.txt"):
        (tmp_path / path).write_text(text)
    (tmp_path / "mine.py").write_text(mixer_of_ones_own())
    for i in range(60):
        (tmp_path / f"packages/{i}").mkdir(parents=True)
        (tmp_path / f"packages/{i}/module.py").write_text(f"y = {i}\n" * 50)
    (tmp_path / "experiments/sweeps").mkdir(parents=True)
    for path in (ROOT / "experiments/sweeps").glob("*.py"):                       # one arm of each
        text_of_one = re.sub(r"^arms = \[.*?\]", 'arms = ["config/base.py"]', path.read_text(), flags=re.M | re.S)
        (tmp_path / "experiments/sweeps" / path.name).write_text(text_of_one)
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
    monkeypatch.setattr(compare, "subprocess", forked)
    monkeypatch.setattr(bench, "machine_peaks", lambda device, dtype: (1e12, 1e10))
    monkeypatch.setattr(model, "FEATURE_MAPS", dict(model.FEATURE_MAPS))
    monkeypatch.setattr(model, "MIXERS", dict(model.MIXERS))
    for name in ("SMALL", "FULL"):
        setting = getattr(recall, name)
        train, test = ([part._replace(examples=setting.batch_size) for part in parts[:2]]
                       for parts in (setting.train, setting.test))
        monkeypatch.setattr(recall, name, dataclasses.replace(setting, train=train, test=test, lrs=(1e-2,),
                                                              decode_batch=2, decode_after=64))


def run(words, monkeypatch, capfd):
    """Runs a command, cut down: exit code and what it printed."""
    at = program_at(words)
    program, flags = words[at], [*words[at + 1:], *CUT[words[at]]]
    given = " ".join(flags)
    if program == "prepare.py" and not re.search("tokenizer|verify|stdlib", given):
        flags += ["--tokenizer=bytes"]                                            # gpt2's vocabulary may be far
        flags += ["--data_files=c4/*.gz"] * ("data_files" not in given)
    if words[0] == "torchrun" or "wandb" in given or "--help" in given:           # W&B stays in the first folder
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
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def \n")))      # of --interactive
        try:
            configurator.command(sys.modules[program.removesuffix(".py")].main)
        except SystemExit as error:
            code = error.code
    return code, "".join(capfd.readouterr())


@pytest.mark.slow
def test_all_that_readme_and_results_show_runs_in_their_order(reader, monkeypatch, capfd):
    for kind, item in shown():
        if kind == "code":
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
    text = re.sub(r"```.*?```", "", README + RESULTS + TROUBLESHOOTING, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    assert [line for line in lines if not ITEM.fullmatch(line)] == [line for line in lines if "_t = " in line]


def test_the_mixer_of_the_readme_keeps_a_state_of_tensors_of_fixed_shape_on_the_device_of_its_input(monkeypatch):
    for name in ("MIXERS", "FEATURE_MAPS"):
        monkeypatch.setattr(model, name, dict(getattr(model, name)))
    names = {}
    exec(mixer_of_ones_own(), names)
    config = model.ModelConfig(mixers="mean linear", feature_map="square", dim=64, depth=2, n_heads=2, vocab_size=100)
    lm, idx = model.LM(config), torch.randint(0, 100, (2, 7))
    whole, _ = lm(idx)
    first, state = lm(idx[:, :3])
    rest, later = lm(idx[:, 3:], state=state)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
    for before, after in zip(state["layers"][0], later["layers"][0], strict=True):
        assert torch.is_tensor(before) and before.shape == after.shape and len(before) == 2
        assert before._base is None and before.dtype == torch.float32
    mixer, x = names["Mean"](config).to("meta"), torch.empty(2, 3, 64, device="meta")
    _, state = mixer(x, None, {})
    _, state = mixer(x, state, {})                                                # a tensor elsewhere does not fit
    assert {leaf.device.type for leaf in state} == {"meta"}


def messages(path):
    """The texts of a source file, with ... for what a format string fills in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_messages_of_the_troubleshooting_table_are_those_of_the_programs():
    texts = "\n".join(text for path in SOURCES for text in messages(path))
    shown = re.findall("`(.+?)`", "".join(re.findall(r"^\| (`.*?`) \|", TROUBLESHOOTING, re.MULTILINE)))
    assert len(shown) > 20
    assert [message for message in shown if not re.search(".*".join(map(re.escape, message.split("..."))), texts)] == []


def test_citation_cff_is_whole_and_names_the_papers_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": "LAT contributors"}] and citation["message"]
    papers = {paper["url"] for paper in citation["references"] if paper["title"] and paper["authors"]}
    assert papers == set(re.findall(r"https://arxiv\.org/abs/[\d.]+", README))
