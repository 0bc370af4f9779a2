"""Merge a LoRA adapter into its base model one tensor at a time, with at most one shard in memory."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sclite.errors import DataError, ScliteError
from sclite.export.tensors import Tensors, read_json
from sclite.student.origin import Origin, fingerprint, nf4_round_trip, read_origin

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2_000_000_000
COPIED = (".json", ".model", ".jinja", ".txt", ".tiktoken")
RECORD = "merged_from.json"
KEEPS_BASE_WEIGHTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that do not change the base weights; PiSSA, OLoRA, CorDA and others do."""


def merge(base_folder: Path, adapter_folder: Path | None, out_folder: Path, *, outtype: str = "f32") -> Path:
    """Write base and adapter as a plain Hugging Face folder; without an adapter, the dequantized base.

    W + scale * B @ A is computed in float32 and stored as float32, matrices as float16 if the GGUF will be 16-bit anyway
    (`outtype`): rounding to bfloat16 would lose most of a small adapter. Tensors without an adapter keep their type. Code and
    `auto_map` are not copied. The folder is complete or absent, and replaces an earlier merge. Raises DataError for adapters
    that PEFT would load differently, adapters of another base, and damaged files.
    """
    if out_folder.exists() and any(out_folder.iterdir()) and not (out_folder / RECORD).exists():
        raise DataError(
            f"{out_folder} is not empty and not an earlier merge", "choose another folder, or empty this one"
        )
    weights = BaseWeights(base_folder, adapter_folder)
    adapter = Adapter(adapter_folder, weights) if adapter_folder else None
    part = out_folder.with_name(out_folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shards = _Shards(part)
    for name in weights:
        shards.add(name, adapter.apply(name, weights[name], outtype) if adapter else weights[name])
    for name in adapter.additions if adapter else ():
        shards.add(name, adapter.apply(name, None, outtype))
    shards.finish()
    copy_settings(base_folder, part, untie=bool(adapter and "lm_head.weight" in adapter.additions))
    record = {"base": str(base_folder), "adapter": str(adapter_folder) if adapter_folder else None}
    (part / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if out_folder.exists():
        shutil.rmtree(out_folder)
    return part.replace(out_folder)


def copy_settings(base: Path, out: Path, untie: bool = False) -> None:
    """Copy a model's configuration and tokenizer byte for byte, but no code and no references to code."""
    for path in sorted(base.iterdir()):
        if not path.is_file() or not path.name.endswith(COPIED) or path.name.endswith(".index.json"):
            continue
        if path.name.endswith("config.json"):
            before = read_json(path)
            after = {key: value for key, value in before.items() if key != "auto_map"}
            if path.name == "config.json":
                after.pop("quantization_config", None)
                after |= {"tie_word_embeddings": False} if untie else {}
            if after != before:
                (out / path.name).write_text(json.dumps(after, indent=2) + "\n", encoding="utf-8")
                continue
        if path.name != RECORD:
            shutil.copyfile(path, out / path.name)


UNSUPPORTED = {
    "use_dora": "DoRA",
    "target_parameters": "LoRA on parameters of expert layers",
    "trainable_token_indices": "trainable token indices",
    "layer_replication": "layer replication",
    "lora_bias": "LoRA biases",
    "alora_invocation_tokens": "activated LoRA",
    **dict.fromkeys(
        ("use_qalora", "use_bdlora", "arrow_config", "monteclora_config", "kasa_config"), "a LoRA variant"
    ),
}


class BaseWeights:
    """The base model's tensors by name, dequantized, and rounded to NF4 if the adapter was trained on NF4 weights."""

    def __init__(self, folder: Path, adapter: Path | None = None):
        self.folder, self._tensors = folder, Tensors(folder)
        config = read_json(folder / "config.json")
        quantized = config.get("quantization_config")
        if quantized and not (
            quantized.get("quant_method") == "bitsandbytes" and quantized.get("load_in_4bit")
        ):
            raise DataError(
                f"the weights of {folder} are quantized ({quantized.get('quant_method')})",
                "set student.model to the unquantized model",
            )
        self._states: dict[str, list[str]] = {}
        for name in self._tensors:
            owner = re.match(r"(.+\.weight)\.(absmax|quant_map|nested_|quant_state)", name)
            if owner:
                self._states.setdefault(owner[1], []).append(name)
        self._parts = {part for parts in self._states.values() for part in parts}
        self.tied = bool(config.get("tie_word_embeddings")) or "lm_head.weight" not in self
        self._origin = read_origin(adapter) if adapter else Origin()
        if self._origin.weights and self._origin.weights != fingerprint(folder):
            raise DataError(
                f"the adapter {adapter} was not trained on the weights in {folder}",
                "set student.model to the base model of the adapter, or train again with `sclite train --fresh`",
            )
        trained_in_nf4 = {self.find(f"{module}.weight", "training") for module in self._origin.nf4}
        self._nf4 = trained_in_nf4 - set(self._states)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if name not in self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors and name not in self._parts

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._nf4:
            return nf4_round_trip(self._tensors[name], self._origin.dtype)
        if name not in self._states:
            return self._tensors[name]
        import bitsandbytes.functional as bnb

        parts = {part: self._tensors[part] for part in self._states[name]}
        return bnb.dequantize_4bit(self._tensors[name], bnb.QuantState.from_dict(parts, device="cpu"))

    def float32_bytes(self) -> int:
        """The size of all tensors in float32; a byte of packed weights holds two."""
        return sum(
            4 * math.prod(self._tensors.shape(name)) * (2 if name in self._states else 1) for name in self
        )

    def find(self, name: str, who: str) -> str:
        """`name`, or the only tensor whose name has the same ending (multimodal models add prefixes)."""
        if name in self:
            return name
        tail = re.sub(r"^(model\.|language_model\.)+", "", name)
        alike = [other for other in self if other.endswith("." + tail) and "vision" not in other]
        if len(alike) == 1:
            return alike[0]
        raise DataError(
            f"{who} changes {name}, which {self.folder} does not have",
            "set student.model to the base model of the adapter",
        )


class Adapter:
    """A PEFT LoRA folder: for each base tensor that it changes, a low-rank update or a replacement."""

    def __init__(self, folder: Path, base: BaseWeights):
        self.folder, self.settings = folder, read_json(folder / "adapter_config.json")
        if (kind := self.settings.get("peft_type")) != "LORA":
            self._reject(f"is {kind}, not LoRA")
        if (initialized := self.settings.get("init_lora_weights")) not in KEEPS_BASE_WEIGHTS:
            self._reject(f"was initialized by changing its base ({initialized})")
        if used := next((name for name in UNSUPPORTED if self.settings.get(name)), None):
            self._reject(f"uses {UNSUPPORTED[used]} ({used})")
        path = folder / "adapter_model.safetensors"
        if not path.is_file():
            raise DataError(f"{path} is missing", "save the adapter as safetensors, or train it again")
        self._tensors = Tensors.open(path, f"delete {folder} and run `sclite train` again")
        self._pairs: dict[str, tuple[str, str, bool, str]] = {}
        self._replaced: dict[str, str] = {}
        keys = list(self._tensors.keys())
        for key in keys:
            self._assign(key, base, keys)
        self.additions = [name for name in self._replaced if name not in base]
        if not self._pairs and not self._replaced:
            raise DataError(f"{path} contains no tensors", "train the adapter again")
        names = (*self._pairs, *self._replaced)
        embeddings = [
            name for name in names if re.search(r"(embed_tokens|wte|word_embeddings|embed_in)\.", name)
        ]
        if base.tied and embeddings:
            self._reject(f"changes {embeddings[0]}, which {base.folder} ties to its output layer")

    def _reject(self, reason: str) -> NoReturn:
        raise DataError(
            f"the adapter {self.folder} {reason}; sclite cannot merge it",
            "merge it with PEFT: PeftModel.from_pretrained(..).merge_and_unload().save_pretrained(FOLDER); then run "
            "sclite export --run NEW --set student.model=FOLDER",
        )

    def _assign(self, key: str, base: BaseWeights, keys: Sequence[str]) -> None:
        """Assign an adapter tensor to its base tensor."""
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        low_rank = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", name)
        if low_rank:
            module, embedding, side = low_rank[1], bool(low_rank[2]), low_rank[3]
            if module == "lm_head" and base.tied:
                self._reject(f"changes lm_head, which {base.folder} ties to its embedding")
            target = base.find(f"{module}.weight", f"the adapter {self.folder}")
            stem = f"lora_{low_rank[2] or ''}"
            other = key.replace(f"{stem}{side}", f"{stem}{'B' if side == 'A' else 'A'}")
            if other not in keys:
                raise DataError(f"{self.folder} has {key} but not {other}", "save or train the adapter again")
            if side == "A":
                self._pairs[target] = (key, other, embedding, module)
        elif "lora_" in name:
            self._reject(f"contains {key}, which is not plain LoRA")
        elif name == "lm_head.weight" and name not in base:
            self._replaced[name] = key
        else:
            self._replaced[base.find(name, f"the adapter {self.folder}")] = key

    def _scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) if rank-stabilized (arXiv 2312.03732); `alpha_pattern` overrides alpha by module."""
        alpha = self.settings.get("lora_alpha")
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        if not isinstance(alpha, (int, float)):
            path = self.folder / "adapter_config.json"
            raise DataError(f"{path}: lora_alpha is {alpha!r}", f"restore {path}, or train the adapter again")
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank

    def apply(self, name: str, weight: torch.Tensor | None, outtype: str) -> torch.Tensor:
        """The tensor after the adapter; `weight` is None for one that the base ties to another."""
        import torch

        before = weight
        if name in self._replaced:  # for an embedding, peft saves both the layer and its update
            found = self._tensors.get_tensor(self._replaced[name])
            self._check_shape(name, found, weight)
            weight = found
        if name in self._pairs:
            key_a, key_b, embedding, module = self._pairs[name]
            a, b = (self._tensors.get_tensor(key).to(torch.float32) for key in (key_a, key_b))
            delta = b @ a
            delta = delta.T if embedding or self.settings.get("fan_in_fan_out") else delta
            self._check_shape(name, delta, weight)
            weight = weight.to(torch.float32) + self._scale(module, a.shape[0]) * delta
        if weight is before:
            return weight
        return weight.to(torch.float32 if outtype == "f32" or weight.ndim == 1 else torch.float16)

    def _check_shape(self, name: str, found: torch.Tensor, weight: torch.Tensor | None) -> None:
        if weight is not None and found.shape != weight.shape:
            raise DataError(
                f"{name} is {tuple(weight.shape)} in the base and {tuple(found.shape)} in {self.folder}",
                f"use the base model of the adapter: {self.settings.get('base_model_name_or_path')}",
            )


class _Shards:
    """Writes tensors to files of about SHARD_BYTES, with the index that transformers reads."""

    def __init__(self, folder: Path):
        self.folder, self._pending, self._bytes, self._total = folder, {}, 0, 0
        self._names: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self.folder / f"{len(self._names)}.safetensors"
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise ScliteError(f"{path} cannot be written: {error}", "check the free disk space") from error
        self._names.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def finish(self) -> None:
        self._flush()
        count = len(self._names)
        places = {}
        for number, names in enumerate(self._names):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            (self.folder / f"{number}.safetensors").rename(self.folder / file)
            places.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": places}
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
