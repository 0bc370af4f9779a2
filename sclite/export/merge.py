"""A LoRA adapter into its base model, tensor by tensor, so that the memory needed is that of one shard."""

import json
import math
import re
import shutil
from pathlib import Path

from sclite.errors import DataFault
from sclite.export.weights import Tensors, read_json

SHARD_BYTES = 2_000_000_000
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
RECORD = "merged_from.json"


def merge(base_folder: Path, adapter_folder: Path | None, out_folder: Path) -> Path:
    """Write base + adapter as a plain Hugging Face folder; without an adapter, the base in full precision.

    W + scale * B @ A is computed in float32 and stored in the base's type; 4-bit (bitsandbytes) weights become the type
    they compute in. Every other file of the base, the tokenizer's above all, is copied byte for byte. The folder appears
    whole or not at all, in the place of an earlier merge. Raises DataFault for what cannot be merged: DoRA, 8-bit weights,
    adapters of another base or another kind, an `out_folder` that holds something else.
    """
    if out_folder.exists() and any(out_folder.iterdir()) and not (out_folder / RECORD).exists():
        raise DataFault(
            f"{out_folder} is not empty and no earlier merge", "name another folder, or empty this one"
        )
    weights = BaseWeights(base_folder)
    adapter = Adapter(adapter_folder, weights) if adapter_folder else None
    part = out_folder.with_name(out_folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shards = _Shards(part)
    for name in weights:
        shards.add(name, adapter.apply(name, weights[name]) if adapter else weights[name])
    if adapter:
        for name in adapter.additions:
            shards.add(name, adapter.apply(name, None))
    shards.finish()
    _copy_files(base_folder, part, untie=bool(adapter and "lm_head.weight" in adapter.additions))
    record = {"base": str(base_folder), "adapter": str(adapter_folder) if adapter_folder else None}
    (part / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if out_folder.exists():
        shutil.rmtree(out_folder)
    return part.replace(out_folder)


def _copy_files(base: Path, out: Path, untie: bool) -> None:
    for path in sorted(base.iterdir()):
        if path.is_file() and not path.name.endswith(NOT_COPIED) and path.name not in (RECORD, "config.json"):
            shutil.copyfile(path, out / path.name)
    shape = read_json(base / "config.json")
    if "quantization_config" not in shape and not untie:
        shutil.copyfile(base / "config.json", out / "config.json")
        return
    shape.pop("quantization_config", None)
    if untie:
        shape["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(shape, indent=2) + "\n", encoding="utf-8")


class BaseWeights:
    """The base model's tensors by name; bitsandbytes 4-bit ones are dequantised when they are read."""

    def __init__(self, folder: Path):
        self.folder, self._tensors = folder, Tensors(folder)
        quantised = read_json(folder / "config.json").get("quantization_config")
        if quantised and not (
            quantised.get("quant_method") == "bitsandbytes" and quantised.get("load_in_4bit")
        ):
            raise DataFault(
                f"the weights of {folder} are quantised ({quantised.get('quant_method')})",
                "name the unquantised base model (student.model), the one this was made from",
            )
        self._states: dict[str, list[str]] = {}
        for name in self._tensors:
            owner = re.match(r"(.+\.weight)\.(absmax|quant_map|nested_|quant_state)", name)
            if owner:
                self._states.setdefault(owner[1], []).append(name)
        self._parts = {part for parts in self._states.values() for part in parts}

    def __iter__(self):
        return (name for name in self._tensors if name not in self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors and name not in self._parts

    def __getitem__(self, name: str):
        if name not in self._states:
            return self._tensors[name]
        import bitsandbytes.functional as bnb

        state = bnb.QuantState.from_dict(
            {part: self._tensors[part] for part in self._states[name]}, device="cpu"
        )
        return bnb.dequantize_4bit(self._tensors[name], state)


class Adapter:
    """What a PEFT LoRA folder changes: name of a base tensor -> low-rank update, or its replacement."""

    def __init__(self, folder: Path, base: BaseWeights):
        self.folder, self.settings = folder, read_json(folder / "adapter_config.json")
        self._refuse_unknown_kinds()
        path = folder / "adapter_model.safetensors"
        if not path.is_file():
            raise DataFault(
                f"{path} is missing", "save the adapter with safe_serialization, or train it again"
            )
        self._tensors = Tensors._open(path)
        self._pairs: dict[str, tuple[str, str, bool]] = {}
        self._whole: dict[str, str] = {}
        keys = list(self._tensors.keys())
        for key in keys:
            self._place(key, base)
        self.additions = [name for name in self._whole if name not in base]
        if not self._pairs and not self._whole:
            raise DataFault(f"{path} holds no tensors", "train the adapter again")

    def _refuse_unknown_kinds(self) -> None:
        found = self.settings
        reasons = {
            f"an adapter of kind {found.get('peft_type')}": found.get("peft_type") != "LORA",
            "DoRA (use_dora)": found.get("use_dora"),
            "LoRA on parameters of expert layers (target_parameters)": found.get("target_parameters"),
            "added token rows (trainable_token_indices)": found.get("trainable_token_indices"),
            "layer replication": found.get("layer_replication"),
        }
        for reason, is_so in reasons.items():
            if is_so:
                raise DataFault(
                    f"{self.folder} has {reason}, which cannot be merged tensor by tensor",
                    "merge it with peft: PeftModel.from_pretrained(..).merge_and_unload(), then export that folder",
                )

    def _place(self, key: str, base: BaseWeights) -> None:
        """Find the base tensor that an adapter tensor belongs to."""
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        low_rank = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", name)
        if low_rank:
            module, embedding, side = low_rank[1], bool(low_rank[2]), low_rank[3]
            target = self._find(f"{module}.weight", base)
            other = key.replace(f"lora_{low_rank[2] or ''}A", f"lora_{low_rank[2] or ''}B")
            if side == "A":
                self._pairs[target] = (key, other, embedding)
        elif "lora_" in name:
            raise DataFault(
                f"{self.folder} holds {key}, which is no plain LoRA", "merge it with peft's merge_and_unload"
            )
        elif name == "lm_head.weight" and name not in base:
            self._whole[name] = key
        else:
            self._whole[self._find(name, base)] = key

    def _find(self, name: str, base: BaseWeights) -> str:
        """`name`, or the one tensor whose name ends like it (files of multimodal models name their parts otherwise)."""
        if name in base:
            return name
        tail = re.sub(r"^(model\.|language_model\.)+", "", name)
        alike = [other for other in base if other.endswith("." + tail) and "vision" not in other]
        if len(alike) == 1:
            return alike[0]
        raise DataFault(
            f"the adapter {self.folder} changes {name}, which {base.folder} does not have",
            f"name the base it was trained on: {self.settings.get('base_model_name_or_path')}",
        )

    def _scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) when rank-stabilised (arXiv 2312.03732); patterns may set alpha by module."""
        alpha = self.settings["lora_alpha"]
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank

    def apply(self, name: str, weight):
        """The tensor after the adapter; `weight` is None for one that the base shares with another."""
        import torch

        if name in self._whole:  # of an embedding peft saves the layer and its update
            found = self._tensors.get_tensor(self._whole[name])
            self._check_shape(name, found, weight)
            weight = found if weight is None else found.to(weight.dtype)
        if name not in self._pairs:
            return weight
        key_a, key_b, embedding = self._pairs[name]
        a, b = (self._tensors.get_tensor(key).to(torch.float32) for key in (key_a, key_b))
        delta = b @ a
        delta = delta.T if embedding or self.settings.get("fan_in_fan_out") else delta
        self._check_shape(name, delta, weight)
        scale = self._scale(name.removesuffix(".weight"), a.shape[0])
        return (weight.to(torch.float32) + scale * delta).to(weight.dtype)

    def _check_shape(self, name: str, found, weight) -> None:
        if weight is not None and found.shape != weight.shape:
            raise DataFault(
                f"{name} is {tuple(weight.shape)} in the base and {tuple(found.shape)} in {self.folder}",
                f"name the base it was trained on: {self.settings.get('base_model_name_or_path')}",
            )


class _Shards:
    """Writes tensors into files of about SHARD_BYTES with the index that transformers reads."""

    def __init__(self, folder: Path):
        self.folder, self._pending, self._bytes, self._total = folder, {}, 0, 0
        self._names: list[list[str]] = []

    def add(self, name: str, tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self._pending, self.folder / f"{len(self._names)}.safetensors", metadata={"format": "pt"})
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
