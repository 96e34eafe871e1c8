"""A dataset as the programs read it: its tokenizer, its sealed manifest, its tokens, and windows of them for training.

prepare.py writes what is read here. torch is imported where a batch is made, so that prepare.py's workers do without.
"""
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

from configurator import UserError
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
        if self.encode_marked and marked.count(END) == sum(last for _, last in pieces):
            return self.encode_marked(marked).astype(self.dtype)  # one call for all: a tenth faster than one for each
        ends = [np.full(int(last), self.eot) for _, last in pieces]
        arrays = [array for (text, _), end in zip(pieces, ends) for array in (self.encode(text), end)]
        return np.concatenate(arrays).astype(self.dtype)


def load_tokenizer(name):
    """The Tokenizer "gpt2" or "bytes"; UserError for another name, or if gpt2 is neither here nor reachable."""
    marked = None
    if name == "bytes":
        vocabulary = [*(bytes([i]) for i in range(256)), END.encode()]
        encode, decode = lambda text: np.frombuffer(clean(text)[1], np.uint8), bytes
    elif name == "gpt2":
        gpt2 = load_gpt2()
        vocabulary = [gpt2.decode_single_token_bytes(i) for i in range(gpt2.n_vocab)]
        # encode_to_numpy saves the detour over a list of ints; disallowed_special=() lets END be text
        encode, decode = lambda text: gpt2.encode_to_numpy(clean(text)[0], disallowed_special=()), gpt2.decode_bytes
        marked = lambda text: gpt2.encode_to_numpy(text, allowed_special={END})  # noqa: E731
    else:
        raise UserError(f"unknown tokenizer {name!r}: it must be gpt2 or bytes")
    eot = len(vocabulary) - 1
    digest = hashlib.sha256(b"".join(len(token).to_bytes(4, "little") + token for token in vocabulary)).hexdigest()
    return Tokenizer(name, eot + 1, eot, digest, encode, lambda ids: decode([int(i) for i in ids if i < eot]), marked)


def load_gpt2():
    import tiktoken
    try:
        return within(20, lambda: tiktoken.get_encoding("gpt2"))
    except Exception as error:  # requests', the file system's, a damaged cache's
        raise UserError("the gpt2 vocabulary can neither be found nor downloaded: set TIKTOKEN_CACHE_DIR to a folder "
                        f"that holds it, or prepare with --tokenizer=bytes ({type(error).__name__})") from None


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
        data = path.read_bytes()
        content = json.loads(data)
        del content["checksum"]
        if seal(content) != data or content["version"] != 1:
            raise ValueError("its checksum does not fit")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        problem = f"{path} is damaged or of another version ({error})"
        raise UserError(f"{problem}: {remake(path.parent, problem)}") from None
    return content


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
    flags = "" if folder.name in ("c4", "stdlib") else " --data_files=..."
    if folder.name == "c4" and (shard := re.search(r"\btrain-(\d{5})\.(bin|json)", problem)):
        flags = f" --shards={int(shard[1])}:{int(shard[1]) + 1}"
    flags += "" if str(folder.parent) == "data" else f" --data_dir={folder.parent}"
    return f"run python prepare.py --dataset={folder.name}{flags} (the command that made it keeps what is whole)"


def read_manifest(folder):
    """The manifest of a dataset, checked against itself and the sizes of its files; UserError if anything is amiss."""
    folder = Path(folder)
    if not (folder / "manifest.json").exists():
        raise UserError(f"there is no finished dataset in {folder}: {remake(folder)}")
    manifest = read_sealed(folder / "manifest.json")
    for problem in bin_problems(folder, manifest):
        raise UserError(f"{problem}: {remake(folder, problem)}")
    check_not_empty(folder, manifest)
    return manifest


def open_split(folder, manifest, split):
    """The files of a split ("train" or "val") as read-only arrays of ids; the disk is read where they are used."""
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    return [np.memmap(Path(folder, name), dtype, "r") for name, entry in manifest["files"].items()
            if entry["split"] == split and entry["tokens"]]


class NoDocuments(UserError):
    pass


def check_not_empty(folder, manifest):
    entries = manifest["files"].values()
    for split, mend in (("train", "look into its source files"), ("val", "raise --val_fraction")):
        if not any(entry["documents"] for entry in entries if entry["split"] == split):
            skipped = "; ".join(example for entry in entries for example in entry.get("examples", []))
            raise NoDocuments(f"{folder} has no {split} documents: {mend}" + f" (skipped: {skipped})" * bool(skipped))


# ----------------------------------------------------------------------------------------------------------------------
# Tokens for training


class Windows:
    """The token files cut into windows of seq_len + 1 tokens, in an order that is a function of (seed, number) alone.

    An epoch visits every window once. Its order is i -> (a i + b) mod M with a near 0.618 M: a permutation that takes
    no memory however large the data, and spreads any run of windows, so any batch, evenly over the data. Each epoch
    starts elsewhere (b), and cuts each file at another offset.
    """

    def __init__(self, files, seq_len, seed):
        self.files, self.seq_len, self.seed = [f for f in files if len(f) > seq_len], seq_len, seed
        if not self.files:
            longest = max(files, key=len)
            raise UserError(f"{longest.filename}, the longest file of its split, has {len(longest)} tokens, too short "
                            f"for one sequence: prepare more text, or take --seq_len below that")
        self.counts = [max(1, (len(f) - 1) // seq_len - 1) for f in self.files]   # all offsets leave this many
        self.ends = np.cumsum(self.counts)
        self.total, self.tokens = int(self.ends[-1]), sum(map(len, files))
        self.stats = [self.stat(f) for f in self.files]

    @staticmethod
    def stat(file):
        """Size and time of the last change of what is under a file's name now, or None."""
        try:
            stat = os.stat(file.filename)
            return stat.st_size, stat.st_mtime_ns
        except OSError:
            return None

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
        if self.stat(self.files[file]) != self.stats[file]:                       # past its end: SIGBUS
            raise UserError(f"{self.files[file].filename} changed while it was being read: restore it, then resume")
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
        """What must stay the same for a run to go on with this data."""
        files = {name: file["sha256"] for name, file in sorted(self.manifest["files"].items())}
        return {key: self.manifest[key] for key in ("tokenizer", "tokenizer_hash", "vocab_size")} | {
            "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}

    def give_vocabulary(self, model_config):
        """Sets the model's vocabulary to that of the text, unless it was said to have another."""
        tokenizer, vocab_size = tokenizer_id(self.manifest), self.manifest["vocab_size"]
        if model_config.tokenizer not in ("", tokenizer):
            raise UserError(f"the model knows {model_config.tokenizer[:20]} tokens, and the dataset holds "
                            f"{tokenizer[:20]} tokens: prepare it again with the model's --tokenizer")
        if model_config.vocab_size not in (type(model_config).vocab_size, vocab_size):
            raise UserError(f"vocab_size={model_config.vocab_size} is not that of the dataset, {vocab_size}: "
                            "leave it out")
        model_config.vocab_size, model_config.tokenizer = vocab_size, tokenizer
