"""Fixtures of the data stages: a real grader and an API key."""

import pytest

from sclite.grading.worker import Grader


@pytest.fixture(scope="package")
def grader():
    with Grader() as grader:
        yield grader


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-secret")
