"""The ledger keeps every paid reply, however the process ends."""

import signal
import sqlite3
from contextlib import AbstractContextManager, closing

import pytest

from sclite import config
from sclite.errors import DataError
from sclite.teacher.ledger import Entry, Ledger
from sclite.teacher.sender import Sender

ENTRY = Entry("hello", "stop", 10, 3, 0.25)
MESSAGES = [{"role": "user", "content": "q"}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def keep(ledger, key, entry=ENTRY, stage="templates"):
    ledger.sent(key, stage, "m")
    ledger.put(key, entry)


def test_unknown_cost_is_counted_and_not_zero(ledger):
    keep(ledger, "a")
    keep(ledger, "b", Entry("x", "stop", None, None, None))
    keep(ledger, "c", stage="corrections")
    assert ledger.totals("templates") == {
        "requests": 2, "sent": 2, "given_up": 0, "prompt_tokens": 10, "completion_tokens": 3,
        "cost_usd": 0.25, "lost_usd": 0.0, "unpriced": 1,
    }  # fmt: skip
    assert ledger.get("b").cost_usd is None
    assert (ledger.cost_usd("nothing"), ledger.cost_usd("templates")) == (0.0, None)
    assert (ledger.totals()["cost_usd"], ledger.totals("nothing")["cost_usd"]) == (0.5, 0.0)


def test_key_depends_on_exactly_what_decides_a_reply():
    def key(model="m", api_base="http://h/v1", messages=MESSAGES, parameters=None, sample=0, repair=0):
        settings = config.Teacher(model=model, api_base=api_base, temperature=0.1, max_tokens=50)
        sender = Sender(settings, ledger=None, budget=None)
        return sender.key(messages, sample, repair, parameters or {})

    same = [{"api_base": address} for address in ("http://h/v1/", "http://a:b@h/v1")]
    # a reply that was cut off says with how many tokens it was requested
    same += [{"parameters": {"temperature": 0.1}}, {"parameters": {"max_tokens": 60}}]
    assert {key(**changed) for changed in same} == {key()}
    others = {"model": "other", "api_base": "http://g/v1", "messages": [{"role": "user", "content": "r"}]}
    others |= {"parameters": {"temperature": 0.2}, "sample": 1, "repair": 1}
    assert len({key(**{name: other}) for name, other in others.items()} | {key()}) == 7


class Interrupted(AbstractContextManager):
    """A database whose commit is interrupted."""

    def __exit__(self, *_):
        signal.raise_signal(signal.SIGINT)

    def execute(self, *_):
        pass


def test_failed_write_is_an_error_and_is_repeated_like_an_interrupted_one(path, monkeypatch):
    with Ledger(path) as ledger, closing(sqlite3.connect(path, isolation_level=None)) as other:
        keep(ledger, "k")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DataError, match=r"cannot be written.*locked"):
            ledger.flush()
        other.execute("ROLLBACK")
    with Ledger.reading(path) as reader:  # nothing paid for is lost
        assert reader.get("k") == ENTRY
    # Ctrl-C may come at any moment, also between a paid reply and its commit
    with Ledger(path) as ledger:
        keep(ledger, "l")
        with monkeypatch.context() as patch:
            patch.setattr(ledger, "_database", Interrupted())
            with pytest.raises(KeyboardInterrupt):
                ledger.flush()
    with Ledger.reading(path) as reader:
        assert reader.get("l") == ENTRY


def test_ledger_can_be_read_during_and_after_writes_without_leftovers(path):
    with Ledger(path) as ledger:
        keep(ledger, "a")
        assert ledger.totals()["requests"] == 1  # though it is not yet written
        ledger.flush()
        with Ledger.reading(path) as reader:
            assert reader.totals() == ledger.totals()
            keep(ledger, "b", stage="corrections")
            ledger.flush()
            assert reader.totals("corrections")["requests"] == 1
    before = path.read_bytes()
    with Ledger.reading(path) as reader:
        assert (reader.totals()["requests"], reader.get("a"), reader.get("other")) == (2, ENTRY, None)
    assert [p.name for p in path.parent.iterdir()] == ["ledger.sqlite"]
    assert path.read_bytes() == before


def test_file_that_is_missing_or_not_a_ledger_is_reported_and_left_as_it_is(path):
    with pytest.raises(DataError, match="cannot be opened"):
        Ledger.reading(path)
    assert not path.exists()
    path.write_text("this is no database, whatever its name says" * 50)
    for open_it, why in ((Ledger, "cannot be opened"), (Ledger.reading, "cannot be read")):
        with pytest.raises(DataError, match=rf"ledger\.sqlite {why}"):
            open_it(path)
    assert path.read_text().startswith("this is no database")


def test_damaged_ledger_is_recovered_moved_aside_or_read_with_its_bad_byte(path, capsys):
    with Ledger(path) as ledger:
        for number in range(400):
            keep(ledger, f"{number:03}", Entry("text " * 100, "stop", 1, 1, 0.5))
    whole, page = path.read_bytes(), 4096
    middle = len(whole) // 2 // page * page
    path.write_bytes(whole[:middle] + b"\xff" * page + whole[middle + page :])
    with Ledger(path) as ledger:
        kept = ledger.totals()["requests"]
        assert ledger.get("000") is not None
        assert ledger.get("399") is not None
    assert 300 < kept < 400  # the page may be a parent of others
    assert f"recovered {kept} requests" in " ".join(capsys.readouterr().err.split())
    assert path.with_name("ledger.sqlite.damaged").stat().st_size == len(whole)
    with Ledger(path) as ledger:
        assert ledger.totals()["requests"] == kept
    with Ledger(path) as ledger:
        keep(ledger, "a", Entry("one two three", "stop", 1, 1, 0.5))
    path.write_bytes(path.read_bytes().replace(b"one two", b"one\xff two"[:7]))
    with Ledger(path) as ledger:
        assert ledger.get("a").text.startswith("one\ufffd")
