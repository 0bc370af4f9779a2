"""Tests that need a CUDA GPU; each fits in 24 GB (`pytest -m gpu`)."""

import importlib.util

import pytest

from sclite.config import Student
from sclite.train.stage import quiet_libraries

CAP_BYTES = 24e9


@pytest.fixture(scope="session", autouse=True)
def gpu():
    """Limit the process to 24 GB; skip without a GPU or Unsloth."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU; on one: pip install -e '.[cuda,test]' && python -m pytest -m gpu")
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed: pip install -e '.[cuda]'")
    quiet_libraries(Student(model="embedded", backend="unsloth"))  # imports Unsloth before what it patches
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / torch.cuda.mem_get_info()[1]))
