"""Merge a LoRA adapter into its base model one tensor at a time, with at most one shard in memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.errors import DataError, ScliteError
from sclite.export.layers import TrainedWeights
from sclite.export.tensors import BaseWeights, open_tensors, read_json
from sclite.student.tokenizer_file import FILE, is_ignored

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 500_000_000
COPIED = (".json", ".model", ".jinja", ".txt", ".tiktoken")
SAMPLING = ("repetition_penalty", "temperature", "top_p", "top_k", "min_p", "do_sample")
"""Settings of the base that would affect the trained student, which was checked without them."""
KEEPS_BASE_WEIGHTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that do not change the base weights; PiSSA, OLoRA, CorDA and others do."""


def merge(base_folder: Path, adapter_folder: Path | None, out_folder: Path, *, outtype: str = "f32") -> Path:
    """Write base and adapter as a plain Hugging Face folder; without an adapter, the dequantized base.

    The sum is computed in float32 and stored as float32, matrices as float16 if the GGUF will be 16-bit anyway
    (`outtype`): rounding to bfloat16 would lose most of a small adapter. Tensors without an adapter keep their type, but
    bfloat16 matrices become float16, too, if the others do: the converter would turn them into float32, 0.9 GB of memory
    for an embedding of 152k tokens and 1,536 values. Code and `auto_map` are not copied. `out_folder` is new or empty.
    Raises DataError for adapters that PEFT would load differently, adapters of another base, and damaged files.
    """
    base, untie = BaseWeights(base_folder, adapter_folder), False
    tensors: Iterable[tuple[str, torch.Tensor]] = ((name, base[name]) for name in base)
    if adapter_folder:
        read_settings(adapter_folder)
        trained = TrainedWeights(base_folder, adapter_folder)
        tensors, untie = trained.merge(outtype), "lm_head.weight" in trained.saved and base.tied
    _save_shards(out_folder, tensors)
    copy_settings(base_folder, out_folder, untie=untie)
    return out_folder


def copy_settings(base: Path, out: Path, untie: bool = False) -> None:
    """Copy a model's configuration and tokenizer, but no code and no references to code."""
    from transformers import AutoTokenizer

    for path in sorted(base.iterdir()):
        if not path.is_file() or not path.name.endswith(COPIED) or path.name.endswith(".index.json"):
            continue
        if path.name.endswith("config.json"):
            before = read_json(path)
            after = {key: value for key, value in before.items() if key != "auto_map"}
            if path.name == "config.json":
                after.pop("quantization_config", None)
                after |= {"tie_word_embeddings": False} if untie else {}
            elif path.name == "generation_config.json":
                after = {key: value for key, value in after.items() if key not in SAMPLING}
            elif path.name == "tokenizer_config.json" and (base / FILE).is_file():
                # loaded as llama.cpp's converter does
                loaded = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
                whole = {"tokenizer_class": "PreTrainedTokenizerFast"}
                after |= whole if is_ignored(loaded, str(base)) else {}
            if after != before:
                (out / path.name).write_text(json.dumps(after, indent=2) + "\n", encoding="utf-8")
                continue
        shutil.copyfile(path, out / path.name)


UNSUPPORTED = (
    "use_dora", "target_parameters", "trainable_token_indices", "layer_replication", "lora_bias",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "monteclora_config", "kasa_config",
)  # fmt: skip
"""Settings of PEFT's variants of LoRA."""


def read_settings(adapter: Path) -> dict[str, Any]:
    """The settings of a LoRA. Raises DataError for one whose update is not plain LoRA's, B @ A times a scale."""
    settings = read_json(adapter / "adapter_config.json")
    kind, initialized, alpha = (settings.get(k) for k in ("peft_type", "init_lora_weights", "lora_alpha"))
    used, reason = next((name for name in UNSUPPORTED if settings.get(name)), None), ""
    if kind != "LORA":
        reason = f"is {kind}, not LoRA"
    elif initialized not in KEEPS_BASE_WEIGHTS:
        reason = f"was initialized by changing its base ({initialized})"
    elif used or not isinstance(alpha, (int, float)):
        reason = f"uses {used}" if used else f"has lora_alpha {alpha!r} in its adapter_config.json"
    if reason:
        raise DataError(
            f"the adapter {adapter} {reason}; sclite cannot merge it",
            "merge it with PEFT: PeftModel.from_pretrained(..).merge_and_unload().save_pretrained(FOLDER); then run "
            "sclite export --run NEW --set student.model=FOLDER",
        )
    return settings


def write_plain(adapter: Path, folder: Path) -> None:
    """Write a copy for llama.cpp's converter, which scales every update by lora_alpha / r and drops all other settings.

    Raises DataError if that would be another adapter.
    """
    settings, path = read_settings(adapter), adapter / "adapter_model.safetensors"
    patterns = [name for name in ("alpha_pattern", "rank_pattern") if settings.get(name)]
    keys = open_tensors(path).keys()
    whole = [key.removeprefix("base_model.model.") for key in keys if "lora_" not in key]
    if odd := min([*patterns, *whole], default=None):
        hint = "use `sclite export --format gguf`, which merges it"
        raise DataError(f"the adapter {adapter} has its own {odd}, which a LoRA file cannot store", hint)
    # rank-stabilized: scaled by alpha / sqrt(r) (arXiv 2312.03732)
    alpha = settings["lora_alpha"] * (math.sqrt(settings["r"]) if settings.get("use_rslora") else 1)
    folder.mkdir()
    (folder / path.name).symlink_to(path.resolve())
    text = json.dumps({"peft_type": "LORA", "lora_alpha": alpha})
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _save_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors to files of about SHARD_BYTES, with the index that transformers reads."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: dict[str, list[str]] = {}
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        folder.mkdir(parents=True, exist_ok=True)  # not before an adapter is accepted
        path = folder / f"model-{len(shards) + 1:05d}.safetensors"
        try:
            save_file(pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise ScliteError(f"{path} cannot be written: {error}", "check the free disk space") from error
        shards[path.name] = list(pending)
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / next(iter(shards))).rename(folder / "model.safetensors")
        return
    places = {name: file for file, names in shards.items() for name in names}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
