"""Fixtures for all tests. Helpers are in modules next to this one: `from tests.replay import TeacherServer, say`."""

import os
import re
import signal
import sys

import pytest

from sclite.__main__ import main
from sclite.grading.grader import Grader
from sclite.run import Run
from tests.replay import TWO, TeacherServer, say
from tests.toy import tiny_llama

THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000", "TOKENIZERS_PARALLELISM": "false"}
if "PYTEST_XDIST_WORKER" in os.environ:  # more threads than cores take up to 1.7 times the CPU time
    os.environ.setdefault("OMP_NUM_THREADS", "1")
CLEAN = ("OPENAI_API_KEY", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


SLOW = ("test_flow.py", "test_three_commands.py", "test_model.py", "test_resume.py", "test_architectures.py")


def pytest_configure(config):
    """Keep the order below: pytest-xdist would move files with few tests to the end."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Slowest files first, so that no worker starts one of them at the end."""
    items.sort(key=lambda item: item.path.name not in SLOW)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Ctrl-C works here and in child processes, even if a script runs the tests in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    """Every test gets a fake key, never the user's."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-secret")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of a random tiny student; nothing changes it."""
    return tiny_llama(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def grader():
    """A real grader; its workers start when they are first needed."""
    with Grader() as grader:
        yield grader


@pytest.fixture
def run(tmp_path):
    """An empty run folder."""
    return Run(tmp_path / "run")


class Ended:
    """How a command ended: its exit code and what it wrote."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err
        self.error = next((line for line in err.splitlines() if line.startswith("error: ")), "")
        self.hint = next((line for line in err.splitlines() if line.startswith("try: ")), "")


@pytest.fixture
def sclite(tmp_path, monkeypatch, capsys):
    """Run a command in a temporary folder, as `sclite` would; a traceback fails the test."""
    monkeypatch.chdir(tmp_path)
    for name in CLEAN:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in THREADS.items():
        monkeypatch.setenv(name, value)

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["sclite", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
        ended = Ended(code, *capsys.readouterr())
        assert not re.search("Traceback|error: unexpected", ended.err)
        return ended

    return call


@pytest.fixture
def teacher_of_sums(monkeypatch):
    """A teacher whose answer to everything is that 1 + 1 = 2."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with TeacherServer(lambda request, nth: say(TWO)) as server:
        yield server


@pytest.fixture
def build(sclite, teacher_of_sums):
    """`build(..)` runs build-data with this teacher."""
    named = ("--set", "teacher.model=openai/replay", "--set", f"teacher.api_base={teacher_of_sums.url}")
    return lambda *arguments: sclite("build-data", *arguments, "--yes", *named)
