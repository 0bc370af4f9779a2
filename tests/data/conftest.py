"""Fixtures of the data stages: a real grader, an API key, and files of rows."""

import json

import pytest


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-secret")


@pytest.fixture
def write(tmp_path):
    """Writes a JSONL file of these rows and returns its path."""

    def write(name: str, *rows: dict) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def unsure():
    """A grader that can only tell that identical answers are equal."""

    class Unsure:
        def equal(self, given, gold):
            return True if given == gold else None

    return Unsure()


@pytest.fixture
def warnings():
    """A progress callback that keeps the warnings it gets."""

    def progress(done, total, spent=None, *, note="", warning=""):
        progress.said += [warning] if warning else []

    progress.said = []
    return progress
