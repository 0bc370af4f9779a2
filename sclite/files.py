"""Files that are whole or absent, whatever happens meanwhile, and their hashes."""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, whole or in pieces, beside, force to disk, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name[:50]}.{os.getpid()}.new")  # as long as fits, whatever the name
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """A short hash of a file's bytes; empty where it is absent. A file that has not changed is read once."""
    if not path.is_file():
        return ""
    found = path.stat()
    return _digest(path.resolve(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=256)
def _digest(path: Path, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def line_at(file: BinaryIO, begin: int) -> bytes:
    file.seek(begin)
    return file.readline()


def end_last_line(file: BinaryIO) -> None:
    """Cut a half-written last line off; a whole one, as an editor may leave it, gets its newline."""
    file.seek(0)
    content = file.read()
    begin = content.rfind(b"\n") + 1
    try:
        json.loads(content[begin:])
    except ValueError:
        file.truncate(begin)
    else:
        file.write(b"\n")
    file.seek(0, os.SEEK_END)
