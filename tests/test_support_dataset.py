"""support/dataset.py: tokens are those of the text, damage is found, and windows of them depend on (seed, number) alone."""
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from configurator import UserError
from model import ModelConfig
from support import dataset
from support.dataset import TokenFile, Windows
from test_prepare import BYTES, HARD_TEXTS, LONE, contents, flip, gpt2, run, write_c4  # noqa: F401 (a fixture)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_encoding_then_decoding_gives_the_text_back(name, request):
    tokenizer = request.getfixturevalue("gpt2") if name == "gpt2" else BYTES
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes([*ids, tokenizer.eot]).decode() == dataset.clean(text)[0]
        assert all(0 <= i < tokenizer.eot for i in ids), "text made an end-of-text"
    assert dataset.clean(LONE)[0] == "\ufffd lone \ufffd🙂"


def test_gpt2_ids_are_those_of_tiktoken(gpt2):
    import tiktoken
    assert (gpt2.vocab_size, gpt2.eot, gpt2.dtype) == (50257, 50256, np.dtype("<u2"))
    for text in HARD_TEXTS:
        assert list(gpt2.encode(text)) == tiktoken.get_encoding("gpt2").encode_ordinary(text)


DOCUMENT = st.text(" \na.é") | st.sampled_from([dataset.END, "<|end", dataset.END[1:], ">", "\n "])


@given(st.lists(DOCUMENT), st.booleans())
@settings(max_examples=300)
def test_documents_encoded_at_once_have_the_ids_of_each(gpt2, texts, ended):
    pieces = [(text, True) for text in texts] + [("the first piece of one more", False)] * (not ended)
    for tokenizer in (gpt2, BYTES):
        one_by_one = [i for text, last in pieces for i in [*tokenizer.encode(text), *[tokenizer.eot] * last]]
        assert not pieces or list(tokenizer.encode_pieces(pieces)) == one_by_one


def test_a_megabyte_of_one_letter_is_encoded_about_as_fast_as_words(gpt2):
    def seconds(text):
        begin = time.process_time()
        return len(gpt2.encode(text)), time.process_time() - begin
    letters, seconds_of_letters = seconds("a" * 1_000_000)
    _, seconds_of_words = seconds("a word " * 150_000)
    assert letters == 250_000 and seconds_of_letters < 100 * seconds_of_words
    assert len(BYTES.encode("a" * 1_000_000)) == 1_000_000


@given(st.lists(st.tuples(st.sampled_from([" ", "\n", " \n", "\t ", "\u2003", "\r\n"]), st.integers(9_000, 12_000)), min_size=1,
                max_size=3), st.sampled_from(["", "a", "word ", "\x1c", "5", "'s"]), st.sampled_from(["", "b", " x", "?"]))
@settings(max_examples=50)
def test_long_white_space_has_the_tokens_that_tiktoken_would_give_it(gpt2, spans, before, after):
    import tiktoken
    text = before + after.join(space * (length // len(space)) for space, length in spans) + after
    ids = list(gpt2.encode(text))
    assert ids == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert list(gpt2.encode_pieces([(text, True), (text, True)])) == 2 * [*ids, gpt2.eot]


def test_a_million_white_spaces_are_encoded(gpt2):
    text = "a" + " " * 1_000_000 + "b"
    assert gpt2.decode_bytes(gpt2.encode(text)).decode() == text
    assert gpt2.decode_bytes(gpt2.encode_pieces([(text, True)])[:-1]).decode() == text


def test_a_vocabulary_beyond_65536_takes_four_bytes_per_id():
    sizes = {n: dataset.Tokenizer("x", n, n - 1, "", None, None).dtype for n in (65536, 65537)}
    assert sizes == {65536: np.dtype("<u2"), 65537: np.dtype("<u4")}


def test_tokenizer_hashes_are_pinned(gpt2):
    assert (BYTES.vocab_size, BYTES.eot) == (257, 256)
    assert gpt2.hash.startswith("a5623714bcf1") and BYTES.hash != gpt2.hash


# ----------------------------------------------------------------------------------------------------------------------
# Manifests


CHANGES = [("dtype", "O"), ("dtype", "float32"), ("dtype", "<u2"), ("dtype", 3), ("vocab_size", 0), ("vocab_size", True),
           ("vocab_size", 2.0), ("vocab_size", 10**30), ("tokenizer", None), ("tokenizer", "gpt2"),
           ("tokenizer", "mine.json"), ("tokenizer", "mine"), ("tokenizer_hash", "0" * 64), ("vocab_size", 258), ("files", []), ("tokens", -1), ("tokens", 1.5),
           ("tokens", True), ("documents", "1"), ("bytes", 10**30), ("bytes", 0), ("version", True), ("split", "val"),
           ("sha256", "x"), ("sha256", 7), ("examples", [1]), *[("name", name) for name in ("../train-00000.bin", "/etc/passwd", "train-00000.txt",
                                                            "train/../x.bin", "train-0\0.bin", "x.bin", "")]]


@pytest.mark.parametrize("key, value", CHANGES)
def test_a_manifest_with_a_good_checksum_is_damaged_where_it_says_what_prepare_never_writes(tmp_path, key, value):
    run(tmp_path, write_c4(tmp_path, shards=1, documents=3))
    path = tmp_path / "data/c4/manifest.json"
    manifest = dataset.read_manifest(path.parent)
    entry = manifest["files"]["train-00000.bin"]
    if key == "name":
        manifest["files"][value] = entry
    else:
        (manifest if key in manifest else entry)[key] = value
    dataset.write_sealed(path, manifest)
    with pytest.raises(UserError, match="manifest.json is damaged"):
        dataset.read_manifest(path.parent)


def test_what_is_missing_or_null_in_a_manifest_is_said_in_the_words_of_json(tmp_path):
    run(tmp_path, write_c4(tmp_path, shards=1, documents=3))
    good = (tmp_path / "data/c4/manifest.json").read_bytes()
    bad = tmp_path / "manifest.json"
    keys = [("files",), ("dtype",), ("tokenizer",), ("tokenizer_hash",), ("version",), ("vocab_size",)]
    keys += [("files", "train-00000.bin", key) for key in ("split", "tokens", "documents", "bytes", "sha256", "source",
                                                           "source_bytes")]
    for *parents, key in keys:
        for value in (None, [1], "missing"):
            manifest = json.loads(good)
            parent = manifest
            for name in parents:
                parent = parent[name]
            parent[key] = value
            said = f"({key}: {json.dumps(value)})"
            if value == "missing":
                if "source" in key:                                               # training does without
                    continue
                del parent[key]
                said = f"(no {key})"
            del manifest["checksum"]
            bad.write_bytes(dataset.seal(manifest))
            with pytest.raises(UserError, match=re.escape(f"{bad} is damaged or of another version {said}: ")):
                dataset.read_sealed(bad)


@pytest.mark.parametrize("text, words", [
    ("", "it is not JSON"), ("[]", "its checksum does not fit"), ("[" * 100_000, "it is not JSON"),
    ('{"a": ' * 500 + "1" + "}" * 500, "it is not JSON|its checksum does not fit"), ("null", "its checksum does not fit")])
def test_a_manifest_that_is_no_json_of_ours_is_said_in_its_own_words(tmp_path, text, words):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=rf"manifest.json is damaged or of another version .({words}).: "):
        dataset.read_sealed(tmp_path / "manifest.json")


def test_a_folder_or_a_pipe_where_the_manifest_should_be_is_damage(tmp_path):
    for make in (Path.mkdir, os.mkfifo):
        make(tmp_path / "manifest.json")
        with pytest.raises(UserError, match="manifest.json is damaged .*it is not a file"):
            dataset.read_manifest(tmp_path)
        (tmp_path / "manifest.json").rmdir() if make is Path.mkdir else (tmp_path / "manifest.json").unlink()


def test_a_manifest_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").touch()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    with pytest.raises(UserError, match="cannot read .*manifest.json .Permission denied"):
        dataset.read_manifest(tmp_path)


def test_every_flipped_bit_of_the_manifest_is_found(tmp_path):
    flag = write_c4(tmp_path, shards=1, documents=3)
    run(tmp_path, flag)
    path = tmp_path / "data/c4/manifest.json"
    for position in range(path.stat().st_size):
        flip(path, position, 1 << position % 8)
        with pytest.raises(UserError, match="manifest.json is damaged"):
            dataset.read_manifest(path.parent)
        flip(path, position, 1 << position % 8)
    dataset.read_manifest(path.parent)


@pytest.mark.parametrize("name, flags", [("data/novel", "--dataset=novel"), ("novels", "--dataset=novel"),
                                         ("other/my text", "'--dataset=my text' --data_dir=other")])
def test_a_dataset_that_is_not_there_is_answered_with_the_one_that_may_be_meant(tmp_path, monkeypatch, name, flags):
    monkeypatch.chdir(tmp_path)
    for folder in ("data/novel", "other/my text"):
        Path(folder).mkdir(parents=True)
        Path(folder, "manifest.json").touch()
    with pytest.raises(UserError, match=rf"there is no dataset data/{name}, but there is .*: use {flags}$"):
        dataset.read_manifest(Path("data", name))
    with pytest.raises(UserError, match="no finished dataset in data/c4: run python prepare.py --dataset=c4"):
        dataset.read_manifest(Path("data/c4"))


def test_read_manifest_refuses_what_cannot_be_trained_on(tmp_path):
    flag, folder = write_c4(tmp_path, shards=1), tmp_path / "data/c4"
    with pytest.raises(UserError, match="no finished dataset .*: run python prepare.py --dataset=c4 --shards=8 --data_dir="):
        dataset.read_manifest(folder)
    folder.mkdir(parents=True)                                                    # as prepare.py does at its start
    with pytest.raises(UserError, match="repeat the command that made it, which keeps what is whole, or run python"):
        dataset.read_manifest(folder)
    run(tmp_path, flag)
    before = contents(folder)
    for change, words in ((lambda path: path.unlink(), "missing"), (lambda path: path.write_bytes(b"12"), "2 bytes"),
                          (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes instead of")):
        change(folder / "train-00000.bin")
        with pytest.raises(UserError, match=words):
            dataset.read_manifest(folder)
        (folder / "train-00000.bin").write_bytes(before["train-00000.bin"])
    for text in (b"", b"{}", b"[]", b"null", b"{", b"\xff", before["manifest.json"][:-9], b"[" * 100_000):
        (folder / "manifest.json").write_bytes(text)
        with pytest.raises(UserError, match="damaged"):
            dataset.read_manifest(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("tokenizer, held", [("gpt2:a5623", "bytes tokens"), ("gpt2", "bytes tokens"),
                                             ("bytes:c8653", "those of another file of that name")])
def test_a_model_of_another_tokenizer_is_refused_by_names_that_people_know(tokenizer, held):
    data = SimpleNamespace(manifest={"tokenizer": "bytes", "tokenizer_hash": "c8652", "vocab_size": 257})
    name = tokenizer.split(":")[0]
    with pytest.raises(UserError, match=f"^the model knows {name} tokens, and the dataset holds {held}: prepare it"):
        dataset.Dataset.give_vocabulary(data, ModelConfig(tokenizer=tokenizer))
    for own in ("", "bytes", "bytes:c8652"):
        config = ModelConfig(tokenizer=own)
        dataset.Dataset.give_vocabulary(data, config)
        assert (config.vocab_size, config.tokenizer) == (257, "bytes:c8652")


def token_files(folder, *sizes):
    """Files whose token at a position names the file and the position."""
    for i, size in enumerate(sizes):
        np.arange(size, dtype="<u2").__iadd__(np.uint16(1000 * i % 65536)).tofile(folder / f"{i}.bin")
    return [TokenFile(folder / f"{i}.bin", "uint16") for i in range(len(sizes))]


@pytest.mark.parametrize("sizes", [(17,), (32,), (33,), (500,), (17, 100, 16, 999)])
def test_an_epoch_visits_every_window_once_and_no_window_crosses_a_file(tmp_path, sizes):
    windows = Windows(token_files(tmp_path, *sizes), 16, seed=1)
    for epoch in range(3):
        starts = []
        for number in range(epoch * windows.total, (epoch + 1) * windows.total):
            assert list(windows[number]) == list(range(windows[number][0], windows[number][0] + 17))
            starts.append(int(windows[number][0]))
        gaps = np.diff(sorted(starts))
        assert len(set(starts)) == windows.total and all(gap >= 16 for gap in gaps)
    assert windows.total >= sum(max(1, size // 16 - 2) for size in sizes if size > 16)


def test_every_token_of_files_too_short_for_a_window_is_trained_on(tmp_path):
    sizes = [16, 3, 100, 16, 9, 1, 12, 16, 16, 8]
    windows = Windows(token_files(tmp_path, *sizes), 16, seed=1)
    assert windows.tokens == 16 * windows.total <= sum(sizes)
    seen = {int(token) for number in range(100 * windows.total) for token in windows[number]}
    assert seen >= {1000 * i + position for i in (0, 1, 3, 4, 5, 6, 7, 8) for position in range(sizes[i])}
    with pytest.raises(UserError, match="15 tokens, too short for one sequence"):
        Windows(token_files(tmp_path, 7, 8), 16, seed=1)


def test_files_are_read_whatever_their_number_and_the_limit_of_open_files(tmp_path):
    import resource
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    token_files(tmp_path, *[40] * 200)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 2, limits[1]))
        windows = Windows([TokenFile(tmp_path / f"{i}.bin", "uint16") for i in range(200)], 16, seed=1)
        assert windows.total == 200 and all(len(windows[number]) == 17 for number in range(200))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_file_that_changes_under_a_run_is_named(tmp_path):
    windows = Windows(token_files(tmp_path, 500), 16, seed=1)
    windows[0]
    np.arange(500, dtype="<u2").tofile(tmp_path / "0.bin")
    for change in (lambda: None, (tmp_path / "0.bin").unlink):
        change()
        with pytest.raises(UserError, match="0.bin changed while it was being read.*: restore it, then resume"):
            windows[1]


def test_epochs_cut_a_file_at_every_offset_and_start_elsewhere(tmp_path):
    windows = Windows(token_files(tmp_path, 500), 16, seed=1)
    firsts = [int(windows[epoch * windows.total][0]) for epoch in range(200)]
    assert {first % 16 for first in firsts} == set(range(16)) and len(set(firsts)) > 100


def test_a_batch_is_a_function_of_seed_and_step_alone(tmp_path):
    files = token_files(tmp_path, 500, 300)
    def batch(seed, numbers, windows=None):
        return (windows or Windows(files, 16, seed)).batch(numbers, 2000, torch.device("cpu"))
    used = Windows(files, 16, 1)
    [used[number] for number in (500, 3, 77)]
    x, y = batch(1, range(80, 88))
    assert torch.equal(x, batch(1, range(80, 88), used)[0])
    assert torch.equal(x, torch.cat([batch(1, range(80, 82))[0], batch(1, range(82, 88))[0]]))
    assert not torch.equal(x, batch(2, range(80, 88))[0]) and not torch.equal(x, batch(1, range(88, 96))[0])
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y, x + 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_reading_batches_for_10000_steps_takes_no_more_memory(tmp_path):
    """Of this process's own: pages of the files that are still in memory are the system's, to take back at any time."""
    def own():
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    for i in range(2):
        with open(tmp_path / f"{i}.bin", "wb") as file:
            file.truncate(2 * 10**8)
    windows = Windows([TokenFile(tmp_path / f"{i}.bin", "uint16") for i in range(2)], 256, seed=1)
    for step in range(10_000):
        windows.batch(range(4 * step, 4 * step + 4), 2, torch.device("cpu"))
        if step == 500:
            before = own()
    assert own() - before < 2_000                                                 # the batches are 82,000 kB
