"""LoRA adapters of the student that is trained: a new one, or the weights in a folder put onto one of its shape."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sclite.config import Lora
from sclite.errors import DataError, UsageError


def meta_model(kind: Any) -> Any:
    """The model of a transformers configuration, without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(kind, trust_remote_code=False)


def lora_targets(model: Any, wanted: Sequence[str] = ()) -> list[str]:
    """Names of the layers that LoRA is put on: all linear layers of the decoder except the head, or the `wanted` ones.

    Skipped: vision towers; routers of experts; Mamba's `out_proj`, whose fused kernels read the weight and bypass the
    adapter. Names are the last part (`q_proj`) if it names nothing else, otherwise the whole path. Raises UsageFault if
    the model has no layer of a `wanted` name.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head, decoder = model.get_output_embeddings(), model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    found: dict[str, list[str]] = {}
    others = set()
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        mamba = last == "out_proj" and hasattr(owner, "A_log") and hasattr(owner, "D")
        if module is head or id(module) not in inside or mamba or last.endswith(("gate", "router")):
            others.add(last)
        else:
            found.setdefault(last, []).append(name)
    all_paths = [path for paths in found.values() for path in paths]
    if unknown := [name for name in wanted if not any(_names(name, path) for path in all_paths)]:
        raise UsageError(
            f"lora.target_modules: {model.config.model_type} has no linear layer named {', '.join(unknown)}",
            f"choose from {', '.join(found)}, or leave target_modules empty for all of them",
        )
    targets = []
    for last, paths in found.items():
        chosen = [path for path in paths if not wanted or any(_names(name, path) for name in wanted)]
        targets += [last] if chosen == paths and last not in others else chosen
    return targets


def _names(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def new_lora_shape(lora: Lora, kind: Any) -> dict[str, Any]:
    """What decides the shape of a new LoRA on a model of this configuration."""
    targets = lora_targets(meta_model(kind), lora.target_modules)
    return {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": targets, "lora_dropout": 0.0}


def add_adapter(model: Any, shape: dict[str, Any], seed: int) -> Any:
    """The model with a new LoRA; the seed decides its random factors."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**shape, task_type="CAUSAL_LM"))


def adapted_layers(model: Any) -> list[str]:
    """The layers that have a LoRA, by the last part of their names."""
    from peft.tuners.lora import LoraLayer

    found = (name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, LoraLayer))
    return list(dict.fromkeys(found))


def check_adapter(folder: Path) -> dict[str, Any]:
    """The configuration of the LoRA in a folder; raises DataFault where one of its two files is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        kept = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", "np"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(folder, str(error)) from error
    if not isinstance(kept, dict) or kept.get("peft_type") != "LORA":
        raise _damaged(folder, "adapter_config.json describes no LoRA")
    return kept


def _damaged(folder: Path, reason: str) -> DataError:
    return DataError(
        f"the adapter in {folder} cannot be read: {reason}",
        "restore it from a copy, or remove the folder and train its stage again with --fresh",
    )


def load_adapter(model: Any, folder: Path) -> None:
    """Give the weights in a folder to the model's adapter; raises DataFault where they are damaged or of another shape."""
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, str(error)) from error
    wrong_shape = f"the adapter in {folder} does not fit the student"
    hint = "use one that was trained from this student"
    try:
        found = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:  # a size mismatch; names every tensor, a line each
        raise DataError(f"{wrong_shape}: {str(error).splitlines()[1].strip()}", hint) from error
    missing = [name for name in found.missing_keys if ".lora_" in name]
    if wrong := [*found.unexpected_keys, *missing]:
        raise DataError(f"{wrong_shape}: {wrong[0]} and {len(wrong) - 1} more differ", hint)


def read_lora_shape(adapter: Path) -> dict[str, Any]:
    """What decides the shape of the LoRA in a folder, from its own configuration."""
    kept = check_adapter(adapter)
    for unlike in ("rank_pattern", "alpha_pattern", "use_dora"):
        if kept.get(unlike):
            raise DataError(
                f"the adapter in {adapter} has {unlike}, which is not trained on here",
                "put a plain LoRA there; or use it through --set student.backend=plain",
            )
    names = ("r", "lora_alpha", "target_modules", "lora_dropout")
    return {name: kept[name] for name in names} | {"use_rslora": kept.get("use_rslora", False)}
