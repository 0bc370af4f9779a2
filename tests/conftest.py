"""What every test stands on. This folder is on the path, so tests import its helpers by name: `from replay import say`."""

import pytest

from sclite.run import Run


@pytest.fixture
def run(tmp_path):
    """An empty run folder."""
    return Run(tmp_path / "run")
