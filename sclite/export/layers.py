"""The trained model in transformers with one decoder layer's weights in memory at a time; the merge, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.errors import DataError, ScliteError
from sclite.export.merge import BaseWeights
from sclite.export.tensors import Tensors, open_tensors
from sclite.student.loader import attention_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

ROWS = 1024
"""Rows of a merged tensor to compare, spread over it: a faulty merge changes all rows, or many consecutive ones."""


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
            self.model = get_peft_model(plain, settings, low_cpu_mem_usage=True)
            self._adapter = open_tensors(adapter / "adapter_model.safetensors")
            self._trained = set(self._adapter.keys())
        self.model.eval()

    def __getitem__(self, name: str) -> torch.Tensor:
        if re.search(r"\.lora_|\.modules_to_save\.", name):
            key = name.replace(".modules_to_save.default", "").replace(".default", "")
            if key not in self._trained:
                hint = "save or train the adapter again"
                raise DataError(f"the adapter has no {key}, which PEFT expects", hint)
            return self._adapter.get_tensor(key).float()
        return self.base[self.base_name(name)].float()

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


def check_merge(base: Path, adapter: Path, merged: Path) -> None:
    """Compare a merged folder with base + scale * B @ A as PEFT computes it, one tensor at a time.

    Of a tensor with more than ROWS rows, every n-th row is compared, at most ROWS in total. Each value must be within
    rounding; and since the adapter's update can be smaller than the rounding of float16, the rows must contain 99 to 101 % of
    it by least squares. Raises ScliteError with the name of a tensor that differs.
    """
    import torch

    weights, written = TrainedWeights(base, adapter), Tensors(merged)
    updates: dict[str, tuple[str, Any]] = {}
    saved = {}
    for path, module in weights.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            updates[weights.base_name(f"{path}.weight")] = path, module
    for path, _ in weights.model.named_parameters():
        if ".modules_to_save." in path:
            name = path.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            saved[name if name == "lm_head.weight" else weights.base_name(path)] = path

    def is_right(name: str) -> bool:
        source = weights[saved[name]] if name in saved else weights.base[name]
        whole, source = torch.atleast_1d(written[name], source)
        rows, dtype = slice(None, None, max(1, -(-len(whole) // ROWS))), whole.dtype  # every n-th row
        stored, wanted = whole[rows].float(), source[rows].float()
        if whole.shape != source.shape:
            return False
        if name not in updates:
            return stored.equal(wanted.to(dtype).float())
        path, module = updates[name]
        empty = {key: each for key, each in module.named_parameters() if "lora_" in key}
        factors = {key: weights[f"{path}.{key}"] for key in empty}
        module.load_state_dict(factors, strict=False, assign=True)
        update = module.get_delta_weight("default").detach()[rows]
        module.load_state_dict(empty, strict=False, assign=True)
        wanted += update
        # never that of bfloat16, which is larger than many updates
        precision, error = min(torch.finfo(dtype).eps, 2**-10), stored - wanted
        size, noise = float(update.norm()), precision * float(wanted.norm()) / wanted.numel() ** 0.5
        complete = abs(float((error * update).sum())) <= size * (0.01 * size + 8 * noise)
        return complete and bool((error.abs_() <= 2 * precision * wanted.abs_() + 1e-6).all())

    unmatched = min(set(written) ^ {*weights.base, *saved}, default=None)  # one that is missing, or too many
    if wrong := unmatched or next((name for name in written if not is_right(name)), None):
        hint = "run `sclite export` again; if it fails in the same way, please report it"
        raise ScliteError(f"{wrong} of the merged model is not the base with the adapter added once", hint)
