"""LoRA adapters of the trainable student: create one, check one on disk, load its weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.config import Lora
from sclite.errors import DataError, UsageError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel


def meta_model(config: "PretrainedConfig") -> "PreTrainedModel":
    """The model of a transformers configuration, without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def lora_targets(model: "PreTrainedModel", wanted: Sequence[str] = ()) -> list[str]:
    """Names of the layers that get a LoRA: all linear layers of the decoder except the head, or the `wanted` ones.

    Skipped: vision towers; routers of experts; Mamba's `out_proj`, whose fused kernels read the weight and bypass the
    adapter. Names are the last part (`q_proj`) if it names nothing else, otherwise the whole path. Raises UsageError if
    the model has no layer of a `wanted` name.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head, decoder = model.get_output_embeddings(), model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    eligible: dict[str, list[str]] = {}
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
            eligible.setdefault(last, []).append(name)

    def matches(path: str, name: str) -> bool:
        return path == name or path.endswith(f".{name}")

    all_paths = [path for paths in eligible.values() for path in paths]
    if unknown := [name for name in wanted if not any(matches(path, name) for path in all_paths)]:
        raise UsageError(
            f"lora.target_modules: {model.config.model_type} has no linear layer named {', '.join(unknown)}",
            f"choose from {', '.join(eligible)}, or leave target_modules empty for all of them",
        )
    targets = []
    for last, paths in eligible.items():
        chosen = [path for path in paths if not wanted or any(matches(path, name) for name in wanted)]
        targets += [last] if chosen == paths and last not in others else chosen
    return targets


def new_lora_shape(lora: Lora, config: "PretrainedConfig") -> dict[str, Any]:
    """LoraConfig arguments for a new LoRA on a model with this configuration."""
    targets = lora_targets(meta_model(config), lora.target_modules)
    return {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": targets, "lora_dropout": 0.0}


def add_adapter(model: "PreTrainedModel", shape: dict[str, Any], seed: int) -> "PeftModel":
    """The model with a new LoRA, initialized from the seed."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**shape, task_type="CAUSAL_LM"))


def adapted_layers(model: "PeftModel") -> list[str]:
    """The layers that have a LoRA, by the last part of their names."""
    from peft.tuners.lora import LoraLayer

    layers = (name for name, layer in model.named_modules() if isinstance(layer, LoraLayer))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in layers))


def check_adapter(folder: Path) -> dict[str, Any]:
    """The configuration of the LoRA in a folder. Raises DataError if one of its two files is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", "np"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(folder, str(error)) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise _unreadable(folder, "adapter_config.json describes no LoRA")
    return config


def _unreadable(folder: Path, reason: str) -> DataError:
    return DataError(
        f"the adapter in {folder} cannot be read: {reason}",
        "restore it from a backup, or delete the folder and train its stage again with --fresh",
    )


def load_adapter(model: "PeftModel", folder: Path) -> None:
    """Load the weights in a folder into the model's adapter. Raises DataError if they are damaged or do not fit."""
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, str(error)) from error
    message = f"the adapter in {folder} does not fit the student"
    hint = "use an adapter that was trained from this student"
    try:
        result = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:  # a size mismatch; lists every tensor, one per line
        raise DataError(f"{message}: {str(error).splitlines()[1].strip()}", hint) from error
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if wrong := [*result.unexpected_keys, *missing]:
        raise DataError(f"{message}: {wrong[0]} and {len(wrong) - 1} more differ", hint)


def read_lora_shape(adapter: Path) -> dict[str, Any]:
    """LoraConfig arguments for a LoRA shaped like the one in a folder."""
    config = check_adapter(adapter)
    for unsupported in ("rank_pattern", "alpha_pattern", "use_dora"):
        if config.get(unsupported):
            raise DataError(
                f"the adapter in {adapter} uses {unsupported}, which Unsloth training does not support",
                "use a plain LoRA, or --set student.backend=plain",
            )
    names = ("r", "lora_alpha", "target_modules", "lora_dropout")
    return {name: config[name] for name in names} | {"use_rslora": config.get("use_rslora", False)}
