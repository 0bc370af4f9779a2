"""Unsloth without a GPU: its kernels run in Triton's interpreter, and `cuda` means the CPU.

python -m tests.student.unsloth_on_cpu FILE FOLDER..    figures of the models in the folders, into FILE
"""

import contextlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sclite.student import loader
from sclite.student.log_probs import hidden_states, pad, token_log_probs
from sclite.student.tokenization import TrainingSequence
from tests.toy import toy_config

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "UNSLOTH_ALLOW_CPU": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}  # fmt: skip
GPU = SimpleNamespace(name="none", total_memory=24 << 30, major=8, minor=9, multi_processor_count=64)


class CudaMeansCpu(TorchFunctionMode):
    """Creates and moves tensors on the CPU wherever a GPU is named."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def moved(value: Any, numbered: bool = False) -> Any:
            named = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
            return "cpu" if named or (numbered and type(value) is int) else value

        name, given = getattr(func, "__name__", ""), kwargs or {}
        if name in ("cuda", "record_stream"):
            return args[0]
        kwargs = {key: moved(value, key == "device") for key, value in given.items() if key != "pin_memory"}
        return func(*args[:1], *(moved(value, name == "to") for value in args[1:]), **kwargs)


def import_unsloth() -> None:
    """Import Unsloth as on a machine with one GPU, in float32."""
    torch.compile = lambda function=None, *_, **__: function if callable(function) else lambda given: given
    import unsloth

    cuda, nothing = torch.cuda, lambda *_, **__: None
    cuda.get_device_properties = lambda *_: GPU
    cuda.get_device_capability, cuda.mem_get_info = (lambda *_: (8, 9)), (lambda *_: (20 << 30, 24 << 30))
    cuda.current_device, cuda.device = (lambda: 0), lambda *_: contextlib.nullcontext()
    cuda.memory_reserved = cuda.max_memory_reserved = lambda *_: 1 << 30
    cuda.synchronize = cuda.empty_cache = nothing
    cuda.Stream = cuda.Event = lambda *_, **__: SimpleNamespace(wait_stream=nothing, record_event=nothing)
    cuda.stream, cuda.current_stream = (lambda *_: contextlib.nullcontext()), cuda.Stream
    for name, module in list(sys.modules.items()):
        if name.startswith("unsloth.models") and hasattr(module, "DEVICE_COUNT"):
            module.DEVICE_COUNT = 1
        if name.startswith("unsloth") and hasattr(module, "torch_gpu_device"):
            module.torch_gpu_device = cuda.device
    unsloth.models.llama._base_weight_dtype = lambda _: torch.bfloat16  # else not its LoRA kernels
    load, loader.select_backend = unsloth.FastLanguageModel.from_pretrained, lambda student: student.backend

    def load_on_cpu(name: str, **settings: Any) -> Any:
        return load(name, **settings | {"dtype": torch.float32, "device_map": {"": "cpu"}})

    unsloth.FastLanguageModel.from_pretrained = load_on_cpu
    CudaMeansCpu().__enter__()


def measure(folder: Path, backend: str) -> dict[str, Any]:
    """Log-probabilities of the tokens of three rows in one batch, and what their mean changes in the adapter."""
    config = toy_config(folder, student={"backend": backend, "load_in_4bit": False}, sft={"max_length": 512})
    model: Any = loader.load_student(config, "sft", folder / "adapter", train=True)[0]
    draw = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, 512, (length,), generator=draw).tolist() for length in (40, 17, 29)]
    batch = pad([TrainingSequence(ids, [0.0] * 5 + [1.0] * (len(ids) - 5)) for ids in drawn], 0)
    log_probs, _ = token_log_probs(model, hidden_states(model, batch), batch)
    log_probs.mean().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return {"padding_free": model.padding_free, "log_probs": log_probs.detach(), "gradients": gradients}


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    import_unsloth()
    torch.save({path: measure(Path(path), "unsloth") for path in sys.argv[2:]}, sys.argv[1])
