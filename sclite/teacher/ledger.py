"""The ledger: every request sent and every reply paid for, so that nothing is paid for twice."""

import sqlite3
import threading
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from sclite import console
from sclite.errors import DataError

FILE = "ledger.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    key TEXT PRIMARY KEY,
    stage TEXT NOT NULL,
    model TEXT NOT NULL,
    state TEXT NOT NULL,                    -- sent, replied, failed, given_up
    sent INTEGER NOT NULL,                  -- how often it was sent
    given_up INTEGER NOT NULL DEFAULT 0,    -- how often its reply was no longer awaited
    reserved_usd REAL NOT NULL DEFAULT 0,   -- the maximum cost of one sending
    lost_usd REAL NOT NULL DEFAULT 0,       -- cost of earlier replies, and the maximum for those given up
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
_REPLY = """UPDATE requests SET state = 'replied', text = ?, finish_reason = ?, prompt_tokens = ?, completion_tokens = ?,
cost_usd = ?, max_tokens = ? WHERE key = ?"""
_FAILED = "UPDATE requests SET state = 'failed', text = ? WHERE key = ?"
_LOST = "UPDATE requests SET state = 'given_up', given_up = given_up + 1, lost_usd = lost_usd + reserved_usd, text = ?"
_GET = """SELECT text, finish_reason, prompt_tokens, completion_tokens, cost_usd, max_tokens FROM requests
WHERE key = ? AND state = 'replied'"""
_TOTALS = """SELECT COALESCE(SUM(state = 'replied'), 0) AS requests, COALESCE(SUM(sent), 0) AS sent,
COALESCE(SUM(given_up), 0) AS given_up, COALESCE(SUM(prompt_tokens), 0) AS prompt_tokens,
COALESCE(SUM(completion_tokens), 0) AS completion_tokens, TOTAL(cost_usd) AS cost_usd, TOTAL(lost_usd) AS lost_usd,
COALESCE(SUM(state = 'replied' AND cost_usd IS NULL), 0) AS unpriced FROM requests"""

_READ_ERRORS = (sqlite3.Error, UnicodeDecodeError)  # the latter from the message about a damaged schema


def _connect(path: Path | str, **options: Any) -> sqlite3.Connection:
    """A connection that can read texts with invalid UTF-8."""
    database = sqlite3.connect(path, check_same_thread=False, **options)
    database.text_factory = lambda text: text.decode("utf-8", "replace")
    database.row_factory = sqlite3.Row
    return database


def _salvage(path: Path, why: str) -> None:
    """Move a damaged ledger aside and copy its readable rows into a new one."""
    damaged = path.with_name(f"{path.name}.damaged")
    for end in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            path.with_name(path.name + end).rename(f"{damaged}{end}")
    with closing(_connect(damaged)) as old, closing(_connect(path)) as new:
        new.execute(_SCHEMA)
        for order in ("ASC", "DESC"):  # up to the damage, from both ends
            with suppress(*_READ_ERRORS):
                for row in old.execute(f"SELECT * FROM requests ORDER BY key {order}"):
                    new.execute(f"INSERT OR IGNORE INTO requests VALUES ({', '.join('?' * len(row))})", row)
        new.commit()
        kept = new.execute("SELECT COUNT(*) FROM requests").fetchone()[0]
    text = f"{path} was damaged ({why}): recovered {kept} requests; the damaged file is now {damaged}"
    console.note(f"[yellow]warning:[/] {console.escape(text)}")


@dataclass(frozen=True)
class Entry:
    """One reply."""

    text: str
    finish_reason: str
    prompt_tokens: int | None  # None if the endpoint does not report it
    completion_tokens: int | None
    cost_usd: float | None  # None if the price is unknown
    max_tokens: int | None = None  # the limit with which it was requested


class Ledger(AbstractContextManager["Ledger"]):
    """The SQLite file of a run, open for writing in one process (Run.lock). Raises DataError if it cannot be used.

    Reads use a connection that never waits for the disk; writes are queued until `flush`, which may be called in a thread.
    `spent_usd` is the known cost of all replies, plus the maximum cost of requests given up after sending.
    """

    def __init__(self, path: Path | str, read_only: bool = False):
        self.path = Path(path)
        self._pending: list[tuple[str, tuple]] = []
        self._writing = threading.Lock()
        try:
            if read_only:
                # no log: no process has it open; without `immutable`, SQLite would leave an empty log and its index behind
                log = self.path.with_name(f"{self.path.name}-wal")
                mode = "mode=ro" if log.exists() else "mode=ro&immutable=1"
                address = f"{self.path.absolute().as_uri()}?{mode}"
                self._database = self._reader = _connect(address, uri=True)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._open()
                except sqlite3.DatabaseError as error:
                    if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_CORRUPT:
                        raise
                    self._database.close()
                    _salvage(self.path, str(error))
                    self._open()
        except _READ_ERRORS as error:
            raise self._unusable("opened", error) from error
        totals = self.totals()
        self.spent_usd: float = totals["cost_usd"] + totals["lost_usd"]

    def _open(self) -> None:
        database = self._database = _connect(self.path)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")  # a paid reply survives a power failure
        database.execute(_SCHEMA)
        with database:  # the process that sent these was killed before the replies arrived
            database.execute(f"{_LOST} WHERE state = 'sent'", ("the process ended",))
        self._reader = _connect(self.path)
        self._reader.execute(_TOTALS).fetchone()  # reads every row: damage is found now

    @classmethod
    def reading(cls, path: Path | str) -> "Ledger":
        """Open a ledger read-only, even while another process writes to it. Raises DataError if it is missing or invalid."""
        return cls(path, read_only=True)

    def __exit__(self, *_: object) -> None:
        """Write what is queued and close the file."""
        try:
            self.flush()
        finally:
            self._reader.close()
            self._database.close()  # the last one, so that it removes its log

    def _unusable(self, action: str, error: Exception) -> DataError:
        """The error for a ledger that cannot be opened, read or written: only a damaged one may be moved."""
        damaged = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT)
        hint = "check its permissions and the free disk space; if another program has it open, close it. Then re-run to resume"
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in damaged:
            hint = (
                f"restore a backup, or `mv {self.path} {self.path}.damaged`: finished rows are kept, the others are paid for "
                "again"
            )
        return DataError(f"{self.path} cannot be {action}: {error}", hint)

    # -- reading ---------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        """The reply to this request; None if there is none on disk."""
        row = self._row(_GET, key)
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
        if stage is None:
            return dict(self._row(_TOTALS))
        found, inspections = (
            dict(self._row(f"{_TOTALS} WHERE stage = ?", name)) for name in (stage, f"{stage} inspection")
        )
        return found | {
            name: found[name] + inspections[name] for name in ("cost_usd", "lost_usd", "unpriced")
        }

    def _row(self, statement: str, *values: str) -> Any:
        try:
            return self._reader.execute(statement, values).fetchone()
        except _READ_ERRORS as error:
            raise self._unusable("read", error) from error

    # -- writing ---------------------------------------------------------------------------------------------------

    def sent(self, key: str, stage: str, model: str, reserved_usd: float = 0.0) -> None:
        """Record a request before it is sent; `reserved_usd` is its maximum cost."""
        self._pending.append((_SENT, (key, stage, model, reserved_usd)))

    def put(self, key: str, entry: Entry) -> None:
        """Record the reply to a request that was sent."""
        self.spent_usd += entry.cost_usd or 0.0
        self._pending.append((_REPLY, (*astuple(entry), key)))

    def failed(self, key: str, why: str, lost_usd: float | None) -> None:
        """Record that a request failed, or that its reply is no longer awaited.

        `lost_usd`: what it may cost anyway, if the reply was generated; None if it costs nothing, because of an error status
        or because no server was reached.
        """
        self.spent_usd += lost_usd or 0.0
        self._pending.append((_FAILED if lost_usd is None else f"{_LOST} WHERE key = ?", (why, key)))

    def flush(self) -> None:
        """Write what is queued, also by others while this waited, in one transaction; after a failure it stays queued."""
        with self._writing:
            writes = self._pending[:]
            try:
                with self._database:  # commits, or rolls back
                    for statement, values in writes:
                        self._database.execute(statement, values)
            except sqlite3.Error as error:
                raise self._unusable("written", error) from error
            del self._pending[: len(writes)]  # only now: an interrupt before it loses no row
