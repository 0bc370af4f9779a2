"""The trained model, in transformers on the CPU: the tokens and probabilities that an export must reproduce."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sclite.export.layers import load_layered
from sclite.export.quantize import estimate_bytes
from sclite.export.samples import Sample, split_samples
from sclite.export.tensors import BaseWeights
from sclite.student.adapters import meta_model
from sclite.student.backends import attention_of, nf4_config
from sclite.student.cuda_memory import available_ram
from sclite.student.loader import max_positions, read_config
from sclite.student.origin import read_origin
from sclite.student.tokenization import piece_ids, prompt_ids

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

TOP = 20  # the most probable tokens per position, on which the adapter's effect is measured
REFERENCE_BYTES = 400_000_000  # maximum for the probabilities of the trained model


@dataclass
class Reference:
    """The trained model's output on `ids`, where it predicts ids[start], ids[start + 1], ... and the token after the last.

    `trained`: log-probabilities [predictions, vocabulary] in float32; `top`: the TOP tokens of each; `base`: their
    log-probabilities without the adapter.
    """

    ids: list[int]
    start: int
    trained: np.ndarray
    top: np.ndarray
    base: np.ndarray


class Trained(NamedTuple):
    """The student that an export must match: the folders of its base model and its adapter, if any, and its tokenizer."""

    base: Path
    adapter: Path | None
    tokenizer: PreTrainedTokenizerBase

    def ids(self, sample: Sample) -> list[int]:
        """The token ids of a sample's chat and answer."""
        answer = [i for ids in piece_ids(self.tokenizer, sample.pieces) for i in ids]
        return prompt_ids(self.tokenizer, sample.chat) + answer

    def held_out(self, samples: list[Sample]) -> list[tuple[list[int], int]]:
        """The token ids of the samples on which probabilities are compared, and where each answer begins."""
        found, rows = [], REFERENCE_BYTES // (4 * len(self.tokenizer))
        most = max_positions(read_config(str(self.base)))
        for sample in split_samples(samples)[0]:
            ids, start = self.ids(sample), len(prompt_ids(self.tokenizer, sample.chat))
            if len(ids) <= most and (rows := rows - len(ids) + start) > 0:
                found.append((ids, start))
        return found

    def size(self, name: str) -> int:
        """The approximate bytes of a file of this quantization type."""
        return estimate_bytes(BaseWeights(self.base).count_parameters(), name)

    def ram_shortage(self) -> str:
        """Why the model must be run one layer at a time; "" if it fits in memory."""
        needed, available = self.size("f32") * 1.2, available_ram()
        if available is None or needed <= available:
            return ""
        return f"{format_size(needed)} of RAM needed for the whole model, {format_size(available)} free"


def format_size(count: float) -> str:
    """A number of bytes in GB, or in MB if there are few."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def compute_references(
    base: Path, adapter: Path | None, sequences: Sequence[tuple[list[int], int]], layered: bool = False
) -> list[Reference]:
    """Run the trained model in transformers on the CPU in float32, on ids and the index of the first one to predict.

    `layered`: with one layer's weights in memory at a time, for models larger than the RAM.
    """
    import numpy as np
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    if layered:
        model: Any = load_layered(base, adapter)  # its calls have no types
    else:
        origin = read_origin(adapter) if adapter else None
        settings: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": torch.float32}
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        if origin and origin.nf4:  # round to NF4 what was in NF4 in training
            layers = meta_model(config).named_modules()
            skipped = [
                name for name, layer in layers if type(layer) is torch.nn.Linear and name not in origin.nf4
            ]
            settings |= {"dtype": getattr(torch, origin.dtype), "quantization_config": nf4_config(skipped)}
        settings |= attention_of(config)
        model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, **settings)
        if "quantization_config" in settings or getattr(config, "quantization_config", None):
            model = model.dequantize().float()
        model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()

    def log_probabilities() -> Iterator[np.ndarray]:
        if not layered:
            for ids, start in sequences:
                yield model(torch.tensor([ids])).logits[0, start - 1 :].float().log_softmax(-1).numpy()
            return
        # one batch, as each pass reads all weights; attention is causal, so the padding needs no mask
        batch = torch.zeros(len(sequences), max(len(ids) for ids, _ in sequences), dtype=torch.long)
        predicts = torch.zeros_like(batch, dtype=torch.bool)
        for row, (ids, start) in enumerate(sequences):
            batch[row, : len(ids)] = torch.tensor(ids)
            predicts[row, start - 1 : len(ids)] = True
        hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: (args[0][predicts][None],)
        )
        found = model(batch).logits[0].float().log_softmax(-1)
        hook.remove()
        yield from (part.numpy() for part in found.split(predicts.sum(1).tolist()))

    with torch.inference_mode():
        trained = list(log_probabilities())
        tops = [torch.from_numpy(rows).topk(TOP).indices.numpy() for rows in trained]
        with model.disable_adapter() if adapter else nullcontext():
            unadapted = log_probabilities() if adapter else iter(trained)
            bases = [np.take_along_axis(rows, top, 1) for rows, top in zip(unadapted, tops, strict=True)]
    return [Reference(*given, *made) for given, *made in zip(sequences, trained, tops, bases, strict=True)]
