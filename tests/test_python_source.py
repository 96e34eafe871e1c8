"""experiments/python_source.py: nothing of a package that is held out is trained on, and no text stands twice."""
import gzip
import json
import sys

import pytest

from configurator import UserError
from experiments import python_source


def gather(root, out, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["python_source.py", f"--root={root}", f"--out={out}", "--shards=2", *flags])
    python_source.main()
    return {path.name: [json.loads(line)["text"] for line in gzip.open(path)] for path in sorted(out.iterdir())}


@pytest.fixture
def root(tmp_path):
    """Twenty packages of a few files; each holds one text that all have, one of its own twice, and an empty one."""
    for i in range(20):
        folder = tmp_path / f"site/package{i}/inner"
        folder.mkdir(parents=True)
        for name, text in (("licence", "the same\n"), ("a", f"own {i}\n"), ("b", f"own {i}\n"), ("c", f"é {i}\n"),
                           ("__init__", "")):
            (folder / f"{name}.py").write_text(text, encoding="utf-8")
    (tmp_path / "site/package0/latin.py").write_bytes(b"\xe9\xe8\n")
    return tmp_path / "site"


def test_packages_are_held_out_whole_and_no_text_stands_twice(root, tmp_path, monkeypatch, capsys):
    files = gather(root, tmp_path / "out", monkeypatch, "--val_fraction=0.2")
    held_out = files.pop("python-validation.jsonl.gz")
    trained = [text for texts in files.values() for text in texts]
    assert len(files) == 2 and len({*trained, *held_out}) == len(trained + held_out) == 41
    assert "the same\n" in trained and {text.split()[1] for text in held_out}.isdisjoint(
        text.split()[1] for text in trained if text != "the same\n")
    assert 4 <= len(held_out) <= 8 and "left out: 60 files" in capsys.readouterr().err


def test_the_same_folder_gives_the_same_bytes(root, tmp_path, monkeypatch):
    for name in ("a", "b"):
        gather(root, tmp_path / name, monkeypatch, "--val_fraction=0.2")
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert a == b


def test_a_folder_without_packages_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds 0 packages: name a folder of several with --root"):
        gather(tmp_path / "empty", tmp_path / "out", monkeypatch)
