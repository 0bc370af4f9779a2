"""The check before the first step: what carries loss, what ends, what is too long, and whether the chat template holds."""

from collections.abc import Sequence
from typing import Any

from sclite import prompts
from sclite.config import Student
from sclite.errors import DataError
from sclite.records import Drop, Template
from sclite.run import Run
from sclite.student.chat_template import opens_thinking
from sclite.student.loader import load_tokenizer, model_name
from sclite.student.tokenization import Encoded, end_id, prompt_ids, prompt_text
from sclite.train.bundle import Bundle
from sclite.train.metrics_logger import Progress


def checked_tokenizer(student: Student, progress: Progress | None = None) -> Any:
    """The student's tokenizer, had in a second where its weights take a minute, and fit for training.

    Raises DataFault as `check_tokenizer` does.
    """
    tokenizer = load_tokenizer(model_name(student))
    check_tokenizer(tokenizer)
    if progress is not None and opens_thinking(tokenizer.get_chat_template(), **tokenizer.special_tokens_map):
        closed = (
            "the student's chat template opens a block of thoughts: it is trained and used with an empty one"
        )
        progress(0, 0, warning=f"{closed}; other programs must send the closing tag themselves")
    return tokenizer


def rows_of_sft(rows: Sequence[Template], unseen: frozenset[str]) -> list[Template]:
    """The templates of problems that are not kept for stage 2; raises DataFault where that leaves none."""
    found = [row for row in rows if row.id not in unseen]
    if not found:
        raise DataError(
            f"all {len(rows)} templates are of problems that are kept for stage 2: SFT has none to learn from",
            "`sclite build-data` writes those of the other problems; problems.correction_share says how many are kept",
        )
    return found


def check_labels(rows: Sequence[Encoded], end: int, names: Sequence[str] = ()) -> dict[str, float]:
    """Refuse rows that would teach nothing or never end; return what share of the tokens carries loss.

    Every whole row needs loss on its last token, which is the end of turn, and none on its first, which is prompt.
    `names` say which row is meant. Raises DataFault.
    """
    if not rows:
        raise DataError(
            "there is nothing to train on: no row is left", "dropped.jsonl in the run folder tells why"
        )
    for number, row in enumerate(rows, 1):
        where = f"training row {number}" + (f" ({names[number - 1]})" if names else "")
        if not any(row.weights):
            raise DataError(f"{where}: every label is masked", "this row would teach nothing; report it")
        if row.weights[0]:
            raise DataError(f"{where}: the prompt carries loss", "check the chat template of the student")
        if row.ids[-1] != end or not row.weights[-1]:
            raise DataError(
                f"{where}: the end-of-turn token carries no loss", "check the chat template of the student"
            )
    tokens = sum(len(row.ids) for row in rows)
    trained = sum(weight > 0 for row in rows for weight in row.weights)
    return {"rows": len(rows), "tokens": tokens, "trained_share": round(trained / tokens, 4)}


def check_bundles(bundles: Sequence[Bundle], decisions: tuple[int, int]) -> None:
    """Refuse pairs that would teach nothing, or something else than what is asked in use.

    `decisions` are the tokens of accusing a step and of closing it: what follows a decision must be the one that is
    chosen. Two contents must differ, and carry loss on their own texts alone. Raises DataFault.
    """
    for bundle in bundles:
        where, review, other = f"the pairs of {bundle.key}", bundle.review, bundle.rejected
        if not review.marks and other is None:
            raise DataError(f"{where}: no decision and no content", "they would teach nothing; report it")
        for mark, accused in zip(review.marks, review.accused, strict=True):
            after = review.ids[mark + 1 : mark + 2]
            if after and after[0] != decisions[0 if accused else 1]:
                raise DataError(
                    f"{where}: another token follows than the decision that is chosen",
                    "check pairs.jsonl and the tokenizer of the student",
                )
        for side in (review, other) if other is not None else ():
            if not any(side.weights):
                raise DataError(f"{where}: a content is empty", "it would teach nothing; remove the pair")
            if side.weights[0]:
                raise DataError(f"{where}: the prompt carries loss", "check the chat template of the student")
        if other is not None and review.ids == other.ids:
            raise DataError(
                f"{where}: both contents are the same tokens", "remove this pair from pairs.jsonl"
            )


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a chat template that would train something else than what is used, or an end of turn that is no token.

    Both prompts are rendered as they will be; the end of turn must be one token, and must not stand in the prompt's own
    last message as text. Raises DataFault.
    """
    messages = prompts.solve_messages("1 + 1 = ?")
    text = prompt_text(tokenizer, messages)
    if "1 + 1 = ?" not in text:
        raise DataError("the student's chat template leaves the question out", "choose an instruct model")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in prompt_ids(tokenizer, messages):
        raise DataError(
            "the student's chat template writes a token that its vocabulary lacks",
            "check chat_template and added tokens of the student",
        )
    if end_id(tokenizer) == unknown:
        raise DataError(
            "the student's end-of-turn token is unknown to its vocabulary", "choose an instruct model"
        )


def too_long(rows: Sequence[Encoded], limit: int) -> list[int]:
    """The numbers of the rows that have more than `limit` tokens; nothing is ever cut in silence."""
    return [i for i, row in enumerate(rows) if len(row.ids) > limit]


def left_out(run: Run, stage: str, names: Sequence[str], rows: Sequence[Encoded], limit: int) -> list[int]:
    """The numbers of the rows that are too long, each noted in dropped.jsonl under its name."""
    numbers = too_long(rows, limit)
    drops = [
        Drop(
            stage=stage,
            id=names[i],
            reason="longer_than_max_length",
            detail=f"{len(rows[i].ids)} tokens, {limit} fit",
        )
        for i in numbers
    ]
    run.replace_drops({stage}, drops)
    return numbers


def tell_left_out(
    progress: Progress | None, section: str, what: str, lengths: Sequence[int], limit: int
) -> None:
    """Say before the first step how many of the rows, by their lengths in tokens, are too long, and the remedy."""
    long = sum(length > limit for length in lengths)
    if long and progress is not None:
        told = f"{long} of {len(lengths)} {what} have more than {limit} tokens and are left out"
        longest = f"the longest has {max(lengths)}"
        progress(0, 0, warning=f"{told} ({longest}): raise {section}.max_length")
