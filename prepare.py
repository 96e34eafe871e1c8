"""Text to token files: writes data/NAME/train-*.bin, val-*.bin and manifest.json, which train.py reads.

    python prepare.py                                                  the first shard of C4, and its validation set
    python prepare.py --shards=128:256                                 this machine's share of it
    python prepare.py --dataset=stdlib                                 Python's own source: needs no network
    python prepare.py --dataset=mine --data_files='texts/*.jsonl.gz'   .txt .jsonl .json .gz of these, .parquet
    python prepare.py --dataset=stories --hub=roneneldan/TinyStories   any text dataset of the Hugging Face hub
    python prepare.py --dataset=c4 --verify                            checks every byte, joins what was copied together

A .bin holds the little-endian ids of its documents, each followed by end-of-text. A source is a large file, a group of
small ones, or a shard of the hub. One process commits its .bin files (temporary name, fsync, rename), and then their
record, a small .json. When all records are there, they are joined in manifest.json. So a kill at any moment loses only
the sources in progress, the same command ends with the same bytes, and machines that share the work need no
coordination: copy their folders together and --verify. (A manifest that grows with every shard would need a lock.)
Records and manifest end with a checksum of themselves; training checks these and sizes, --verify every byte.
"""
import concurrent.futures as futures
import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import os
import platform
import re
import signal
import sys
import sysconfig
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, command, configure, help_first

help_first(__name__, __file__)

from support.advice import say_what_was_made, usable_cores
from support.dataset import NoDocuments, bin_problems, load_tokenizer, within, write_sealed
from support.files import file_sha256, leftovers, locked, replacing
from support.shards import Bin, check_disk, hash_limit, list_records, read_record, verify, write_manifest
from support.texts import (Tally, find_files, held_out, hub_revision, listed, local_revision, named_splits, open_hub,
                           open_shard, read, read_hub, some_of, split_tail, unreadable, valid)

C4 = "allenai/c4"  # the repository on the hub, and how many files its splits have
C4_TRAIN = 1024
C4_VAL = 8
GROUP = 1 << 26  # files share a .bin until they are so many bytes: it should be much longer than a context
SMALL = 1 << 24  # so few bytes of text are for the byte tokenizer
cached_tokenizer = functools.lru_cache(load_tokenizer)  # a worker loads it once


@dataclass
class PrepareConfig:
    # The text
    dataset: str = "c4"  # c4 (downloaded), stdlib (Python's own source), or any name for text of --data_files or --hub
    data_files: str = ""  # local files: a glob, or several separated by spaces or commas
    hub: str = ""  # a dataset of the Hugging Face hub, OWNER/NAME; or a local folder or file that `datasets` reads
    config: str = ""  # configuration of the hub dataset, where it has several
    text_field: str = "text"  # field or column of a record that holds its text
    max_documents: int = 0  # with hub: documents to use of each split; 0: all

    # How it is cut
    tokenizer: str = "auto"  # gpt2, bytes, or a tokenizer.json; auto: bytes for stdlib and small texts, else gpt2
    shards: str = "1"  # train shards of the downloaded C4, of 1024: N for the first N, a:b for a to b-1
    val_fraction: float = 0.05  # share of the text held out where no file or folder is named val, eval or dev

    # Files and the machine
    data_dir: str = "data"  # folder of the datasets; this one goes to data_dir/NAME
    processes: int = 0  # number of worker processes; 0: one per core
    max_bad: int = 10  # unreadable records to skip and report, per source, before giving up
    verify: bool = False  # check all files of the dataset, write the manifest that joins them, and stop

    def __post_init__(self):
        if not re.fullmatch(r"[\w-][\w.-]*", self.dataset):
            raise UserError(f"--dataset must be a plain name of letters, digits, - and _, got {self.dataset!r}")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val_fraction must lie between 0 and 1, got {self.val_fraction}")
        if min(self.processes, self.max_bad, self.max_documents) < 0:
            raise UserError("--processes, --max_bad and --max_documents must not be negative")
        if not self.shard_range():
            raise UserError(f"--shards must be N or a:b within 0:{C4_TRAIN}, got {self.shards!r}")
        if (self.config or self.max_documents) and not self.hub:
            raise UserError("--config and --max_documents belong to --hub=OWNER/NAME")
        if "://" in self.hub:
            raise UserError(f"--hub takes OWNER/NAME, which are part of that address, not {self.hub}")
        if self.hub and self.data_files:
            raise UserError("give --hub or --data_files, not both")
        if (self.hub or self.data_files) and self.dataset == "stdlib" or self.hub and self.dataset == "c4":
            raise UserError(f"{self.dataset} is built in: choose another --dataset name for this text")

    def shard_range(self):
        match = re.fullmatch(r"(?:([0-9]{1,9}):)?([0-9]{1,9})", self.shards)
        first, end = (int(match[1] or 0), int(match[2])) if match else (0, 0)
        return range(first, end if end <= C4_TRAIN else 0)

    @property
    def folder(self):
        return Path(self.data_dir) / self.dataset


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

    @property
    def paths(self):
        """The local files."""
        return [*dict.fromkeys(path for _, path, _, _ in self.parts if "://" not in path)]

    def of_each(self, call):
        try:
            return [call(path) for path in self.paths]
        except OSError as error:
            raise unreadable(error.filename or self.name, error) from None

    def sha256(self):
        """The hash of a local file, or of the hashes of several; None for the hub, whose revision does not change."""
        sums = self.of_each(file_sha256)
        if len(sums) > 1:
            return hashlib.sha256("".join(sums).encode()).hexdigest()
        return sums[0] if sums else None

    def state(self):
        """What changes whenever a file is written to, even if its size stays the same."""
        return [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for stat in self.of_each(os.stat)]

    def bins(self):
        kind, number = self.stem.split("-")
        return {split: f"{split}-{number}.bin" for split in ("train", "val") if kind in (split, "both")}


def list_sources(config):
    """The sources, and what their records say about their origin."""
    if config.data_files:
        return local_sources(*find_files(config.data_files), config.val_fraction), {"origin": "local files"}
    if config.hub:
        return hub_sources(config)
    builtin = {"c4": c4_sources, "stdlib": stdlib_sources}
    if config.dataset not in builtin:
        raise UserError(f"{config.dataset!r} is not c4 or stdlib, which are built in: name its files, "
                        "--data_files=..., or its dataset on the hub, --hub=OWNER/NAME")
    return builtin[config.dataset](config), {"origin": "built in"}


def local_sources(paths, base, val_fraction):
    """Without files named as validation, a share of all text is that split: documents, or the tails of few .txt."""
    paths, validation = named_splits(paths, base)
    documents = [path for path in paths if path.lower().endswith(".txt")]
    few = not validation and len(documents) * val_fraction < 5
    tails = {path for path in documents if few and os.path.getsize(path) * val_fraction > 1000}
    paths = sorted(paths, key=lambda path: path in validation)
    # A source is one worker's: records, which are slow to read, share one only up to GROUP / 32.
    ends = itertools.accumulate(os.path.getsize(path) * (1 if path in documents else 32) for path in paths)
    groups = {path: (path in validation, end // GROUP) for path, end in zip(paths, ends)}
    sources = []
    for number, (_, members) in enumerate(itertools.groupby(paths, groups.get)):
        members = list(members)
        kind = "both"
        if validation:
            kind = "val" if members[0] in validation else "train"
        parts = []
        for path in members:
            if path in tails:
                parts += split_tail(path, val_fraction)
            else:
                parts.append(("hash" if kind == "both" else kind, path, 0, os.path.getsize(path)))
        name = Path(os.path.relpath(members[0], base)).as_posix()
        name += f" and {len(members) - 1} more" * (len(members) > 1)
        sources.append(Source(f"{kind}-{number:05d}", name, tuple(parts)))
    return sources


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


def c4_sources(config):
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


def hub_sources(config):
    """The shards of a dataset that `datasets` reads. The records keep the revision and the number of shards, so that
    a later revision on the hub does not change a dataset in progress, and a finished one needs no network."""
    local = os.path.exists(config.hub)
    asked = {"origin": "hub", "hub": os.path.basename(os.path.abspath(config.hub)) if local else config.hub,
             "config": config.config, "text_field": config.text_field, "max_documents": config.max_documents}
    made = first_record(config.folder)
    if made and not local and all(made.get(key) == value for key, value in asked.items()):
        asked |= {"revision": made["revision"], "shards": made["shards"]}
    else:
        try:
            asked["revision"] = local_revision(config.hub) if local else within(60, lambda: hub_revision(config.hub))
            streams = open_hub(config.hub, config.config, asked["revision"])
        except Exception as error:  # no network, no such name, several configurations: each its own exception type
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise UserError(f"datasets cannot open {config.hub} ({reason}): check its name, --config and the "
                            "network") from None
        asked["shards"] = {split: stream.num_shards for split, stream in streams.items()}
    splits = asked["shards"]
    train = "train" if "train" in splits else next(iter(splits))
    validation = next((split for split in splits if split != train and held_out(split, ".")), None)
    if train != "train" and len(splits) > 1:
        raise UserError(f"{config.hub} has no split train, only {', '.join(splits)}")
    kinds = {"train": train, "val": validation} if validation else {"both": train}
    if others := splits.keys() - {train, validation}:
        print(f"left out: split {listed(sorted(others))}")
    sources = []
    for kind, split in kinds.items():
        for i in range(splits[split]):
            part = ("hash" if kind == "both" else kind, f"hub://{split}/{i}", 0, 0)
            sources.append(Source(f"{kind}-{i:05d}", f"{asked['hub']} {split} {i}", (part,)))
    return sources, asked


# ---------------------------------------------------------------------------------------------------------------------
# Workers: one call of encode_source per source.

def start_worker(config, progress):
    global CONFIG, PROGRESS
    CONFIG = config
    PROGRESS = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent says what to do
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # a killed parent must not leave writers behind that its successor would meet


def encode_source(index, source, options):
    """Commits a source, if it is not yet. PROGRESS[1 + 2 * index] counts the bytes read, the next cell the tokens."""
    global OPTIONS, TOKENIZER
    OPTIONS = options
    TOKENIZER = cached_tokenizer(options["tokenizer"])
    record = read_record(CONFIG.folder / source.record)
    state = source.state()
    sha256 = source.sha256()  # a worker's task: it takes long
    fits = record and one_entry(record).get("source_sha256", sha256) == sha256
    if record and not fits and (CONFIG.folder / "manifest.json").exists():
        raise UserError(changed(CONFIG.folder, source))
    bad = max(entry.get("bad", 0) for entry in record["files"].values()) if fits else 0
    whole = fits and bad <= CONFIG.max_bad and not any(bin_problems(CONFIG.folder, record, whole=True))
    if not whole and room_for(source) != 0:
        write_source(index, source, sha256, state)
    PROGRESS[1 + 2 * index] = source.size


def room_for(source):
    """How many of --max_documents the earlier shards of the same split left for this one; None: no limit."""
    if not CONFIG.max_documents:
        return None
    kind, number = source.stem.split("-")
    records = [read_record(CONFIG.folder / f"{kind}-{i:05d}.json") for i in range(int(number))]
    entries = [entry for record in records if record for entry in record["files"].values()]
    taken = sum(entry[key] for entry in entries for key in ("documents", "bad", "empty") if key in entry)
    return max(0, CONFIG.max_documents - taken)


def write_source(index, source, sha256, state):
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
        PROGRESS[2 + 2 * index] = sum(bin.tokens for bin in bins.values())
        if source.state() != state:
            raise UserError(f"{source.name} was changed while it was being read: run the same command again")
    next(iter(entries.values())).update(tally.summary())
    write_sealed(CONFIG.folder / source.record, {"version": 1, **OPTIONS, "files": entries})


def pieces(source, tally):
    """Yields (split, valid text, its UTF-8 bytes, is it the document's last piece, bytes of the source read so far)."""
    limit, found = hash_limit(texts(source, tally), CONFIG.val_fraction)
    fresh = True
    for rule, text, utf8, last, position in found:
        if rule == "hash" and limit is None and fresh and last and len(text) > 1:
            cut = max(1, int(len(text) * (1 - CONFIG.val_fraction)))
            for split, part in (("train", text[:cut]), ("val", text[cut:])):
                yield split, part, len(part.encode()), True, position
            continue
        if fresh and rule == "hash":
            split = "val" if limit and zlib.crc32(utf8) < limit else "train"
        elif fresh:
            split = rule
        fresh = last
        yield split, text, len(utf8), last, position


def texts(source, tally):
    """Yields (rule, valid text, its UTF-8, is it the document's last piece, bytes of the source read so far)."""
    done = 0
    for rule, path, begin, end in source.parts:
        if path.startswith("hub://"):
            shard = open_shard(path, CONFIG.hub, CONFIG.config, OPTIONS)
            found = read_hub(shard, source.name, tally, CONFIG.text_field, room_for(source))
            found = some_of(found, source.name, tally)
        else:
            found = read(path, begin, end, tally, CONFIG.text_field)
        for text, utf8, last, position in valid(found, path, tally):
            yield rule, text, utf8, last, done + position - begin
        done += end - begin


# ---------------------------------------------------------------------------------------------------------------------
# The run.

def prepare(config):
    """Makes the dataset, or what is still missing of it; returns its manifest and its sources."""
    sources, origin = list_sources(config)
    with workers(config, len(sources)) as (pool, progress, tasks):
        options = options_of(config, sources, origin)
        encode_all(pool, progress, tasks, config, sources, options)
    try:
        return write_manifest(config.folder), sources
    except NoDocuments:  # no dataset after all: nothing is left of it. After any other error everything is
        for source in sources:
            remove(config.folder, source.record, *source.bins().values())
        raise


def options_of(config, sources, origin):
    """What all records say alike, after everything that could stop the work was checked."""
    tokenizer = load_tokenizer(pick_tokenizer(config, sources))
    options = {"dataset": config.dataset, **origin, "tokenizer": tokenizer.name, "tokenizer_hash": tokenizer.hash,
               "vocab_size": tokenizer.vocab_size, "dtype": tokenizer.dtype.name}
    if sources[0].stem.startswith("both"):
        options["val_fraction"] = config.val_fraction
    check_same_work(config.folder, options, sources)
    missing = [source for source in sources if not (config.folder / source.record).exists()]
    check_disk(config.folder, options, text_size(missing))
    for name in ("*-*.bin", "*-*.json", "manifest.json"):
        remove(config.folder, *(path.name for path in leftovers(config.folder, name)))
    return options


def remove(folder, *names):
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def pick_tokenizer(config, sources):
    """The one asked for, else that of the existing records, else gpt2, or bytes for little text and a small model."""
    if config.tokenizer != "auto":
        return config.tokenizer
    if made := first_record(config.folder):
        return made["tokenizer"]
    little = config.data_files and text_size(sources) < SMALL
    return "bytes" if config.dataset == "stdlib" or little else "gpt2"


def text_size(sources):
    """Bytes of text, estimated: gzip packs English 3 : 1."""
    return sum(source.size * (3 if source.parts[0][1].endswith((".gz", ".parquet")) else 1) for source in sources)


def first_record(folder):
    return next((record for path in list_records(folder) if (record := read_record(path))), None)


def one_entry(record):
    return next(iter(record["files"].values()))


def check_same_work(folder, options, sources):
    """Refuses to mix a finished dataset, or a partly downloaded one, with anything that this command would not have
    written itself. In a dataset of local files that was never finished, what does not fit is made again."""
    planned = {source.record: source for source in sources}
    finished = (folder / "manifest.json").exists()
    for path in list_records(folder):
        record = read_record(path)
        if not record or not (problem := difference(folder, record, options, planned.get(path.name))):
            continue
        if finished or options["origin"] != "local files":
            raise UserError(problem)
        remove(folder, path.name, *record["files"])


def difference(folder, record, options, source):
    """How a record differs from what this command would make of the source; "" if it does not."""
    made, asked = record | one_entry(record), options
    if source:
        asked = asked | {"source": source.name}
    elif options["origin"] == "local files":  # a shard of C4 that another --shards wanted is welcome
        asked = asked | {"source": "among the files given now"}
    for key, value in asked.items():
        if made.get(key) != value:
            return (f"{folder} was made with {key} {made.get(key, 'unset')}, not {value}: use another --dataset name, "
                    "or delete that folder")
    return changed(folder, source) if source and source.size != made["source_bytes"] else ""


def changed(folder, source):
    return (f"{source.name} has changed since {folder / source.record} was made from it: delete that record and repeat "
            "the command to prepare the new text, or use another --dataset name")


@contextlib.contextmanager
def workers(config, count):
    """A pool of processes, which start while this one still plans; its shared counters; its tasks. Ends them all."""
    spawn = multiprocessing.get_context("spawn")  # fork would copy locks that other threads hold
    progress = spawn.RawArray("q", 1 + 2 * count)  # a stop flag, then cells with one writer each: no lock
    # With max_documents each shard takes what those before it left.
    processes = 1 if config.max_documents else min(count, config.processes or usable_cores())
    with futures.ProcessPoolExecutor(processes, spawn, start_worker, (config, progress)) as pool:
        tasks = []
        try:
            for _ in range(processes):
                pool.submit(int)  # a process is started when there is something to do
            yield pool, progress, tasks
        except futures.process.BrokenProcessPool:
            raise UserError("a worker process was killed, perhaps because memory ran out: try fewer --processes; the "
                            "same command continues where this one stopped") from None
        finally:
            progress[0] = True  # workers stop, and leave nothing half-written
            manager = getattr(pool, "_executor_manager_thread", None)
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(task.done() for task in tasks):
                time.sleep(0.01)
            for worker in multiprocessing.active_children():  # idle; one killed while it waited would hang the rest
                worker.kill()
            if manager:  # Python's own end writes to a pipe that this thread closes (3.11: Bad file descriptor)
                manager.join(timeout=10)


def encode_all(pool, progress, tasks, config, sources, options):
    """encode_source for all sources in the pool, with one progress bar over the bytes of all."""
    for index, source in enumerate(sources):
        tasks.append(pool.submit(encode_source, index, source, options))
    from tqdm import tqdm  # imported here, it costs no time: the workers are busy
    start = time.monotonic()
    with tqdm(total=sum(source.size for source in sources) or None, desc=config.dataset, unit="B", unit_scale=True,
              delay=1, mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        waiting = tasks
        while waiting:
            done, waiting = futures.wait(waiting, timeout=0.2, return_when=futures.FIRST_COMPLETED)
            tokens = sum(progress[2::2])
            rate = f"{tokens / 1e6:,.1f}M tokens, {tokens / (time.monotonic() - start):,.0f} tokens/s"
            bar.set_postfix_str(rate, refresh=False)
            bar.update(sum(progress[1::2]) - bar.n)
            for task in done:
                task.result()


def main(argv=None):
    (config,) = configure(sys.argv[1:] if argv is None else argv, PrepareConfig)
    with locked(config.folder):
        manifest, sources = (verify(config.folder), []) if config.verify else prepare(config)
    say_what_was_made(config, manifest, sources)


if __name__ == "__main__":
    command(main)
