"""The Python source of the packages installed here, as text to train on: without copies, and with packages held out.

    python -m experiments.python_source --out=python
    python prepare.py --dataset=python --data_files='python/*.jsonl.gz'

Writes out/python-train-0000N.jsonl.gz and out/python-validation.jsonl.gz, one document per source file. Of identical
files one is kept, in the training text if any of them belongs there. Whole packages are held out, so that training sees
nothing of them: those whose names have the lowest hashes, up to `val_fraction` of all bytes. A package that is larger
than that by itself is used for training.
"""
import gzip
import hashlib
import json
import sys
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, command, configure, help_first

help_first(__name__, __file__, config_file=False)

from support.files import replacing
from support.machine import say
from support.report import table


@dataclass
class SourceConfig:
    out: str = "python"              # the folder to write to
    root: str = ""                   # the folder of packages; empty: that of this Python
    val_fraction: float = 0.04       # share of the bytes that is held out
    shards: int = 8                  # files of training text

    def __post_init__(self):
        if not 0 < self.val_fraction < 1 or self.shards < 1:
            raise ValueError("val_fraction must lie between 0 and 1, and shards be at least 1")


def find_packages(root):
    """{package: its .py files}: a package is a folder of root, or a file in it."""
    packages = defaultdict(list)
    for path in sorted(root.rglob("*.py")):
        packages[path.relative_to(root).parts[0]].append(path)
    return packages


def held_out(sizes, fraction):
    """The names of the packages {name: bytes} to hold out."""
    budget = fraction * sum(sizes.values())
    chosen = set()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[name] <= budget:
            chosen.add(name)
            budget -= sizes[name]
    return chosen


def texts_of(paths, seen):
    """The texts of these files that are UTF-8, not empty, and not in `seen`, a set of hashes that grows."""
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield text


def write(path, texts):
    """Writes .jsonl.gz, always the same bytes for the same texts; how many, and their bytes."""
    documents = 0
    size = 0
    with replacing(path) as temporary:
        with open(temporary, "wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as lines:
            for text in texts:
                lines.write(json.dumps({"text": text}).encode() + b"\n")
                documents += 1
                size += len(text.encode())
    return documents, size


def main():
    config, = configure(sys.argv[1:], SourceConfig, config_file=False)
    root = Path(config.root or sysconfig.get_path("purelib"))
    packages = find_packages(root)
    if len(packages) < 2:
        raise UserError(f"{root} holds {len(packages)} packages: name a folder of several with --root")
    sizes = {name: sum(path.stat().st_size for path in paths) for name, paths in packages.items()}
    chosen = held_out(sizes, config.val_fraction)
    out = Path(config.out)
    seen = set()
    rows = []
    out.mkdir(parents=True, exist_ok=True)
    training = [path for name, paths in packages.items() if name not in chosen for path in paths]
    for i in range(config.shards):
        path = out / f"python-train-{i:05d}.jsonl.gz"
        documents, size = write(path, texts_of(training[i::config.shards], seen))
        rows.append({"file": path.name, "documents": documents, "MB": size / 1e6})
    path = out / "python-validation.jsonl.gz"
    documents, size = write(path, texts_of([path for name in sorted(chosen) for path in packages[name]], seen))
    rows.append({"file": path.name, "documents": documents, "MB": size / 1e6})
    if not documents:
        raise UserError(f"no package of {root} fits in --val_fraction={config.val_fraction}: use a larger one")
    table(f"Python source in {root.name}, {len(packages)} packages", rows)
    largest = sorted(sizes, key=sizes.get, reverse=True)[:8]
    say("largest: " + ", ".join(f"{name} {sizes[name] / 1e6:.1f} MB" for name in largest))
    say(f"held out: {', '.join(sorted(chosen))}")
    copies = sum(map(len, packages.values())) - sum(row["documents"] for row in rows)
    say(f"left out: {copies:,} files that are empty, copies of others, or not UTF-8")


if __name__ == "__main__":
    command(main)
