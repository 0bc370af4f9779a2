"""The rows of DPO: one bundle for each reviewed attempt.

A bundle contains the review sequence (the context, the attempt's steps with a decision after each up to the first wrong
one, and the chosen cause and correction), the rejected text if the attempt is wrong, and a solved row for replay.
All decisions of an attempt are read off one forward pass, as in use; a row for each pair would repeat the whole context:
about ten times the tokens for an attempt of five steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sclite import prompts
from sclite.errors import DataError
from sclite.records import Pair
from sclite.student.log_probs import PaddedBatch, pad
from sclite.student.tokenization import TrainingSequence, piece_ids, prompt_ids
from sclite.trace import CAUSE, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

REMOVE_PAIR = "remove it from pairs.jsonl"


@dataclass(frozen=True)
class Bundle:
    """`review` has the decisions, and loss on the chosen content; `rejected` has loss on the other content."""

    key: str
    review: TrainingSequence
    rejected: TrainingSequence | None = None
    replay: TrainingSequence | None = None

    @property
    def sides(self) -> list[TrainingSequence]:
        """The sequences of the bundle."""
        return [side for side in (self.review, self.rejected, self.replay) if side is not None]


def build_bundles(
    tokenizer: Tokenizer, pairs: Iterable[Pair], questions: dict[str, str], folder: str = ""
) -> list[Bundle]:
    """Gather the pairs of each attempt into a bundle. `questions` maps problem ids to questions."""
    groups: dict[tuple[str, int], list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.id, pair.sample].append(pair)
    bundles = []
    for (id, sample), group in groups.items():
        decisions = sorted((p for p in group if p.kind == "decision"), key=lambda p: p.step)
        content = next((p for p in group if p.kind == "content"), None)
        messages = prompts.review_messages(questions[id], render(group[0].work), folder)
        ids, ends = prompt_ids(tokenizer, messages), {}
        for number, piece in enumerate(piece_ids(tokenizer, (content or decisions[-1]).prefix), 1):
            ids = ids + piece
            ends[number] = len(ids) - 1  # the last position of a prefix of `number` pieces
        marks = tuple(ends[len(pair.prefix)] for pair in decisions)
        accused = tuple(pair.chosen == CAUSE for pair in decisions)
        masked, rejected, chosen_ids = [0.0] * len(ids), None, list[int]()
        if content is not None:
            chosen_ids, rejected_ids = piece_ids(tokenizer, [content.chosen, content.rejected])
            rejected = TrainingSequence(ids + rejected_ids, masked + [1.0] * len(rejected_ids))
        review = TrainingSequence(ids + chosen_ids, masked + [1.0] * len(chosen_ids), marks, accused)
        bundles.append(Bundle(f"{id}/{sample}", review, rejected))
    return bundles


def check_bundles(bundles: Sequence[Bundle], decisions: tuple[int, int]) -> None:
    """Reject pairs that would teach nothing, or something else than what inference needs.

    `decisions` are the tokens that flag a step and close it: the chosen one has to follow the decision's position. The
    sides of a content pair have to differ, and to have loss only on their own text. Raises DataError.
    """
    for bundle in bundles:
        where, review, other = f"the pairs of {bundle.key}", bundle.review, bundle.rejected
        if not review.marks and other is None:
            nothing = f"{where}: neither a decision nor a content pair"
            raise DataError(nothing, "they would teach nothing; please report this")
        for mark, accused in zip(review.marks, review.accused, strict=True):
            if review.ids[mark + 1 : mark + 2] not in ([], [decisions[0 if accused else 1]]):
                odd = f"{where}: the next token is not the chosen decision"
                raise DataError(odd, "check pairs.jsonl and the student's tokenizer")
        if other is None:
            continue
        if not (any(review.weights) and any(other.weights)):
            raise DataError(f"{where}: one side of the content pair is empty", REMOVE_PAIR)
        if review.weights[0] or other.weights[0]:
            raise DataError(f"{where}: the prompt is not masked", "check the student's chat template")
        if review.ids == other.ids:
            raise DataError(f"{where}: both sides of the content pair are the same tokens", REMOVE_PAIR)


@dataclass
class Batch:
    """Bundles as tensors: reviews, rejected texts and replay rows are padded separately."""

    bundles: Sequence[Bundle]
    reviews: PaddedBatch
    rejected: PaddedBatch | None
    replay: PaddedBatch | None


def collate(bundles: Sequence[Bundle], pad_id: int) -> Batch:
    """Batch bundles."""
    rejected = [bundle.rejected for bundle in bundles if bundle.rejected is not None]
    replay = [bundle.replay for bundle in bundles if bundle.replay is not None]
    return Batch(
        bundles=bundles,
        reviews=pad([bundle.review for bundle in bundles], pad_id),
        rejected=pad(rejected, pad_id) if rejected else None,
        replay=pad(replay, pad_id) if replay else None,
    )
