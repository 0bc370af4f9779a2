"""Errors that a user can fix: each has a message, a hint and an exit code."""

import errno
from collections.abc import Mapping
from typing import Any

DONE, FAILED, USAGE, DATA, BUDGET, DEVICE, NETWORK, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130


class ScliteError(Exception):
    """Something went wrong that the user can fix.

    `message` says what is wrong and where, `hint` what to type or change next. The command line prints both and ends
    with `code`. `details` are further keys of the JSON object that is printed under --json.
    """

    code = FAILED
    details: Mapping[str, Any] = {}

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ScliteError):
    """A wrong option or configuration key (exit code 2)."""

    code = USAGE


class DataError(ScliteError):
    """A missing, empty or malformed file, or rows that cannot be used (exit code 3)."""

    code = DATA


class BudgetError(ScliteError):
    """A spending limit was reached (exit code 4)."""

    code = BUDGET


class DeviceError(ScliteError):
    """No such card, not enough memory, or a missing GPU package (exit code 5)."""

    code = DEVICE


class GpuMemoryError(DeviceError):
    """The card has too little memory for so many rows in one forward pass (exit code 5)."""

    def __init__(self, stage: str, micro_batch: int):
        super().__init__(
            f"{stage}: the card has too little memory for {micro_batch} row{'s' * (micro_batch > 1)} at once",
            f"lower {stage}.max_length or lora.r; `sclite train --plan` shows what fits",
        )
        self.stage, self.micro_batch = stage, micro_batch

    def __reduce__(self):  # so that it comes whole from another process
        return GpuMemoryError, (self.stage, self.micro_batch)


class NetworkError(ScliteError):
    """A hub, teacher or endpoint that cannot be reached (exit code 6)."""

    code = NETWORK


class TeacherError(NetworkError):
    """A teacher or endpoint that cannot be reached or refuses (exit code 6)."""


def from_os_error(error: OSError) -> ScliteError:
    """What the operating system refused, as an error with a hint."""
    what = f"{error.filename}: " if error.filename else ""
    message = f"{what}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ScliteError(message, "make room and run the same command again: it resumes")
    if error.errno == errno.ENAMETOOLONG:
        return UsageError(message, "use a shorter name")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(message, "check its permissions, or name another folder with --run")
    return ScliteError(message, "run the same command again: it resumes")
