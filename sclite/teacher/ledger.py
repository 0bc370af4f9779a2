"""The ledger: every request that was sent and every reply that was paid for, so that nothing is paid for twice."""

import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sclite import console
from sclite.errors import DataError
from sclite.signature import digest

FILE = "ledger.sqlite"
VERSION = 2
REPLIED, REFUSED, EMPTY = "replied", "refused", "empty"
_FIELDS = ("text", "finish_reason", "prompt_tokens", "completion_tokens", "cost_usd", "seconds")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    key TEXT PRIMARY KEY,
    stage TEXT NOT NULL,
    model TEXT NOT NULL,
    state TEXT NOT NULL,                    -- sent, replied, empty, refused, failed, given_up
    sent INTEGER NOT NULL,                  -- how often it went out
    given_up INTEGER NOT NULL DEFAULT 0,    -- how often nobody waited for the reply any longer
    reserved_usd REAL NOT NULL DEFAULT 0,   -- the most that one sending can cost
    lost_usd REAL NOT NULL DEFAULT 0,       -- what earlier sendings cost: empty replies, and the most for those given up
    text TEXT NOT NULL DEFAULT '',
    finish_reason TEXT NOT NULL DEFAULT '',
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    cost_usd REAL,
    seconds REAL NOT NULL DEFAULT 0
) WITHOUT ROWID
"""
_ANSWERED = (REPLIED, REFUSED)
_GET = f"SELECT {', '.join(_FIELDS)} FROM requests WHERE key = ? AND state IN (?, ?)"
_SENT = """INSERT INTO requests (key, stage, model, state, sent, reserved_usd) VALUES (?, ?, ?, 'sent', 1, ?)
ON CONFLICT (key) DO UPDATE SET state = 'sent', sent = sent + 1, reserved_usd = excluded.reserved_usd,
lost_usd = lost_usd + COALESCE(cost_usd, 0), cost_usd = NULL"""
_REPLY = """UPDATE requests SET state = ?, text = ?, finish_reason = ?, prompt_tokens = ?, completion_tokens = ?,
cost_usd = ?, seconds = ? WHERE key = ?"""
_FAILED = "UPDATE requests SET state = 'failed', text = ? WHERE key = ?"
_LOST = "UPDATE requests SET state = 'given_up', given_up = given_up + 1, lost_usd = lost_usd + reserved_usd, text = ?"


_UNREADABLE = (sqlite3.Error, UnicodeDecodeError)  # the second: in a message about a damaged schema


def _connect(path: Path | str, **options: Any) -> sqlite3.Connection:
    """A connection that reads texts also where a byte of theirs is damaged."""
    database = sqlite3.connect(path, check_same_thread=False, **options)
    database.text_factory = lambda text: text.decode("utf-8", "replace")
    return database


def _salvage(path: Path, why: str) -> None:
    """Put a damaged ledger aside, and the rows that can still be read of it into a new one."""
    aside = path.with_name(f"{path.name}.damaged")
    for end in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + end).rename(f"{aside}{end}")
    with contextlib.closing(_connect(aside)) as old, contextlib.closing(_connect(path)) as new:
        new.execute(_SCHEMA)
        for order in ("ASC", "DESC"):  # up to the damage from either side
            with contextlib.suppress(*_UNREADABLE):
                for row in old.execute(f"SELECT * FROM requests ORDER BY key {order}"):
                    new.execute(f"INSERT OR IGNORE INTO requests VALUES ({', '.join('?' * len(row))})", row)
        new.commit()
        kept = new.execute("SELECT COUNT(*) FROM requests").fetchone()[0]
    text = f"{path} was damaged ({why}): {kept} requests could be read and are kept; the file is in {aside}"
    console.note(f"[yellow]warning:[/] {console.escape(text)}")


def _remedy(error: Exception, path: Path) -> str:
    """What to do about a ledger that does not open: only a damaged one may be moved."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "another program has it open: close it, and run the same command again"
    damaged = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT)
    if code in damaged:
        moved = f"`mv {path} {path}.damaged`"
        return f"put it back from a copy, or {moved}: finished rows stay, and the others are paid for again"
    return "check its permissions and that its disk has room, and run the same command again"


@dataclass(frozen=True)
class Entry:
    """One reply as it came. Tokens and cost are None where the endpoint or the price list does not say.

    A `finish_reason` of `refused` marks a request that the endpoint will not answer; `text` then says why. One of
    `empty` marks a reply that says nothing: it is paid for, but the same request is sent again when it comes up again.
    """

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

    Each write returns a future that is done when the row is on disk, and that raises DataFault where it cannot be
    written; so do all later writes, and `close`. A thread of its own writes what has come together in one transaction.
    Reading never waits for the disk: it has a connection of its own, and what is not there is known without a query.
    `spent_usd` is what all replies have cost as far as that is known, and the most that those given up after sending may
    have cost.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._known: set[int] | None
        try:
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_CORRUPT:
                    raise
                self._database.close()
                _salvage(self.path, str(error))
                self._open()
        except _UNREADABLE as error:
            raise DataError(f"{self.path} cannot be opened: {error}", _remedy(error, self.path)) from error
        self._waiting: deque[tuple[str, tuple]] = deque()
        self._fault: DataError | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        totals = self.totals()
        self.spent_usd: float = totals["cost_usd"] + totals["lost_usd"]

    def _open(self) -> None:
        self._database = _connect(self.path, isolation_level=None)
        self._prepare()
        self._reader = _connect(self.path, isolation_level=None)
        rows = self._reader.execute("SELECT key FROM requests WHERE state IN (?, ?)", _ANSWERED)
        self._known = {hash(key) for (key,) in rows}  # a third of the memory; alike ones are looked up

    def _prepare(self) -> None:
        database = self._database
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")  # a reply that was paid for outlives a power cut
        database.execute(_SCHEMA)
        columns = {row[1] for row in database.execute("PRAGMA table_info(requests)")}
        if "given_up" not in columns:
            raise sqlite3.DatabaseError("another version of sclite has written it")
        # the process that sent these was killed before their replies came
        database.execute(f"{_LOST} WHERE state = 'sent'", ("the process ended",))

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is still to be written, and close the file. Twice does no harm."""
        last: Future[None] | None = None
        with suppress(RuntimeError):  # closed before
            last = self._writer.submit(self._write)
        self._writer.shutdown()
        with self._lock:  # the writer last: it then clears its log away
            self._reader.close()
        self._database.close()
        if last is not None:
            last.result()

    # -- reading ---------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        """The reply to this request, or its refusal; None where neither has come yet."""
        if self._known is not None and hash(key) not in self._known:
            return None
        with self._lock:
            row = self._row(_GET, (key, *_ANSWERED))
        return Entry(*row) if row else None

    def _row(self, statement: str, values: tuple) -> tuple | None:
        try:
            return self._reader.execute(statement, values).fetchone()
        except _UNREADABLE as error:
            raise DataError(f"{self.path} cannot be read: {error}", _remedy(error, self.path)) from error

    def totals(self, stage: str | None = None) -> dict[str, Any]:
        """What one stage or all have asked for.

        `requests` with a reply, how often requests were `sent`, how many were `given_up` after sending, tokens, cost;
        `lost_usd` is the most that the given-up ones can have cost, `unpriced` counts replies of unknown cost.
        """
        with suppress(RuntimeError):  # open for reading alone; else what was noted until now counts
            self._writer.submit(self._write).result()
        where, values = ("", ()) if stage is None else (" WHERE stage = ?", (stage,))
        with self._lock:
            row = self._row(_TOTALS + where, values)
        return dict(zip(_TOTAL_NAMES, row, strict=True))

    @classmethod
    def reading(cls, path: Path | str) -> "Ledger":
        """The ledger for reading alone, also while another process writes it; nothing beside it is made or changed.

        Raises DataFault where it is absent or no ledger.
        """
        ledger = cls.__new__(cls)
        ledger.path, ledger._lock, ledger._writer = Path(path), threading.Lock(), ThreadPoolExecutor(1)
        ledger._writer.shutdown()
        ledger._known = None  # another process may add to it
        # without a log nobody has it open; SQLite, not told so, would leave an empty log and its index behind
        log = ledger.path.with_name(f"{ledger.path.name}-wal")
        mode = "mode=ro" if log.exists() else "mode=ro&immutable=1"
        try:
            ledger._database = ledger._reader = _connect(
                f"{ledger.path.absolute().as_uri()}?{mode}", uri=True
            )
            ledger.totals()
        except _UNREADABLE as error:
            raise DataError(f"{ledger.path} cannot be read: {error}", _remedy(error, ledger.path)) from error
        return ledger

    # -- writing ---------------------------------------------------------------------------------------------------

    def sent(self, key: str, stage: str, model: str, reserved_usd: float = 0.0) -> Future[None]:
        """Note that a request goes out, before it does; `reserved_usd` is the most that it can cost."""
        return self._order(_SENT, (key, stage, model, reserved_usd))

    def put(self, key: str, entry: Entry) -> Future[None]:
        """Keep the reply to a request that was sent, or its refusal."""
        state = entry.finish_reason if entry.finish_reason in (REFUSED, EMPTY) else REPLIED
        self.spent_usd += entry.cost_usd or 0.0
        if state in _ANSWERED:
            self._known.add(hash(key))
        return self._order(_REPLY, (state, *(getattr(entry, name) for name in _FIELDS), key))

    def failed(self, key: str, why: str) -> Future[None]:
        """Note that a request failed in a way that costs nothing: an error status, nobody there."""
        return self._order(_FAILED, (why, key))

    def given_up(self, key: str, why: str, reserved_usd: float = 0.0) -> Future[None]:
        """Note that a reply was no longer waited for; it may have been written, and paid for, all the same."""
        self.spent_usd += reserved_usd
        return self._order(f"{_LOST} WHERE key = ?", (why, key))

    def _order(self, statement: str, values: tuple) -> Future[None]:
        self._waiting.append((statement, values))
        try:
            return self._writer.submit(self._write)
        except RuntimeError:
            raise self._unwritable("it is closed") from None

    def _write(self) -> None:
        """Write all that waits, in one transaction; after a failure row by row, and nothing from then on."""
        if self._fault is not None:
            raise self._fault
        orders = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not orders:
            return
        self._fault = self._unwritable("its writer failed")  # until they are written
        try:
            self._transact(orders)
        except _UNWRITABLE as error:
            self._fault = self._unwritable(error)
            for order in orders:
                with suppress(*_UNWRITABLE):
                    self._transact([order])
            raise self._fault from error
        self._fault = None

    def _transact(self, orders: Sequence[tuple[str, tuple]]) -> None:
        with self._database:  # commits, or rolls back
            self._database.execute("BEGIN")
            for statement, values in orders:
                self._database.execute(statement, values)

    def _unwritable(self, why: object) -> DataError:
        return DataError(
            f"{self.path} cannot be written: {why}",
            "check that its disk has space and that nothing else holds it; what was written is kept, re-run to resume",
        )


_UNWRITABLE = (sqlite3.Error, OverflowError, ValueError)
_TOTAL_NAMES = (
    "requests", "sent", "given_up", "prompt_tokens", "completion_tokens", "cost_usd", "lost_usd", "unpriced",
)  # fmt: skip
_TOTALS = """SELECT COALESCE(SUM(state IN ('replied', 'empty')), 0), COALESCE(SUM(sent), 0), COALESCE(SUM(given_up), 0),
COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0), COALESCE(SUM(cost_usd), 0.0),
COALESCE(SUM(lost_usd), 0.0), COALESCE(SUM(state IN ('replied', 'empty') AND cost_usd IS NULL), 0) FROM requests"""
