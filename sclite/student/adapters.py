"""LoRA adapters: choose their layers, check one on disk, load its weights, record what it was trained on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pydantic import BaseModel

from sclite.errors import DataError, UsageError
from sclite.signature import digest

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

ORIGIN_FILE = "trained_on.json"
SAMPLE, PLACES = 4096, 16
"""Bytes of each sample in the fingerprint, and samples per file."""
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
        message = f"transformers has no causal language model for {config.model_type}: {error}"
        raise DataError(message, "choose a text model as student.model") from error


def lora_targets(model: "PreTrainedModel", wanted: Sequence[str] = ()) -> list[str]:
    """The layers that get a LoRA: every linear layer of the language model except the head, or the `wanted` ones.

    Skipped: vision towers, and routers of experts. Names are the last part (`q_proj`) if that is unambiguous, otherwise the
    whole path. Raises UsageError for a `wanted` name without a layer.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head, inside = model.get_output_embeddings(), set(model.get_decoder().modules())
    linear = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    eligible = [
        path
        for path, module in linear.items()
        if module is not head and module in inside and not path.endswith(("gate", "router"))
    ]
    last = {path: path.rpartition(".")[2] for path in linear}
    if unknown := [name for name in wanted if not any(f".{path}".endswith(f".{name}") for path in eligible)]:
        why = f"{model.config.model_type} has no linear layer named {', '.join(unknown)}"
        choices = ", ".join(dict.fromkeys(last[path] for path in eligible))
        hint = f"choose from {choices}, or leave target_modules empty for all of them"
        raise UsageError(f"lora.target_modules: {why}", hint)
    endings = tuple(f".{name}" for name in wanted) or ("",)
    chosen = [path for path in eligible if f".{path}".endswith(endings)]
    others = {last[path] for path in linear if path not in chosen}
    return list(dict.fromkeys(path if last[path] in others else last[path] for path in chosen))


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
    misfit = DataError(
        f"the adapter in {folder} does not fit the student",
        "use an adapter that was trained from this student",
    )
    weights = load_file(folder / "adapter_model.safetensors")
    try:
        missing, unexpected = cast("tuple[list[str], list[str]]", set_peft_model_state_dict(model, weights))
    except RuntimeError as error:  # sizes differ
        raise misfit from error
    if unexpected or any(".lora_" in name for name in missing):
        raise misfit


# -- what an adapter was trained on --------------------------------------------------------------------------------


class Origin(BaseModel, frozen=True, extra="forbid"):
    """`weights`: fingerprint of the base, "" if unknown; `nf4`: modules that were in NF4 in training; `dtype`: theirs."""

    weights: str = ""
    nf4: tuple[str, ...] = ()
    dtype: str = "bfloat16"


def fingerprint(folder: Path) -> str:
    """Digest of samples from all over each weight file, 64 kB per file; "" if the folder has no safetensors."""
    samples = []
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            for place in range(PLACES):
                file.seek(path.stat().st_size * place // PLACES)
                samples.append(file.read(SAMPLE).hex())
    return digest(samples) if samples else ""


def record_origin(model: "torch.nn.Module", base: Path, adapter: Path) -> None:
    """Write next to the adapter what `model`, loaded from the folder `base`, was trained on."""
    causal = cast("PreTrainedModel", getattr(model, "get_base_model", lambda: model)())
    inside = set(causal.get_decoder().modules())  # a vision tower is neither trained nor exported
    layers = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module.weight
        for name, module in model.named_modules()
        if type(module).__name__ == "Linear4bit" and module in inside
    }
    state = next((weight.quant_state for weight in layers.values()), None)
    dtype = "bfloat16" if state is None else str(state.dtype).removeprefix("torch.")
    origin = Origin(weights=fingerprint(base), nf4=tuple(sorted(layers)), dtype=dtype)
    (adapter / ORIGIN_FILE).write_text(origin.model_dump_json(indent=1) + "\n", encoding="utf-8")
