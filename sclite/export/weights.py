"""The tensors of a base model and an adapter, one at a time, and the model with one layer's weights in memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.errors import DataError
from sclite.student.adapters import ORIGIN_FILE, Origin, fingerprint
from sclite.student.backends import attention_of
from sclite.student.loader import check_quantization

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import PreTrainedModel

PART = re.compile(r"(.+\.weight)\.(absmax|quant_map|nested_|quant_state)")  # of a weight in 4 bits


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DataError if the file is missing or malformed."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", "copy or download the folder again") from error
    return content


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file. Raises DataError if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}", "download or save it again") from error


class BaseWeights:
    """The tensors in a model's safetensors files, sharded or not, by name. Each is read on access, on the CPU.

    They are dequantized, and rounded to NF4 if the adapter was trained on NF4 weights.
    """

    def __init__(self, folder: Path, adapter: Path | None = None):
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            self._file = {name: folder / file for name, file in read_json(index)["weight_map"].items()}
        else:
            with open_tensors(single) as weights:
                self._file = dict.fromkeys(weights.keys(), single)
        config, self.folder = read_json(folder / "config.json"), folder
        check_quantization(config.get("quantization_config"), folder)
        self._packed = {found[1] for name in self._file if (found := PART.match(name))}
        self.tied = bool(config.get("tie_word_embeddings")) or "lm_head.weight" not in self
        self._origin = Origin()
        if adapter and (path := adapter / ORIGIN_FILE).is_file():  # an imported adapter has no record
            try:
                self._origin = Origin.model_validate_json(path.read_bytes())
            except ValueError as error:
                hint = f"delete {adapter} and run `sclite train` again"
                raise DataError(f"{path} is damaged: {error}", hint) from error
        if self._origin.weights and self._origin.weights != fingerprint(folder):
            message = f"the adapter {adapter} was not trained on the weights in {folder}"
            hint = "set student.model to the base model of the adapter, or train again with `sclite train --fresh`"
            raise DataError(message, hint)
        self._nf4 = {self.find(f"{module}.weight") for module in self._origin.nf4} - self._packed

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._file if not PART.match(name))

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def __getitem__(self, name: str) -> torch.Tensor:
        names, parts = [name], dict[str, Any]()
        if name in self._packed:
            names += [part for part in self._file if part.startswith(f"{name}.")]
        for part in names:
            with open_tensors(self._file[part]) as weights:
                parts[part] = weights.get_tensor(part)
        weight: torch.Tensor = parts.pop(name)
        if name not in self._packed | self._nf4:
            return weight
        import bitsandbytes.functional as bnb
        import torch

        if name in self._nf4:  # as training in NF4 sees it: quantized as in `load_plain`, then dequantized
            device = "cuda" if torch.cuda.is_available() else "cpu"
            weight = weight.to(device, getattr(torch, self._origin.dtype))
            packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            return bnb.dequantize_4bit(packed, state).cpu()
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        return bnb.dequantize_4bit(weight, state)

    def count_parameters(self) -> int:
        """The number of values of all tensors; a byte of packed weights holds two."""
        total = 0
        for name in self:
            with open_tensors(self._file[name]) as weights:
                values = math.prod(weights.get_slice(name).get_shape())
            total += values * (2 if name in self._packed else 1)
        return total

    def find(self, name: str) -> str:
        """`name`, or the only tensor whose name has the same ending (multimodal models add prefixes)."""
        if name in self:
            return name
        tail = re.sub(r"^(model\.|language_model\.)+", "", name)
        # Qwen3.5's layers for multi-token prediction have names like the first ones
        own = (other for other in self if not ("vision" in other or other.startswith("mtp.")))
        alike = [other for other in own if other.endswith("." + tail)]
        if len(alike) == 1:
            return alike[0]
        raise DataError(f"{self.folder} has no {name}", "set student.model to the base model of the adapter")


class TrainedWeights:
    """`model`: base and adapter in transformers, where only the adapter has weights; the base's are read by name."""

    def __init__(self, base: Path, adapter: Path | None):
        import torch
        from accelerate import init_empty_weights
        from peft import PeftConfig, get_peft_model
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        config.__dict__.pop("quantization_config", None)  # BaseWeights dequantizes
        with init_empty_weights(include_buffers=False):
            plain = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False, **attention_of(config)
            )
        self._tied: dict[str, str] = plain.all_tied_weights_keys
        self.base, self.model = BaseWeights(base, adapter), plain
        if adapter is not None:
            hint = "set student.model to the base model of the adapter"
            try:
                settings = PeftConfig.from_pretrained(str(adapter))
                self.model = get_peft_model(plain, settings, low_cpu_mem_usage=True)
            except ValueError as error:  # no layer has these names
                raise DataError(f"the adapter {adapter} does not fit {base}: {error}", hint) from error
            parameters = {
                re.sub(r"(\.modules_to_save)?\.default\b", "", name): (name, parameter.shape)
                for name, parameter in self.model.named_parameters()
                if re.search(r"\.lora_|\.modules_to_save\.", name)
            }
            tensors = load_file(adapter / "adapter_model.safetensors")
            weights = {name: each.float() for name, each in tensors.items() if ".base_layer." not in name}
            shapes = {(name, shape) for name, (_, shape) in parameters.items()}
            if odd := shapes ^ {(name, weight.shape) for name, weight in weights.items()}:
                name, shape = min(odd)
                why = f"{name} {list(shape)} is in only one of them"
                raise DataError(f"the adapter {adapter} does not fit {base}: {why}", hint)
            state = {parameters[name][0]: weight for name, weight in weights.items()}
            self.model.load_state_dict(state, strict=False, assign=True)
        self.model.eval()
        self.updates: dict[str, Any] = {}  # LoRA layers, by the name of their tensor in the base
        for path, module in self.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                self.updates[self.base_name(f"{path}.weight")] = module
        self.saved: dict[str, torch.Tensor] = {}  # parameters in modules_to_save, likewise
        for path, parameter in self.model.named_parameters():
            if ".modules_to_save." in path:
                head = path.endswith(".lm_head.modules_to_save.default.weight")  # may be tied in the base
                self.saved["lm_head.weight" if head else self.base_name(path)] = parameter.detach()

    def base_name(self, name: str) -> str:
        """The name of a parameter of `model` in the files of the base model."""
        name = re.sub(r"\.(base_layer|original_module|modules_to_save\.default)\.", ".", name)
        name = name.removeprefix("base_model.model.")
        return self.base.find(self._tied.get(name, name))


def load_layered(base: Path, adapter: Path | None) -> PreTrainedModel | PeftModel:
    """Base and adapter in float32, where each layer, the embedding and the head have weights only while they run.

    Each forward pass reads all files, so it should get all sequences. The peak is about 1.5 times the largest layer,
    embedding or head in float32, and the activations. Raises DataError if transformers names the weights differently.
    """
    import torch

    weights = TrainedWeights(base, adapter)
    number = weights.model.config.get_text_config().num_hidden_layers
    lists = (module for module in weights.model.modules() if isinstance(module, torch.nn.ModuleList))
    layers = set(next(module for module in lists if len(module) == number))
    inside = {part for layer in layers for part in layer.modules()} - layers
    for path, block in weights.model.named_modules():
        parameters = block.named_parameters(recurse=block in layers)
        empty = {name: parameter for name, parameter in parameters if parameter.is_meta}
        if block in inside or not empty:
            continue
        names = [(name, f"{path}.{name}") for name in empty]

        def attach(module: torch.nn.Module, _: object, names: list[tuple[str, str]] = names) -> None:
            state = {name: weights.base[weights.base_name(path)].float() for name, path in names}
            module.load_state_dict(state, strict=False, assign=True)

        def detach(module: torch.nn.Module, *_: object, empty: dict[str, Any] = empty) -> None:
            module.load_state_dict(empty, strict=False, assign=True)

        block.register_forward_pre_hook(attach)
        block.register_forward_hook(detach)
    return weights.model
