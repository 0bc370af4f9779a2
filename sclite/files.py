"""Atomic writes and file hashes."""

import hashlib
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write text (whole or in pieces) to a temporary file, sync and rename it: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}.new")  # truncated, so that any name fits
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """A short hash of a file's bytes, cached while the file is unchanged; empty if the file is missing."""
    if not path.is_file():
        return ""
    found = path.stat()
    return _digest(path.resolve(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=256)
def _digest(path: Path, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
