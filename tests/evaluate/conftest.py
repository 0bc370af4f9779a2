"""What tests of the evaluation share."""

import pytest


@pytest.fixture
def gguf(run):
    """A file of the run that stands for a GGUF."""
    path = run.path("export/dpo-q8_0.gguf")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    return path
