"""Text to token files: writes data/NAME/train-*.bin, val-*.bin and manifest.json, which train.py reads.

    python prepare.py                                                  the first shard of C4, and its validation set
    python prepare.py --shards=128:256                                 this machine's share of it
    python prepare.py --dataset=stdlib                                 Python's own source: needs no network
    python prepare.py --dataset=mine --data_files='texts/*.jsonl.gz'   .txt .jsonl .jsonl.gz .json.gz .parquet
    python prepare.py --dataset=c4 --verify                            checks every byte, joins what was copied together

A .bin is the little-endian ids of its documents, each followed by end-of-text. Every source file becomes .bin files of
its own, in a process of its own, committed in three steps: temporary name, fsync, rename; then its record, a small
.json, in the same way; when all are there, manifest.json, the join of the records. So a kill at any moment loses the
sources under way and no others, the same command finishes to the same bytes, and machines that share the work need no
coordination: copy their folders together and --verify. (One manifest that grows with every shard would need a lock.)
Records and manifest end with a checksum of themselves; training checks that and sizes, --verify all the bytes.
"""
import codecs
import collections
import concurrent.futures as futures
import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from configurator import UserError, command, configure, help_first

help_first(__name__, __file__)

from support.dataset import (NoDocuments, bin_problems, check_not_empty, clean, load_tokenizer, read_sealed, remake,
                             seal, within, write_sealed)
from support.files import file_sha256, locked, replacing

C4, C4_TRAIN, C4_VAL = "allenai/c4", 1024, 8  # the repository on the hub, and how many files it has
PIECE = 1 << 20  # a .txt file is read in pieces of so many bytes
BATCH = 1 << 22  # so many bytes of text are encoded at once
TXT_GROUP = 1 << 26  # .txt files share a .bin until they are so many bytes
EXTENSIONS = (".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")


@dataclass
class PrepareConfig:
    dataset: str = "c4"  # c4 (downloaded), stdlib (Python's own source), or a name of yours for data_files
    data_files: str = ""  # local files instead: a glob, or several separated by spaces or commas
    tokenizer: Literal["auto", "gpt2", "bytes"] = "auto"  # auto: bytes for stdlib, gpt2 otherwise
    shards: str = "1"  # train shards of the downloaded C4, of 1024: N is the first N, a:b is a to b-1
    val_fraction: float = 0.05  # share of the text held out where no file has "val" or "validation" in its name
    data_dir: str = "data"  # the dataset goes to data_dir/dataset
    processes: int = 0  # worker processes; 0: one per core
    max_bad: int = 10  # unreadable records to skip and report, per source file, before giving up; 0: none
    verify: bool = False  # check all files of the dataset, write the manifest that joins them, and stop

    def __post_init__(self):
        if not re.fullmatch(r"[\w-][\w.-]*", self.dataset):
            raise UserError(f"--dataset must be a plain name of letters, digits, - and _, got {self.dataset!r}")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val_fraction must lie between 0 and 1, got {self.val_fraction}")
        if self.processes < 0 or self.max_bad < 0:
            raise UserError("--processes and --max_bad must not be negative")
        if not self.shard_range():
            raise UserError(f"--shards must be N or a:b within 0:{C4_TRAIN}, got {self.shards!r}")

    def shard_range(self):
        match = re.fullmatch(r"(?:([0-9]{1,9}):)?([0-9]{1,9})", self.shards)
        first, end = (int(match[1] or 0), int(match[2])) if match else (0, 0)
        return range(first, end if end <= C4_TRAIN else 0)

    @property
    def folder(self):
        return Path(self.data_dir, self.dataset)


# ---------------------------------------------------------------------------------------------------------------------
# Sources: what a dataset is made of. One source is one task, one record, and one .bin (two if it is split).

@dataclass(frozen=True)
class Source:
    stem: str  # of the record: train-00017, val-00003; both-00000 makes train-00000.bin and val-00000.bin
    name: str  # as the manifest tells it, without the folders of this machine
    parts: tuple  # (split, path, begin, end) with offsets in bytes; split "hash": each document by its hash

    @property
    def size(self):
        return sum(end - begin for _, _, begin, end in self.parts)

    @property
    def record(self):
        return f"{self.stem}.json"

    def sha256(self):
        """Of a local file; of the hashes of several; None of one on the hub, where C4 does not change."""
        paths = dict.fromkeys(path for _, path, _, _ in self.parts if not path.startswith("hf://"))
        try:
            sums = [file_sha256(path) for path in paths]
        except OSError as error:
            raise unreadable(error.filename or self.name, error) from None
        return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest() if sums else None

    def bins(self):
        kind, number = self.stem.split("-")
        return {split: f"{split}-{number}.bin" for split in ("train", "val") if kind in (split, "both")}


def list_sources(config):
    if config.data_files:
        if config.dataset == "stdlib":
            raise UserError("stdlib takes no --data_files: choose another --dataset name for them")
        return local_sources(find_files(config.data_files), config.val_fraction)
    builtin = {"c4": hub_sources, "stdlib": stdlib_sources}
    if config.dataset not in builtin:
        raise UserError(f"{config.dataset!r} is not c4 or stdlib, which are built in: name its files, --data_files=...")
    return builtin[config.dataset](config)


def find_files(patterns):
    """The sorted files that the globs match; the whole text is tried as one first, since names may have spaces."""
    found = set()
    for pattern in [patterns] if glob.glob(patterns, recursive=True) else re.split(r"[\s,]+", patterns.strip(" ,")):
        matches = {path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path)}
        if not matches and os.path.isdir(os.path.expanduser(pattern)):
            raise UserError(f"--data_files: {pattern} is a folder: name its files, '{os.path.join(pattern, '*.txt')}'")
        if not matches:
            raise UserError(f"--data_files: no file matches {pattern!r}")
        found |= matches
    for path in sorted(found):
        if not path.endswith(EXTENSIONS):
            raise UserError(f"{path}: cannot read this kind of file, only {' '.join(EXTENSIONS)}")
    return sorted(found)


def local_sources(paths, val_fraction):
    """Files with "val" or "validation" as a word of their name are the validation split; else a share of all text is:
    whole documents where there are many, the tail of each file where there are few, as a few .txt files are."""
    held_out = {path for path in paths if re.search(r"(?<![a-z])val(id(ation)?)?(?![a-z])", os.path.basename(path))}
    if len(held_out) == len(paths):
        raise UserError(f"--data_files: the names of all {len(paths)} files say validation, none is left to train on")
    few = all(path.endswith(".txt") for path in paths) and len(paths) * val_fraction < 5
    # every .txt file is one document, maybe a short one; a .bin should be longer than a context
    ends = itertools.accumulate(map(os.path.getsize, paths))
    group = {path: (path in held_out, end // TXT_GROUP) if path.endswith(".txt") else path
             for path, end in zip(paths, ends)}
    sources = []
    for number, (_, members) in enumerate(itertools.groupby(paths, group.get)):
        members = list(members)
        kind = ("val" if members[0] in held_out else "train") if held_out else "both"
        name = os.path.basename(members[0]) + f" and {len(members) - 1} more" * (len(members) > 1)
        if kind == "both" and few:
            parts = [part for path in members for part in split_tail(path, val_fraction)]
        else:
            parts = [("hash" if kind == "both" else kind, path, 0, os.path.getsize(path)) for path in members]
        sources.append(Source(f"{kind}-{number:05d}", name, tuple(parts)))
    return sources


def split_tail(path, val_fraction):
    """The two parts of a file, cut between two characters."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        cut = file.seek(int(size * (1 - val_fraction)))
        ahead = file.read(3)
    cut += len(ahead) - len(ahead.lstrip(bytes(range(0x80, 0xC0))))  # the bytes that continue a UTF-8 character
    return ("train", path, 0, cut), ("val", path, cut, size)


def stdlib_sources(config):
    """The standard library without tests, installed packages and this build's settings: a function of the version."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
    paths = sorted((path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts)
                    and not path.name.startswith(("_sysconfigdata", "sitecustomize"))), key=Path.as_posix)
    if not paths:
        raise UserError(f"this Python has no source of its standard library in {root}: use --data_files=...")
    return [Source("both-00000", f"the standard library of Python {platform.python_version()}",
                   tuple(("hash", str(path), 0, path.stat().st_size) for path in paths))]


def hub_sources(config):
    """The wanted shards of C4. The hub is asked for sizes only if one is not committed yet."""
    wanted = {f"train-{i:05d}": f"en/c4-train.{i:05d}-of-{C4_TRAIN:05d}.json.gz" for i in config.shard_range()}
    wanted |= {f"val-{i:05d}": f"en/c4-validation.{i:05d}-of-{C4_VAL:05d}.json.gz" for i in range(C4_VAL)}
    records = {stem: read_record(config.folder / f"{stem}.json") for stem in wanted}
    missing = [path for stem, path in wanted.items() if not records[stem]]
    known = {entry["source"]: entry["source_bytes"] for record in records.values() if record
             for entry in record["files"].values()}
    try:
        from huggingface_hub import HfApi  # comes with datasets
        answer = within(60, lambda: list(HfApi().get_paths_info(C4, missing, repo_type="dataset"))) if missing else []
        sizes = dict.fromkeys(wanted.values(), 0) | known | {info.path: info.size for info in answer}
    except Exception as error:
        raise UserError(f"cannot reach {C4} on the Hugging Face hub ({type(error).__name__}): check the network, or "
                        "give local files, --data_files='.../c4-*.json.gz', or try --dataset=stdlib") from None
    return [Source(stem, path, ((stem.split("-")[0], f"hf://datasets/{C4}/{path}", 0, sizes[path]),))
            for stem, path in wanted.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Readers: each yields (text, is it the document's last piece, bytes of the file read so far). A record that cannot be
# read is counted and named, never passed over in silence; a file that breaks off may lack most of its text: an error.

class Tally:
    """What was skipped or repaired in one source, as its manifest entry tells it."""

    def __init__(self, max_bad):
        self.max_bad, self.counts, self.examples = max_bad, collections.Counter(), []

    def bad(self, path, number, why):
        self.counts["bad"] += 1
        self.examples = (self.examples + [f"{os.path.basename(path)}:{number}: {why}"])[:10]
        if self.counts["bad"] > self.max_bad:
            raise UserError(f"{os.path.basename(path)}:{number}: {why}; mend the file, or skip such records with a "
                            f"larger --max_bad (now {self.max_bad})")

    def summary(self):
        return dict(+self.counts) | ({"examples": self.examples} if self.examples else {})


def read(path, begin, end, tally):
    try:
        if path.endswith((".txt", ".py")):
            yield from read_plain(path, begin, end)
        elif path.endswith(".parquet"):
            yield from read_parquet(path, tally)
        else:
            yield from read_json_lines(path, tally)
    except UserError:
        raise
    except Exception as error:
        if not (isinstance(error, OSError) or path.startswith("hf://") or path.endswith(".parquet")):
            raise  # our own mistake; a network or a damaged .parquet, though, has errors of many kinds
        raise unreadable(path, error) from None


def unreadable(path, error):
    return UserError(f"{path} cannot be read ({type(error).__name__}: {error}); once it can, the same command "
                     "continues where this one stopped")


def read_json_lines(path, tally):
    number = 0
    with open_bytes(path) as raw:
        try:
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw, 1):
                if line.isspace():
                    continue
                try:
                    text = parse_record(line)
                except ValueError as error:
                    tally.bad(path, number, error)
                else:
                    yield text, True, raw.tell()
            if path.endswith(".gz") and not raw.tell():
                raise EOFError  # to gzip, no bytes at all are a whole file
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise UserError(f"{path}:{number + 1}: the gzip stream is truncated or damaged and the rest lost: fetch "
                            "the file again, or give what `gzip -dc` still reads of it") from None


def open_bytes(path):
    if not path.startswith("hf://"):
        return open(path, "rb")
    # What load_dataset(streaming=True) opens, with its retries; as bytes, so that bad lines can be counted one by one.
    from datasets.utils.file_utils import xopen
    return xopen(path, "rb")


def parse_record(line):
    """The text of one JSON line: b'{"text": "Hi"}' -> "Hi"; ValueError with the reason if it has none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(record, dict) or "text" not in record:
        raise ValueError("no field text")
    if not isinstance(record["text"], str):
        raise ValueError("text is not a string")
    return record["text"]


def read_parquet(path, tally):
    import pyarrow.parquet  # comes with datasets
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as table:
        if "text" not in table.schema_arrow.names:
            raise UserError(f"{path} has no column text")
        row, rows, size = 0, table.metadata.num_rows, os.path.getsize(path)
        for batch in table.iter_batches(1024, columns=["text"]):
            column = batch.column("text").cast(pyarrow.large_binary())  # a string column may hold broken UTF-8
            for row, text in enumerate(column.to_pylist(), row + 1):
                if text is None:
                    tally.bad(path, row, "text is null")
                else:
                    yield text.decode("utf-8", "surrogateescape"), True, size * row // rows
        if row < rows:  # pyarrow passes over some damage in silence
            raise UserError(f"{path}:{row + 1}: the file is damaged and the rest lost: fetch it again")


def read_plain(path, begin, end, size=PIECE):
    """Bytes begin..end of a file in pieces of about `size` bytes whose tokens, joined, are those of the whole.

    A cut between a non-space and a space or newline changes no token: GPT-2's pattern begins a new word there,
    whatever follows. A piece grows until it has such a place; memory is that of a piece, whatever the file."""
    decoder, text = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape"), ""
    with open(path, "rb") as raw:
        raw.seek(begin)
        while chunk := raw.read(min(size, end - raw.tell())):
            text += decoder.decode(chunk)
            cut = re.compile(r".*\S(?=[ \n])", re.DOTALL).match(text, max(0, len(text) - len(chunk) - 1))
            if cut and raw.tell() < end:
                yield text[:cut.end()], False, raw.tell()
                text = text[cut.end():]
        yield text + decoder.decode(b"", True), True, raw.tell()


# ---------------------------------------------------------------------------------------------------------------------
# Workers: one call of encode_source per source.

def start_worker(config, options, progress):
    global CONFIG, OPTIONS, TOKENIZER, PROGRESS
    CONFIG, OPTIONS, TOKENIZER, PROGRESS = config, options, load_tokenizer(options["tokenizer"]), progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent says what to do
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # a killed parent must not leave writers behind that its successor would meet


def encode_source(index, source):
    """Makes sure that a source is committed. Tells PROGRESS[1 + 2 * index] the bytes read, the next cell the tokens."""
    record, sha256 = read_record(CONFIG.folder / source.record), source.sha256()
    if record and one_entry(record).get("source_sha256", sha256) != sha256:  # a worker's task: it takes long
        raise UserError(changed(CONFIG.folder, source))
    bad = record and max(entry.get("bad", 0) for entry in record["files"].values())
    if not record or bad > CONFIG.max_bad or any(bin_problems(CONFIG.folder, record, whole=True)):
        write_source(index, source, sha256)
    PROGRESS[1 + 2 * index] = source.size


def write_source(index, source, sha256):
    tally = Tally(CONFIG.max_bad)
    with contextlib.ExitStack() as files:
        names = {split: files.enter_context(replacing(CONFIG.folder / name)) for split, name in source.bins().items()}
        bins = {split: Bin(files.enter_context(open(name, "wb")), TOKENIZER) for split, name in names.items()}
        for split, text, size, last, position in pieces(source, tally):
            bins[split].write(text, size, last)
            PROGRESS[1 + 2 * index] = position
            PROGRESS[2 + 2 * index] = sum(bin.tokens for bin in bins.values())
            if PROGRESS[0]:
                raise UserError("stopped")  # another source failed; its error is the one that is shown
        made_of = {"source": source.name, "source_bytes": source.size} | ({"source_sha256": sha256} if sha256 else {})
        entries = {name: {"split": split, **bins[split].finish(), **made_of} for split, name in source.bins().items()}
    next(iter(entries.values())).update(tally.summary())
    write_sealed(CONFIG.folder / source.record, {"version": 1, **OPTIONS, "files": entries})


def pieces(source, tally):
    """Yields (split, valid text, its UTF-8 bytes, is it the document's last piece, bytes of the source read so far)."""
    done, fresh = 0, True
    for rule, path, begin, end in source.parts:
        for text, last, position in read(path, begin, end, tally):
            if not text:
                tally.counts["empty"] += 1
                continue
            valid, utf8 = clean(text)
            tally.counts["repaired"] += valid is not text
            if fresh:  # by content, so that the same text is never in both splits
                split = rule if rule != "hash" else "val" if zlib.crc32(utf8) < CONFIG.val_fraction * 2**32 else "train"
            fresh = last
            yield split, valid, len(utf8), last, done + position - begin
        done += end - begin


class Bin:
    """A .bin that is being written, and what the manifest will say of it."""

    def __init__(self, file, tokenizer):
        self.file, self.tokenizer, self.sha256 = file, tokenizer, hashlib.sha256()
        self.tokens = self.documents = self.bytes = self.encoded = 0
        self.pieces = []

    def write(self, text, size, last):
        """Takes a piece of a document. 4 MB are encoded at once: to read and encode by turns takes 15 % longer."""
        self.pieces.append((text, last))
        self.documents, self.bytes = self.documents + last, self.bytes + size
        if self.bytes - self.encoded >= BATCH:
            self.flush()

    def flush(self):
        if self.pieces:
            ids = self.tokenizer.encode_pieces(self.pieces)
            self.file.write(ids.data)
            self.sha256.update(ids.data)
            self.tokens, self.encoded, self.pieces = self.tokens + len(ids), self.bytes, []

    def finish(self):
        self.flush()
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes,
                "sha256": self.sha256.hexdigest()}


# ---------------------------------------------------------------------------------------------------------------------
# The run.

def prepare(config):
    """Makes the dataset, or what is still missing of it; returns its manifest."""
    tokenizer = ("bytes" if config.dataset == "stdlib" else "gpt2") if config.tokenizer == "auto" else config.tokenizer
    sources, tokenizer = list_sources(config), load_tokenizer(tokenizer)
    options = {"dataset": config.dataset, "origin": "local files" if config.data_files else "built in",
               "tokenizer": tokenizer.name, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size,
               "dtype": tokenizer.dtype.name}
    if sources[0].stem.startswith("both"):
        options["val_fraction"] = config.val_fraction
    check_same_work(config.folder, options, sources)
    check_disk(config.folder, options, sources)
    for stale in made_files(config.folder, r"(bin|json)\.tmp"):
        with contextlib.suppress(OSError):
            stale.unlink()
    encode_all(config, options, sources)
    try:
        return write_manifest(config.folder)
    except NoDocuments:  # no dataset after all: nothing is left of it. After any other error everything is
        for path in (config.folder / name for source in sources for name in (source.record, *source.bins().values())):
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def made_files(folder, ending):
    """The files of sources, by name; whatever else lies in the folder is the user's."""
    name = re.compile(rf"(train|val|both)-\d{{5,}}\.{ending}")
    return sorted(path for path in folder.glob("*-*") if name.fullmatch(path.name))


def list_records(folder):
    return made_files(folder, "json")


def read_record(path):
    """The record of a committed source; None where it is missing or damaged, so that the source is done again."""
    with contextlib.suppress(UserError):
        return read_sealed(path)


def check_same_work(folder, options, sources):
    """Refuses to mix what is in the folder with anything that this command would not have written itself."""
    planned = {source.record: source for source in sources}
    for path in list_records(folder):
        if not (record := read_record(path)):
            continue
        made, asked, source = record | one_entry(record), options, planned.get(path.name)
        if source:
            asked = asked | {"source": source.name}
        elif options["origin"] == "local files":  # a shard of C4 that another --shards wanted is welcome
            asked = asked | {"source": "among the files given now"}
        for key, value in asked.items():
            if made.get(key) != value:
                raise UserError(f"{folder} was made with {key} {made.get(key)}, not {value}: take another --dataset "
                                "name, or delete that folder")
        if source and source.size != made["source_bytes"]:
            raise UserError(changed(folder, source))


def changed(folder, source):
    return (f"{source.name} has changed since {folder / source.record} was made from it: restore it, or delete that "
            "record and the same command makes it anew, or take another --dataset name")


def one_entry(record):
    return next(iter(record["files"].values()))


def check_disk(folder, options, sources):
    """Estimates from above, for English, what is still to be written: gzip packs 3 : 1, a GPT-2 token is 4 bytes."""
    text = sum(source.size * (3 if source.parts[0][1].endswith((".gz", ".parquet")) else 1)
               for source in sources if not (folder / source.record).exists())
    need = text * np.dtype(options["dtype"]).itemsize // (4 if options["tokenizer"] == "gpt2" else 1)
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if need > (free := shutil.disk_usage(place).free):
        raise UserError(f"{folder} needs about {need / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free: "
                        "make room, use another --data_dir, or fewer --shards")


def encode_all(config, options, sources):
    """encode_source for all sources in worker processes, with one progress bar over the bytes of all."""
    spawn = multiprocessing.get_context("spawn")  # fork would copy locks that other threads hold
    progress = spawn.RawArray("q", 1 + 2 * len(sources))  # a stop flag, then cells with one writer each: no lock
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(len(sources), config.processes or cores)
    bar = tqdm(total=sum(source.size for source in sources), desc=config.dataset, unit="B", unit_scale=True, delay=1,
               mininterval=0.5 if sys.stderr.isatty() else 30)
    with bar, futures.ProcessPoolExecutor(workers, spawn, start_worker, (config, options, progress)) as pool:
        start, waiting = time.monotonic(), ()
        try:
            waiting = {pool.submit(encode_source, *task) for task in enumerate(sources)}
            while waiting:
                done, waiting = futures.wait(waiting, timeout=0.2, return_when=futures.FIRST_COMPLETED)
                tokens = sum(progress[2::2])
                rate = f"{tokens / 1e6:,.1f}M tokens, {tokens / (time.monotonic() - start):,.0f} tokens/s"
                bar.set_postfix_str(rate, refresh=False)
                bar.update(sum(progress[1::2]) - bar.n)
                for future in done:
                    future.result()
        except futures.process.BrokenProcessPool:
            raise UserError("a worker process was killed, perhaps for want of memory: try fewer --processes; the same "
                            "command continues where this one stopped") from None
        finally:
            progress[0] = True  # who is at work stops, and leaves nothing half-written
            manager = getattr(pool, "_executor_manager_thread", None)
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in waiting):
                time.sleep(0.01)
            for worker in multiprocessing.active_children():  # idle; one killed while it waited would hang the rest
                worker.kill()
            if manager:  # Python's own end writes to a pipe that this thread closes (3.11: Bad file descriptor)
                manager.join(timeout=10)


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
    """Checks every file of the dataset to the last bit, then writes the manifest that joins all records."""
    found, listed = [], set()
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
    if first["origin"] == "built in" and (shards := [int(path.stem[6:]) for path in records if path.match("train-*")]):
        if absent := sorted({*range(min(shards), max(shards))} - {*shards}):  # lost in copying, or not made yet
            print(f"{folder}: {len(absent)} train shards are missing between the first and the last, "
                  f"as {absent[0]:05d}")
    return write_manifest(folder)


def main(argv=None):
    (config,) = configure(sys.argv[1:] if argv is None else argv, PrepareConfig)
    with locked(config.folder):
        manifest = verify(config.folder) if config.verify else prepare(config)
    entries = manifest["files"].values()
    train, val = (sum(entry["tokens"] for entry in entries if entry["split"] == split) for split in ("train", "val"))
    print(f"{config.folder}: {train:,} train and {val:,} validation tokens in {len(entries)} files"
          + ", all verified" * config.verify)
    for key, meaning in (("bad", "unreadable records skipped"), ("empty", "empty documents skipped"),
                         ("repaired", "texts with invalid characters, now U+FFFD")):
        if count := sum(entry.get(key, 0) for entry in entries):
            print(f"  {count:,} {meaning}")
    for example in [example for entry in entries for example in entry.get("examples", [])][:10]:
        print(f"  {example}")
    preset = "tiny" if manifest["tokenizer"] == "bytes" else "base"
    data_dir = f" --data_dir={config.data_dir}" * (config.data_dir != "data")
    out_dir = f" --out_dir=out/{config.dataset}" * (config.dataset not in ("c4", "stdlib"))  # one folder, one run
    print(f"next: python train.py config/{preset}.py --dataset={config.dataset}{data_dir}{out_dir}")


if __name__ == "__main__":
    command(main)
