"""A dataset in the making: its token files, their records, the manifest that joins them, and what is held out."""
import collections
import contextlib
import hashlib
import itertools
import re
import shutil
import zlib

import numpy as np

from configurator import UserError
from support.dataset import bin_problems, check_not_empty, read_sealed, remake, seal, write_sealed

BATCH = 1 << 22  # so many bytes of text are encoded at once
MANY = 2000  # of so many documents, or bytes, a hash holds out the share that it should
MANY_BYTES = 1 << 26


class Bin:
    """A .bin that is being written, and what the manifest will say of it."""

    def __init__(self, file, tokenizer):
        self.file = file
        self.tokenizer = tokenizer
        self.sha256 = hashlib.sha256()
        self.tokens = self.documents = self.bytes = self.encoded = 0
        self.pieces = []

    def write(self, text, size, last):
        """Takes a piece of a document. 4 MB are encoded at once: alternating reading and encoding takes 15 % longer."""
        self.pieces.append((text, last))
        self.documents += last
        self.bytes += size
        if self.bytes - self.encoded >= BATCH:
            self.flush()

    def flush(self):
        if self.pieces:
            ids = self.tokenizer.encode_pieces(self.pieces)
            self.file.write(ids.data)
            self.sha256.update(ids.data)
            self.tokens += len(ids)
            self.encoded = self.bytes
            self.pieces = []

    def finish(self):
        self.flush()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes,
                "sha256": self.sha256.hexdigest()}


def hash_limit(found, fraction):
    """Documents whose CRC-32 is below this limit are validation: by content, so no text is in both splits.

    For much text the limit is this fraction of all CRC-32 values. For little text that could by chance hold out far too
    much, or nothing; then the limit is chosen that comes nearest to the fraction. It is None where no limit comes near,
    as for a single document: then the tail of each document is held out.
    Returns: the limit; and an iterator over `found`, some of which had to be read ahead.
    """
    limit = int(fraction * 2**32)
    sizes = collections.Counter()
    read_ahead = []
    total = 0
    crc = 0
    fresh = True
    for item in found:
        read_ahead.append(item)
        rule, _, utf8, last, _ = item
        total += len(utf8)
        if rule != "hash" and not sizes or total > MANY_BYTES or len(sizes) > MANY and total > BATCH:
            return limit, itertools.chain(read_ahead, found)
        crc = zlib.crc32(utf8) if fresh else crc
        if rule == "hash":
            sizes[crc] += len(utf8)
        fresh = last
    wanted = fraction * sum(sizes.values())
    near = abs(sum(size for crc, size in sizes.items() if crc < limit) - wanted) < wanted / 10
    if near and min(sizes) < limit <= max(sizes):  # neither split is without a document
        return limit, read_ahead
    crcs = sorted(sizes)
    held = dict(zip(crcs[1:], itertools.accumulate(sizes[crc] for crc in crcs)))  # limit: bytes below it
    nearest = min(held, key=lambda crc: abs(held[crc] - wanted), default=0)
    near = nearest and wanted / 2 <= held[nearest] <= 2 * wanted
    return nearest if near else None, read_ahead


def check_disk(folder, options, text):
    """UserError where the disk is too small, by an upper estimate for English text: 4 bytes per GPT-2 token."""
    need = text * np.dtype(options["dtype"]).itemsize // (4 if options["tokenizer"] == "gpt2" else 1)
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if need > free:
        raise UserError(f"{folder} needs about {need / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free: "
                        "make room, use another --data_dir, or fewer --shards")


def made_files(folder, ending):
    """The files of sources, by name. All other files in the folder are the user's."""
    name = re.compile(rf"(train|val|both)-\d{{5,}}\.{ending}")
    return sorted(path for path in folder.glob("*-*") if name.fullmatch(path.name))


def list_records(folder):
    return made_files(folder, "json")


def read_record(path):
    """The record of a committed source; None where it is missing or damaged: then the source is encoded again."""
    with contextlib.suppress(UserError):
        record = read_sealed(path)
        if record["files"] and all({"source", "source_bytes"} <= entry.keys() for entry in record["files"].values()):
            return record


def write_manifest(folder):
    """Joins the records of the folder: what they have in common, and all their files."""
    records = [read_sealed(path) for path in list_records(folder)]
    files = {name: entry for record in records for name, entry in record["files"].items()}
    manifest = records[0] | {"files": dict(sorted(files.items()))}
    check_not_empty(folder, manifest)
    path = folder / "manifest.json"
    if not path.is_file() or path.read_bytes() != seal(manifest):  # the disk may be full, or read-only
        write_sealed(path, manifest)
    return manifest


def verify(folder):
    """Checks every byte of the dataset, then writes the manifest that joins all records."""
    found = []
    listed = set()
    records = {path: read_sealed(path) for path in list_records(folder)}
    if not records:
        raise UserError(f"there is no dataset in {folder}: {remake(folder)}")
    first = next(iter(records.values()))
    for path, record in records.items():
        found += [f"{path} has {key} {record[key]}, others {first.get(key)}"
                  for key in record if key != "files" and record[key] != first.get(key)]
        found += bin_problems(folder, record, whole=True)
        listed |= record["files"].keys()
    expected = {path.name for path in made_files(folder, "bin")}
    if (folder / "manifest.json").exists():
        expected |= read_sealed(folder / "manifest.json")["files"].keys()
    found += [f"{folder / name} has no record" for name in sorted(expected - listed)]
    if found:
        raise UserError(f"{'; '.join(found[:5])}" + "; ..." * (len(found) > 5) + f": {remake(folder, found[0])}")
    shards = {int(path.stem[6:]) for path in records if path.match("train-*")}
    if first["origin"] == "built in" and shards:
        if absent := sorted({*range(min(shards), max(shards))} - shards):  # lost in copying, or not made yet
            print(f"{folder}: {len(absent)} train shards are missing between the first and the last, "
                  f"as {absent[0]:05d}")
    return write_manifest(folder)
