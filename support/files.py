"""Files that are whole or not there: what a kill or a full disk leaves is the old file or the new one, never a part.

Nothing here imports torch: prepare.py's workers start in a tenth of a second without it.
"""
import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

from configurator import UserError


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name, which becomes `path` when the block is done: even a power cut leaves the whole new file
    or the whole old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself
        os.close(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        raise UserError(f"cannot write {path} ({reason}): is the disk full? What was there before is intact, and the "
                        "same command goes on") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


class Busy(UserError):
    """Another process is at work in a folder."""

    code = 4


@contextlib.contextmanager
def locked(folder, program="prepare.py", flag="--data_dir"):
    """Makes the folder and lets one run at a time into it; the lock ends with the process, however that ends."""
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise UserError(f"cannot write to {folder} ({getattr(error, 'strerror', error)}): use another {flag}") from None
    try:
        with contextlib.suppress(ImportError, OSError):  # Windows and some network disks have no such locks
            import fcntl
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"another {program} is at work in {folder}: wait until it ends, or use another "
                           f"{flag}") from None
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:  # if nothing came of it
                path.rmdir()
        os.close(handle)


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path, value, indent=None):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n")


def read_json(path, *keys):
    """The dict that write_json wrote; None where there is none, or it is damaged, or lacks a key."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and {*keys} <= {*found} else None


def read_text(path):
    try:
        return (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
