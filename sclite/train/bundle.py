"""The rows of DPO: one bundle for each reviewed attempt.

A bundle holds the review sequence (the context, the attempt's steps with a decision after each up to the first wrong
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
from sclite.records import Pair
from sclite.student.log_probs import Padded, pad
from sclite.student.tokenization import Encoded, piece_ids, prompt_ids
from sclite.trace import CAUSE, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Bundle:
    """`review` has the decisions, and loss on the chosen content; `rejected` has loss on the other content."""

    key: str
    review: Encoded
    rejected: Encoded | None = None
    replay: Encoded | None = None


def build_bundles(
    tokenizer: PreTrainedTokenizerBase, pairs: Iterable[Pair], questions: dict[str, str], folder: str = ""
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
            rejected = Encoded(ids + rejected_ids, masked + [1.0] * len(rejected_ids))
        review = Encoded(ids + chosen_ids, masked + [1.0] * len(chosen_ids), marks, accused)
        bundles.append(Bundle(f"{id}/{sample}", review, rejected))
    return bundles


@dataclass
class Batch:
    """Bundles as tensors. The `decision_*` lists are flat over all decisions."""

    reviews: Padded
    rejected: Padded | None
    replay: Padded | None
    decision_rows: list[int]
    decision_columns: list[int]
    decision_accused: list[bool]
    content: list[int]  # numbers of the bundles that have a rejected text, in the order of `rejected`
    keys: list[str]


def collate(bundles: Sequence[Bundle], pad_id: int) -> Batch:
    """Batch bundles; reviews, rejected texts and replay rows are padded separately."""
    content = [i for i, bundle in enumerate(bundles) if bundle.rejected is not None]
    rejected = [bundle.rejected for bundle in bundles if bundle.rejected is not None]
    replay = [bundle.replay for bundle in bundles if bundle.replay is not None]
    return Batch(
        reviews=pad([bundle.review for bundle in bundles], pad_id),
        rejected=pad(rejected, pad_id) if rejected else None,
        replay=pad(replay, pad_id) if replay else None,
        decision_rows=[i for i, bundle in enumerate(bundles) for _ in bundle.review.marks],
        decision_columns=[mark for bundle in bundles for mark in bundle.review.marks],
        decision_accused=[a for bundle in bundles for a in bundle.review.accused],
        content=content,
        keys=[bundle.key for bundle in bundles],
    )
