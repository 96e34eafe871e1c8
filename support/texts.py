"""The texts in files: which files a pattern means, and the documents in .txt, .jsonl, .parquet and what datasets reads.

A reader yields (text, is it the document's last piece, bytes of the file read so far). A record that cannot be read is
counted and named, never passed over in silence; a file that breaks off may lack most of its text: an error.
"""
import codecs
import collections
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import threading
import zlib
from pathlib import Path

from configurator import UserError, escape, shell, show
from support.dataset import clean
from support.files import check_text, encoding_of, file_sha256, not_text

PIECE = 1 << 20  # a .txt file is read in pieces of so many bytes
HEAD = 1 << 16  # so many bytes tell what a file is
EXTENSIONS = (".txt", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
INVALID = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8
SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # what JSON can write beside
codecs.register_error("mark", lambda error: ("\udfff", error.end))  # what we make of bytes that are not UTF-16


# ----------------------------------------------------------------------------------------------------------------------
# Which files


def find_files(patterns):
    """The sorted files that the globs match, each once; and the folder below which the names of folders mean something.

    Names may have spaces and commas, so the whole text is tried as one pattern first, then what is between commas."""
    if "\0" in patterns:
        raise UserError("--data_files: a file name cannot hold a NUL character")
    for separator in (None, ",", r"[\s,]+"):
        parts = re.split(separator, patterns) if separator else [patterns]
        parts = [part.strip() for part in parts if part.strip()]
        matched = {part: list(expand(*split_pattern(part))) for part in parts}
        if matched and all(matched.values()):
            break
    if not matched:
        raise UserError("--data_files names no file")
    found = {}
    for pattern, paths in matched.items():
        paths = [os.path.normpath(path) for path in paths if os.path.isfile(path)]
        if not paths:
            raise UserError(f"--data_files: {why_none(pattern)}")
        for path in sorted(paths, key=lambda path: (os.path.realpath(path) != os.path.abspath(path), path)):
            found.setdefault(identity(path), path)
    for path in sorted(found.values()):
        if not path.lower().endswith(EXTENSIONS):
            raise UserError(f"{path}: cannot read this kind of file, only {' '.join(EXTENSIONS)}: plain text of "
                            "another name can be copied to a .txt")
    base = os.path.commonpath([os.path.abspath(split_pattern(pattern)[0]) for pattern in matched])
    return sorted(found.values()), base


def identity(path):
    """The same for all names of a file, by links of any kind."""
    stat = os.stat(path)
    return (stat.st_dev, stat.st_ino) if stat.st_ino else os.path.realpath(path)


def why_none(pattern):
    path = os.path.expanduser(pattern)
    if "://" in pattern:
        return f"{pattern} is an address: download it first, and name the file"
    if os.path.isdir(path):
        found = {ending for name in os.listdir(path) for ending in EXTENSIONS if name.lower().endswith(ending)}
        patterns = [shell(os.path.join(pattern, f"*{ending}")) for ending in EXTENSIONS if ending in found]
        if not found:
            return f"{pattern} is a folder without {', '.join(EXTENSIONS)} files: name files that are there"
        return f"{pattern} is a folder: name its files, {' or '.join(patterns)}"
    if os.path.lexists(path):
        return f"{pattern} is not a regular file, or a link to none: name a file"
    return f"no file matches {pattern!r}"


def split_pattern(pattern):
    """The folder of a pattern before its first wildcard, and the parts after that."""
    parts = Path(os.path.expanduser(pattern)).parts
    fixed = 0
    while fixed < len(parts) - 1 and not is_wildcard(os.path.join(*parts[:fixed + 1])):
        fixed += 1
    return os.path.join("", *parts[:fixed]), parts[fixed:]


def is_wildcard(path):
    """What is there under its very name is none, whatever characters it has."""
    return glob.has_magic(os.path.basename(path)) and not os.path.lexists(path)


def expand(folder, parts):
    """The paths below a folder that match the parts of a pattern, as glob.glob(recursive=True) finds them, but **
    enters each folder once: a link that leads back up would otherwise give the same text again and again."""
    if not parts:
        yield folder
        return
    path = os.path.join(folder, parts[0])
    if parts[0] == "**":
        for below in folders_below(folder or "."):
            yield from expand(below, parts[1:] or ("*",))
    elif not is_wildcard(path):
        if os.path.lexists(path):
            yield from expand(path, parts[1:])
    else:
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), parts[0]))):
            yield from expand(path, parts[1:])


def folders_below(folder):
    """The folder and those below it, each once, first as what they are and only then by links."""
    seen = set()
    now = [folder]
    links = []
    while now or links:
        path = now.pop() if now else links.pop()
        if os.path.realpath(path) in seen:
            continue
        seen.add(os.path.realpath(path))
        yield path
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name, reverse=True)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise unreadable(path, error) from None
        for entry in entries:
            if os.path.isdir(entry) and not entry.name.startswith("."):
                (links if entry.is_symlink() else now).append(entry.path)


VALIDATION = "(val(id(ation)?s?)?|eval(uation)?s?|dev|h[eo]ld[-_ ]?out)(set)?"
TEST = "test(s|ing)?(set)?"


def held_out(path, base, words=VALIDATION):
    """Does the name of a file, or of a folder between base and the file, say validation, dev or held-out?"""
    name = os.path.relpath(os.path.abspath(path), base)
    name = re.sub("(?<=[a-z])(?=[A-Z])", " ", name)  # ValidationSet is two words
    return bool(re.search(f"(?<![a-z]){words}(?![a-z])", name, re.IGNORECASE))


def listed(paths, most=20):
    more = len(paths) - most
    return escape(", ".join(paths[:most])) + f" and {more} more" * (more > 0)


def named_splits(paths, base):
    """(Paths to use, those among them that their names say to be validation). Those that say test are left out: nothing
    may be learned or chosen by a test. Where all say so, it means something else."""
    tests = [path for path in paths if held_out(path, base, TEST)]
    if len(tests) == len(paths):
        tests = []
    used = [path for path in paths if path not in tests]
    validation = {path for path in used if held_out(path, base)}
    if len(validation) == len(used):
        raise UserError(f"--data_files: all {len(paths)} files are named as validation files" + " or tests" * bool(tests)
                        + ": none is left to train on")
    if tests:
        print(f"left out, since their names say test: {listed(tests)}")
    return used, validation


# ----------------------------------------------------------------------------------------------------------------------
# What is read


class TooManyBad(UserError):
    pass


MEANINGS = {"bad": "unreadable records skipped", "empty": "empty documents skipped",
            "repaired": "texts with invalid characters, now U+FFFD", "nul": "texts with NUL characters"}


class Tally:
    """What was skipped or repaired in one source, as its manifest entry tells it."""

    def __init__(self, max_bad):
        self.max_bad = max_bad
        self.counts = collections.Counter()
        self.examples = []
        self.fields = ""  # the other ones that the last bad record has

    def bad(self, path, number, why):
        example = f"{os.path.basename(path)}:{number}: {why}"
        self.fields = getattr(why, "fields", "")
        self.counts["bad"] += 1
        self.examples = [*self.examples, example][:10]
        if self.counts["bad"] > self.max_bad:
            raise TooManyBad(f"{example}; fix the file, or skip such records with a larger --max_bad "
                            f"(now {self.max_bad})")

    def summary(self):
        return dict(+self.counts) | ({"examples": self.examples} if self.examples else {})


def read(path, begin, end, tally, field="text"):
    """The documents of a file, or of bytes begin to end of a .txt."""
    name = path.lower()
    try:
        if name.endswith((".txt", ".py")):
            yield from read_plain(path, begin, end)
        elif name.endswith(".parquet"):
            yield from some_of(read_parquet(path, tally, field), path, tally)
        else:
            yield from some_of(read_json(path, tally, field), path, tally)
    except UserError:
        raise
    except Exception as error:
        if not (isinstance(error, OSError) or path.startswith("hf://") or name.endswith(".parquet")):
            raise  # our own mistake; a network or a damaged .parquet, though, has errors of many kinds
        raise unreadable(path, error) from None


def some_of(documents, name, tally):
    """The documents; UserError where not one of the records that they are in can be read."""
    before = tally.counts["bad"]
    good = 0
    try:
        for good, item in enumerate(documents, 1):
            yield item
    except TooManyBad:
        if good or tally.counts["bad"] - before < 10:
            raise
    bad = tally.counts["bad"] - before
    if good or not bad:
        return
    fix = "write one JSON object per line, with its text under --text_field"
    if tally.fields:
        fix = f"name the field that holds the text, --text_field=..., of {tally.fields}"
    raise UserError(f"{name}: not one of {bad} records can be read ({tally.examples[-1]}): {fix}, or leave it out")


def valid(found, path, tally):
    """What a reader found as (text, its UTF-8, last, position), with empty texts left out and invalid ones repaired.

    A file of which many bytes are invalid, and more than are part of a valid character, is of another encoding; one of
    many NUL characters too."""
    invalid = beyond_ascii = nuls = size = 0
    sample = b""

    def check():
        wrong = invalid > max(size / 1000, beyond_ascii) or nuls > max(size / 100, 100)
        if wrong and path.lower().endswith(EXTENSIONS):
            raise not_text(path, sample)
    for text, last, position in found:
        if not text:
            tally.counts["empty"] += 1
            continue
        repaired, utf8 = clean(text)
        beyond_ascii += len(utf8) - len(repaired)
        size += len(utf8)
        if repaired is not text:
            tally.counts["repaired"] += 1
            escaped = len(INVALID.findall(text))
            invalid += escaped
            beyond_ascii -= 2 * escaped  # U+FFFD has three bytes
        if "\0" in text:
            tally.counts["nul"] += 1
            nuls += text.count("\0")
        if repaired is not text or "\0" in text:
            first = re.search("\0|" + INVALID.pattern, text)
            begin = max(0, first.start() - 1) if first else 0
            sample = sample or SURROGATE.sub("?", text[begin:begin + HEAD]).encode("utf-8", "surrogateescape")
            if size > PIECE:
                check()
        yield repaired, utf8, last, position
    check()


def unreadable(path, error):
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path} cannot be read ({type(error).__name__}: {reason}); once it can, the same command "
                     "continues where this one stopped")


def read_plain(path, begin, end, size=PIECE):
    """Bytes begin..end of a file in pieces of about `size` bytes whose tokens, joined, are those of the whole.

    A cut between a non-space and a space or newline changes no token: GPT-2's pattern begins a new word there,
    whatever follows. A piece grows until it has such a place; memory is that of a piece, whatever the file."""
    with open(path, "rb") as raw:
        encoding, mark = check_text(path, raw.read(HEAD))
        decoder = codecs.getincrementaldecoder(encoding)(errors_of(encoding))
        raw.seek(max(begin, mark))
        text = ""
        while chunk := raw.read(max(0, min(size, end - raw.tell()))):
            text += decoder.decode(chunk)
            cut = re.compile(r".*\S(?=[ \n])", re.DOTALL).match(text, max(0, len(text) - len(chunk) - 1))
            if cut and raw.tell() < end:
                yield text[:cut.end()], False, raw.tell()
                text = text[cut.end():]
        yield text + decoder.decode(b"", True), True, raw.tell()


def errors_of(encoding):
    """How invalid bytes become characters that mark them, of which clean() makes U+FFFD."""
    return "surrogateescape" if encoding == "utf-8" else "mark"


def split_tail(path, val_fraction):
    """The two parts of a file, cut between two characters."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        encoding, mark = encoding_of(file.read(4))
        unit = {"utf-8": 1, "utf-16": 2, "utf-32": 4}[encoding.removesuffix("-le").removesuffix("-be")]
        cut = file.seek(max(mark, int(size * (1 - val_fraction)) // unit * unit))
        ahead = file.read(4)
    if unit == 1:
        cut += len(ahead[:3]) - len(ahead[:3].lstrip(bytes(range(0x80, 0xC0))))  # these continue a character
    elif unit == 2 and "\udc00" <= ahead[:2].decode(encoding, "surrogatepass") <= "\udfff":
        cut += 2  # the second half of a pair
    return ("train", path, 0, cut), ("val", path, cut, size)


# ----------------------------------------------------------------------------------------------------------------------
# JSON


def read_json(path, tally, field):
    """One record per line, or one array of records; gzipped where the name ends in .gz."""
    with open_bytes(path) as raw:
        stream = gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw
        number = 0
        try:
            records, parse = json_records(path, stream)
            for number, record in enumerate(records, 1):
                if isinstance(record, str) and not record.strip():
                    continue
                try:
                    text = text_of(parse(record), field)
                except ValueError as error:
                    tally.bad(path, number, error)
                else:
                    yield text, True, raw.tell()
            if stream is not raw and not raw.tell():
                raise EOFError  # to gzip, no bytes at all are a whole file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise bad_gzip(path, number, stream, error) from None


def bad_gzip(path, number, stream, error):
    name = shell(path)
    if "Not a gzipped file" not in str(error):
        return UserError(f"{path}:{number + 1}: the gzip stream is truncated or damaged and the rest lost: fetch the "
                         "file again, or give what `gzip -dc` still reads of it")
    if not stream.tell():
        return UserError(f"{path} is not compressed, though its name ends in .gz: rename it, "
                         f"mv {name} {shell(path[:-3])}")
    return UserError(f"{path} has other bytes after the end of its gzip stream: if they are not your text, drop "
                     f"them, gzip -dc {name} > {shell(path[:-3])}, and give that file")


def json_records(path, stream):
    """The records of a stream and what parses one: lines, which end in LF, CR LF or CR, or the items of an array."""
    head = stream.read(HEAD)
    stream.seek(0)
    encoding, mark = check_text(path, head)
    stream.read(mark)
    lines = io.TextIOWrapper(stream, encoding, errors_of(encoding))
    if head[mark:].decode(encoding, "ignore").lstrip().startswith("["):
        return read_array(path, lines)
    return lines, parse_json


def read_array(path, lines):
    """As json_records, of a text that begins with [: one JSON array, or lines of which the first is an array."""
    text = lines.read()
    lines.detach()  # or it would close the file
    try:
        return json.loads(text), lambda record: record
    except (ValueError, RecursionError) as error:
        problem = error
    lines = text.split("\n")
    try:
        json.loads(lines[0])
    except (ValueError, RecursionError):
        raise UserError(f"{path} begins as one JSON array and cannot be read as one ({problem}): fetch the file again, "
                        "or write one record per line") from None
    return lines, parse_json


def open_bytes(path):
    if not path.startswith("hf://"):
        return open(path, "rb")
    # What load_dataset(streaming=True) opens, with its retries; as bytes, so that bad lines can be counted one by one.
    return import_datasets().utils.file_utils.xopen(path, "rb")


def parse_json(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None


class NoText(ValueError):
    """Why a record has no text, and which other fields it has."""

    def __init__(self, why, record, field):
        super().__init__(why)
        self.fields = show(", ".join(key for key in record if key != field), str)


def text_of(record, field):
    """The text of a record: {"text": "Hi"} -> "Hi"; ValueError with the reason if it has none."""
    if not isinstance(record, dict):
        raise ValueError(f"{in_json(record)} has no field {field}")
    if field not in record:
        names = show(", ".join(record), str)
        raise NoText(f"no field {field}" + f", only {names} (see --text_field)" * bool(names), record, field)
    if not isinstance(record[field], str):
        raise NoText(f"{field} is {in_json(record[field])}, not a string", record, field)
    return record[field]


def in_json(value):
    return show(value, lambda value: json.dumps(value, ensure_ascii=False, default=str))


# ----------------------------------------------------------------------------------------------------------------------
# Parquet, and what the datasets library reads


def read_parquet(path, tally, field):
    import pyarrow.parquet  # comes with datasets
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as table:
        names = table.schema_arrow.names
        name_it = f"name the one that holds the text, --text_field=..., of {', '.join(names)}"
        if field not in names:
            raise UserError(f"{path} has no column {field}: {name_it}")
        row = 0
        rows = table.metadata.num_rows
        size = os.path.getsize(path)
        for batch in table.iter_batches(1024, columns=[field]):
            try:
                column = batch.column(field).cast(pyarrow.large_binary())  # a string column may hold broken UTF-8
            except pyarrow.ArrowNotImplementedError:
                kind = table.schema_arrow.field(field).type
                raise UserError(f"{path}: its column {field} holds {kind}, not text: {name_it}") from None
            for row, text in enumerate(column.to_pylist(), row + 1):
                if text is None:
                    tally.bad(path, row, f"{field} is null")
                else:
                    yield text.decode("utf-8", "surrogateescape"), True, size * row // rows
        if row < rows:  # pyarrow passes over some damage in silence
            raise UserError(f"{path}:{row + 1}: the file is damaged and the rest lost: fetch it again")


def import_datasets():
    """The datasets library, without torch, which it would import, and without its bars."""
    os.environ["USE_TORCH"] = "0"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import datasets
    import datasets.utils.file_utils
    from tqdm import tqdm
    tqdm.set_lock(threading.RLock())  # its bars would make one of all processes, which a killed worker leaks
    datasets.logging.set_verbosity_error()
    return datasets


def open_hub(name, config, revision):
    """The splits of a dataset of the hub, or of a local folder or file, as streams: {split: IterableDataset}."""
    datasets = import_datasets()
    given = name
    options = {}
    if os.path.isfile(name):
        given = os.path.dirname(os.path.abspath(name))
        options = {"data_files": {"train": [os.path.basename(name)]}}
    elif not os.path.isdir(name):
        options = {"revision": revision}
    return datasets.load_dataset(given, config or None, streaming=True, **options)


def open_shard(path, name, config, made):
    """The stream of hub://SPLIT/NUMBER, of the revision and the number of shards that the records keep."""
    split, number = path.removeprefix("hub://").split("/")
    try:
        return open_hub(name, config, made["revision"])[split].shard(made["shards"][split], int(number))
    except Exception as error:  # a network has errors of many kinds
        raise unreadable(name, error) from None


def read_hub(stream, name, tally, field, most):
    """The documents of a stream of datasets, at most so many (None: all)."""
    records = enumerate(itertools.islice(stream, most), 1)
    while True:
        try:
            number, record = next(records)
        except StopIteration:
            return
        except Exception as error:  # a network, or a damaged file, has errors of many kinds
            raise unreadable(name, error) from None
        try:
            text = text_of(record, field)
        except ValueError as error:
            tally.bad(name, number, error)
        else:
            yield text, True, 0


def hub_revision(name):
    from huggingface_hub import HfApi  # comes with datasets
    return HfApi().dataset_info(name).sha


def local_revision(name):
    """A hash of all files of a local dataset."""
    root = Path(name)
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    names = [f"{path.relative_to(root)} {file_sha256(path)}" for path in paths]
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
