"""What a CUDA build of llama-cpp-python needs to be loaded."""

import sys
from pathlib import Path

import pytest

from sclite.errors import DeviceError
from sclite.student.llama_cpp import engine


def test_cuda_build_of_llama_cpp_gets_the_libraries_of_torch(tmp_path, monkeypatch):
    """Its wheels contain none, and a machine with a driver alone has no others."""
    for name in ("llama_cpp/__init__.py", "llama_cpp/lib/libggml-cuda.so", "nvidia/cu13/lib/libcudart.so.13"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "nvidia/cu13/lib/libcublas.so.13").touch()
    loaded = []
    monkeypatch.setattr(engine.ctypes, "CDLL", lambda path, _: loaded.append(Path(path).name))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [each for each in sys.modules if each.partition(".")[0] in ("llama_cpp", "nvidia")]:
        monkeypatch.delitem(sys.modules, name)
    engine.load_cuda_libraries()
    assert loaded == ["libcudart.so.13", "libcublas.so.13"]
    (tmp_path / "llama_cpp/lib/libggml-cuda.so").unlink()
    engine.load_cuda_libraries()  # a CPU build
    assert len(loaded) == 2


def test_llama_cpp_that_cannot_be_loaded_is_an_error_with_a_remedy(monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name.startswith("llama_cpp"):
                raise RuntimeError("libcudart.so.12: cannot open shared object file")

    for name in [each for each in sys.modules if each.partition(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(engine, "load_cuda_libraries", lambda: None)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(DeviceError, match=r"cannot be loaded: libcudart\.so\.12") as error:
        engine.llama.__wrapped__()
    assert "sclite doctor" in error.value.hint
