"""Fixtures for the teacher tests: a ledger, and calls to a scripted server."""

import pytest

from sclite import config
from sclite.teacher.client import Teacher
from sclite.teacher.ledger import Ledger
from tests.replay import TeacherServer


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as found:
        yield found


@pytest.fixture
def teacher_of(ledger):
    """teacher_of(server or address, **settings): a client over `ledger`."""

    def make(server, **settings):
        address = server.url if isinstance(server, TeacherServer) else server
        chosen = {"model": "openai/replay", "api_base": address, "attempts_per_call": 4, "max_tokens": 100}
        return Teacher(config.Teacher(**{**chosen, **settings}), ledger)

    return make


@pytest.fixture
def ask(teacher_of):
    """ask(server or address, jobs, **settings): the results from a new teacher, by job."""

    def call(server, jobs, **settings):
        with teacher_of(server, **settings) as teacher:
            return sorted(teacher.ask_all(jobs, "templates"), key=lambda result: int(result.id))

    return call


@pytest.fixture
def asked(ask):
    """asked(answer, jobs, **settings): (results, requests) with a new server that replies with `answer`."""

    def call(answer, jobs, **settings):
        with TeacherServer(answer) as server:
            return ask(server, jobs, **settings), server.requests

    return call
