"""support/files.py: a file is whole or as it was, whatever comes in between."""
import json
import os
import stat

import pytest

from configurator import UserError
from support.files import replacing, write_json


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
