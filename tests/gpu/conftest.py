"""Tests that need a CUDA card, all within 24 GB of its memory (`pytest -m gpu`)."""

import importlib.util

import pytest

from sclite.config import Student
from sclite.train.stage import quiet_libraries

CAP_BYTES = 24e9


@pytest.fixture(scope="session", autouse=True)
def card():
    """Keep the process within 24 GB; skip without a card or without Unsloth."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA card here; on one: pip install -e '.[cuda,test]' && python -m pytest -m gpu")
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is missing: pip install -e '.[cuda]'")
    quiet_libraries(Student(model="embedded", backend="unsloth"))  # Unsloth comes before what it patches
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / torch.cuda.mem_get_info()[1]))
