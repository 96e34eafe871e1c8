"""Files that are whole or not there: what a kill or a full disk leaves is the old file or the new one, never a part.

Nothing here imports torch: prepare.py's workers start in a tenth of a second without it.
"""
import codecs
import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import sys
from pathlib import Path

from configurator import UserError, shell

# ----------------------------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name, which becomes `path` when the block is done: even a power cut leaves the whole new file
    or the whole old one."""
    temporary = None
    try:
        temporary = new_file_beside(path)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)  # the rename itself
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        raise cannot_write(path, error) from None
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                temporary.unlink()


def new_file_beside(path):
    """An empty file that nobody else has: FILE.1b4f09aa.tmp. A user's FILE.tmp, or a link of that name, stays."""
    temporary = path.with_name(f"{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except ValueError as error:  # a NUL byte in the name
        raise OSError(errno.EINVAL, str(error)) from None
    return temporary


def leftovers(folder, name):
    """The temporary files that killed runs left when they wrote `name`, which may be a pattern of glob."""
    ours = re.compile(r".*\.[0-9a-f]{8}\.tmp", re.DOTALL)
    return [path for path in Path(folder).glob(f"{name}.*.tmp") if ours.fullmatch(path.name)]


def cannot_write(path, error):
    reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
    refused = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR)
    question = "do you have permission?" if refused else "is the disk full?"
    return UserError(f"cannot write {path} ({reason}): {question} What was there before is intact, and the same "
                     "command continues")


def sync(path):
    """fsync of a file or folder, where there is such a thing: Windows opens no folders, some file systems sync none."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        if folder:
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(handle)


def check_target(path, flag, is_ours=None):
    """UserError where path could not be written, before the work of which it is to hold the result; also where a file
    is there that is_ours(path) does not know as an earlier result of this kind."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        if path.parent == Path("/dev") or path.exists() and not path.is_file():
            raise OSError(0, "it is not a file")                                  # to rename onto /dev/null breaks it
        new_file_beside(path).unlink()
        empty = not path.exists() or not path.stat().st_size
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path} ({reason}): use another --{flag}") from None
    if is_ours and not empty and not is_ours(path):
        raise UserError(f"{path} exists, and --{flag} wrote no such file: use another --{flag}")


class Busy(UserError):
    """Another process is running in a folder. support/side_by_side.py asks for an exit code of its own for that."""

    @property
    def code(self):
        return int(os.environ.get("LAT_BUSY_CODE", UserError.code))


@contextlib.contextmanager
def locked(folder, program="prepare.py", flag="--data_dir"):
    """Makes the folder and lets one run at a time into it; the lock ends with the process, however that ends."""
    handle = None
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise UserError(f"cannot write to {folder} ({getattr(error, 'strerror', error)}): use another {flag}") from None
    try:
        with contextlib.suppress(ImportError, OSError):  # Windows and some network disks have no such locks
            import fcntl
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"another {program} is running in {folder}: wait until it ends, or use another "
                           f"{flag}") from None
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:  # if nothing came of it
                path.rmdir()
        if handle is not None:
            os.close(handle)


def write_json(path, value, indent=None):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path, *keys):
    """The dict that write_json wrote; None where there is none, or it is damaged, or lacks a key."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and {*keys} <= {*found} else None


def read_text(path):
    """The text of a file, or of standard input for "-", without its byte-order mark; UserError if it is not text."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else read_bytes(path)
    except AttributeError:  # sys.stdin is None
        raise UserError("standard input is closed: give a file instead of -") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None
    encoding, mark = check_text(path, data)
    try:
        return data[mark:].decode(encoding)
    except ValueError:
        if mark and encoding != "utf-8":
            raise UserError(f"{path} begins as {encoding.upper()} text, but the rest of it is not: it is cut or "
                            "damaged") from None
        raise not_text(path, data) from None


def read_bytes(path):
    """Those of a file; of a pipe, to its end. A pipe without a writer is empty, where open() would wait for ever."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        if hasattr(os, "O_NONBLOCK"):
            os.set_blocking(handle, True)
        return file.read()


MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
         codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}  # UTF-16's begins UTF-32's
FORMATS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\3\4": "zip",
           b"PAR1": "Parquet", b"%PDF-": "PDF"}
# Codecs that charset_normalizer may guess, by names that iconv has too, with - for _.
CODECS = ("cp1251", "koi8_r", "gb18030", "big5", "cp932", "euc_jp", "cp949", "cp1253", "cp1255", "cp1256", "cp874",
          "cp1250", "cp1254")


def encoding_of(head):
    """The encoding of a text that begins with these bytes, and how many of them are its byte-order mark."""
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def check_text(path, head):
    """As encoding_of; UserError where a file that begins so is no text."""
    for begin, name in FORMATS.items():
        if head.startswith(begin):
            fix = "unpack or convert it first"
            if b"/data.pkl" in head[:300]:                                        # what torch.save wrote
                fix = "--init_from takes a checkpoint, --load_state a state"
            raise UserError(f"{path} holds {name} data, not text: {fix}")
    encoding, mark = encoding_of(head)
    if encoding == "utf-8" and has_many_nuls(head):
        raise not_text(path, head)
    return encoding, mark


def has_many_nuls(data):
    """As UTF-16 without a byte-order mark has, and files that are no text."""
    head = data[:1 << 16]
    return head.count(0) * 10 > len(head)


def likely_encoding(data):
    """What the bytes of a text may be, which are not UTF-8, by a name that iconv knows too; "" if there is no telling.

    Up to a third beyond ASCII means a Western European language; the rest is left to charset_normalizer."""
    data = data[:1 << 16]
    if has_many_nuls(data):
        return "UTF-16LE" if data[1::2].count(0) >= data[::2].count(0) else "UTF-16BE"
    if len(data.translate(None, bytes(range(128)))) * 3 < len(data):
        return "CP1252"
    try:
        from charset_normalizer import from_bytes  # comes with tiktoken
        best = from_bytes(data, cp_isolation=CODECS).best()
    except ImportError:
        best = None
    return best.encoding.upper().replace("_", "-") if best else ""


def not_text(path, data):
    """The error for a file whose bytes are not UTF-8."""
    name = likely_encoding(data)
    common = {"CP1252": " (Latin-1, Western European)", "UTF-16LE": " without a byte-order mark"}.get(name, "")
    guess = f", perhaps {name}{common}" * bool(name)
    source, iconv = shell(str(path)), f"iconv -f {name or 'ENCODING'} -t UTF-8"
    fix = f"convert it with {iconv} {source}"
    if str(path).lower().endswith(".gz"):
        fix = f"convert it with gzip -dc {source} | {iconv}"
    if str(path).lower().endswith(".parquet"):
        fix = "write it as strings, which are UTF-8"
    return UserError(f"{path} is not UTF-8 text{guess}: if it is text, {fix}")
