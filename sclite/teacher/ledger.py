"""The ledger: every request sent and every reply paid for, so that nothing is paid for twice."""

import sqlite3
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sclite import console
from sclite.errors import DataError

FILE = "ledger.sqlite"
REPLIED, REFUSED, EMPTY = "replied", "refused", "empty"
_FIELDS = ("text", "finish_reason", "prompt_tokens", "completion_tokens", "cost_usd", "max_tokens")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    key TEXT PRIMARY KEY,
    stage TEXT NOT NULL,
    model TEXT NOT NULL,
    state TEXT NOT NULL,                    -- sent, replied, empty, refused, failed, given_up
    sent INTEGER NOT NULL,                  -- how often it was sent
    given_up INTEGER NOT NULL DEFAULT 0,    -- how often its reply was no longer awaited
    reserved_usd REAL NOT NULL DEFAULT 0,   -- the maximum cost of one sending
    lost_usd REAL NOT NULL DEFAULT 0,       -- cost of earlier sendings: empty replies, and the maximum for those given up
    text TEXT NOT NULL DEFAULT '',
    finish_reason TEXT NOT NULL DEFAULT '',
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    cost_usd REAL,
    max_tokens INTEGER                      -- the limit with which it was sent, if any
) WITHOUT ROWID
"""
_SENT = """INSERT INTO requests (key, stage, model, state, sent, reserved_usd) VALUES (?, ?, ?, 'sent', 1, ?)
ON CONFLICT (key) DO UPDATE SET state = 'sent', sent = sent + 1, reserved_usd = excluded.reserved_usd,
lost_usd = lost_usd + COALESCE(cost_usd, 0), cost_usd = NULL"""
_REPLY = """UPDATE requests SET state = ?, text = ?, finish_reason = ?, prompt_tokens = ?, completion_tokens = ?,
cost_usd = ?, max_tokens = ? WHERE key = ?"""
_FAILED = "UPDATE requests SET state = 'failed', text = ? WHERE key = ?"
_LOST = "UPDATE requests SET state = 'given_up', given_up = given_up + 1, lost_usd = lost_usd + reserved_usd, text = ?"
_TOTAL_NAMES = (
    "requests", "sent", "given_up", "prompt_tokens", "completion_tokens", "cost_usd", "lost_usd", "unpriced",
)  # fmt: skip
_TOTALS = """SELECT COALESCE(SUM(state IN ('replied', 'empty')), 0), COALESCE(SUM(sent), 0), COALESCE(SUM(given_up), 0),
COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0), COALESCE(SUM(cost_usd), 0.0),
COALESCE(SUM(lost_usd), 0.0), COALESCE(SUM(state IN ('replied', 'empty') AND cost_usd IS NULL), 0) FROM requests"""
_WRITE_ERRORS = (sqlite3.Error, OverflowError, ValueError)
_READ_ERRORS = (sqlite3.Error, UnicodeDecodeError)  # the latter from the message about a damaged schema


def _connect(path: Path | str, **options: Any) -> sqlite3.Connection:
    """A connection that can read texts with invalid UTF-8."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, **options)
    database.text_factory = lambda text: text.decode("utf-8", "replace")
    return database


def _salvage(path: Path, why: str) -> None:
    """Move a damaged ledger aside and copy its readable rows into a new one."""
    damaged = path.with_name(f"{path.name}.damaged")
    for end in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            path.with_name(path.name + end).rename(f"{damaged}{end}")
    with closing(_connect(damaged)) as old, closing(_connect(path)) as new:
        new.execute(_SCHEMA)
        new.execute("BEGIN")
        for order in ("ASC", "DESC"):  # up to the damage, from both ends
            with suppress(*_READ_ERRORS):
                for row in old.execute(f"SELECT * FROM requests ORDER BY key {order}"):
                    new.execute(f"INSERT OR IGNORE INTO requests VALUES ({', '.join('?' * len(row))})", row)
        new.commit()
        kept = new.execute("SELECT COUNT(*) FROM requests").fetchone()[0]
    text = f"{path} was damaged ({why}): recovered {kept} requests; the damaged file is now {damaged}"
    console.note(f"[yellow]warning:[/] {console.escape(text)}")


def _hint(error: Exception, path: Path) -> str:
    """How to fix a ledger that does not open: only a damaged one may be moved."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "another program has it open: close it, then re-run to resume"
    damaged = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT)
    if code in damaged:
        return f"restore a backup, or `mv {path} {path}.damaged`: finished rows are kept, the others are paid for again"
    return "check its permissions and the free disk space, then re-run to resume"


@dataclass(frozen=True)
class Entry:
    """One reply, or the refusal of a request."""

    text: str
    finish_reason: str  # REFUSED: `text` says why; EMPTY: paid for, but the request is sent again next time
    prompt_tokens: int | None  # None if the endpoint does not report it
    completion_tokens: int | None
    cost_usd: float | None  # None if the price is unknown
    max_tokens: int | None = None  # the limit with which it was requested


class Ledger(AbstractContextManager["Ledger"]):
    """The SQLite file of a run, open in one process (Run.lock). Reads use a connection that never waits for the disk.

    Writes are queued until `flush`, which may be called in a thread; after a failed one, nothing more is written.
    `spent_usd` is the known cost of all replies, plus the maximum cost of requests given up after sending.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._pending: list[tuple[str, tuple]] = []
        self._error: DataError | None = None
        self._writing = threading.Lock()
        try:
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_CORRUPT:
                    raise
                self._database.close()
                _salvage(self.path, str(error))
                self._open()
        except _READ_ERRORS as error:
            raise DataError(f"{self.path} cannot be opened: {error}", _hint(error, self.path)) from error

    def _open(self) -> None:
        database = self._database = _connect(self.path)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")  # a paid reply survives a power failure
        database.execute(_SCHEMA)
        # the process that sent these was killed before the replies arrived
        database.execute(f"{_LOST} WHERE state = 'sent'", ("the process ended",))
        self._reader = _connect(self.path)
        totals = dict(zip(_TOTAL_NAMES, self._reader.execute(_TOTALS).fetchone(), strict=True))
        self.spent_usd: float = totals["cost_usd"] + totals["lost_usd"]

    @classmethod
    def reading(cls, path: Path | str) -> "Ledger":
        """Open a ledger read-only, even while another process writes to it. Raises DataError if it is missing or invalid."""
        ledger = cls.__new__(cls)
        ledger.path, ledger._pending, ledger._error, ledger._writing = Path(path), [], None, threading.Lock()
        # no log: no process has it open; without `immutable`, SQLite would leave an empty log and its index behind
        log = ledger.path.with_name(f"{ledger.path.name}-wal")
        mode = "mode=ro" if log.exists() else "mode=ro&immutable=1"
        try:
            address = f"{ledger.path.absolute().as_uri()}?{mode}"
            ledger._database = ledger._reader = _connect(address, uri=True)
            ledger.totals()
        except _READ_ERRORS as error:
            raise DataError(f"{ledger.path} cannot be read: {error}", _hint(error, ledger.path)) from error
        return ledger

    def __exit__(self, *_: object) -> None:
        """Write what is queued and close the file."""
        try:
            self.flush()
        finally:
            self._reader.close()
            self._database.close()  # the last one, so that it removes its log

    # -- reading ---------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        """The reply to this request, or its refusal; None if there is neither on disk."""
        query = f"SELECT {', '.join(_FIELDS)} FROM requests WHERE key = ? AND state IN (?, ?)"
        row = self._row(query, (key, REPLIED, REFUSED))
        return Entry(*row) if row else None

    def cost_usd(self, stage: str) -> float | None:
        """The cost of a stage's replies; None if that of one is unknown."""
        totals = self.totals(stage)
        return None if totals["unpriced"] else totals["cost_usd"]

    def totals(self, stage: str | None = None) -> dict[str, float]:
        """Totals of one stage or of all: `requests` with a reply, times `sent`, `given_up` after sending, tokens, cost.

        `lost_usd` is the maximum cost of those given up, `unpriced` counts replies of unknown cost. These and the cost of a
        stage include its inspections.
        """
        self.flush()
        where, values = ("", ()) if stage is None else (" WHERE stage = ?", (stage,))
        found = dict(zip(_TOTAL_NAMES, self._row(_TOTALS + where, values) or (), strict=True))
        if stage is not None:
            inspections = self._row(_TOTALS + where, (f"{stage} inspection",)) or ()
            for name, value in zip(_TOTAL_NAMES[-3:], inspections[-3:], strict=True):
                found[name] += value
        return found

    def _row(self, statement: str, values: tuple) -> tuple | None:
        try:
            return self._reader.execute(statement, values).fetchone()
        except _READ_ERRORS as error:
            raise DataError(f"{self.path} cannot be read: {error}", _hint(error, self.path)) from error

    # -- writing ---------------------------------------------------------------------------------------------------

    def sent(self, key: str, stage: str, model: str, reserved_usd: float = 0.0) -> None:
        """Record a request before it is sent; `reserved_usd` is its maximum cost."""
        self._pending.append((_SENT, (key, stage, model, reserved_usd)))

    def put(self, key: str, entry: Entry) -> None:
        """Record the reply to a request that was sent, or its refusal."""
        state = entry.finish_reason if entry.finish_reason in (REFUSED, EMPTY) else REPLIED
        self.spent_usd += entry.cost_usd or 0.0
        self._pending.append((_REPLY, (state, *(getattr(entry, name) for name in _FIELDS), key)))

    def failed(self, key: str, why: str) -> None:
        """Record that a request failed at no cost: an error status, or no server."""
        self._pending.append((_FAILED, (why, key)))

    def given_up(self, key: str, why: str, reserved_usd: float = 0.0) -> None:
        """Record that a reply is no longer awaited; it may have been generated, and charged for, anyway."""
        self.spent_usd += reserved_usd
        self._pending.append((f"{_LOST} WHERE key = ?", (why, key)))

    def flush(self) -> None:
        """Write what is queued in one transaction; after a failure row by row, and from then on nothing."""
        with self._writing:
            writes = self._pending[:] if self._error is None else []
            try:
                if writes:
                    self._commit(writes)
            except _WRITE_ERRORS as error:
                self._error = DataError(
                    f"{self.path} cannot be written: {error}",
                    "check the free disk space and that no other program has it open; written rows are kept, re-run to "
                    "resume",
                )
                for write in writes:
                    with suppress(*_WRITE_ERRORS):
                        self._commit([write])
            del self._pending[: len(writes)]  # only now: an interrupt before it loses no row
            if self._error is not None:
                raise self._error

    def _commit(self, writes: Sequence[tuple[str, tuple]]) -> None:
        with self._database:  # commits, or rolls back
            self._database.execute("BEGIN")
            for statement, values in writes:
                self._database.execute(statement, values)
