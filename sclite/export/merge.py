"""Merge a LoRA adapter into its base model one tensor at a time, with at most one shard in memory."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sclite.errors import DataError, ScliteError
from sclite.export.tensors import Tensors, open_tensors, read_json
from sclite.student.loader import check_quantization
from sclite.student.origin import Origin, fingerprint, read_origin
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

    W + scale * B @ A is computed in float32 and stored as float32, matrices as float16 if the GGUF will be 16-bit anyway
    (`outtype`): rounding to bfloat16 would lose most of a small adapter. Tensors without an adapter keep their type, but
    bfloat16 matrices become float16, too, if the others do: the converter would turn them into float32, 0.9 GB of memory
    for an embedding of 152k tokens and 1,536 values. Code and `auto_map` are not copied. `out_folder` is new or empty.
    Raises DataError for adapters that PEFT would load differently, adapters of another base, and damaged files.
    """
    weights = BaseWeights(base_folder, adapter_folder)
    adapter = Adapter(adapter_folder, weights) if adapter_folder else None
    out_folder.mkdir(parents=True, exist_ok=True)
    if adapter is None:
        _save_shards(out_folder, ((name, weights[name]) for name in weights))
    else:
        changed = ((name, adapter.apply(name, weights[name], outtype)) for name in weights)
        added = ((name, adapter.apply(name, None, outtype)) for name in adapter.additions)
        _save_shards(out_folder, chain(changed, added))
    copy_settings(base_folder, out_folder, untie=bool(adapter and "lm_head.weight" in adapter.additions))
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


class BaseWeights:
    """The base model's tensors by name, dequantized, and rounded to NF4 if the adapter was trained on NF4 weights."""

    def __init__(self, folder: Path, adapter: Path | None = None):
        self.folder, self._tensors = folder, Tensors(folder)
        config = read_json(folder / "config.json")
        check_quantization(config.get("quantization_config"), folder)
        self._states: dict[str, list[str]] = {}
        for name in self._tensors:
            owner = re.match(r"(.+\.weight)\.(absmax|quant_map|nested_|quant_state)", name)
            if owner:
                self._states.setdefault(owner[1], []).append(name)
        self._parts = {part for parts in self._states.values() for part in parts}
        self.tied = bool(config.get("tie_word_embeddings")) or "lm_head.weight" not in self
        self._origin = read_origin(adapter) if adapter else Origin()
        if self._origin.weights and self._origin.weights != fingerprint(folder):
            message = f"the adapter {adapter} was not trained on the weights in {folder}"
            hint = "set student.model to the base model of the adapter, or train again with `sclite train --fresh`"
            raise DataError(message, hint)
        trained_in_nf4 = {self.find(f"{module}.weight", "training") for module in self._origin.nf4}
        self._nf4 = trained_in_nf4 - set(self._states)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if name not in self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors and name not in self._parts

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._states and name not in self._nf4:
            return self._tensors[name]
        import bitsandbytes.functional as bnb
        import torch

        if name in self._nf4:  # as training in NF4 sees it: quantized as in `nf4_config`, then dequantized
            device = "cuda" if torch.cuda.is_available() else "cpu"
            weight = self._tensors[name].to(device, getattr(torch, self._origin.dtype))
            packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            return bnb.dequantize_4bit(packed, state).cpu()
        parts = {part: self._tensors[part] for part in self._states[name]}
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        return bnb.dequantize_4bit(self._tensors[name], state)

    def count_parameters(self) -> int:
        """The number of values of all tensors; a byte of packed weights contains two."""
        return sum(self._tensors.size(name) * (2 if name in self._states else 1) for name in self)

    def find(self, name: str, who: str) -> str:
        """`name`, or the only tensor whose name has the same ending (multimodal models add prefixes)."""
        if name in self:
            return name
        tail = re.sub(r"^(model\.|language_model\.)+", "", name)
        # Qwen3.5's layers for multi-token prediction have names like the first ones
        candidates = (other for other in self if "vision" not in other and not other.startswith("mtp."))
        alike = [other for other in candidates if other.endswith("." + tail)]
        if len(alike) == 1:
            return alike[0]
        hint = "set student.model to the base model of the adapter"
        raise DataError(f"{who} changes {name}, which {self.folder} does not have", hint)


class Adapter:
    """A PEFT LoRA folder: for each base tensor that it changes, a low-rank update or a replacement."""

    def __init__(self, folder: Path, base: BaseWeights):
        self.folder, self.settings = folder, read_json(folder / "adapter_config.json")
        if (kind := self.settings.get("peft_type")) != "LORA":
            self._reject(f"is {kind}, not LoRA")
        if (initialized := self.settings.get("init_lora_weights")) not in KEEPS_BASE_WEIGHTS:
            self._reject(f"was initialized by changing its base ({initialized})")
        if used := next((name for name in UNSUPPORTED if self.settings.get(name)), None):
            self._reject(f"uses {used}")
        path, who = folder / "adapter_model.safetensors", f"the adapter {folder}"
        self._tensors = open_tensors(path, f"delete {folder} and run `sclite train` again")
        self._pairs: dict[str, tuple[str, str, bool, str]] = {}
        self._replaced: dict[str, str] = {}
        keys = list(self._tensors.keys())
        for key in keys:
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            low_rank = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", name)
            if low_rank:
                module, embedding, side = low_rank[1], bool(low_rank[2]), low_rank[3]
                if module == "lm_head" and base.tied:
                    self._reject(f"changes lm_head, which {base.folder} ties to its embedding")
                target, stem = base.find(f"{module}.weight", who), f"lora_{low_rank[2] or ''}"
                other = key.replace(f"{stem}{side}", f"{stem}{'B' if side == 'A' else 'A'}")
                if other not in keys:
                    raise DataError(f"{folder} has {key} but not {other}", "save or train the adapter again")
                if side == "A":
                    self._pairs[target] = (key, other, embedding, module)
            elif "lora_" in name:
                self._reject(f"contains {key}, which is not plain LoRA")
            elif name == "lm_head.weight" and name not in base:
                self._replaced[name] = key
            else:
                self._replaced[base.find(name, who)] = key
        self.additions = [name for name in self._replaced if name not in base]
        names = (*self._pairs, *self._replaced)
        if not names:
            raise DataError(f"{path} contains no tensors", "train the adapter again")
        embedding_names = re.compile(r"(embed_tokens|wte|word_embeddings|embed_in)\.")
        if base.tied and (changed := next(filter(embedding_names.search, names), None)):
            self._reject(f"changes {changed}, which {base.folder} ties to its output layer")

    def _reject(self, reason: str) -> NoReturn:
        raise DataError(
            f"the adapter {self.folder} {reason}; sclite cannot merge it",
            "merge it with PEFT: PeftModel.from_pretrained(..).merge_and_unload().save_pretrained(FOLDER); then run "
            "sclite export --run NEW --set student.model=FOLDER",
        )

    def write_plain(self, folder: Path) -> None:
        """Write a copy for llama.cpp's converter, which scales every update by lora_alpha / r and drops all other settings.

        Raises DataError if that would be another adapter.
        """
        settings, alpha = self.settings, self.settings["lora_alpha"]
        patterns = [name for name in ("alpha_pattern", "rank_pattern") if settings.get(name)]
        if odd := min([*patterns, *self._replaced], default=None):
            hint = "use `sclite export --format gguf`, which merges it"
            raise DataError(
                f"the adapter {self.folder} has its own {odd}, which a LoRA file cannot store", hint
            )
        if settings.get("use_rslora"):  # see `apply`
            alpha *= math.sqrt(settings["r"])
        folder.mkdir()
        path = self.folder / "adapter_model.safetensors"
        (folder / path.name).symlink_to(path.resolve())
        text = json.dumps({"peft_type": "LORA", "lora_alpha": alpha})
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")

    def apply(self, name: str, weight: torch.Tensor | None, outtype: str) -> torch.Tensor:
        """The tensor after the adapter; `weight` is None for one that the base ties to another.

        An update is scaled by alpha / r, or alpha / sqrt(r) if rank-stabilized (arXiv 2312.03732); `alpha_pattern` overrides
        alpha by module.
        """
        import torch

        found, delta, settings = weight, None, self.settings
        if name in self._replaced:  # for an embedding, peft saves both the layer and its update
            found = self._tensors.get_tensor(self._replaced[name])
        if name in self._pairs:
            key_a, key_b, embedding, module = self._pairs[name]
            a, b = (self._tensors.get_tensor(key).to(torch.float32) for key in (key_a, key_b))
            patterns = (settings.get("alpha_pattern") or {}).items()
            overrides = (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module))
            alpha, rank = next(overrides, settings.get("lora_alpha")), a.shape[0]
            if not isinstance(alpha, (int, float)):
                path = self.folder / "adapter_config.json"
                hint = f"restore {path}, or train the adapter again"
                raise DataError(f"{path}: lora_alpha is {alpha!r}", hint)
            delta = b @ a
            delta = delta.T if embedding or settings.get("fan_in_fan_out") else delta
            delta *= alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
        for made in (found, delta):
            if made is not None and weight is not None and made.shape != weight.shape:
                shapes = f"{tuple(weight.shape)} in the base and {tuple(made.shape)} in {self.folder}"
                hint = f"use the base model of the adapter: {settings.get('base_model_name_or_path')}"
                raise DataError(f"{name} is {shapes}", hint)
        assert found is not None
        half = outtype != "f32" and found.ndim > 1
        if delta is not None:
            found = delta.add_(found)
        elif found is weight and not (half and found.dtype == torch.bfloat16):
            return found
        return found.to(torch.float16 if half else torch.float32)


def _save_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write tensors to files of about SHARD_BYTES, with the index that transformers reads."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: dict[str, list[str]] = {}
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
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
