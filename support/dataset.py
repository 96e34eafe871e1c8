"""A dataset as the programs read it: its tokenizer, its sealed manifest, its tokens, and windows of them for training.

prepare.py writes what is read here. torch is imported where a batch is made, so that prepare.py's workers do without.
"""
import difflib
import hashlib
import json
import math
import os
import re
import threading
from concurrent import futures
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable

import numpy as np

from configurator import UserError, shell, show
from support.files import file_sha256, replacing

END = "<|endoftext|>"  # the name of end-of-text


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers: ids [0, eot) are text, eot ends a document and is never made from text, not even from "<|endoftext|>".


@dataclass(frozen=True)
class Tokenizer:
    name: str
    vocab_size: int
    eot: int  # the last id
    hash: str  # sha256 of the vocabulary: equal hashes, equal meaning of every id
    encode: Callable  # str -> array of ids
    decode_bytes: Callable  # ids -> bytes; eot, and the ids that pad a model's vocabulary, have none
    encode_marked: Callable = None  # the same as encode, but END is eot

    @property
    def dtype(self):
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode_pieces(self, pieces):
        """The ids of pieces [(text, is it the last of a document)], with eot after the last ones."""
        marked = "".join(text + END * last for text, last in pieces)
        ends = sum(last for _, last in pieces)
        if self.encode_marked and marked.count(END) == ends and not long_spaces(marked):
            return self.encode_marked(marked).astype(self.dtype)  # one call for all: a tenth faster than one for each
        arrays = []
        for text, last in pieces:
            arrays += [self.encode(text), np.full(int(last), self.eot)]
        return np.concatenate(arrays).astype(self.dtype)


def load_tokenizer(name):
    """The Tokenizer "gpt2", "bytes", or of a tokenizer.json; UserError for another name, or if it cannot be loaded."""
    marked = None
    if name == "bytes":
        vocabulary = [bytes([i]) for i in range(256)]
        encode = lambda text: np.frombuffer(clean(text)[1], np.uint8)  # noqa: E731
    elif name == "gpt2":
        gpt2 = load_gpt2()
        vocabulary = [gpt2.decode_single_token_bytes(i) for i in range(gpt2.n_vocab - 1)]
        encode = lambda text: encode_gpt2(gpt2, clean(text)[0])  # noqa: E731
        marked = lambda text: gpt2.encode_to_numpy(text, allowed_special={END})  # noqa: E731
    elif name.endswith(".json"):
        vocabulary, encode = load_tokenizer_json(name)
    else:
        raise UserError(f"unknown tokenizer {name!r}: it must be gpt2, bytes, or the path of a tokenizer.json")
    eot = len(vocabulary)
    vocabulary.append(END.encode())
    digest = hashlib.sha256(b"".join(len(token).to_bytes(4, "little") + token for token in vocabulary)).hexdigest()

    def decode_bytes(ids):
        return b"".join(vocabulary[i] for i in ids if i < eot)
    return Tokenizer(name, eot + 1, eot, digest, encode, decode_bytes, marked)


def load_gpt2():
    import tiktoken
    try:
        return within(20, lambda: tiktoken.get_encoding("gpt2"))
    except Exception as error:  # requests', the file system's, a damaged cache's
        raise UserError("the gpt2 vocabulary can neither be found nor downloaded: set TIKTOKEN_CACHE_DIR to a folder "
                        f"that holds it, or prepare with --tokenizer=bytes ({type(error).__name__})") from None


SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # what \s is to tiktoken
LONG_SPACE = re.compile(SPACE + "{1000,}")
SAMPLED_SPACE = re.compile(SPACE + "{15}")


def long_spaces(text):
    """The spans of white space that are long for tiktoken's regular expression: of 1,000 its time per character is ten
    times that of words, of 10,000 two hundred times, of 1,000,000 its stack overflows. Every 60th character is looked
    at first, since to look at all takes a tenth of the tokenizer's time: any such span has 15 of them."""
    if not SAMPLED_SPACE.search(text[::60]):
        return []
    return [match.span() for match in LONG_SPACE.finditer(text)]


def encode_gpt2(gpt2, text):
    """The ids of a text. GPT-2's pattern makes one word of a span of white space, but for its last character where
    another word follows; such a word goes past the regular expression straight to the merges."""
    parts = []
    done = 0
    for first, end in long_spaces(text):
        last = end if end == len(text) else end - 1
        parts.append(gpt2.encode_to_numpy(text[done:first], disallowed_special=()))
        parts.append(gpt2._encode_single_piece(text[first:last]))
        done = last
    # encode_to_numpy saves the detour over a list of ints; disallowed_special=() lets END be text
    rest = gpt2.encode_to_numpy(text[done:], disallowed_special=())
    return np.concatenate([*parts, rest]).astype(rest.dtype) if parts else rest


def load_tokenizer_json(path):
    """The bytes of each token of a tokenizer.json, and str -> ids. end-of-text is always a new id after them."""
    try:
        from tokenizers import Tokenizer as Json
        content = json.loads(Path(path).read_bytes())
        decoder = json.dumps(content.get("decoder"))
        tokenizer = Json.from_str(json.dumps(content))
    except ImportError:
        raise UserError(f"to read {path}: pip install tokenizers") from None
    except Exception as error:  # tokenizers raises a bare Exception
        raise UserError(f"{path} cannot be read as a tokenizer.json ({getattr(error, 'strerror', None) or error}): "
                        "give the path of the file that tokenizers' save() wrote") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.get_added_tokens_decoder()
    tokens = [ids.get(i, "") for i in range(max(ids, default=-1) + 1)]
    vocabulary = [token.encode() if i in added else token_bytes(token, decoder) for i, token in enumerate(tokens)]
    return vocabulary, lambda text: np.array(tokenizer.encode(clean(text)[0], add_special_tokens=False).ids, np.uint32)


@lru_cache
def byte_of_character():
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in printable]
    return {chr(i): i for i in printable} | {chr(256 + n): i for n, i in enumerate(others)}


def token_bytes(token, decoder):
    """The bytes that a token of a tokenizer.json with this decoder stands for."""
    alphabet = byte_of_character()
    if "ByteLevel" in decoder and all(c in alphabet for c in token):
        return bytes(alphabet[c] for c in token)
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(byte[1])
    if "WordPiece" in decoder:
        return (token[2:] if token.startswith("##") else f" {token}").encode()
    return token.replace("\u2581", " ").encode()


def clean(text):
    """(text, its UTF-8): lone surrogates, which JSON can write and UTF-8 cannot, become U+FFFD as in tiktoken."""
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text, text.encode()


def within(seconds, call):
    """call(), or a TimeoutError: some network clients wait and retry for minutes, which looks like a hang."""
    answer = futures.Future()

    def attempt():
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=attempt, daemon=True).start()
    return answer.result(seconds)


def tokenizer_id(data):
    return f"{data['tokenizer']}:{data['tokenizer_hash']}"


# ----------------------------------------------------------------------------------------------------------------------
# The sealed files of a dataset, which know when they have rotted


def seal(content):
    """The bytes of a .json file that ends with the checksum of the rest."""
    checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"checksum": checksum}, indent=1).encode() + b"\n"


def write_sealed(path, content):
    with replacing(path) as temporary:
        temporary.write_bytes(seal(content))


def read_sealed(path):
    """The content of a file that write_sealed made; UserError if it differs from that in any bit."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        content = unseal(path.read_bytes())
        check_content(content)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): do you have permission?") from None
    except ValueError as error:
        problem = f"{path} is damaged or of another version ({error})"
        raise UserError(f"{problem}: {remake(path.parent, problem)}") from None
    return content


def unseal(data):
    """The content of which seal() made these bytes; ValueError if it did not."""
    try:
        content = json.loads(data)
        whole = type(content) is dict and content.pop("checksum", None) and seal(content) == data
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not whole:
        raise ValueError("its checksum does not fit")
    return content


TOKENIZERS = {  # hash: (name, vocab_size); of other vocabularies only the file knows
    "c8652c242d0cd3b98b3c82d4aa53d102c8ccae44dc16854240715e4e32d8b038": ("bytes", 257),
    "a5623714bcf19049eb0fd78df19b6daa1e61ac435b86a5deae767768e7fcdc3d": ("gpt2", 50257),
}
BIN = re.compile(r"(train|val)[A-Za-z0-9_-]*\.bin")  # the names of token files; no folders


def check_content(content):
    """ValueError where a record or manifest, whose checksum anyone can make, says what prepare.py never writes."""
    check_number(content, "version", 1, 1)
    check_number(content, "vocab_size", 1, 2**31)
    if field(content, "dtype", str) not in ("uint16", "uint32"):
        raise ValueError(f"dtype: {content['dtype']}")
    tokenizer = field(content, "tokenizer", str)
    known = TOKENIZERS.get(field(content, "tokenizer_hash", str))
    if known and known != (tokenizer, content["vocab_size"]) or not known and not tokenizer.endswith(".json"):
        raise ValueError(f"tokenizer: {tokenizer}, which its hash is not of")
    if content.get("origin") == "hub":
        field(content, "revision", str)
        for split in field(content, "shards", dict):
            check_number(content["shards"], split, 0, 2**31)
    for name in field(content, "files", dict):
        check_entry(name, field(content["files"], name, dict))


def check_entry(name, entry):
    """As check_content, for what it says of one token file."""
    match = BIN.fullmatch(name)
    if not match or match[1] != field(entry, "split", str):
        raise ValueError(f"a file {name!r} of split {entry.get('split')!r}")
    field(entry, "source", str, "")
    for key in ("tokens", "documents", "bytes", *entry.keys() & {"bad", "empty", "repaired", "nul", "source_bytes"}):
        check_number(entry, key, 0, 2**53)
    if entry["tokens"] and not entry["bytes"]:
        raise ValueError(f"{entry['tokens']} tokens without text")
    if not re.fullmatch("[0-9a-f]{64}", field(entry, "sha256", str)):
        raise ValueError(f"sha256: {entry['sha256']}")
    if not all(type(example) is str for example in field(entry, "examples", list, [])):
        raise ValueError("examples that are not text")


def field(content, key, kind, default=None):
    """content[key]; ValueError, in the words of JSON, where it is missing or of another kind."""
    value = content.get(key, default)
    if value is None and key not in content:
        raise ValueError(f"no {key}")
    if type(value) is not kind:
        raise ValueError(f"{key}: {show(value, json.dumps)}")
    return value


def check_number(content, key, low, high):
    if not low <= field(content, key, int) <= high:
        raise ValueError(f"{key}: {content[key]}")


def bin_problems(folder, content, whole=False):
    """Yields what is wrong with the .bin files of a record or manifest; whole: by all their bytes, at about 1 GB/s."""
    itemsize = np.dtype(content["dtype"]).itemsize
    for name, entry in content["files"].items():
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != entry["tokens"] * itemsize:
            yield f"{path} has {path.stat().st_size:,} bytes instead of {entry['tokens'] * itemsize:,}"
        elif whole and file_sha256(path) != entry["sha256"]:
            yield f"{path} has changed since it was made: its sha256 does not fit"


def remake(folder, problem=""):
    """What makes a dataset whole again, and first the shard of C4 in `problem`, maybe of another machine's share."""
    flags = "" if folder.name in ("c4", "stdlib") else " --data_files=... (or --hub=...)"
    shard = re.search(r"\btrain-(\d{5})\.(bin|json)", problem) if folder.name == "c4" else None
    if shard:
        flags = f" --shards={int(shard[1])}:{int(shard[1]) + 1}"
    elif folder.name == "c4" and not problem:
        flags = " --shards=8"  # as README has it for 20,000 steps
    again = "" if shard or not folder.exists() else "repeat the command that made it, which keeps what is whole, or "
    return f"{again}run python prepare.py {flags_of(folder, flags)}"


def flags_of(folder, others=""):
    """What names a dataset on a command line, and other flags after its name."""
    place = "" if str(folder.parent) == "data" else " " + shell(f"--data_dir={folder.parent}")
    return shell(f"--dataset={folder.name}") + others + place


def meant(folder):
    """The dataset that a folder which is not there may stand for, or None: data/d for --dataset=data/d, or one beside
    it whose name is near."""
    beside = [path.parent.name for path in folder.parent.glob("*/manifest.json")]
    paths = [Path(*folder.parts[i:]) for i in range(1, len(folder.parts) - 1)]
    paths += [folder.with_name(name) for name in difflib.get_close_matches(folder.name, beside, 1)]
    return next((path for path in paths if (path / "manifest.json").is_file()), None)


def read_manifest(folder):
    """The manifest of a dataset, checked against itself and the sizes of its files; UserError if anything is amiss."""
    folder = Path(folder)
    if not folder.exists() and (near := meant(folder)):
        raise UserError(f"there is no dataset {folder}, but there is {near}: use {flags_of(near)}")
    if not (folder / "manifest.json").exists():
        raise UserError(f"there is no finished dataset in {folder}: {remake(folder)}")
    manifest = read_sealed(folder / "manifest.json")
    for problem in bin_problems(folder, manifest):
        raise UserError(f"{problem}: {remake(folder, problem)}")
    check_not_empty(folder, manifest)
    return manifest


def open_split(folder, manifest, split):
    """The files of a split ("train" or "val") as read-only arrays of ids; the disk is read where they are used."""
    return [TokenFile(Path(folder, name), manifest["dtype"]) for name, entry in manifest["files"].items()
            if entry["split"] == split and entry["tokens"]]


class TokenFile:
    """The ids of a .bin, read where they are sliced. It is open only while it is read: a memmap keeps a descriptor, and
    the whole of C4 has 1,032 files, where `ulimit -n` is 1,024, or 256 on a Mac."""

    def __init__(self, path, dtype):
        self.path = Path(path)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.made = self.stat()
        self.size = self.made[0] // self.dtype.itemsize

    def stat(self):
        stat = os.stat(self.path)
        return stat.st_size, stat.st_mtime_ns

    def __len__(self):
        return self.size

    def __getitem__(self, part):
        start, stop, _ = part.indices(self.size)
        try:
            with open(self.path, "rb") as file:
                file.seek(start * self.dtype.itemsize)
                data = file.read(max(0, stop - start) * self.dtype.itemsize)
            if self.stat() == self.made:
                return np.frombuffer(data, self.dtype)
            problem = "changed while it was being read"
        except OSError as error:
            problem = f"changed while it was being read ({error.strerror})"
        raise UserError(f"{self.path} {problem}: restore it, then resume")


class Joined:
    """Token files that read as one."""

    def __init__(self, files):
        self.files = files
        self.ends = np.cumsum([len(file) for file in files], dtype=np.int64)

    def __len__(self):
        return int(self.ends[-1]) if self.files else 0

    def __getitem__(self, part):
        start, stop, _ = part.indices(len(self))
        first = np.searchsorted(self.ends, start, side="right")
        last = np.searchsorted(self.ends, stop - 1, side="right")
        pieces = []
        for i in range(first, last + 1):
            begin = int(self.ends[i]) - len(self.files[i])
            pieces.append(self.files[i][max(0, start - begin):stop - begin])
        return np.concatenate(pieces)


class NoDocuments(UserError):
    pass


def check_not_empty(folder, manifest):
    entries = manifest["files"].values()
    for split, fix in (("train", "look into its source files"), ("val", "raise --val_fraction, or give more text")):
        if not any(entry["documents"] for entry in entries if entry["split"] == split):
            skipped = [example for entry in entries for example in entry.get("examples", [])]
            empty = sum(entry.get("empty", 0) for entry in entries)
            skipped = "; ".join(skipped + [f"empty documents: {empty:,}"] * bool(empty))
            raise NoDocuments(f"{folder} has no {split} documents: {fix}" + f" (skipped: {skipped})" * bool(skipped))


# ----------------------------------------------------------------------------------------------------------------------
# Tokens for training


class Windows:
    """The token files cut into windows of seq_len + 1 tokens, in an order that is a function of (seed, number) alone.

    An epoch visits every window once. Its order is i -> (a i + b) mod M with a near 0.618 M: a permutation that takes
    no memory however large the data, and spreads any run of windows, so any batch, evenly over the data. Each epoch
    starts elsewhere (b), and cuts each file at another offset. Files too short for a window are read as one file.
    """

    def __init__(self, files, seq_len, seed):
        self.seq_len = seq_len
        self.seed = seed
        short = Joined([file for file in files if len(file) <= seq_len])
        self.files = [file for file in files if len(file) > seq_len] + [short] * (len(short) > seq_len)
        if not self.files:
            raise UserError(f"{files[0].path} and the other files of its split have {len(short)} tokens, too short for "
                            "one sequence: prepare more text, or use --seq_len below that")
        self.counts = [max(1, (len(f) - 1) // seq_len - 1) for f in self.files]   # all offsets leave this many
        self.ends = np.cumsum(self.counts)
        self.total = int(self.ends[-1])
        self.tokens = self.total * seq_len                                        # in an epoch

    @lru_cache(maxsize=2)
    def epoch(self, epoch):
        rng = np.random.default_rng((self.seed, epoch))
        strides = range(max(1, round(0.618 * self.total)), 2 * self.total + 1)
        stride = next(a for a in strides if math.gcd(a, self.total) == 1)
        offsets = [int(rng.integers(min(self.seq_len, len(f) - n * self.seq_len)))
                   for f, n in zip(self.files, self.counts)]
        return stride, int(rng.integers(self.total)), offsets

    def __getitem__(self, number):
        epoch, i = divmod(number, self.total)
        stride, first, offsets = self.epoch(epoch)
        window = (stride * i + first) % self.total
        file = int(np.searchsorted(self.ends, window, side="right"))
        start = offsets[file] + self.seq_len * (window - int(self.ends[file]) + self.counts[file])
        return self.files[file][start:start + self.seq_len + 1]

    def batch(self, numbers, vocab_size, device):
        """(inputs, targets), both (len(numbers), seq_len) int64 on the device."""
        import torch
        tokens = np.stack([self[n] for n in numbers]).astype(np.int64)
        if tokens.max() >= vocab_size:
            raise UserError(f"token {tokens.max()} in the data is not below vocab_size={vocab_size}: "
                            "the files do not fit their manifest; run prepare.py again")
        tokens = torch.from_numpy(tokens)
        if device.type == "cuda":
            tokens = tokens.pin_memory().to(device, non_blocking=True)
        tokens = tokens.to(device)
        return tokens[:, :-1], tokens[:, 1:]


class Dataset:
    """A folder that prepare.py wrote, found whole: up to 1 GB in every byte, which takes a second."""

    def __init__(self, folder):
        self.manifest = read_manifest(folder)
        small = sum(path.stat().st_size for path in folder.glob("*.bin")) <= 2**30
        for problem in bin_problems(folder, self.manifest, whole=True) if small else ():
            raise UserError(f"{problem}: {remake(folder, problem)}")
        self.train, self.val = (open_split(folder, self.manifest, split) for split in ("train", "val"))

    @property
    def fingerprint(self):
        """What must stay the same for a run to resume with this data."""
        files = {name: file["sha256"] for name, file in sorted(self.manifest["files"].items())}
        return {key: self.manifest[key] for key in ("tokenizer", "tokenizer_hash", "vocab_size")} | {
            "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}

    def give_vocabulary(self, model_config):
        """Sets the model's vocabulary to that of the text, unless it was said to have another."""
        tokenizer, vocab_size = tokenizer_id(self.manifest), self.manifest["vocab_size"]
        held = self.manifest["tokenizer"]
        if model_config.tokenizer not in ("", held, tokenizer):
            name = model_config.tokenizer.rpartition(":")[0] or model_config.tokenizer
            held = "those of another file of that name" if held == name else f"{held} tokens"
            raise UserError(f"the model knows {name} tokens, and the dataset holds {held}: prepare it again with the "
                            "model's --tokenizer")
        if model_config.vocab_size not in (type(model_config).vocab_size, vocab_size):
            raise UserError(f"vocab_size={model_config.vocab_size} is not that of the dataset, {vocab_size}: "
                            "leave it out")
        model_config.vocab_size = vocab_size
        model_config.tokenizer = tokenizer
