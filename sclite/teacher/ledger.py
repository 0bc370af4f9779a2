"""The ledger: every request that was sent and every reply that was paid for, so that nothing is paid for twice."""

import sqlite3
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from sclite.errors import DataFault
from sclite.signature import digest

FILE = "ledger.sqlite"
VERSION = 2
REPLIED, REFUSED, SENT, FAILED, GIVEN_UP = "replied", "refused", "sent", "failed", "given_up"
_FIELDS = ("text", "finish_reason", "prompt_tokens", "completion_tokens", "cost_usd", "seconds")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    key TEXT PRIMARY KEY,
    stage TEXT NOT NULL,
    model TEXT NOT NULL,
    state TEXT NOT NULL,                    -- sent, replied, refused, failed, given_up
    sent INTEGER NOT NULL,                  -- how often it went out
    given_up INTEGER NOT NULL DEFAULT 0,    -- how often nobody waited for the reply any longer
    reserved_usd REAL NOT NULL DEFAULT 0,   -- the most that one sending can cost
    lost_usd REAL NOT NULL DEFAULT 0,       -- the most that those given up have cost
    text TEXT NOT NULL DEFAULT '',
    finish_reason TEXT NOT NULL DEFAULT '',
    prompt_tokens INTEGER,
    completion_tokens INTEGER,
    cost_usd REAL,
    seconds REAL NOT NULL DEFAULT 0
) WITHOUT ROWID
"""
_SENT = """INSERT INTO requests (key, stage, model, state, sent, reserved_usd) VALUES (?, ?, ?, 'sent', 1, ?)
ON CONFLICT (key) DO UPDATE SET state = 'sent', sent = sent + 1, reserved_usd = excluded.reserved_usd"""
_REPLY = """UPDATE requests SET state = ?, text = ?, finish_reason = ?, prompt_tokens = ?, completion_tokens = ?,
cost_usd = ?, seconds = ? WHERE key = ?"""
_FAILED = "UPDATE requests SET state = 'failed', text = ? WHERE key = ?"
_LOST = "UPDATE requests SET state = 'given_up', given_up = given_up + 1, lost_usd = lost_usd + reserved_usd, text = ?"


@dataclass(frozen=True)
class Entry:
    """One reply as it came. Tokens and cost are None where the endpoint or the price list does not say.

    A `finish_reason` of `refused` marks a request that the endpoint will not answer; `text` then says why.
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

    Whatever is written gives a future, which is done when it is on disk: a thread of its own writes what has come
    together in one transaction. `spent_usd` is what all replies have cost as far as that is known, and the most that
    those given up after sending may have cost.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
            self._prepare()
        except sqlite3.Error as error:
            raise DataFault(
                f"{self.path} cannot be opened: {error}",
                "move it away; every reply is then asked for again",
            ) from error
        totals = self.totals()
        self.spent_usd: float = totals["cost_usd"] + totals["lost_usd"]
        self._orders: SimpleQueue[tuple[str, tuple, Future] | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="ledger", daemon=True)
        self._writer.start()

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
        if self._writer.is_alive():
            self._orders.put(None)
            self._writer.join()
        with self._lock:
            self._database.close()

    # -- reading ---------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        """The reply to this request, or its refusal; None where neither has come yet."""
        query = f"SELECT {', '.join(_FIELDS)} FROM requests WHERE key = ? AND state IN (?, ?)"
        with self._lock:
            row = self._database.execute(query, (key, REPLIED, REFUSED)).fetchone()
        return Entry(*row) if row else None

    def totals(self, stage: str | None = None) -> dict[str, Any]:
        """What one stage or all have asked for.

        `requests` with a reply, how often requests were `sent`, how many were `given_up` after sending, tokens, cost;
        `lost_usd` is the most that the given-up ones can have cost, `unpriced` counts replies of unknown cost.
        """
        where, values = ("", ()) if stage is None else (" WHERE stage = ?", (stage,))
        with self._lock:
            row = self._database.execute(_TOTALS + where, values).fetchone()
        return dict(zip(_TOTAL_NAMES, row, strict=True))

    @classmethod
    def reading(cls, path: Path | str) -> "Ledger":
        """The ledger for reading alone, also while another process writes it; nothing beside it is made or changed.

        Raises DataFault where it is absent or no ledger.
        """
        ledger = cls.__new__(cls)
        ledger.path, ledger._lock, ledger._writer = Path(path), threading.Lock(), threading.Thread()
        # without a log nobody has it open; SQLite, not told so, would leave an empty log and its index behind
        log = ledger.path.with_name(f"{ledger.path.name}-wal")
        mode = "mode=ro" if log.exists() else "mode=ro&immutable=1"
        try:
            ledger._database = sqlite3.connect(
                f"{ledger.path.absolute().as_uri()}?{mode}", uri=True, check_same_thread=False
            )
            ledger.totals()
        except sqlite3.Error as error:
            raise DataFault(f"{ledger.path} cannot be read: {error}", "see that it is a ledger") from error
        return ledger

    # -- writing ---------------------------------------------------------------------------------------------------

    def sent(self, key: str, stage: str, model: str, reserved_usd: float = 0.0) -> Future:
        """Note that a request goes out, before it does; `reserved_usd` is the most that it can cost."""
        return self._order(_SENT, (key, stage, model, reserved_usd))

    def put(self, key: str, entry: Entry) -> Future:
        """Keep the reply to a request that was sent, or its refusal."""
        state = REFUSED if entry.finish_reason == REFUSED else REPLIED
        self.spent_usd += entry.cost_usd or 0.0
        return self._order(_REPLY, (state, *(getattr(entry, name) for name in _FIELDS), key))

    def failed(self, key: str, why: str) -> Future:
        """Note that a request failed in a way that costs nothing: an error status, a broken connection."""
        return self._order(_FAILED, (why, key))

    def given_up(self, key: str, why: str, reserved_usd: float = 0.0) -> Future:
        """Note that a reply was no longer waited for; it may have been written, and paid for, all the same."""
        self.spent_usd += reserved_usd
        return self._order(f"{_LOST} WHERE key = ?", (why, key))

    def _order(self, statement: str, values: tuple) -> Future:
        future: Future = Future()
        self._orders.put((statement, values, future))
        if not self._writer.is_alive():  # closed: nobody else will answer
            self._fail([future], sqlite3.ProgrammingError("it is closed"))
        return future

    def _write_all(self) -> None:
        while True:
            orders = [self._orders.get()]
            while not self._orders.empty():
                orders.append(self._orders.get())
            found = [order for order in orders if order is not None]
            if found:
                self._write(found)
            if len(found) < len(orders):
                return

    def _write(self, orders: Sequence[tuple[str, tuple, Future]]) -> None:
        futures = [future for _, _, future in orders]
        try:
            with self._lock:
                self._database.execute("BEGIN")
                for statement, values, _ in orders:
                    self._database.execute(statement, values)
                self._database.execute("COMMIT")
        except sqlite3.Error as error:
            with self._lock:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
            self._fail(futures, error)
            return
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    def _fail(self, futures: Sequence[Future], error: sqlite3.Error) -> None:
        fault = DataFault(f"{self.path} cannot be written: {error}", "see that its disk has room")
        for future in futures:
            if not future.done() and future.set_running_or_notify_cancel():
                future.set_exception(fault)


_TOTAL_NAMES = (
    "requests", "sent", "given_up", "prompt_tokens", "completion_tokens", "cost_usd", "lost_usd", "unpriced",
)  # fmt: skip
_TOTALS = """SELECT COALESCE(SUM(state = 'replied'), 0), COALESCE(SUM(sent), 0), COALESCE(SUM(given_up), 0),
COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0), COALESCE(SUM(cost_usd), 0.0),
COALESCE(SUM(lost_usd), 0.0), COALESCE(SUM(state = 'replied' AND cost_usd IS NULL), 0) FROM requests"""
