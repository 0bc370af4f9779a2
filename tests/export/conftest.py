"""Fixtures for the export tests: the tiny student, and llama.cpp's converter if this machine has it."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

from sclite.export import gguf


@pytest.fixture(scope="session")
def student(folder):
    """The tiny student; a test that changes it copies it."""
    return folder


@pytest.fixture(scope="session")
def converter():
    """llama.cpp's converter if it is already on this machine; tests download nothing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "sclite" / f"llama.cpp-{version('llama_cpp_python')}"
    if not (folder / gguf.SCRIPT).is_file():
        pytest.skip("llama.cpp's converter is not on this machine; `sclite export` downloads it")
    return folder
