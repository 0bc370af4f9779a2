"""Fixtures of the data stages: row files, an unsure grader, and a stage's warnings."""

import pytest

from tests.toy import Said, write_rows


@pytest.fixture
def write(tmp_path):
    """write(name, *rows): writes a JSONL file of these rows and returns its path."""
    return lambda name, *rows: str(write_rows(tmp_path / name, rows))


@pytest.fixture
def unsure():
    """A grader that can only tell that identical answers are equal."""

    class Unsure:
        def equal(self, given, gold):
            return True if given == gold else None

    return Unsure()


@pytest.fixture
def warnings():
    return Said()
