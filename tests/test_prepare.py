"""prepare.py: what goes in comes out, once, whole, or one line says why not."""
import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tqdm
from hypothesis import given, settings, strategies as st

import prepare
from configurator import UserError
from support import dataset, texts
from support.dataset import bin_problems, clean, open_split, read_manifest, read_sealed

PROGRAM = Path(prepare.__file__)
BYTES = prepare.load_tokenizer("bytes")
LONE = "\ud83d lone \udc00\ud83d\ude42"
HARD_TEXTS = ["", "naïve 🙂 Ünï", "a<|endoftext|>b", "NUL \0 inside", " \n\t  x\r\n", LONE, "a" * 1000, " " * 1000]


@pytest.fixture(scope="module")
def gpt2():
    try:
        return prepare.load_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(f"no gpt2 vocabulary here: {error}")


ALONE = "import sys, prepare; sys.argv[0], prepare.GROUP = 'prepare.py', 1; prepare.command(prepare.main)"


def start(folder, *flags, alone=True, **options):
    """A run of prepare.py; alone: every file is a source of its own, however small."""
    command = [sys.executable, *(["-c", ALONE] if alone else [str(PROGRAM)]), "--tokenizer=bytes", *flags]
    if alone:
        path = os.pathsep.join(filter(None, [str(PROGRAM.parent), options.get("env", os.environ).get("PYTHONPATH")]))
        options["env"] = options.get("env", os.environ) | {"PYTHONPATH": path}
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(folder, *flags, **options):
    """The summary of a run that must succeed in silence."""
    process = start(folder, *flags, **options)
    out, err = process.communicate()
    assert process.returncode == 0 and err == "", err
    return out


def refusal(folder, *flags, **options):
    """The one line of a run that must end with exit code 2."""
    process = start(folder, *flags, **options)
    out, err = process.communicate()
    assert process.returncode == 2 and out == "", (process.returncode, out, err)
    assert err.startswith("prepare.py: ") and err.count("\n") == 1, err
    return err


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def texts_of(folder, split):
    """The documents of a split, decoded again."""
    manifest = read_manifest(folder)
    tokenizer = prepare.load_tokenizer(manifest["tokenizer"])
    texts = []
    for ids in open_split(folder, manifest, split):
        assert ids[:][-1] == tokenizer.eot and not ids[:].flags.writeable
        ids = ids[:]
        ends = np.flatnonzero(ids == tokenizer.eot)
        for begin, end in zip([0, *ends + 1], ends):
            texts.append(tokenizer.decode_bytes(ids[begin:end]).decode())
    return texts


def write_jsonl(path, texts):
    data = "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_c4(folder, shards=3, documents=50):
    """Local files named as C4's; returns their flag."""
    rng = random.Random(1)
    for name in [*(f"c4-train.{i:05d}-of-{shards:05d}" for i in range(shards)), "c4-validation.00000-of-00001"]:
        words = ["cat", "déjà", "<|endoftext|>", "\n", "🙂"]
        texts = [" ".join(rng.choices(words, k=50)) for _ in range(documents)]
        write_jsonl(folder / f"{name}.json.gz", texts)
    return "--data_files=c4-*.json.gz"


def test_torch_is_never_imported(tmp_path):
    """It would cost each worker a second and 150 MB."""
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "torch.py").write_text("import os; os._exit(9)")
    run(tmp_path, "--dataset=x", "--data_files=a.txt", env=os.environ | {"PYTHONPATH": str(tmp_path)})


def test_gpt2_without_network_names_the_ways_out(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    no_network = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "HTTPS_PROXY": "http://127.0.0.1:9",
                  "https_proxy": "http://127.0.0.1:9"}
    error = refusal(tmp_path, "--dataset=x", "--data_files=a.txt", "--tokenizer=gpt2", env=no_network)
    assert "TIKTOKEN_CACHE_DIR" in error and "--tokenizer=bytes" in error and not (tmp_path / "data").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Readers: properties.

@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder for hypothesis, which wants fixtures that last."""
    return tmp_path_factory.mktemp("scratch")


def read_all(path, data):
    """(texts, number of bad records) of a file with these bytes."""
    path.write_bytes(data)
    tally = texts.Tally(10**9)
    return [text for text, _, _ in texts.read(str(path), 0, len(data), tally)], tally.counts["bad"]


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)


LINE = (st.binary(max_size=40) | st.just(b"[" * 100_000) | st.builds(lambda value: json.dumps(value).encode(), JSON)
        | st.builds(lambda value: json.dumps({"text": value}).encode(), JSON))


@given(st.lists(LINE))
def test_every_line_is_a_text_or_is_counted(scratch, lines):
    data = b"\n".join(lines)
    try:
        texts, bad = read_all(scratch / "lines.jsonl", data)
    except UserError as error:
        assert re.search("lines.jsonl(: not one of| is not UTF-8| holds | begins as one JSON array)", str(error))
        return
    assert all(isinstance(text, str) for text in texts)
    if data.decode(errors="replace").lstrip().startswith("["):
        return  # the records of an array
    lines = re.split("\r\n|\r|\n", data.decode(errors="replace"))
    assert len(texts) + bad == sum(bool(line.strip()) for line in lines)


@given(st.lists(st.text(st.characters())))
def test_json_lines_keep_every_text(scratch, texts):
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    assert read_all(scratch / "texts.jsonl", data) == (texts, 0)


@given(st.binary(max_size=200), st.integers(0, 200), st.integers(0, 255), st.integers(0, 400))
def test_a_damaged_gzip_never_passes_for_a_whole_one(scratch, data, position, value, size):
    packed = bytearray(gzip.compress(json.dumps({"text": data.hex()}).encode() + b"\n"))
    packed[position % len(packed)] = value
    try:
        texts, bad = read_all(scratch / "damaged.json.gz", packed[:size])
        assert texts == [data.hex()] or bad
    except UserError as error:
        assert "damaged.json.gz" in str(error)


@pytest.fixture(scope="module")
def parquet(scratch):
    import pyarrow
    texts = ["one", "", "two", "déjà", "x" * 300]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(5)}), scratch / "whole.parquet")
    return (scratch / "whole.parquet").read_bytes()


CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=5)


@given(CHANGES, st.integers(1, 10_000))
@settings(max_examples=500)
def test_a_damaged_parquet_is_read_or_named_and_never_cut_in_silence(scratch, parquet, changes, size):
    data, footer = bytearray(parquet), len(parquet) - 8 - int.from_bytes(parquet[-8:-4], "little")
    for position, value in changes:
        data[position % len(data)] = value
    try:
        texts, bad = read_all(scratch / "damaged.parquet", data[:size])
        assert bad or len(texts) == 5 or data[footer:] != parquet[footer:], "the footer says how many there are"
    except UserError as error:
        assert re.search("damaged.parquet(:\\d+: the file| cannot be read| has no column text)", str(error))


@given(st.sampled_from(texts.EXTENSIONS), st.binary(max_size=300))
def test_any_bytes_under_any_name_are_read_or_are_one_line(scratch, extension, data):
    try:
        texts, _ = read_all(scratch / f"any{extension}", data)
        assert all(isinstance(text, str) for text in texts)
    except UserError as error:
        assert f"any{extension}" in str(error)


@given(st.text(), st.text(), st.text())
def test_any_flag_gives_sources_or_one_line(scratch, dataset, data_files, shards):
    try:
        config = prepare.PrepareConfig(dataset=dataset, data_files=data_files, shards=shards)
        assert config.folder.parent == Path("data") and 0 <= config.shard_range()[0] <= config.shard_range()[-1] < 1024
        prepare.find_files(data_files)
    except UserError:
        pass
    with contextlib.suppress(UserError):
        assert prepare.find_files(data_files)


TEXT = st.text("a \n.") | st.text("ab1 \n\t\x1c\x85\u00a0\u3000.'s!é🙂") | st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@given(TEXT, st.integers(1, 9))
@settings(max_examples=500)
def test_pieces_of_a_text_have_the_tokens_of_the_whole(gpt2, scratch, text, size):
    path = scratch / "text.txt"
    path.write_bytes(text.encode())
    pieces = list(texts.read_plain(path, 0, len(text.encode()), size))
    assert "".join(piece for piece, _, _ in pieces) == text.removeprefix("\ufeff")
    assert [last for _, last, _ in pieces] == [False] * (len(pieces) - 1) + [True]
    ids = [*gpt2.encode(text.removeprefix("\ufeff"))]
    assert [i for piece, _, _ in pieces for i in gpt2.encode(piece)] == ids
    assert [*gpt2.encode_pieces([(piece, last) for piece, last, _ in pieces])] == [*ids, gpt2.eot]


@given(st.text(min_size=1), st.floats(0.01, 0.99))
def test_a_tail_is_cut_between_two_characters(scratch, text, fraction):
    path = scratch / "tail.txt"
    path.write_bytes(text.encode("utf-8", "replace"))
    (_, _, begin, cut), (_, _, again, end) = texts.split_tail(path, fraction)
    data = path.read_bytes()
    assert (begin, again, end) == (0, cut, len(data)) and data[:cut].decode() + data[cut:].decode() == data.decode()


def test_big_text_is_read_in_pieces(tmp_path):
    (tmp_path / "big.txt").write_bytes(b"some words\n" * 400_000)
    sizes = [len(piece) for piece, _, _ in texts.read_plain(tmp_path / "big.txt", 0, 4_400_000)]
    assert sum(sizes) == 4_400_000 and max(sizes) < 1.1 * texts.PIECE


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.

def test_local_c4_gives_one_bin_per_file_and_every_document(tmp_path):
    flag = write_c4(tmp_path)
    out = run(tmp_path, flag)
    manifest = read_manifest(tmp_path / "data/c4")
    assert [*manifest["files"]] == ["train-00000.bin", "train-00001.bin", "train-00002.bin", "val-00003.bin"]
    for split, names in (("train", "c4-train*"), ("val", "c4-val*")):
        lines = [line for path in sorted(tmp_path.glob(names)) for line in gzip.open(path)]
        assert texts_of(tmp_path / "data/c4", split) == [json.loads(line)["text"] for line in lines]
    for name, entry in manifest["files"].items():
        data = (tmp_path / "data/c4" / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["tokens"] * 2 == len(data)
        assert entry["bytes"] + entry["documents"] == entry["tokens"]
        assert entry["source"].startswith("c4-") and str(tmp_path) not in json.dumps(manifest)
    assert "\n    python train.py" in out and "--dataset=c4" in out


def test_every_kind_of_file_gives_the_same_texts(tmp_path):
    import pyarrow
    texts = [f"document {i} \ufffd é\n" for i in range(200)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "a.jsonl.gz", texts)
    write_jsonl(tmp_path / "a.json.gz", texts)
    pyarrow.parquet.write_table(pyarrow.table({"id": range(200), "text": texts}), tmp_path / "a.parquet")
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / f"txt/{i:03d}.txt").write_text(text)
    splits = []
    for i, files in enumerate(["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.parquet", "txt/*.txt"]):
        run(tmp_path, f"--dataset=d{i}", f"--data_files={files}", alone=False)
        splits.append([texts_of(tmp_path / f"data/d{i}", split) for split in ("train", "val")])
    assert all(split == splits[0] for split in splits) and sorted(sum(splits[0], [])) == sorted(texts)
    pyarrow.parquet.write_table(pyarrow.table({"id": range(200)}), tmp_path / "ids.parquet")
    assert "ids.parquet has no column text" in refusal(tmp_path, "--dataset=ids", "--data_files=ids.parquet")
    assert 1 <= len(splits[0][1]) <= 40


@pytest.mark.long  # it is a measurement, which other programs on the machine can spoil
def test_reading_and_writing_take_a_tenth_of_the_tokenizers_time(tmp_path, gpt2, monkeypatch):
    """A core's whole work on a .json.gz against tiktoken alone on the same texts in memory. Measured: 0.93 to 1.00 of its
    throughput (its lists of ints, made arrays, cost what reading costs us), by CPU time, which a busy machine spares."""
    import tiktoken
    raw, papers = tiktoken.get_encoding("gpt2"), sorted(Path(json.__file__).parent.parent.glob("*.py"))
    paper = "".join(path.read_text() for path in papers)[:6_000_000]
    texts = [paper[i:i + 2000] for i in range(0, len(paper), 2000)]  # C4's are about as long
    write_jsonl(tmp_path / "a.json.gz", texts)
    config = prepare.PrepareConfig(dataset="x", data_dir=str(tmp_path))
    config.folder.mkdir()
    for name, value in (("CONFIG", config), ("OPTIONS", {}), ("TOKENIZER", gpt2), ("PROGRESS", [0, 0, 0])):
        monkeypatch.setattr(prepare, name, value, raising=False)
    (source,) = prepare.local_sources([str(tmp_path / "a.json.gz")], str(tmp_path), 0.05)

    def cpu(call):
        begin = time.process_time()
        call()
        return time.process_time() - begin

    alone, ours = [], []
    for _ in range(5):
        alone.append(cpu(lambda: [np.array(raw.encode_ordinary(text), np.uint16) for text in texts]))
        ours.append(cpu(lambda: prepare.write_source(0, source, source.sha256(), source.state())))
    print(f"of the raw tokenizer's throughput: {min(alone) / min(ours):.3f}")
    assert min(alone) / min(ours) > 0.8, (alone, ours)                            # the least of each: others take time, too


def test_the_tail_of_a_single_text_is_validation(tmp_path):
    text = "Ünï " * 1000
    (tmp_path / "book with spaces.txt").write_text(text)
    run(tmp_path, "--dataset=book", "--data_files=book with spaces.txt", "--val_fraction=0.1")
    (train,), (val,) = texts_of(tmp_path / "data/book", "train"), texts_of(tmp_path / "data/book", "val")
    assert train + val == text and 0.09 < len(val) / len(text) < 0.11


@pytest.mark.slow
def test_stdlib_is_the_same_twice_and_is_source_without_tests(tmp_path):
    for name, seed in (("one", "1"), ("two", "2")):
        run(tmp_path, "--dataset=stdlib", f"--data_dir={name}", env={**os.environ, "PYTHONHASHSEED": seed})
    assert contents(tmp_path / "one/stdlib") == contents(tmp_path / "two/stdlib")
    manifest = read_manifest(tmp_path / "one/stdlib")
    train, val = (sum(map(len, open_split(tmp_path / "one/stdlib", manifest, s))) for s in ("train", "val"))
    assert 8e6 < train + val < 16e6 and 0.01 < val / (train + val) < 0.15
    texts = texts_of(tmp_path / "one/stdlib", "train") + texts_of(tmp_path / "one/stdlib", "val")
    tests = Path(json.__file__).parent.parent / "test"
    assert Path(json.__file__).read_text() in texts
    assert not {path.read_text(errors="replace") for path in tests.glob("*.py") if path.stat().st_size} & {*texts}


def test_what_is_skipped_is_counted_and_named(tmp_path):
    lines = ['{"text": "good 1"}', "no json", '{"txt": 1}', '{"text": 5}', "", '{"text": ""}',
             '{"text": "a\\ud800b\\u0000"}']
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "val.jsonl.gz").write_bytes(gzip.compress(b'{"text": "v1"}\n{"text": "v2"}\n{"text": "cut'))
    out = run(tmp_path, "--dataset=d", "--data_files=*.jsonl train.jsonl, *.gz")
    entry = read_manifest(tmp_path / "data/d")["files"]["train-00000.bin"]
    assert (entry["bad"], entry["empty"], entry["repaired"], entry["documents"]) == (3, 1, 1, 2)
    assert entry["examples"] == ["train.jsonl:2: not JSON", "train.jsonl:3: no field text, only txt (see --text_field)",
                                 "train.jsonl:4: text is 5, not a string"]
    assert texts_of(tmp_path / "data/d", "train") == ["good 1", "a\ufffdb\0"]
    assert "unreadable records skipped: 4" in out and "train.jsonl:2: not JSON" in out and "val.jsonl.gz:3: not JSON" in out
    error = refusal(tmp_path, "--dataset=strict", "--data_files=*.jsonl *.gz", "--max_bad=2")
    assert "train.jsonl:4: text is 5, not a string" in error and not list((tmp_path / "data/strict").glob("train*"))
    (tmp_path / "train.jsonl").write_text('{"text": "good 1"}')
    run(tmp_path, "--dataset=mended", "--data_files=*.jsonl *.gz")
    error = refusal(tmp_path, "--dataset=mended", "--data_files=*.jsonl *.gz", "--max_bad=0")  # once skipped, now fatal
    assert "val.jsonl.gz:3: not JSON" in error


def test_a_source_that_breaks_off_is_no_source_and_the_same_command_goes_on_once_it_is_mended(tmp_path):
    flag = write_c4(tmp_path)
    run(tmp_path, flag, "--data_dir=whole")
    path = tmp_path / "c4-train.00001-of-00003.json.gz"
    packed = path.read_bytes()
    for size in (0, len(packed) // 50, len(packed) - 6):  # nothing, 2 %, all but the end of the checksum
        path.write_bytes(packed[:size])
        error = refusal(tmp_path, flag, "--max_bad=1000")
        assert "c4-train.00001-of-00003.json.gz:" in error and "fetch the file again" in error
        assert not any(path.name in record.read_text() for record in (tmp_path / "data/c4").glob("*-*.json"))
    path.write_bytes(packed)
    run(tmp_path, flag)
    assert contents(tmp_path / "data/c4") == contents(tmp_path / "whole/c4")


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_hard_documents_come_out_as_they_went_in(tmp_path, request, tokenizer):
    request.getfixturevalue("gpt2") if tokenizer == "gpt2" else None
    texts = [*HARD_TEXTS, "a" * 1_000_000, "<|endoftext|>" * 1000, "\0" * 1000]
    write_jsonl(tmp_path / "train.jsonl", texts)
    write_jsonl(tmp_path / "val.jsonl", ["v"])
    (tmp_path / "letters.txt").write_text("b" * 1_500_000)  # longer than the pieces in which a .txt is read
    out = run(tmp_path, "--dataset=hard", "--data_files=*.jsonl *.txt", f"--tokenizer={tokenizer}")
    read = sorted(texts_of(tmp_path / "data/hard", "train"))
    assert read == sorted(["b" * 1_500_000, *(clean(text)[0] for text in texts if text)])
    assert "empty documents skipped: 1" in out and "U+FFFD: 1" in out


@pytest.mark.parametrize("flags, words", [
    (["--dataset=nonesuch"], "--data_files"),
    (["--dataset=../x", "--data_files=*.txt"], "plain name"),
    (["--dataset=x", "--data_files=*.nothing"], "no file matches '*.nothing'"),
    (["--dataset=x", "--data_files=."], ". is a folder: name its files, './*.txt'"),
    (["--dataset=x", "--data_files=a.txt b.pdf"], "parquet: plain text of another name can be copied to a .txt"),
    (["--dataset=x", "--data_files=empty.txt"], "no train documents"),
    (["--dataset=x", "--data_files=one.jsonl"], "no "),
    (["--dataset=x", "--data_files=val.txt"], "none is left to train on"),
    (["--dataset=x", "--data_files=text.parquet"], "text.parquet cannot be read (ArrowInvalid"),
    (["--dataset=x", "--data_files=noise.jsonl.gz"], "is not compressed"),
    (["--dataset=x", "--data_files=a.txt", "--data_dir=a.txt"], "--data_dir"),
    (["--dataset=x", "--data_files=a.txt", "--val_fraction=1"], "val_fraction"),
    (["--dataset=" + 300 * "x", "--data_files=a.txt", "--data_dir=."], "too long"),
    (["--dataset=x", "--verify"], "python prepare.py --dataset=x"),
    *((["--shards=" + shards], "--shards") for shards in ("0", "-1", "2:1", "0:1025", "1:2:3", "x", "", "²"))])
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, flags, words):
    for name, data in (("a.txt", b"text"), ("b.pdf", b"x"), ("empty.txt", b""), ("one.jsonl", b'{"text": "a"}'),
                       ("val.txt", b"x"), ("text.parquet", b"PAR1 not really"), ("noise.jsonl.gz", b"not gzip")):
        (tmp_path / name).write_bytes(data)
    before = contents(tmp_path)
    assert words in refusal(tmp_path, *flags)
    assert not list(tmp_path.glob("data/*"))
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    assert contents(tmp_path) == before


def test_c4_without_network_is_one_line(tmp_path):
    offline = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "--data_files=" in refusal(tmp_path, env=offline)
    assert not (tmp_path / "data").exists()


def test_missing_files_are_named_before_a_missing_vocabulary(tmp_path):
    no_network = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    assert "name its files" in refusal(tmp_path, "--dataset=mine", "--tokenizer=gpt2", env=no_network)


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text " * 100)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(UserError, match="free"):
        prepare.main(["--dataset=x", "--data_files=a.txt", "--tokenizer=bytes"])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("files, words, limit", [(1, 1_000_000, 3_000_000), (60, 10, 10_000)])  # a .bin; the manifest
def test_a_disk_that_fills_leaves_nothing_half_written(tmp_path, files, words, limit):
    for i in range(files):
        write_jsonl(tmp_path / f"{i:02d}.jsonl", ["word " * words])
    write_jsonl(tmp_path / "val.jsonl", ["text"])
    ask, folder = ["--dataset=x", "--data_files=*.jsonl"], tmp_path / "data/x"
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    error = refusal(tmp_path, *ask, preexec_fn=small)
    assert "cannot write data/x/" in error and "(File too large): is the disk full?" in error
    assert not list(folder.glob("*.tmp")) and not (folder / "manifest.json").exists()
    for record in folder.glob("*.json"):
        assert not list(bin_problems(folder, read_sealed(record), whole=True)), "a record of nothing"
    run(tmp_path, *ask)
    run(tmp_path, *ask, "--data_dir=other")
    assert contents(folder) == contents(tmp_path / "other/x")


def test_a_finished_dataset_survives_the_same_command_whatever_else_is_amiss(tmp_path):
    flag, folder = write_c4(tmp_path, shards=1), tmp_path / "data/c4"
    run(tmp_path, flag)
    for name in ("my-notes.json", "my-notes.tmp", "notes.bin"):  # the user's
        (folder / name).write_text("{}")
    for name in ("x.tmp", "train-00000.bin.0123abcd.tmp", "manifest.json.0123abcd.tmp"):
        (folder / name).mkdir()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    run(tmp_path, flag)  # nothing is left to write
    run(tmp_path, "--verify")
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    assert "cannot write data/c4/manifest.json" in refusal(tmp_path, flag)
    del before[folder / "manifest.json"]
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    script = ("import multiprocessing, prepare, resource, sys; prepare.main(sys.argv[1:]); "
              "[worker.join() for worker in multiprocessing.active_children()];"  # counted when waited for
              # the most of the run, and of a worker, in KB
              "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0],"
              "      resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    text, peaks = "some words " * 500_000, []
    for shards in (2, 16):
        for i in range(shards):
            write_jsonl(tmp_path / f"{i:02d}.jsonl", [text])
        write_jsonl(tmp_path / "val.jsonl", ["text"])
        command = [sys.executable, "-c", script, f"--dataset=d{shards}", "--data_files=*.jsonl", "--tokenizer=bytes",
                   "--processes=2"]
        out = subprocess.check_output(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(PROGRAM.parent)})
        peaks.append([int(kilobytes) for kilobytes in out.split()[-2:]])
    assert all(0 < many < 1.1 * few for few, many in zip(*peaks)), peaks


# ---------------------------------------------------------------------------------------------------------------------
# Which files, and which of them are validation.

@pytest.mark.parametrize("names, pattern, held", [
    (["Train.jsonl", "Validation.jsonl"], "*.jsonl", ["Validation.jsonl"]),
    (["train/part0.jsonl", "val/part0.jsonl"], "*/*.jsonl", ["val/part0.jsonl"]),
    (["train/part0.jsonl", "val/part0.jsonl"], "train/*.jsonl val/*.jsonl", ["val/part0.jsonl"]),
    (["a/train/0.jsonl", "a/VALIDATION/x/0.jsonl"], "a/**/*.jsonl", ["a/VALIDATION/x/0.jsonl"]),
    (["text.jsonl", "text.Valid.jsonl"], "text*", ["text.Valid.jsonl"]),
    (["Training.jsonl", "ValidationSet.jsonl", "myVal.jsonl"], "*.jsonl", ["ValidationSet.jsonl", "myVal.jsonl"]),
    (["val/train.jsonl", "val/test.jsonl"], "val/*.jsonl", []),  # not below the fixed part of the pattern
    (["train.jsonl", "dev.jsonl"], "*.jsonl", ["dev.jsonl"]), (["trn.jsonl", "valset.jsonl"], "*.jsonl", ["valset.jsonl"]),
    (["a/train.jsonl", "validations/a.jsonl"], "*/*.jsonl", ["validations/a.jsonl"]),
    (["part1.jsonl", "held-out.jsonl", "heldout2.jsonl"], "*.jsonl", ["held-out.jsonl", "heldout2.jsonl"]),
    (["train.jsonl", "evaluation.jsonl"], "*.jsonl", ["evaluation.jsonl"]),
    (["a/0.jsonl", "eval/0.jsonl", "holdout/0.jsonl"], "*/*.jsonl", ["eval/0.jsonl", "holdout/0.jsonl"]),
    (["valentine.jsonl", "interval.jsonl", "medieval.jsonl", "developer.jsonl", "settings.jsonl"], "*.jsonl", [])])
def test_names_and_folders_that_say_validation_are_held_out_and_named(tmp_path, names, pattern, held):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, [f"{name} {i}" for i in range(200)])
    out = run(tmp_path, "--dataset=d", f"--data_files={pattern}", alone=False)
    if held:
        assert f"  validation: {', '.join(held)}\n" in out
        wanted = sorted(f"{name} {i}" for name in held for i in range(200))
        assert sorted(texts_of(tmp_path / "data/d", "val")) == wanted
    else:
        assert "% of the tokens, since no file is named val" in out
        assert 0 < len(texts_of(tmp_path / "data/d", "val")) < 60


@pytest.mark.parametrize("names, left_out, held", [
    (["train.jsonl", "test.jsonl"], ["test.jsonl"], []),
    (["train.jsonl", "val.jsonl", "Test-00000-of-00001.jsonl"], ["Test-00000-of-00001.jsonl"], ["val.jsonl"]),
    (["train/0.jsonl", "testing/0.jsonl", "validation/0.jsonl"], ["testing/0.jsonl"], ["validation/0.jsonl"]),
    (["a.jsonl", "TestSet/val.jsonl"], ["TestSet/val.jsonl"], []),
    (["latest.jsonl", "attestation.jsonl", "contest.jsonl", "testament.jsonl"], [], []),
    (["test1.jsonl", "test2.jsonl"], [], [])])  # a first try, not the test of anything
def test_files_named_test_are_neither_trained_on_nor_validated_with_and_that_is_said(tmp_path, names, left_out, held):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, [f"{name} {i}" for i in range(200)])
    out = run(tmp_path, "--dataset=d", "--data_files=**/*.jsonl", alone=False)
    assert ("left out, since their names say test: " + ", ".join(left_out) in out) == bool(left_out)
    read = {split: {text.split()[0] for text in texts_of(tmp_path / "data/d", split)} for split in ("train", "val")}
    assert read["train"] | read["val"] == {*names} - {*left_out}
    assert not held or read["val"] == {*held}


def test_nothing_to_train_on_but_validation_and_tests_is_refused(tmp_path):
    for name in ("val", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", ["text"])
    error = refusal(tmp_path, "--dataset=d", "--data_files=*.jsonl")
    assert "all 2 files are named as validation files or tests: none is left to train on" in error


@pytest.mark.parametrize("files, given, words", [
    (["t/a.jsonl", "t/b.md"], ["--data_files=t"], "t is a folder: name its files, 't/*.jsonl'"),
    (["t/a.TXT", "t/b.parquet"], ["--data_files=t"], "t is a folder: name its files, 't/*.txt' or 't/*.parquet'"),
    (["t/b.md"], ["--data_files=t/"], "t/ is a folder without .txt, .jsonl"),
    ([], ["--data_files=http://x.org/a.txt"], "http://x.org/a.txt is an address: download it first"),
    ([], ["--hub=https://x.org/datasets/a/b"], "--hub takes OWNER/NAME, which are part of that address"),
    (["a.txt", "b.txt"], ["--data_files", "a.txt", "b.txt"], "write all files in one flag, in quotes: --data_files='")])
def test_what_is_no_file_or_pattern_is_answered_with_what_to_type(tmp_path, files, given, words):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert words in refusal(tmp_path, "--dataset=d", *given)


def test_small_files_of_any_kind_share_a_bin(tmp_path):
    import pyarrow
    for i in range(15):
        write_jsonl(tmp_path / f"{i:02d}.jsonl", [f"{i} {j}" for j in range(9)])
        write_jsonl(tmp_path / f"{i:02d}.val.jsonl.gz", [f"{i} {j}" for j in range(9)])
        pyarrow.parquet.write_table(pyarrow.table({"text": [f"{i} {j}" for j in range(9)]}), tmp_path / f"{i:02d}.parquet")
    run(tmp_path, "--dataset=d", "--data_files=*.jsonl *.gz *.parquet", alone=False)
    assert [*read_manifest(tmp_path / "data/d")["files"]] == ["train-00000.bin", "val-00001.bin"]
    assert len(texts_of(tmp_path / "data/d", "train")) == 270 and len(texts_of(tmp_path / "data/d", "val")) == 135


def test_a_text_behind_links_is_read_once_and_loops_of_links_end(tmp_path):
    (tmp_path / "texts/2024/deep").mkdir(parents=True)
    for name in ("2024/a", "2024/deep/b", "c"):
        (tmp_path / f"texts/{name}.txt").write_text(f"text {name} " * 9)
    for link in ("2024/loop", "2024/deep/loop", "2024/deep/up"):
        (tmp_path / "texts" / link).symlink_to(".." if link.endswith("up") else ".")
    (tmp_path / "texts/a link").symlink_to("2024")
    (tmp_path / "texts/again.txt").symlink_to("2024/a.txt")
    (tmp_path / "texts/self").symlink_to("self")
    (tmp_path / "texts/2024/hard.txt").hardlink_to(tmp_path / "texts/2024/a.txt")
    found, base = texts.find_files(str(tmp_path / "texts/**/*.txt"))
    assert [os.path.relpath(path, base) for path in found] == ["2024/a.txt", "2024/deep/b.txt", "c.txt"]
    assert [os.path.basename(path) for path in texts.find_files(str(tmp_path / "texts/**"))[0]] == ["a.txt", "b.txt", "c.txt"]


@pytest.mark.parametrize("name", ["a[1].txt", "my [data]/*.txt", "what?/a b.txt", "one, two/a.txt", "*/x/[y].txt", "-a.txt"])
def test_a_name_that_is_there_is_no_pattern(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = Path(name.replace("*.txt", "b.txt"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text")
    Path("a1.txt").write_text("another")
    assert texts.find_files(name)[0] == [str(path)]
    if "," not in name:
        assert texts.find_files(f"{name},a1.txt")[0] == sorted(["a1.txt", str(path)])


def test_home_and_names_that_a_shell_would_split_are_said_so_that_the_next_command_works(tmp_path):
    import shlex
    (tmp_path / "a.txt").write_text("text " * 3000)
    home = os.environ | {"HOME": str(tmp_path)}
    out = run(tmp_path, "--dataset=d", "--data_files=~/a.txt", "--data_dir=~/my $data;", env=home)
    assert not (tmp_path / "~").exists() and (tmp_path / "my $data;/d/manifest.json").exists()
    assert "no file matches '~no-such-user/x'" in refusal(tmp_path, "--dataset=d", "--data_files=~no-such-user/x")
    words = shlex.split(re.search("next.*:\n +(.*)", out)[1])
    assert words[:3] == ["python", "train.py", "config/tiny.py"] and f"--data_dir={tmp_path}/my $data;" in words


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_name_that_the_terminal_has_no_characters_for_is_no_error(tmp_path, encoding):
    name = "val-\u043f\u0440\u0438\u0432\u0435\u0442-" + os.fsdecode(b"\xff") + ".txt"
    (tmp_path / name).write_text("text " * 100)
    (tmp_path / "a.txt").write_text("text " * 3000)
    out = run(tmp_path, "--dataset=d", "--data_files=*.txt", env=os.environ | {"PYTHONIOENCODING": encoding})
    assert "validation: val-" in out and "next" in out


def test_the_name_of_a_folder_cannot_clear_the_screen(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    out = run(tmp_path, "--dataset=d", "--data_files=a.txt", "--data_dir=\x1b[2J\n")
    assert out.startswith("\\x1b[2J\\n/d: ") and "\x1b" not in out


@pytest.mark.parametrize("make, words", [
    (os.mkfifo, "a.txt is not a regular file"), (os.mkdir, "a.txt is a folder"),
    (lambda path: os.symlink("gone", path), "a.txt is not a regular file, or a link to none")])
def test_what_is_no_file_is_named(tmp_path, make, words):
    make(tmp_path / "a.txt")
    assert words in refusal(tmp_path, "--dataset=d", "--data_files=a.txt")


# ---------------------------------------------------------------------------------------------------------------------
# Encodings, and records that are not lines.

@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["one.txt", "records.jsonl", "records.json.gz"])
def test_a_byte_order_mark_says_how_a_text_is_read(tmp_path, encoding, kind):
    lines = [f"naïve 🙂 {i} “quoted”" for i in range(200)]
    text = "".join((line if kind == "one.txt" else json.dumps({"text": line}, ensure_ascii=False)) + "\r\n" for line in lines)
    data = ("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding)
    (tmp_path / kind).write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    out = run(tmp_path, "--dataset=d", f"--data_files={kind}", "--val_fraction=0.1")
    read = texts_of(tmp_path / "data/d", "train") + texts_of(tmp_path / "data/d", "val")
    assert "".join(read) == text if kind == "one.txt" else sorted(read) == sorted(lines)
    assert "invalid" not in out


@pytest.mark.parametrize("kind", ["one.txt", "records.jsonl", "records.jsonl.gz", "records.parquet"])
@pytest.mark.parametrize("encoding, named", [("latin-1", "CP1252"), ("utf-16-le", "UTF-16LE"), ("cp1251", "CP1251"),
                                             ("koi8-r", "KOI8-R")])
def test_a_text_of_another_encoding_is_refused_and_its_encoding_named(tmp_path, kind, encoding, named):
    line = "Le café était fermé ce jour-là."
    if encoding in ("cp1251", "koi8-r"):
        line = "Привет, как дела? Это обычный текст на русском языке, я люблю кошек."
    fix = f"iconv -f {named} -t UTF-8 {kind}"
    if kind.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [line.encode(encoding)] * 300}), tmp_path / kind)
        fix = "write it as strings"
    else:
        line = line if kind == "one.txt" else json.dumps({"text": line}, ensure_ascii=False)
        data = "".join(line + "\n" for _ in range(300)).encode(encoding)
        (tmp_path / kind).write_bytes(data)
    if kind.endswith(".gz"):
        (tmp_path / kind).write_bytes(gzip.compress(data))
        fix = f"gzip -dc {kind} | iconv -f {named} -t UTF-8"
    error = refusal(tmp_path, "--dataset=d", f"--data_files={kind}")
    assert f"{kind} is not UTF-8 text, perhaps {named}" in error and fix in error


def test_utf_16_after_utf_8_as_powershell_appends_it_is_refused_and_a_few_nuls_are_counted(tmp_path):
    text = "A line of English text, and another.\n" * 2000
    (tmp_path / "a.txt").write_bytes(text.encode() * 20 + text.encode("utf-16-le") + text.encode() * 5)
    assert "a.txt is not UTF-8 text, perhaps UTF-16LE" in refusal(tmp_path, "--dataset=d", "--data_files=a.txt")
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\0\0" + text.encode())
    assert "texts with NUL characters: 1" in run(tmp_path, "--dataset=d", "--data_files=a.txt")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_what_is_no_utf_16_within_it_is_repaired_and_counted(tmp_path, encoding, name):
    line = "A line of English text."
    line = line if name == "a.txt" else json.dumps({"text": line})
    data = (line + "\n").encode(encoding)
    for broken in (data * 1 + b"x", data + "\ud800".encode(encoding + "-le", "surrogatepass") + b"x\0\0\0"):
        (tmp_path / name).write_bytes(broken)
        (tmp_path / "b.txt").write_text("more text " * 1000)
        out = run(tmp_path, "--dataset=d", f"--data_files={name},b.txt")
        assert "texts with invalid characters, now U+FFFD: 1" in out or f"{name}:2: not JSON" in out
        shutil.rmtree(tmp_path / "data")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("data, kind", [(gzip.compress(b"text" * 99, mtime=0), "gzip"), (b"%PDF-1.4", "PDF"), (b"PK\3\4", "zip"),
                                        (b"PAR1", "Parquet"), (b"\x28\xb5\x2f\xfd", "zstd")])
def test_a_file_of_another_format_is_called_that(tmp_path, name, data, kind):
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert f"{name} holds {kind} data, not text" in refusal(tmp_path, "--dataset=d", f"--data_files={name}")


def test_a_column_that_holds_no_text_is_named_with_what_it_holds(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [[1, 2]], "body": ["b"]}), tmp_path / "a.parquet")
    error = refusal(tmp_path, "--dataset=d", "--data_files=a.parquet")
    assert "a.parquet: its column text holds list<" in error and "--text_field=..., of text, body" in error


def test_pretty_printed_json_is_not_advised_to_be_skipped(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"text": f"text {i}"} for i in range(50)]}, indent=1))
    error = refusal(tmp_path, "--dataset=d", "--data_files=a.json")
    assert "not one of 11 records can be read" in error and "max_bad" not in error


@pytest.mark.parametrize("record, why, fix", [
    ({"title": "a", "body": "b"}, "no field text, only title, body", "name the field that holds the text, --text_field=..., of title, body"),
    ({"text": None, "Body": "b"}, "text is null, not a string", "name the field that holds the text, --text_field=..., of Body"),
    ({"text": ["é"]}, 'text is ["é"], not a string', "write one JSON object per line, with its text under --text_field"),
    ("a text", '"a text" has no field text', "write one JSON object per line, with its text under --text_field")])
@pytest.mark.parametrize("count", [3, 40])
def test_where_no_record_has_text_the_field_looked_for_and_those_there_are_named(tmp_path, record, why, fix, count):
    (tmp_path / "a.jsonl").write_text((json.dumps(record) + "\n") * count)
    error = refusal(tmp_path, "--dataset=d", "--data_files=a.jsonl")
    assert f"a.jsonl: not one of {min(count, 11)} records can be read (a.jsonl:{min(count, 10)}: {why}" in error
    assert f"): {fix}, or leave it out\n" in error and "max_bad" not in error


def test_where_no_record_of_a_hub_dataset_has_text_the_fields_there_are_are_named(tmp_path):
    (tmp_path / "one.csv").write_text("title,body\n" + "a,b\n" * 40)
    error = refusal(tmp_path, "--dataset=d", "--hub=one.csv", env=OFFLINE)
    assert "not one of 11 records can be read" in error and "--text_field=..., of title, body" in error


def test_empty_documents_alone_are_called_that(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 40)
    assert "no train documents: look into its source files (skipped: empty documents: 40)" in refusal(
        tmp_path, "--dataset=d", "--data_files=a.jsonl")


def test_a_few_invalid_bytes_in_a_long_text_are_repaired_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve words ".encode() * 1000 + b"\xe9\xff" + b" words" * 1000)
    assert "texts with invalid characters, now U+FFFD: 1" in run(tmp_path, "--dataset=d", "--data_files=a.txt")


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl"])
@pytest.mark.parametrize("form", [lambda records: json.dumps(records), lambda records: json.dumps(records, indent=1),
                                  lambda records: "\r".join(map(json.dumps, records)),
                                  lambda records: "\r\n\r\n".join(map(json.dumps, records))])
def test_an_array_of_records_and_lines_that_end_in_cr_are_read_whole(tmp_path, name, form):
    data = form([{"text": f"text {i}", "n": [i]} for i in range(50)]).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    out = run(tmp_path, "--dataset=d", f"--data_files={name}")
    read = texts_of(tmp_path / "data/d", "train") + texts_of(tmp_path / "data/d", "val")
    assert sorted(read) == sorted(f"text {i}" for i in range(50)) and "unreadable" not in out


@pytest.mark.parametrize("data, words", [
    (b'{"text": "plain"}\n', "is not compressed, though its name ends in .gz: rename it, mv a.json.gz a.json"),
    (gzip.compress(b'{"text": "whole"}\n') + b"trailing", "has other bytes after the end of its gzip stream"),
    (gzip.compress(b'{"text": "whole"}\n' * 9)[:-3], "is truncated or damaged"),
    (gzip.compress(b'[{"text": "one"}, {"te'), "begins as one JSON array and cannot be read as one"),
    (gzip.compress(b'{\n "text": "over several lines"\n}\n'), "not one of 3 records can be read")],
    ids=["plain", "trailing", "cut", "half an array", "lines"])
def test_what_cannot_be_read_of_a_compressed_file_is_named_for_what_it_is(tmp_path, data, words):
    (tmp_path / "a.json.gz").write_bytes(data)
    (tmp_path / "val.jsonl").write_text('{"text": "v"}')
    (tmp_path / "b.jsonl").write_text('{"text": "v"}')
    assert words in refusal(tmp_path, "--dataset=d", "--data_files=*.json*", alone=False)


def test_a_file_that_is_rewritten_at_its_size_while_it_is_read_is_no_source(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("text " * 100)
    config = prepare.PrepareConfig(dataset="x", data_dir=str(tmp_path))
    config.folder.mkdir()
    for name, value in (("CONFIG", config), ("OPTIONS", {}), ("TOKENIZER", BYTES), ("PROGRESS", [0, 0, 0])):
        monkeypatch.setattr(prepare, name, value, raising=False)
    (source,) = prepare.local_sources([str(path)], str(tmp_path), 0.05)
    state, sha256 = source.state(), source.sha256()
    path.write_text("test " * 100)
    os.utime(path, ns=(state[0][1], state[0][1]))
    with pytest.raises(UserError, match="a.txt was changed while it was being read"):
        prepare.write_source(0, source, sha256, state)
    assert contents(config.folder) == {}


def test_a_record_with_a_million_spaces_is_a_document(tmp_path, gpt2):
    write_jsonl(tmp_path / "a.jsonl", [" " * 1_000_000 + "text", "more"])
    (tmp_path / "val.txt").write_text("\n" * 1_000_000 + "text")
    run(tmp_path, "--dataset=d", "--data_files=a.jsonl val.txt", "--tokenizer=gpt2")
    assert texts_of(tmp_path / "data/d", "train") == [" " * 1_000_000 + "text", "more"]
    assert texts_of(tmp_path / "data/d", "val") == ["\n" * 1_000_000 + "text"]


# ---------------------------------------------------------------------------------------------------------------------
# The share that is held out.

@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("documents", [1, 2, 13, 40, 300])
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_the_share_of_text_that_was_asked_for_is_held_out(tmp_path, kind, documents, fraction):
    rng = random.Random(documents)
    lines = [f"{i} " + "word " * rng.randint(20, 60) for i in range(documents)]
    if kind.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": lines}), tmp_path / kind)
    else:
        write_jsonl(tmp_path / kind, lines)
    run(tmp_path, "--dataset=d", f"--data_files={kind}", f"--val_fraction={fraction}")
    train, val = texts_of(tmp_path / "data/d", "train"), texts_of(tmp_path / "data/d", "val")
    share = sum(map(len, val)) / sum(map(len, train + val))
    assert fraction / 2 <= share <= 2 * fraction and sum(map(len, train + val)) == sum(map(len, lines))
    if documents * fraction > 2:
        assert sorted(train + val) == sorted(lines) and abs(share - fraction) <= fraction / 3


@pytest.mark.parametrize("documents", [1, 2, 40])
@pytest.mark.parametrize("fraction", [0.99, 0.999999, 1e-6])
def test_an_extreme_share_leaves_both_splits_a_text(tmp_path, documents, fraction):
    write_jsonl(tmp_path / "a.jsonl", [f"text {i} " * 20 for i in range(documents)])
    run(tmp_path, "--dataset=d", "--data_files=a.jsonl", f"--val_fraction={fraction}")
    assert texts_of(tmp_path / "data/d", "train") and texts_of(tmp_path / "data/d", "val")


def test_a_few_short_texts_are_held_out_whole(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text {i:02d}")
    run(tmp_path, "--dataset=d", "--data_files=*.txt", alone=False)
    train, val = texts_of(tmp_path / "data/d", "train"), texts_of(tmp_path / "data/d", "val")
    assert sorted(train + val) == [f"text {i:02d}" for i in range(40)] and 1 <= len(val) <= 4


def test_documents_with_the_same_text_are_never_in_both_splits(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"text {i % 20}" for i in range(200)])
    run(tmp_path, "--dataset=d", "--data_files=a.jsonl")
    train, val = texts_of(tmp_path / "data/d", "train"), texts_of(tmp_path / "data/d", "val")
    assert val and not {*train} & {*val} and len(train + val) == 200


# ---------------------------------------------------------------------------------------------------------------------
# What datasets reads, and tokenizers of one's own.

OFFLINE = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}


def write_local_hub(folder, files=3, documents=40):
    (folder / "ds").mkdir()
    for i in range(files):
        lines = [json.dumps({"story": f"story {i} {j}"}) + "\n" for j in range(documents)]
        (folder / f"ds/part{i}.jsonl").write_text("".join(lines))
    return ["--dataset=d", "--hub=ds", "--text_field=story"]


@pytest.mark.slow
def test_a_dataset_that_datasets_reads_gives_one_bin_per_shard_and_keeps_its_revision(tmp_path):
    flags = write_local_hub(tmp_path)
    run(tmp_path, *flags, env=OFFLINE)
    folder = tmp_path / "data/d"
    manifest = read_manifest(folder)
    assert (manifest["origin"], manifest["hub"], manifest["text_field"]) == ("hub", "ds", "story")
    assert len(manifest["revision"]) == 64 and manifest["shards"] == {"train": 3} and len(manifest["files"]) == 6
    read = texts_of(folder, "train") + texts_of(folder, "val")
    assert sorted(read) == sorted(f"story {i} {j}" for i in range(3) for j in range(40))
    before = contents(folder)
    for name in ("both-00001.json", "manifest.json"):  # as a kill leaves it
        (folder / name).unlink()
    run(tmp_path, *flags, env=OFFLINE)
    assert contents(folder) == before
    with open(tmp_path / "ds/part1.jsonl", "a") as file:
        file.write('{"story": "one more"}\n')
    assert "was made with revision" in refusal(tmp_path, *flags, env=OFFLINE)


@pytest.mark.slow
def test_max_documents_takes_the_first_of_each_split_and_a_kill_changes_nothing(tmp_path):
    flags = [*write_local_hub(tmp_path), "--max_documents=70"]
    run(tmp_path, *flags, env=OFFLINE)
    folder = tmp_path / "data/d"
    read = texts_of(folder, "train") + texts_of(folder, "val")
    assert sorted(read) == sorted([f"story 0 {j}" for j in range(40)] + [f"story 1 {j}" for j in range(30)])
    before = contents(folder)
    (folder / "both-00001.json").unlink()
    run(tmp_path, *flags, env=OFFLINE)
    assert contents(folder) == before


def test_splits_of_a_dataset_that_say_validation_are_held_out(tmp_path):
    (tmp_path / "ds").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / f"ds/{split}.csv").write_text("text,n\n" + "".join(f"{split} {i},1\n" for i in range(20)))
    assert "left out: split test\n" in run(tmp_path, "--dataset=d", "--hub=ds", env=OFFLINE)
    assert texts_of(tmp_path / "data/d", "train") == [f"train {i}" for i in range(20)]
    assert texts_of(tmp_path / "data/d", "val") == [f"validation {i}" for i in range(20)]


@pytest.mark.parametrize("flags, words", [
    (["--hub=ds"], "--dataset name"), (["--dataset=d", "--hub=ds", "--data_files=x"], "not both"),
    (["--dataset=d", "--data_files=one.csv", "--max_documents=3"], "belong to --hub"),
    (["--dataset=d", "--hub=someone/nothing"], "datasets cannot open someone/nothing"),
    (["--dataset=d", "--hub=one.csv", "--config=other"], "datasets cannot open one.csv"),
    (["--dataset=d", "--hub=one.csv", "--text_field=txt", "--max_bad=1"], "no field txt, only text (see --text_field)")])
def test_a_dataset_that_cannot_be_read_is_one_line(tmp_path, flags, words):
    (tmp_path / "one.csv").write_text("text\na\nb\nc\n")
    (tmp_path / "ds").mkdir()
    assert words in refusal(tmp_path, *flags, env=OFFLINE)


def test_a_dataset_of_the_hub_leaves_torch_unimported(tmp_path):
    (tmp_path / "torch.py").write_text("import os; os._exit(9)")
    (tmp_path / "one.csv").write_text("text\n" + "".join(f"text {i}\n" for i in range(50)))
    run(tmp_path, "--dataset=d", "--hub=one.csv", env=OFFLINE | {"PYTHONPATH": str(tmp_path)})


@pytest.mark.parametrize("kind", ["ByteLevel", "Metaspace"])
def test_a_tokenizer_json_of_ones_own_gives_the_text_back(tmp_path, kind):
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=kind == "Metaspace"))
    text = "naïve words, 🙂 more words\n" * 20
    if kind == "ByteLevel":
        own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        own.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        own.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
        own.decoder = tokenizers.decoders.Metaspace(prepend_scheme="never")
        alphabet = []
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"])
    own.train_from_iterator([text], trainer)
    own.save(str(tmp_path / "my tokenizer.json"))
    write_jsonl(tmp_path / "a.jsonl", [text, "words <s>"])
    write_jsonl(tmp_path / "val.jsonl", [text])
    os.chdir(tmp_path)
    run(tmp_path, "--dataset=d", "--data_files=*.jsonl", "--tokenizer=my tokenizer.json")
    assert texts_of(tmp_path / "data/d", "train")[0] == text and texts_of(tmp_path / "data/d", "val") == [text]
    manifest = read_manifest(tmp_path / "data/d")
    assert manifest["vocab_size"] == own.get_vocab_size() + 1 and manifest["tokenizer"] == "my tokenizer.json"


@pytest.mark.parametrize("data", [None, b"", b"{}", b"[]", b"\xff", b'{"model": 3}'])
def test_a_tokenizer_json_that_is_none_is_one_line(tmp_path, data):
    if data is not None:
        (tmp_path / "t.json").write_bytes(data)
    (tmp_path / "a.txt").write_text("text")
    assert "t.json" in refusal(tmp_path, "--dataset=d", "--data_files=a.txt", "--tokenizer=t.json")
    assert "unknown tokenizer 'gpt3'" in refusal(tmp_path, "--dataset=d", "--data_files=a.txt", "--tokenizer=gpt3")


# ---------------------------------------------------------------------------------------------------------------------
# What is said at the end.

@pytest.mark.parametrize("gpu, vocab_size, train, command", [
    (False, 257, 600_000, "    python train.py config/tiny.py --dataset=d --out_dir=out/d --max_steps=600"),  # a novel
    (False, 257, 100_000, "    python train.py config/tiny.py --dataset=d --out_dir=out/d --max_steps=100"),
    (True, 257, 600_000, "    python train.py config/tiny.py --dataset=d --out_dir=out/d --max_steps=600"),
    (True, 50257, 170_000_000, "    python train.py config/hybrid.py --dataset=d --out_dir=out/d --max_steps=10400"),
    (True, 50257, 30_000_000, "    python train.py config/hybrid.py --dataset=d --out_dir=out/d --max_steps=1800"),
    (False, 50257, 170_000_000, "    python train.py config/tiny.py --dataset=d --out_dir=out/d\nor, on a GPU:\n"
     "    python train.py config/hybrid.py --dataset=d --out_dir=out/d --max_steps=10400")])
def test_the_next_command_fits_the_text_and_the_machine_and_stands_on_its_own_line(monkeypatch, gpu, vocab_size, train,
                                                                                   command):
    from support import advice
    monkeypatch.setattr(advice.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if gpu else None)
    said, shown = advice.next_steps("d", "data", vocab_size, train, train // 20).split("\n", 1)
    assert shown == command
    assert said == "next:" or re.fullmatch("next, about .* on this machine's CPU when nothing else runs on it:", said)


def test_the_estimate_says_minutes_hours_or_days(monkeypatch):
    from support import advice
    for speed, words in ((1e12, "about 32 seconds"), (1e11, "about 5.3 minutes"), (1e9, "about 8.8 hours"), (1e8, "about 3.7 days")):
        monkeypatch.setattr(advice, "machine_speed", lambda: speed)
        assert words in advice.next_steps("d", "data", 257, 10_000_000, 500_000)


def test_a_text_shorter_than_the_presets_context_gets_a_command_that_trains(tmp_path):
    (tmp_path / "a.txt").write_text("a short text " * 1000)
    out = run(tmp_path, "--dataset=d", "--data_files=a.txt", "--val_fraction=0.015")
    seq_len = int(re.search("--seq_len=([0-9]+)", out)[1])
    manifest = read_manifest(tmp_path / "data/d")
    for split in ("train", "val"):
        assert dataset.Windows(open_split(tmp_path / "data/d", manifest, split), seq_len, 0).total


def test_a_text_too_small_to_train_on_is_said_to_be_so_and_gets_no_command(tmp_path):
    (tmp_path / "a.txt").write_text("The cat sat on the mat. The dog ran.")
    (tmp_path / "long.txt").write_text("a long text " * 2000)
    out = run(tmp_path, "--dataset=a", "--data_files=a.txt")
    assert out.endswith("\ntoo small to train on: give at least 10 kB of text, better ten times that or more\n")
    (tmp_path / "val.txt").write_text("words")
    out += run(tmp_path, "--dataset=b", "--data_files=long.txt val.txt")
    assert out.endswith("\ntoo little text for validation: it needs at least 100 bytes, by a longer validation file or "
                        "a larger --val_fraction\n")
    assert "train.py" not in out


def test_small_texts_get_byte_tokens_and_what_is_there_keeps_its_own(tmp_path, gpt2):
    (tmp_path / "a.txt").write_text("text " * 1000)
    for tokenizer, flags in (("bytes", []), ("gpt2", ["--tokenizer=gpt2"])):
        run(tmp_path, f"--dataset={tokenizer}", "--data_files=a.txt", "--tokenizer=auto", *flags)
        run(tmp_path, f"--dataset={tokenizer}", "--data_files=a.txt", "--tokenizer=auto")
        assert read_manifest(tmp_path / "data" / tokenizer)["tokenizer"] == tokenizer


def test_the_bar_ends_with_the_bytes_and_tokens_of_all(tmp_path, monkeypatch):
    class Bar(tqdm.tqdm):
        def set_postfix_str(self, text, refresh=True):
            said.append((self, text))
    said = []
    write_jsonl(tmp_path / "a.jsonl", ["text " * 1000] * 400)
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.chdir(tmp_path)
    prepare.main(["--dataset=d", "--data_files=a.jsonl", "--tokenizer=bytes"])
    bar, text = said[-1]
    assert bar.n == bar.total == (tmp_path / "a.jsonl").stat().st_size and text.startswith("2.0M tokens, ")


# ---------------------------------------------------------------------------------------------------------------------
# Kills, restarts, rot.

def workers_of(process):
    """The ids of the worker processes of a run."""
    found = []
    with contextlib.suppress(OSError):                                            # one that ends meanwhile
        for i in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if b"spawn_main" in Path(f"/proc/{i}/cmdline").read_bytes():
                found.append(int(i))
    return found


@pytest.mark.slow
def test_killed_at_random_moments_and_restarted_it_ends_with_the_same_bytes(tmp_path):
    flag, killed = write_c4(tmp_path, shards=6, documents=3000), tmp_path / "killed/c4"
    begin = time.monotonic()
    run(tmp_path, flag, "--data_dir=whole", "--processes=2")
    duration = time.monotonic() - begin
    kills, worker_kills, stages, tries = 0, 0, set(), 0
    while kills < 20 or worker_kills < 2 or len(stages) < 3:
        tries += 1
        assert tries < 100, (kills, worker_kills, stages)
        if len(list(killed.glob("*-*.json"))) == 7:
            shutil.rmtree(killed)  # nothing is left to do: once more from the start
        process = start(tmp_path, flag, "--data_dir=killed", "--processes=2")
        while tries % 4 and process.poll() is None and not workers_of(process):
            time.sleep(0.001)  # most kills come when workers are there
        time.sleep(random.uniform(0, duration / 4 if tries % 4 else duration))
        workers = workers_of(process) if tries % 2 and process.poll() is None else []  # by turns: the run, a worker
        with contextlib.suppress(ProcessLookupError):
            os.kill(random.choice(workers or [process.pid]), signal.SIGKILL)
        _, err = process.communicate()
        said = "a worker process was killed" in err and err.count("\n") == 1
        assert process.returncode in ([2] if workers and said else [-signal.SIGKILL]) + [0], err  # 0: too late
        kills, worker_kills = kills + (process.returncode != 0), worker_kills + (process.returncode == 2)
        for path in killed.glob("*.bin"):
            assert path.read_bytes() == (tmp_path / "whole/c4" / path.name).read_bytes(), "half-written"
        stages.add((len(list(killed.glob("*-*.json"))), len(list(killed.glob("*.tmp")))))
    run(tmp_path, flag, "--data_dir=killed", "--processes=2")
    assert contents(killed) == contents(tmp_path / "whole/c4") and not list(killed.glob("*.tmp"))


def test_a_killed_run_leaves_no_process_that_writes_on(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["word " * 2000] * 20_000)
    process = start(tmp_path, "--dataset=x", "--data_files=a.jsonl", "--processes=1")
    while not list(tmp_path.glob("data/x/*.tmp")):
        time.sleep(0.01)
    process.kill()
    process.communicate()  # returns when the last process that holds the pipe has ended
    sizes = [path.stat().st_size for path in tmp_path.glob("data/x/*")]
    time.sleep(0.5)
    assert sizes == [path.stat().st_size for path in tmp_path.glob("data/x/*")]
    assert not list(tmp_path.glob("data/x/*.json"))


STUCK = '''
import os, pathlib, signal, sys, threading, time
import prepare

def task(index, source, options):
    if index:
        stop = lambda: (pathlib.Path("stopped").touch(), os.kill(os.getpid(), signal.SIGSTOP))
        return threading.Timer(0.1, stop).start()
    while not pathlib.Path("stopped").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    raise prepare.UserError("this source fails")

if __name__ == "__main__":
    prepare.encode_source, prepare.GROUP = task, 1
    prepare.command(lambda: prepare.main(sys.argv[1:]))
'''


def test_an_idle_worker_that_never_answers_does_not_hang_a_run_whose_source_fails(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    write_jsonl(tmp_path / "b.jsonl", ["b"])
    (tmp_path / "stuck.py").write_text(STUCK)
    command = [sys.executable, "stuck.py", "--dataset=x", "--data_files=*.jsonl", "--tokenizer=bytes", "--processes=2"]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stderr=subprocess.PIPE, start_new_session=True,
                               env=os.environ | {"PYTHONPATH": str(PROGRAM.parent)})
    try:
        _, err = process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, err) == (2, "stuck.py: this source fails\n")


def test_a_restart_skips_what_is_whole_and_mends_what_is_not(tmp_path):
    flag, folder = write_c4(tmp_path), tmp_path / "data/c4"
    run(tmp_path, flag)
    before, untouched = contents(folder), (folder / "train-00001.bin").stat().st_ino
    (folder / "train-00000.bin").write_bytes(before["train-00000.bin"][:-1])
    flip(folder / "train-00002.bin", 100)
    flip(folder / "val-00003.json", 50)
    (folder / "manifest.json").unlink()
    (folder / "train-00009.bin.0123abcd.tmp").write_bytes(b"left by a kill")
    run(tmp_path, flag)
    assert contents(folder) == before and (folder / "train-00001.bin").stat().st_ino == untouched


def test_other_options_in_the_same_folder_are_refused_with_the_difference(tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(100)])
    ask = ["--dataset=d", "--data_files=a.jsonl b.jsonl"]
    run(tmp_path, *ask)
    before = contents(tmp_path / "data/d")
    assert "val_fraction 0.05, not 0.5" in refusal(tmp_path, *ask, "--val_fraction=0.5")
    assert "source b.jsonl, not among the files" in refusal(tmp_path, "--dataset=d", "--data_files=a.jsonl")
    assert "source a.jsonl, not b.jsonl" in refusal(tmp_path, "--dataset=d", "--data_files=b.jsonl")
    assert contents(tmp_path / "data/d") == before


def test_after_a_run_that_failed_the_corrected_command_makes_what_it_would_have_made_alone(tmp_path):
    write_jsonl(tmp_path / "good.jsonl", [f"good {i}" for i in range(100)])
    write_jsonl(tmp_path / "other.jsonl", [f"other {i}" for i in range(100)])
    (tmp_path / "bad.jsonl").write_text("no json\n" * 100)
    assert "bad.jsonl: not one of 11 records" in refusal(tmp_path, "--dataset=d", "--data_files=*.jsonl", "--processes=1")
    for flags in (["--data_files=good.jsonl"], ["--data_files=g*.jsonl o*.jsonl", "--val_fraction=0.3"]):
        (tmp_path / "data/d/manifest.json").unlink(missing_ok=True)  # as if the run before had failed
        run(tmp_path, "--dataset=d", *flags)
        run(tmp_path, "--dataset=d", *flags, "--data_dir=alone")
        assert contents(tmp_path / "data/d") == contents(tmp_path / "alone/d")
        shutil.rmtree(tmp_path / "alone")


def test_a_source_that_has_changed_is_refused_and_only_it_is_made_anew(tmp_path):
    flag, folder = write_c4(tmp_path, documents=5), tmp_path / "data/c4"
    (tmp_path / "c4-train.00001-of-00003.json.gz").rename(tmp_path / "c4-train.00001.jsonl")
    flag, path = "--data_files=c4-*", tmp_path / "c4-train.00001.jsonl"
    write_jsonl(path, ["a cat"])
    run(tmp_path, flag)
    before, untouched = contents(folder), (folder / "train-00002.bin").stat().st_ino
    os.utime(path, (1, 1))  # no change
    run(tmp_path, flag)
    for text in ("a dog", "a whole dog"):  # the same size and another
        write_jsonl(path, [text])
        assert "delete that record and" in (error := refusal(tmp_path, flag)) and path.name in error
        assert contents(folder) == before
        record = re.search(r"data/c4/\S+\.json", error)[0]
        (tmp_path / record).unlink()
        run(tmp_path, flag)
        before = contents(folder)
        assert text in texts_of(folder, "train") and (folder / "train-00002.bin").stat().st_ino == untouched
        run(tmp_path, "--verify")


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    source = prepare.Source("both-00000", "gone.txt", (("train", str(tmp_path / "gone.txt"), 0, 1),))
    with pytest.raises(UserError, match="gone.txt cannot be read .* the same command continues"):
        source.sha256()


def test_two_tokenizers_are_never_mixed(tmp_path, gpt2):
    flag = write_c4(tmp_path)
    run(tmp_path, flag)
    assert "tokenizer bytes, not gpt2" in refusal(tmp_path, flag, "--tokenizer=gpt2")
    run(tmp_path, flag, "--tokenizer=gpt2", "--data_dir=other")
    shutil.copy(tmp_path / "other/c4/train-00001.json", tmp_path / "data/c4")
    assert "train-00001.json has tokenizer" in refusal(tmp_path, "--verify")


def test_two_runs_in_one_folder_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    with prepare.locked(tmp_path / "data/x"):
        assert "another prepare.py" in refusal(tmp_path, "--dataset=x", "--data_files=a.txt")
        assert "another prepare.py" in refusal(tmp_path, "--dataset=x", "--verify")  # what is half done is not damage
    run(tmp_path, "--dataset=x", "--data_files=a.txt")


def flip(path, position, bit=1):
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= bit
    path.write_bytes(data)


def test_verify_names_what_has_rotted(tmp_path):
    flag, folder = write_c4(tmp_path), tmp_path / "data/c4"
    run(tmp_path, flag)
    assert "all verified" in run(tmp_path, "--verify")
    before = contents(folder)
    for name in before:
        flip(folder / name, random.randrange(10**6), 1 << random.randrange(8))
        assert name in refusal(tmp_path, "--verify")
        (folder / name).unlink()
        assert name == "manifest.json" or name.split(".")[0] in refusal(tmp_path, "--verify")
        (folder / name).write_bytes(before[name])
    assert contents(folder) == before


# ---------------------------------------------------------------------------------------------------------------------
# C4 from the hub, played by a server on this machine.

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serves shards of a small C4 under the hub's own API; yields the environment that leads there."""
    import http.server
    import threading
    files = {}
    for i in range(4):
        files[f"en/c4-train.{i:05d}-of-01024.json.gz"] = [f"train {i} {j}" for j in range(20)]
    for i in range(8):
        files[f"en/c4-validation.{i:05d}-of-00008.json.gz"] = [f"val {i} {j}" for j in range(5)]
    for name, texts in files.items():
        files[name] = gzip.compress(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts), mtime=0)

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self, data, status=200, **headers):
            self.send_response(status)
            for key, value in {"Content-Length": len(data), **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(data)

        def list(self, wanted):
            infos = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                     for name, data in files.items() if wanted(name)]
            self.answer(json.dumps(infos).encode(), Content_Type="application/json")

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.list(lambda name: name in body or name.replace("/", "%2F") in body)

        def do_GET(self):
            if "/tree/" in self.path:
                return self.list(lambda name: True)
            if "/resolve/" not in self.path:
                info = {"id": "allenai/c4", "sha": "0" * 40, "siblings": []}
                return self.answer(json.dumps(info).encode(), Content_Type="application/json")
            data = files[self.path.split("/resolve/")[1].split("/", 1)[1]]
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            self.answer(data[int(first):int(last) + 1], 206)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
           "HF_HUB_DISABLE_TELEMETRY": "1"}
    server.shutdown()


@pytest.mark.slow
def test_machines_share_the_shards_of_c4_and_verify_joins_them(tmp_path, hub):
    run(tmp_path, "--shards=0:2", "--data_dir=one", env=hub)
    run(tmp_path, "--shards=2:4", "--data_dir=two", env=hub)
    run(tmp_path, "--shards=4", "--data_dir=all", env=hub)
    assert texts_of(tmp_path / "one/c4", "train") == [f"train {i} {j}" for i in range(2) for j in range(20)]
    for path in (tmp_path / "two/c4").iterdir():
        shutil.copy(path, tmp_path / "one/c4")
    assert "missing" not in run(tmp_path, "--verify", "--data_dir=one")
    assert contents(tmp_path / "one/c4") == contents(tmp_path / "all/c4")
    for name in ("train-00001.json", "train-00001.bin", "manifest.json"):
        (tmp_path / "one/c4" / name).unlink()  # a shard that was lost in copying
    assert "1 train shards are missing between the first and the last, as 00001" in run(tmp_path, "--verify", "--data_dir=one")


@pytest.mark.slow
def test_a_damaged_shard_of_another_machine_costs_nothing_else_and_its_remedy_is_named(tmp_path, hub):
    folder = tmp_path / "data/c4"
    run(tmp_path, "--shards=4", env=hub)
    before = contents(folder)
    for damaged in ("train-00002.json", "train-00003.bin"):
        (folder / damaged).write_bytes(before[damaged][:50])
        remedy = f"run python prepare.py --dataset=c4 --shards={damaged[10]}:{int(damaged[10]) + 1}\n"
        assert remedy in refusal(tmp_path, "--verify")
        if damaged.endswith(".json"):
            assert remedy in refusal(tmp_path, "--shards=1", env=hub)
        assert contents(folder) == before | {damaged: before[damaged][:50]}
        run(tmp_path, remedy.split()[-1], env=hub)
        assert contents(folder) == before


@pytest.mark.slow
def test_a_finished_c4_needs_no_network_and_takes_more_shards(tmp_path, hub):
    run(tmp_path, env=hub)
    run(tmp_path, env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"})
    run(tmp_path, "--shards=3", env=hub)
    run(tmp_path, "--shards=1:2", env=hub)  # what other runs have made stays
    assert len(texts_of(tmp_path / "data/c4", "train")) == 60 and len(texts_of(tmp_path / "data/c4", "val")) == 40
