"""Stage 2 in the form in which it is trained: one bundle for each reviewed attempt.

A bundle holds the review sequence (the context, the attempt's steps with a decision after each up to the first wrong
one, and the chosen cause and correction), the rejected one where the attempt is wrong, and a solved row for replay.
All decisions of an attempt are read off one forward pass, as they are in use, where a pair for each would repeat the
whole context: about ten times the tokens for an attempt of five steps.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sclite import prompts
from sclite.records import Pair
from sclite.student.log_probs import (
    Hidden,
    Padded,
    autocast,
    hidden_states,
    pad,
    token_log_probs,
    vocabulary_log_probs,
)
from sclite.student.tokenization import Encoded, decision_ids, piece_ids, prompt_ids
from sclite.trace import CAUSE, parse, render


@dataclass(frozen=True)
class Bundle:
    """`review` carries the decisions, and the chosen content as its loss; `rejected` the other content."""

    key: str
    review: Encoded
    rejected: Encoded | None = None
    replay: Encoded | None = None


def build_bundles(
    tokenizer: Any, pairs: Iterable[Pair], questions: dict[str, str], folder: str = ""
) -> list[Bundle]:
    """Gather the pairs of each attempt into a bundle. `questions` maps problem ids to questions."""
    groups: dict[tuple[str, int], list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.id, pair.sample].append(pair)
    return [_bundle(tokenizer, group, questions[group[0].id], folder) for group in groups.values()]


def _bundle(tokenizer: Any, pairs: list[Pair], question: str, folder: str) -> Bundle:
    first = pairs[0]
    decisions = sorted((p for p in pairs if p.kind == "decision"), key=lambda p: p.step)
    content = next((p for p in pairs if p.kind == "content"), None)
    longest = content or decisions[-1]
    messages = prompts.review_messages(question, render(parse(first.attempt).trace), folder)
    ids, ends = prompt_ids(tokenizer, messages), {}
    for number, piece in enumerate(piece_ids(tokenizer, longest.prefix), 1):
        ids = ids + piece
        ends[number] = len(ids) - 1  # the last position of a prefix of so many pieces
    marks = tuple(ends[len(pair.prefix)] for pair in decisions)
    accused = tuple(pair.chosen == CAUSE for pair in decisions)
    key = f"{first.id}/{first.sample}"
    if content is None:
        return Bundle(key, Encoded(ids, [0.0] * len(ids), marks, accused))
    chosen, rejected = piece_ids(tokenizer, [content.chosen, content.rejected])
    return Bundle(
        key,
        Encoded(ids + chosen, [0.0] * len(ids) + [1.0] * len(chosen), marks, accused),
        Encoded(ids + rejected, [0.0] * len(ids) + [1.0] * len(rejected)),
    )


@dataclass
class Batch:
    """Bundles as tensors. `decision_*` are flat over all decisions, `owner` says of which bundle each is."""

    reviews: Padded
    rejected: Padded | None
    replay: Padded | None
    decision_rows: list[int]
    decision_columns: list[int]
    decision_accused: list[bool]
    content: list[int]  # numbers of the bundles that have a rejected text, in the order of `rejected`
    keys: list[str]


def collate(bundles: Sequence[Bundle], pad_id: int) -> Batch:
    """Bundles side by side, each part padded by itself."""
    content = [i for i, bundle in enumerate(bundles) if bundle.rejected is not None]
    replay = [bundle.replay for bundle in bundles if bundle.replay is not None]
    rows = [i for i, bundle in enumerate(bundles) for _ in bundle.review.marks]
    return Batch(
        reviews=pad([bundle.review for bundle in bundles], pad_id),
        rejected=pad([bundles[i].rejected for i in content], pad_id) if content else None,
        replay=pad(replay, pad_id) if replay else None,
        decision_rows=rows,
        decision_columns=[mark for bundle in bundles for mark in bundle.review.marks],
        decision_accused=[a for bundle in bundles for a in bundle.review.accused],
        content=content,
        keys=[bundle.key for bundle in bundles],
    )


@dataclass
class Likelihoods:
    """Log-probabilities of the chosen and the rejected side of every pair, and token counts of the contents."""

    decision_chosen: Any  # [decisions]
    decision_rejected: Any
    content_chosen: Any  # [contents], summed over tokens
    content_rejected: Any
    content_tokens: Any  # [contents], of the chosen text
    replay_log_prob: Any | None  # scalar, summed over tokens


def likelihoods(model: Any, batch: Batch, decision_tokens: tuple[int, int]) -> Likelihoods:
    """Run the model over a batch; `decision_tokens` are those of accusing and of closing."""
    import torch

    hidden = hidden_states(model, batch.reviews)
    log_probs = vocabulary_log_probs(model, hidden.at(batch.decision_rows, batch.decision_columns))
    accuse, close = (log_probs[:, token] for token in decision_tokens)
    right = torch.tensor(batch.decision_accused, device=log_probs.device)
    chosen, tokens = _sums(model, hidden, batch.reviews, len(batch.keys))
    content = torch.tensor(batch.content, dtype=torch.long, device=chosen.device)
    content_rejected = chosen[:0]
    if batch.rejected is not None:
        other = hidden_states(model, batch.rejected)
        content_rejected, _ = _sums(model, other, batch.rejected, len(batch.content))
    return Likelihoods(
        decision_chosen=torch.where(right, accuse, close),
        decision_rejected=torch.where(right, close, accuse),
        content_chosen=chosen[content],
        content_rejected=content_rejected,
        content_tokens=tokens[content],
        replay_log_prob=_replay(model, batch.replay),
    )


def _sums(model: Any, hidden: Hidden, rows: Padded, count: int) -> tuple[Any, Any]:
    """The summed log-probability of the weighted tokens of each row, and how many there are; both [rows]."""
    import torch

    log_probs, owner = token_log_probs(model, hidden, rows)
    counts = torch.bincount(owner, minlength=count).to(log_probs)
    return log_probs.new_zeros(count).index_add(0, owner.to(log_probs.device), log_probs), counts


def _replay(model: Any, replay: Padded | None) -> Any | None:
    if replay is None:
        return None
    log_probs, _ = token_log_probs(model, hidden_states(model, replay), replay)
    return log_probs.sum()


def reference_log_probs(
    model: Any, bundles: Sequence[Bundle], tokenizer: Any, size: int = 8
) -> dict[str, dict[str, Any]]:
    """log p of both sides of every pair under the model as it is now, in float32, by bundle key.

    Computed once before DPO and kept in the run, so that no second forward pass is paid per step and a resumed
    training compares with the adapter that it started from.
    {"decisions": [[chosen, rejected] ..], "content": [chosen, rejected] or None}, in nats.
    """
    import torch

    tokens = decision_ids(tokenizer)
    was_training = model.training
    model.eval()
    found: dict[str, dict[str, Any]] = {}
    alike = sorted(bundles, key=lambda bundle: -len(bundle.review.ids))  # so that little is padded
    for start in range(0, len(alike), size):
        rows = [Bundle(b.key, b.review, b.rejected) for b in alike[start : start + size]]
        batch = collate(rows, tokenizer.pad_token_id)
        with torch.no_grad(), autocast(model):
            found |= _by_key(batch, likelihoods(model, batch, tokens))
    model.train(was_training)
    return found


def _by_key(batch: Batch, got: Likelihoods) -> dict[str, dict[str, Any]]:
    decisions = list(zip(got.decision_chosen.tolist(), got.decision_rejected.tolist(), strict=True))
    contents = list(zip(got.content_chosen.tolist(), got.content_rejected.tolist(), strict=True))
    found = {}
    for number, key in enumerate(batch.keys):
        mine = [list(d) for row, d in zip(batch.decision_rows, decisions, strict=True) if row == number]
        content = list(contents[batch.content.index(number)]) if number in batch.content else None
        found[key] = {"decisions": mine, "content": content}
    return found
