"""Signatures: short hashes of a stage's inputs, and the differences between two sets of inputs."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping

from sclite.records import Row


def digest(value: object) -> str:
    """A short hash of any JSON-serializable value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def differences(before: Mapping[str, object], now: Mapping[str, object], prefix: str = "") -> list[str]:
    """One line per changed input: `sft.learning_rate: 0.0001 before, 0.0002 now`."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{name}.")
        elif old != new:
            both = (old, new)
            hashed = any(isinstance(v, str) and re.fullmatch("[0-9a-f]{16}", v) for v in both)
            shown = ["nothing" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in both]
            found.append(f"{name} changed" if hashed else f"{name}: {shown[0]} before, {shown[1]} now")
    return found


def with_unanswered(inputs: dict[str, object], count: int) -> dict[str, object]:
    """The inputs to sign after `count` failed calls: they match no others, so the next run retries those calls."""
    return {**inputs, "unanswered": count} if count else inputs


def digest_rows(rows: Iterable[Row]) -> str:
    """A short hash of rows, with one of them in memory at a time."""
    found = hashlib.sha256()
    for row in rows:
        found.update(row.model_dump_json().encode())
    return found.hexdigest()[:16]
