"""The trained model in transformers with one layer's weights in memory at a time: merged, or run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.errors import DataError
from sclite.export.tensors import BaseWeights, open_tensors
from sclite.student.backends import attention_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

TIED = re.compile(r"(embed_tokens|wte|word_embeddings|embed_in)\.")


class TrainedWeights:
    """`model`: base and adapter in transformers, without weights; and its parameters by name, read on access."""

    def __init__(self, base: Path, adapter: Path | None):
        import torch
        from accelerate import init_empty_weights
        from peft import PeftConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        config.__dict__.pop("quantization_config", None)  # BaseWeights dequantizes
        with init_empty_weights(include_buffers=False):
            plain = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False, **attention_of(config)
            )
        self.layers: int = config.get_text_config().num_hidden_layers
        self._tied: dict[str, str] = plain.all_tied_weights_keys
        self.base, self.model = BaseWeights(base, adapter), plain
        if adapter is not None:
            settings = PeftConfig.from_pretrained(str(adapter))
            try:
                self.model = get_peft_model(plain, settings, low_cpu_mem_usage=True)
            except ValueError as error:  # no layer has these names
                hint = "set student.model to the base model of the adapter"
                raise DataError(f"the adapter {adapter} does not fit {base}: {error}", hint) from error
            hint = f"delete {adapter} and run `sclite train` again"
            self._adapter = open_tensors(adapter / "adapter_model.safetensors", hint)
            self._trained = set(self._adapter.keys())
        self.model.eval()
        self.updates: dict[str, tuple[str, Any]] = {}  # LoRA layers, by the name of their tensor in the base
        for path, module in self.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                self.updates[self.base_name(f"{path}.weight")] = path, module
        self.saved: dict[str, str] = {}  # parameters in modules_to_save, likewise
        for path, _ in self.model.named_parameters():
            if ".modules_to_save." in path:
                name = path.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
                self.saved[name if name == "lm_head.weight" else self.base_name(path)] = path

    def __getitem__(self, name: str) -> torch.Tensor:
        if re.search(r"\.lora_|\.modules_to_save\.", name):
            key = name.replace(".modules_to_save.default", "").replace(".default", "")
            if key not in self._trained:
                hint = "save or train the adapter again"
                raise DataError(f"the adapter has no {key}, which PEFT expects", hint)
            return self._adapter.get_tensor(key).float()
        return self.base[self.base_name(name)].float()

    def merge(self, outtype: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its update as PEFT computes it, in float32, matrices in float16 unless `outtype` is f32.

        Raises DataError for an adapter of another base, or that changes an embedding which is the output layer, too.
        """
        import torch

        known = {
            name.replace(".modules_to_save.default", "").replace(".default", "")
            for name, _ in self.model.named_parameters()
        }
        if unknown := min((key for key in self._trained - known if ".base_layer." not in key), default=None):
            hint = "set student.model to the base model of the adapter"
            raise DataError(f"the adapter changes {unknown}, which {self.base.folder} does not have", hint)
        if self.base.tied and (odd := next(filter(TIED.search, (*self.updates, *self.saved)), None)):
            hint = "merge it with PEFT's merge_and_unload, and export the result as student.model"
            raise DataError(
                f"the adapter changes {odd}, which {self.base.folder} ties to its output layer", hint
            )
        for name in dict.fromkeys((*self.base, *self.saved)):
            weight = self[self.saved[name]] if name in self.saved else self.base[name]
            if name in self.saved and weight.shape != self.model.get_parameter(self.saved[name]).shape:
                raise DataError(
                    f"{name} has another shape in the adapter", "use the base model of the adapter"
                )
            half = outtype != "f32" and weight.ndim > 1
            if name in self.updates:
                path, module = self.updates[name]
                empty = {key: each for key, each in module.named_parameters() if "lora_" in key}
                factors = {key: self[f"{path}.{key}"] for key in empty}
                try:
                    module.load_state_dict(factors, strict=False, assign=True)
                except RuntimeError as error:  # another shape
                    raise DataError(f"{name}: {error}", "use the base model of the adapter") from error
                weight = module.get_delta_weight("default").detach().add_(weight)
                module.load_state_dict(empty, strict=False, assign=True)
            elif name not in self.saved and not (half and weight.dtype == torch.bfloat16):
                yield name, weight
                continue
            yield name, weight.to(torch.float16 if half else torch.float32)

    def base_name(self, name: str) -> str:
        """The name of a parameter of `model` in the files of the base model."""
        name = re.sub(r"\.(base_layer|original_module|modules_to_save\.default)\.", ".", name)
        name = name.removeprefix("base_model.model.")
        return self.base.find(self._tied.get(name, name), "transformers")


def load_layered(base: Path, adapter: Path | None) -> PreTrainedModel | PeftModel:
    """Base and adapter in float32, where each layer, the embedding and the head have weights only while they run.

    Each forward pass reads all files, so it should get all sequences. The peak is about 1.5 times the largest layer,
    embedding or head in float32, and the activations. Raises DataError if transformers names the weights differently.
    """
    import torch

    weights = TrainedWeights(base, adapter)
    modules = (module for module in weights.model.modules() if isinstance(module, torch.nn.ModuleList))
    layers = next(module for module in modules if len(module) == weights.layers)

    def blocks(module: torch.nn.Module, prefix: str) -> Iterator[tuple[torch.nn.Module, str]]:
        for name, child in module.named_children():
            if module is not layers and any(part is layers for part in child.modules()):
                yield from blocks(child, f"{prefix}{name}.")
            else:
                yield child, f"{prefix}{name}."

    for block, prefix in blocks(weights.model, ""):
        empty = dict(block.named_parameters())
        if block in list(layers):
            for name in empty:
                if not re.search("lora_|modules_to_save", name):
                    weights.base_name(prefix + name)  # fail now, not after minutes

        def attach(module: torch.nn.Module, _: object, prefix: str = prefix) -> None:
            state = {name: weights[prefix + name] for name, _ in module.named_parameters()}
            module.load_state_dict(state, strict=False, assign=True)

        def detach(module: torch.nn.Module, *_: object, empty: dict[str, Any] = empty) -> None:
            module.load_state_dict(empty, strict=False, assign=True)

        block.register_forward_pre_hook(attach)
        block.register_forward_hook(detach)
    return weights.model
