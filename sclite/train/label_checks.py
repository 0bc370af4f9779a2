"""Checks before the first step: loss masks, end of turn, pairs and the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sclite import prompts
from sclite.errors import DataError
from sclite.student.tokenization import Encoded, end_id, prompt_ids, prompt_text
from sclite.train.bundle import Bundle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECK_TEMPLATE = "check the student's chat template"
REMOVE_PAIR = "remove it from pairs.jsonl"


def check_labels(rows: Sequence[Encoded], end: int, names: Sequence[str] = ()) -> dict[str, float]:
    """Refuse rows that would teach nothing or never end (DataError); return what share of the tokens carries loss.

    The last token, which is the end of turn, needs loss; the first, which is prompt, none. `names` are shown in errors.
    """
    if not rows:
        raise DataError("nothing to train on: no rows are left", "dropped.jsonl in the run folder says why")
    for number, row in enumerate(rows, 1):
        where = f"training row {number}" + (f" ({names[number - 1]})" if names else "")
        if not any(row.weights):
            raise DataError(f"{where}: every label is masked", "it would teach nothing; please report this")
        if row.weights[0]:
            raise DataError(f"{where}: the prompt is not masked", CHECK_TEMPLATE)
        if row.ids[-1] != end or not row.weights[-1]:
            raise DataError(f"{where}: the end-of-turn token is missing or masked", CHECK_TEMPLATE)
    tokens = sum(len(row.ids) for row in rows)
    trained = sum(weight > 0 for row in rows for weight in row.weights)
    return {"rows": len(rows), "tokens": tokens, "trained_share": round(trained / tokens, 4)}


def check_bundles(bundles: Sequence[Bundle], decisions: tuple[int, int]) -> None:
    """Refuse pairs that would teach nothing, or something else than what is asked for in use.

    `decisions` are the tokens of accusing a step and of closing it: the one that is chosen has to follow the decision's
    position. The sides of a content pair have to differ and to carry loss on their own text alone. Raises DataError.
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
            raise DataError(f"{where}: the prompt is not masked", CHECK_TEMPLATE)
        if review.ids == other.ids:
            raise DataError(f"{where}: both sides of the content pair are the same tokens", REMOVE_PAIR)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that drops the question or uses unknown tokens, and an end of turn that is none (DataError)."""
    messages, unknown = prompts.solve_messages("1 + 1 = ?"), tokenizer.unk_token_id
    if "1 + 1 = ?" not in prompt_text(tokenizer, messages):
        raise DataError("the student's chat template drops the question", "choose an instruct model")
    if unknown is not None and unknown in prompt_ids(tokenizer, messages):
        raise DataError(
            "the student's chat template uses a token that is not in its vocabulary",
            "check the student's chat_template and added tokens",
        )
    if end_id(tokenizer) == unknown:
        raise DataError(
            "the student's end-of-turn token is not in its vocabulary", "choose an instruct model"
        )
