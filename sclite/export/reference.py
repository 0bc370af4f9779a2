"""The trained model and texts of its run: the tokens and probabilities that an export must reproduce."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sclite import prompts
from sclite.config import Config
from sclite.errors import DataError
from sclite.export.gguf import estimate_bytes
from sclite.export.weights import BaseWeights, load_layered
from sclite.records import Attempt, Problem, Review, Template
from sclite.run import Run
from sclite.student.base import Messages
from sclite.student.loader import max_positions, read_config
from sclite.student.tokenization import piece_ids, prompt_ids
from sclite.trace import Step, Trace, all_pieces

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
TOP = 20  # the most probable tokens per position, on which the adapter's effect is measured
REFERENCE_BYTES = 400_000_000  # maximum for the probabilities of the trained model
ROWS = 100  # of each file of the run
HELD_OUT = 8  # samples of the run to compare probabilities on
QUESTION = "Anna has 12 nuts and buys 3 more. How many does she have?"
TRACE = Trace((Step("12 + 3 = 15.", "Add.", "The sum is 15.", "12 + 3 = 15."),), "Add what is bought.", "15")


class Sample(NamedTuple):
    """A chat, and the pieces of its answer in the run."""

    chat: Messages
    pieces: list[str]


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


def read_samples(config: Config, run: Run) -> list[Sample]:
    """Solutions and reviews of the run, spread over its files, after a fixed one of each."""
    folder, attempts = config.prompts.folder, run.read("attempts.jsonl", Attempt)
    questions = {row.id: row.question for row in run.read("problems.jsonl", Problem)}
    traces = {(row.id, row.sample): row.trace for row in attempts}
    found = [
        (prompts.solve_messages(QUESTION, folder), TRACE),
        (prompts.review_messages(QUESTION, "".join(all_pieces(TRACE)), folder), TRACE),
    ]
    for template in spread(run.read("templates.jsonl", Template), ROWS):
        found.append((prompts.solve_messages(template.question, folder), template.parsed.trace))
    for attempt in spread([row for row in attempts if row.id in questions], ROWS):
        found.append((prompts.solve_messages(questions[attempt.id], folder), attempt.parsed.trace))
    reviews = [row for row in run.read("reviews.jsonl", Review) if row.id in questions]
    for review in spread([row for row in reviews if (row.id, row.sample) in traces], ROWS):
        chat = prompts.review_messages(questions[review.id], traces[review.id, review.sample], folder)
        found.append((chat, review.parsed.trace))
    return [Sample(chat, all_pieces(trace)) for chat, trace in found]


def spread(rows: list[T], count: int) -> list[T]:
    """Up to `count` of the rows, evenly spaced."""
    return rows[:: max(1, -(-len(rows) // count))]


def split_samples(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The samples to compare probabilities on (the first two, and up to HELD_OUT of the others), and the rest.

    In an order that mixes the run's files: memory may suffice for the first ones only.
    """
    others = random.Random(0).sample(samples[2:], len(samples[2:]))
    return samples[:2] + others[:HELD_OUT], others[HELD_OUT:]


def format_size(count: float) -> str:
    """A number of bytes in GB, or in MB if there are few."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def compute_references(
    base: Path, adapter: Path | None, sequences: Sequence[tuple[list[int], int]]
) -> list[Reference]:
    """Run the trained model in transformers on the CPU in float32, on ids and the index of the first one to predict.

    Returns nothing for a model that cannot be run layer by layer.
    """
    import numpy as np
    import torch

    model: Any = load_layered(base, adapter)  # its calls have no types
    batch, inside = pad_sequences([ids for ids, _ in sequences])
    starts = torch.tensor([[start] for _, start in sequences])
    predicts = inside & (torch.arange(batch.shape[1]) >= starts - 1)
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][predicts][None],))

    def log_probabilities() -> list[np.ndarray]:
        found = model(batch).logits[0].log_softmax(-1)
        return [part.numpy() for part in found.split(predicts.sum(1).tolist())]

    with torch.inference_mode(), suppress(DataError):
        trained = unadapted = log_probabilities()
        if adapter:
            with model.disable_adapter():
                unadapted = log_probabilities()
        tops = [np.argpartition(rows, -TOP)[:, -TOP:] for rows in trained]
        bases = [np.take_along_axis(rows, top, 1) for rows, top in zip(unadapted, tops, strict=True)]
        return [
            Reference(*given, *made) for given, *made in zip(sequences, trained, tops, bases, strict=True)
        ]
    return []


def measure_importance(
    student: Trained, gguf: Path, sequences: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
    """The mean square of each input of every linear layer, over sequences of token ids: llama.cpp's importance matrix.

    float32, by the names of the tensors in the student's `gguf`; empty if it cannot be run layer by layer.
    """
    import torch
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    model: Any = load_layered(student.base, student.adapter)
    field = GGUFReader(gguf).get_field("general.architecture")
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if field and name == field.contents())
    names = get_tensor_name_map(kind, model.config.get_text_config().num_hidden_layers)
    batch, inside = pad_sequences(sequences)
    found: dict[str, np.ndarray] = {}

    def measure(name: str, _: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        found[name] = inputs[0][inside].square().mean(0).numpy()

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in path:
            path = re.sub(r"^base_model\.model\.|language_model\.|\.base_layer$", "", path)
            if name := names.get_name(f"{path}.weight", try_suffixes=(".weight",)):
                module.register_forward_pre_hook(partial(measure, name))
    # of the logits, only one is computed
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][:1, :1],))
    with torch.inference_mode(), suppress(DataError):
        model(batch)
        return found
    return {}


def pad_sequences(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch [sequences, longest], as each pass reads all weights, and where it has ids.

    Attention is causal, so the padding needs no mask.
    """
    import torch

    rows = [torch.tensor(ids) for ids in sequences]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return batch, torch.arange(batch.shape[1]) < torch.tensor([[len(ids)] for ids in sequences])
