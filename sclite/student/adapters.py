"""LoRA adapters: choose their layers, check one on disk, load its weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sclite.errors import DataError, UsageError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

STUDENTS = ("base", "sft", "dpo")
"""The students of a run in the order of training; all but the base model are adapters."""


def adapter_weights(stage: str) -> str:
    """The weights of the adapter that a stage (sft, warmup or dpo) writes, relative to the run folder."""
    return f"{stage}/adapter/adapter_model.safetensors"


def meta_model(config: "PretrainedConfig") -> "PreTrainedModel":
    """The model of a transformers configuration, without memory for its weights. DataError if it has no language model."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        if type(config) in AutoModelForCausalLM._model_mapping:
            raise
        message = f"transformers has no causal language model for {config.model_type}"
        raise DataError(message, "choose a text model as student.model") from error


def lora_targets(model: "PreTrainedModel", wanted: Sequence[str] = ()) -> list[str]:
    """The layers that get a LoRA: every linear layer of the language model except the head, or the `wanted` ones.

    Skipped: vision towers; routers of experts; Mamba's `out_proj`, whose fused kernels bypass the adapter. Names are
    the last part (`q_proj`) if that is unambiguous, otherwise the whole path. Raises UsageError for a `wanted` name
    without a layer.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head, inside = model.get_output_embeddings(), set(model.get_decoder().modules())
    eligible: dict[str, list[str]] = {}
    others = set()
    for path, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        parent, _, last = path.rpartition(".")
        owner = model.get_submodule(parent)
        mamba = last == "out_proj" and hasattr(owner, "A_log") and hasattr(owner, "D")
        if module is head or module not in inside or mamba or last.endswith(("gate", "router")):
            others.add(last)
        else:
            eligible.setdefault(last, []).append(path)
    found: set[str] = set()
    targets = []
    for last, paths in eligible.items():
        names = {path: [name for name in wanted if f".{path}".endswith(f".{name}")] for path in paths}
        found.update(name for matching in names.values() for name in matching)
        chosen = [path for path in paths if names[path] or not wanted]
        targets += [last] if chosen == paths and last not in others else chosen
    if unknown := [name for name in wanted if name not in found]:
        why = f"{model.config.model_type} has no linear layer named {', '.join(unknown)}"
        hint = f"choose from {', '.join(eligible)}, or leave target_modules empty for all of them"
        raise UsageError(f"lora.target_modules: {why}", hint)
    return targets


def check_adapter(folder: Path) -> None:
    """Raise DataError if one of the two files of the LoRA in a folder is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", "np"):
            pass
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise ValueError("adapter_config.json does not describe a LoRA")
    except (OSError, ValueError, SafetensorError) as error:
        hint = "restore it from a backup, or delete the folder and train its stage again with --fresh"
        raise DataError(f"the adapter in {folder} cannot be read: {error}", hint) from error


def load_adapter(model: "PeftModel", folder: Path) -> None:
    """Load the weights in a folder into the model's adapter. Raises DataError if they are damaged or do not fit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    check_adapter(folder)
    message = f"the adapter in {folder} does not fit the student"
    hint = "use an adapter that was trained from this student"
    weights = load_file(folder / "adapter_model.safetensors")
    try:
        missing, unexpected = cast("tuple[list[str], list[str]]", set_peft_model_state_dict(model, weights))
    except RuntimeError as error:  # a size mismatch; lists every tensor, one per line
        raise DataError(f"{message}: {str(error).splitlines()[1].strip()}", hint) from error
    if wrong := [*unexpected, *(name for name in missing if ".lora_" in name)]:
        raise DataError(f"{message}: {wrong[0]} and {len(wrong) - 1} more differ", hint)
