"""Tests that need a CUDA card, all within 24 GB of its memory (`pytest -m gpu`)."""

import pytest

CAP_BYTES = 24e9


@pytest.fixture(scope="session", autouse=True)
def card():
    """Keep the process within 24 GB; skip without a card or without Unsloth."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA card here; on one: pip install -e '.[cuda,test]' && python -m pytest -m gpu")
    pytest.importorskip("unsloth", reason="Unsloth is missing: pip install -e '.[cuda]'")
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / torch.cuda.mem_get_info()[1]))
