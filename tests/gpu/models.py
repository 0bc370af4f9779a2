"""Models of real size with random 4-bit weights: memory and speed do not depend on the values."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sclite.student.loader import EMBEDDED_FOLDER

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SHARD_BYTES = 4_000_000_000


def random_model(folder: Path, config: Mapping[str, Any], device: str) -> Path:
    """Write a pre-quantized checkpoint: NF4 with double quantization, everything else in bfloat16.

    Weights of one shape are the same in every layer, so that a 7B model takes seconds. The tokenizer is the embedded
    student's, whose IDs exist in any larger vocabulary.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    folder.mkdir(parents=True, exist_ok=True)
    written = {**config, "torch_dtype": "bfloat16", "pad_token_id": 2}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written))
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **kind)
    written |= {"architectures": [type(empty).__name__], "quantization_config": quantization.to_dict()}
    (folder / "config.json").write_text(json.dumps(written, indent=1))
    for name in TOKENIZER:
        shutil.copy(EMBEDDED_FOLDER / name, folder / name)
    made: dict[Any, dict[str, Any]] = {}
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, parameter in empty.named_parameters():
        tensors = _tensors(name, parameter.shape, device, made)
        added = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size + added > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1] |= tensors
        size += added
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def _tensors(name: str, shape: Any, device: str, made: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    """The tensors of one parameter in a checkpoint, by name."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    quantized = ".layers." in name and name.endswith("proj.weight")
    key = (tuple(shape), quantized, name.endswith("norm.weight"))
    if key not in made:
        if name.endswith("norm.weight"):
            value = torch.ones(shape, dtype=torch.bfloat16)
        else:
            value = 0.02 * torch.randn(shape, dtype=torch.bfloat16, device=device)
        if quantized:
            packed, state = quantize_4bit(value, compress_statistics=True, quant_type="nf4")
            made[key] = {"": packed.cpu()} | {f".{k}": v.cpu() for k, v in state.as_dict(packed=True).items()}
        else:
            made[key] = {"": value.cpu()}
    return {name + end: value.clone() for end, value in made[key].items()}
