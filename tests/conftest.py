"""What every test stands on. Helpers lie beside it: `from tests.replay import Teaching, say`."""

import pytest

from sclite.run import Run


@pytest.fixture
def run(tmp_path):
    """An empty run folder."""
    return Run(tmp_path / "run")
