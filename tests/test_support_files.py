"""support/files.py: a file is whole or as it was, whatever comes in between."""
import errno
import json
import os
import stat

import pytest
import torch

from configurator import UserError
from support.files import check_target, leftovers, locked, read_json, read_text, replacing, write_json


def test_a_file_is_synced_then_renamed_then_its_folder_is_synced(tmp_path, monkeypatch):
    def fsync(file):
        calls.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("rename"), replace(old, new)))
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("content")
    assert calls == ["file", "rename", "folder"] and (tmp_path / "file").read_text() == "content"


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_bytes(b"old")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt, match="space|^$"):
            with replacing(path) as temporary:
                temporary.write_bytes(b"new")
                raise error
        assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"old"


def test_json_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2.5]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert [*tmp_path.iterdir()] == [path] and json.loads(path.read_text()) == {"a": [1, 2.5]}


def test_nobody_elses_temporary_file_is_touched_not_even_through_a_link(tmp_path):
    (tmp_path / "x.tmp").write_text("the user's")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "y.tmp").symlink_to(tmp_path / "precious")
    for name in ("x", "y"):
        write_json(tmp_path / name, 1)
        assert (tmp_path / name).read_text() == "1\n"
    assert (tmp_path / "x.tmp").read_text() == "the user's" and (tmp_path / "precious").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "x", "x.tmp", "y", "y.tmp"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with replacing(tmp_path / "x") as one, replacing(tmp_path / "x") as two:
        assert one != two and leftovers(tmp_path, "x") and not leftovers(tmp_path, "y")
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "x").read_text() == "one" and [*tmp_path.iterdir()] == [tmp_path / "x"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_sync_a_folder_still_takes_files(tmp_path, monkeypatch, number):
    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:
        with pytest.raises(UserError, match="Input/output error"):
            write_json(tmp_path / "x", 1)
    else:
        write_json(tmp_path / "x", 1)
    assert (tmp_path / "x").read_text() == "1\n"


def test_a_system_that_opens_no_folders_still_takes_files_and_runs(tmp_path, monkeypatch):
    real = os.open

    def no_folders(path, *args, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)
    monkeypatch.setattr(os, "open", no_folders)
    with locked(tmp_path / "out"):
        write_json(tmp_path / "out/x", 1)
    assert (tmp_path / "out/x").exists()


@pytest.mark.parametrize("name", ["nul\0", "file/x", "folder", "n" * 300, "readonly/x"])
def test_a_target_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "readonly").mkdir()
    real = os.open

    def refuses(path, *args, **options):  # root may write everywhere
        if "readonly" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)
    monkeypatch.setattr(os, "open", refuses)
    with pytest.raises(UserError, match="use another --json") as error:
        check_target(tmp_path / name, "json")
    assert str(error.value).count("cannot write") == 1
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / name, 1)
    check_target(tmp_path / "folder/new/x", "json")
    assert not [*(tmp_path / "folder/new").iterdir()]


def test_a_file_that_is_no_earlier_result_is_never_a_target_and_an_empty_one_is(tmp_path):
    def is_ours(path):
        return read_json(path, "figures")
    for name, text in (("notes.txt", "mine"), ("package.json", '{"name": "mine"}'), ("list.json", "[1]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name} exists, and --json wrote no such file: use another --json"):
            check_target(tmp_path / name, "json", is_ours)
        assert (tmp_path / name).read_text() == text
    (tmp_path / "empty").touch()
    write_json(tmp_path / "ours", {"figures": 1})
    for name in ("empty", "ours", "new"):
        check_target(tmp_path / name, "json", is_ours)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout", "fifo"])
def test_a_device_or_a_pipe_is_no_target_since_a_rename_would_replace_it(tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="it is not a file.: use another --json"):
        check_target(tmp_path / path, "json")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_text_with_a_byte_order_mark_is_read_without_it(tmp_path, encoding):
    mark = "\ufeff" if encoding.startswith("utf-16-") else ""
    (tmp_path / "a.txt").write_bytes((mark + "naïve 🙂\n").encode(encoding))
    assert read_text(str(tmp_path / "a.txt")) == "naïve 🙂\n"


@pytest.mark.parametrize("encoding, name", [("latin-1", "CP1252"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"),
                                            ("cp1251", "CP1251")])
def test_another_encoding_is_named_with_what_converts_it(tmp_path, encoding, name):
    text = "Привет, как дела? Это обычный русский текст." if encoding == "cp1251" else "Le café était fermé ce jour-là."
    (tmp_path / "my text.txt").write_bytes(text.encode(encoding) * 3)
    with pytest.raises(UserError, match=rf"not UTF-8 text, perhaps {name}.*iconv -f {name} -t UTF-8 '.*my text.txt'"):
        read_text(str(tmp_path / "my text.txt"))


def test_a_checkpoint_given_as_a_text_is_named_with_the_flags_that_take_it(tmp_path):
    torch.save({"model": {}}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="best.pt holds zip data, not text: --init_from takes a checkpoint, --load_state"):
        read_text(str(tmp_path / "best.pt"))


def test_a_pipe_is_read_to_its_end_and_one_that_nobody_writes_to_does_not_hang(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b"from a pipe")
    os.close(writing)
    assert read_text(f"/dev/fd/{reading}") == "from a pipe"
    os.close(reading)
    os.mkfifo(tmp_path / "fifo")
    assert read_text(str(tmp_path / "fifo")) == ""
    for bad in ("nul\0", str(tmp_path), str(tmp_path / "gone")):
        with pytest.raises(UserError, match="cannot read"):
            read_text(bad)
