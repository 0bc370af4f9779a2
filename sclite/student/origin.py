"""What an adapter was trained on: a fingerprint of the base weights, and which of them were quantized to NF4."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pydantic import BaseModel

from sclite.errors import DataError
from sclite.signature import digest
from sclite.student.tokenization import prompt_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

FILE = "trained_on.json"
SAMPLE = 4096
"""Bytes of each tensor in the fingerprint."""


class Origin(BaseModel, frozen=True, extra="forbid"):
    """`weights`: fingerprint of the base, "" if unknown; `nf4`: modules that were in NF4 in training; `dtype`: theirs.

    `chat` is the digest of a chat in the student's template (`chat_digest`), "" if unknown.
    """

    weights: str = ""
    nf4: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    chat: str = ""


def fingerprint(folder: Path) -> str:
    """Hash of every tensor's name, type, shape and middle bytes; "" if the folder has no safetensors.

    Independent of sharding, and cheap: it reads a few kilobytes per tensor. Raises DataError for a damaged file.
    """
    tensors: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, 1 << 28)))
                header.pop("__metadata__", None)
                for name, tensor in header.items():
                    begin, end = tensor["data_offsets"]
                    file.seek(8 + size + begin + max(0, (end - begin - SAMPLE) // 2))
                    sample = hashlib.sha256(file.read(min(SAMPLE, end - begin))).hexdigest()
                    tensors[name] = f"{tensor['dtype']} {tensor['shape']} {sample}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged: {error}", "download or save the model again") from error
    return hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()[:16] if tensors else ""


def chat_digest(tokenizer: "Tokenizer") -> str:
    """The digest of a short chat as a tokenizer's template renders it: a model on the Hub may change its template."""
    return digest(prompt_text(tokenizer, ({"role": "user", "content": "1 + 1 = ?"},)))


def record_origin(model: "torch.nn.Module", base: Path, adapter: Path, chat: str = "") -> None:
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
    origin = Origin(weights=fingerprint(base), nf4=tuple(sorted(layers)), dtype=dtype, chat=chat)
    (adapter / FILE).write_text(origin.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_origin(adapter: Path) -> Origin:
    """What an adapter was trained on; an imported adapter has no record. Raises DataError for a damaged record."""
    path = adapter / FILE
    if not path.is_file():
        return Origin()
    try:
        return Origin.model_validate_json(path.read_bytes())
    except ValueError as error:
        hint = f"delete {adapter} and run `sclite train` again"
        raise DataError(f"{path} is damaged: {error}", hint) from error
