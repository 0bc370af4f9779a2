"""Merge a LoRA adapter into its base model one tensor at a time, with at most one shard in memory."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.errors import DataError, ScliteError
from sclite.export.weights import TrainedWeights, read_json
from sclite.student.adapters import check_adapter
from sclite.student.tokenization import is_ignored

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 500_000_000
COPIED = (".json", ".model", ".jinja", ".txt", ".tiktoken")
DROPPED = (
    "auto_map", "quantization_config", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "do_sample",
)  # fmt: skip
"""Settings of the base that refer to code or to 4-bit weights, or would affect the student, which was checked without them."""
TIED = re.compile(r"(embed_tokens|wte|word_embeddings|embed_in)\.")
KEEPS_BASE_WEIGHTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that do not change the base weights; PiSSA, OLoRA, CorDA and others do."""


def merge(base_folder: Path, adapter_folder: Path | None, out_folder: Path, *, outtype: str = "f32") -> Path:
    """Write base and adapter as a plain Hugging Face folder; without an adapter, the dequantized base.

    The sum is computed in float32: rounding to bfloat16 would lose most of a small adapter. Matrices are stored as float16
    if the GGUF will be 16-bit anyway (`outtype`), other tensors without an adapter in their own type. Code and references
    to code are not copied. `out_folder` is new or empty.
    Raises DataError for adapters that PEFT would load differently or that change an embedding which is the output layer,
    too, for adapters of another base, and for damaged files.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if adapter_folder:
        read_settings(adapter_folder)
    trained = TrainedWeights(base_folder, adapter_folder)
    base, updates, saved = trained.base, trained.updates, trained.saved
    if base.tied and (odd := next(filter(TIED.search, (*updates, *saved)), None)):
        hint = "merge it with PEFT's merge_and_unload, and export the result as student.model"
        raise DataError(f"the adapter changes {odd}, which {base.folder} ties to its output layer", hint)
    places: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        out_folder.mkdir(parents=True, exist_ok=True)  # not before an adapter is accepted
        path = out_folder / f"model-{len(set(places.values())) + 1:05d}.safetensors"
        try:
            save_file(pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise ScliteError(f"{path} cannot be written: {error}", "check the free disk space") from error
        places.update(dict.fromkeys(pending, path.name))
        pending.clear()

    for name in dict.fromkeys((*base, *saved)):
        weight = saved[name] if name in saved else base[name]
        if name in updates:  # as PEFT computes them
            weight = updates[name].get_delta_weight("default").detach().add_(weight)
        weight = weight.half() if outtype != "f32" and weight.ndim > 1 else weight
        if pending and sum(each.nbytes for each in pending.values()) + weight.nbytes > SHARD_BYTES:
            flush()
        pending[name] = weight.contiguous()
    flush()
    text = json.dumps({"metadata": {}, "weight_map": places}, indent=2) + "\n"
    (out_folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    copy_settings(base_folder, out_folder, untie="lm_head.weight" in saved and base.tied)
    return out_folder


def copy_settings(base: Path, out: Path, untie: bool = False) -> None:
    """Copy a model's configuration and tokenizer, but no code and no references to code."""
    from transformers import AutoTokenizer

    for path in base.iterdir():
        if not path.name.endswith(COPIED) or path.name.endswith(".index.json"):
            continue
        if not path.name.endswith("config.json"):
            shutil.copyfile(path, out / path.name)
            continue
        settings = {key: value for key, value in read_json(path).items() if key not in DROPPED}
        if path.name == "config.json" and untie:
            settings["tie_word_embeddings"] = False
        elif path.name == "tokenizer_config.json":
            loaded = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
            if is_ignored(loaded, str(base)):  # llama.cpp's converter loads it like this
                settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (out / path.name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_settings(adapter: Path) -> dict[str, Any]:
    """The settings of a LoRA. Raises DataError for DoRA, and for one that was initialized by changing its base."""
    check_adapter(adapter)
    settings = read_json(adapter / "adapter_config.json")
    initialized = settings.get("init_lora_weights")
    if settings.get("use_dora") or initialized not in KEEPS_BASE_WEIGHTS:
        used = "use_dora" if settings.get("use_dora") else f"init_lora_weights: {initialized}"
        raise DataError(
            f"sclite cannot merge the adapter {adapter}, which uses {used}",
            "merge it with PEFT: PeftModel.from_pretrained(..).merge_and_unload().save_pretrained(FOLDER); then run "
            "sclite export --run NEW --set student.model=FOLDER",
        )
    return settings
