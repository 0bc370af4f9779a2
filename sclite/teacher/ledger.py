"""The ledger: every reply that was paid for, kept by what was asked, so that nothing is paid for twice."""

import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sclite.errors import DataFault
from sclite.run import digest

FILE = "ledger.sqlite"
_FIELDS = "text, finish_reason, prompt_tokens, completion_tokens, cost_usd, seconds"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    key TEXT PRIMARY KEY,
    stage TEXT NOT NULL,
    model TEXT NOT NULL,
    state TEXT NOT NULL,
    text TEXT NOT NULL,
    finish_reason TEXT NOT NULL,
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    cost_usd REAL,
    seconds REAL NOT NULL
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Entry:
    """One reply as it came. Tokens and cost are None where the endpoint or the price list does not say."""

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: float | None
    seconds: float


def request_key(
    model: str,
    api_base: str,
    messages: Sequence[Mapping[str, str]],
    parameters: Mapping[str, Any],
    sample: int,
    repair: int,
) -> str:
    """What makes two requests the same. The second reply to the same words is another sample, or another repair."""
    asked = [model, api_base.rstrip("/"), [dict(m) for m in messages], dict(parameters), sample, repair]
    return digest(asked)


class Ledger:
    """The SQLite file of a run. One process at a time (Run.hold); any thread of it.

    `spent_usd` is what all its replies have cost, as far as that is known.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(
                "PRAGMA synchronous=FULL"
            )  # a reply that was paid for outlives a power cut
            self._database.execute(_SCHEMA)
        except sqlite3.Error as error:
            raise DataFault(
                f"{self.path} cannot be opened: {error}",
                "move it away; every reply is then asked for again",
            ) from error
        self.spent_usd: float = self.totals()["cost_usd"]

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def get(self, key: str) -> Entry | None:
        """The reply to this request, None where it was never asked."""
        with self._lock:
            row = self._database.execute(f"SELECT {_FIELDS} FROM requests WHERE key = ?", (key,)).fetchone()
        return Entry(*row) if row else None

    def put(self, key: str, entry: Entry, stage: str = "", model: str = "") -> None:
        """Write a reply; it is on disk when this returns. Raises DataFault where it cannot be written."""
        values = (key, stage, model, "replied", *(getattr(entry, name) for name in _FIELDS.split(", ")))
        with self._lock:
            try:
                self._database.execute("INSERT OR REPLACE INTO requests VALUES (?,?,?,?,?,?,?,?,?,?)", values)
            except sqlite3.Error as error:
                raise DataFault(
                    f"{self.path} cannot be written: {error}", "see that its disk has room"
                ) from error
            self.spent_usd += entry.cost_usd or 0.0

    def totals(self, stage: str | None = None) -> dict[str, Any]:
        """Requests, tokens and cost of one stage or of all; `unpriced` requests are those whose cost is unknown."""
        where, values = ("", ()) if stage is None else (" WHERE stage = ?", (stage,))
        with self._lock:
            row = self._database.execute(
                "SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0), "
                "COALESCE(SUM(cost_usd), 0.0), COUNT(*) - COUNT(cost_usd) FROM requests" + where,
                values,
            ).fetchone()
        names = ("requests", "prompt_tokens", "completion_tokens", "cost_usd", "unpriced")
        return dict(zip(names, row, strict=True))

    @classmethod
    def reading(cls, path: Path | str) -> "Ledger":
        """The ledger for reading alone, also while another process writes it; nothing beside it is made or changed.

        Raises DataFault where it is absent or no ledger.
        """
        ledger = cls.__new__(cls)
        ledger.path, ledger._lock = Path(path), threading.Lock()
        # without a log nobody has it open; SQLite, not told so, would leave an empty log and its index behind
        log = ledger.path.with_name(f"{ledger.path.name}-wal")
        mode = "mode=ro" if log.exists() else "mode=ro&immutable=1"
        try:
            ledger._database = sqlite3.connect(
                f"{ledger.path.absolute().as_uri()}?{mode}", uri=True, check_same_thread=False
            )
            ledger.spent_usd = ledger.totals()["cost_usd"]
        except sqlite3.Error as error:
            raise DataFault(f"{ledger.path} cannot be read: {error}", "see that it is a ledger") from error
        return ledger
