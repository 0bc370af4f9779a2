"""Fixtures for the evaluation tests."""

import pytest


@pytest.fixture
def gguf(run):
    """A fake GGUF in the run."""
    path = run.path("export/dpo-q8_0.gguf")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    return path
