"""Errors that a user can fix, each with a message, a hint and an exit code."""

from collections.abc import Mapping
from typing import Any

DONE, FAILED, USAGE, DATA, BUDGET, DEVICE, NETWORK, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130


class ScliteError(Exception):
    """An error that the user can fix: `message` says what is wrong and where, `hint` what to type or change.

    The command line prints both and exits with `code`; with --json, `details` are part of the object.
    """

    code = FAILED
    details: Mapping[str, Any] = {}

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint


class DeclinedError(ScliteError):
    """The user declined; nothing failed (exit code 0)."""

    code = DONE


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
    """No such GPU, not enough memory, or a missing GPU package (exit code 5)."""

    code = DEVICE


class GpuMemoryError(DeviceError):
    """Out of GPU memory at a micro-batch size (exit code 5)."""

    def __init__(self, stage: str, micro_batch: int):
        super().__init__(
            f"{stage}: out of GPU memory at micro-batch size {micro_batch}",
            f"lower {stage}.max_length{' or lora.r' * (stage == 'sft')}; `sclite train --plan` shows what fits",
        )
        self.stage, self.micro_batch = stage, micro_batch

    def __reduce__(self):  # pickled by isolation, with both arguments
        return GpuMemoryError, (self.stage, self.micro_batch)


class NetworkError(ScliteError):
    """The Hub, a teacher or an endpoint cannot be reached (exit code 6)."""

    code = NETWORK


class TeacherError(NetworkError):
    """A teacher or an endpoint cannot be reached or refuses a request (exit code 6)."""
