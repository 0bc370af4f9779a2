"""LoRA adapters of the student that is trained: a new one, or the weights in a folder put onto one of its shape."""

import json
from pathlib import Path
from typing import Any

from sclite.config import Lora
from sclite.errors import DataFault

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_new_adapter(model: Any, lora: Lora, seed: int) -> Any:
    """The model with a new LoRA on all seven linear layers of each block; the seed decides its random factors."""
    import torch
    from peft import LoraConfig, get_peft_model

    shape = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(LINEAR_LAYERS),
        task_type="CAUSAL_LM",
        lora_dropout=0.0,
    )
    torch.manual_seed(seed)
    return get_peft_model(model, shape)


def put_adapter(model: Any, folder: Path) -> None:
    """Give the weights in a folder to the model's adapter; raises DataFault where they are not of its shape."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    found = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    missing = [name for name in found.missing_keys if ".lora_" in name]
    if wrong := [*found.unexpected_keys, *missing]:
        raise DataFault(
            f"the adapter in {folder} does not fit the student: {wrong[0]} and {len(wrong) - 1} more differ",
            "put one there that was trained from this student",
        )


def shape_of(lora: Lora, adapter: Path | None) -> dict[str, Any]:
    """What decides a LoRA's shape: an adapter's own configuration, else the settings."""
    if adapter is None:
        return {
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "target_modules": list(LINEAR_LAYERS),
            "lora_dropout": 0.0,
        }
    kept = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for unlike in ("rank_pattern", "alpha_pattern", "use_dora"):
        if kept.get(unlike):
            raise DataFault(
                f"the adapter in {adapter} has {unlike}, which is not trained on here",
                "put a plain LoRA there; or use it through --set student.backend=plain",
            )
    names = ("r", "lora_alpha", "target_modules", "lora_dropout")
    return {name: kept[name] for name in names} | {"use_rslora": kept.get("use_rslora", False)}
