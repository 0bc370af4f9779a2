"""What every test stands on. Helpers lie beside it: `from tests.replay import Teaching, say`."""

import signal

import pytest

from sclite.run import Run


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Ctrl-C counts here and in what the tests start, also where a script runs them in the background without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run(tmp_path):
    """An empty run folder."""
    return Run(tmp_path / "run")
