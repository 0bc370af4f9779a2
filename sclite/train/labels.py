"""The check before the first step: what carries loss, what ends, what is too long, and whether the chat template holds."""

from collections.abc import Sequence
from typing import Any

from sclite import prompts
from sclite.errors import DataFault
from sclite.records import Drop
from sclite.run import Run
from sclite.student.encode import Encoded, end_id, prompt_ids, prompt_text


def check_labels(rows: Sequence[Encoded], end: int, names: Sequence[str] = ()) -> dict[str, float]:
    """Refuse rows that would teach nothing or never end; return what share of the tokens carries loss.

    Every whole row needs loss on its last token, which is the end of turn, and none on its first, which is prompt.
    `names` say which row is meant. Raises DataFault.
    """
    if not rows:
        raise DataFault(
            "there is nothing to train on: no row is left", "dropped.jsonl in the run folder tells why"
        )
    for number, row in enumerate(rows, 1):
        where = f"training row {number}" + (f" ({names[number - 1]})" if names else "")
        if not any(row.weights):
            raise DataFault(f"{where}: every label is masked", "this row would teach nothing; report it")
        if row.weights[0]:
            raise DataFault(f"{where}: the prompt carries loss", "check the chat template of the student")
        if row.ids[-1] != end or not row.weights[-1]:
            raise DataFault(
                f"{where}: the end-of-turn token carries no loss", "check the chat template of the student"
            )
    tokens = sum(len(row.ids) for row in rows)
    trained = sum(weight > 0 for row in rows for weight in row.weights)
    return {"rows": len(rows), "tokens": tokens, "trained_share": round(trained / tokens, 4)}


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a chat template that would train something else than what is used, or an end of turn that is no token.

    Both prompts are rendered as they will be; the end of turn must be one token, and must not stand in the prompt's own
    last message as text. Raises DataFault.
    """
    messages = prompts.solve_messages("1 + 1 = ?")
    text = prompt_text(tokenizer, messages)
    if "1 + 1 = ?" not in text:
        raise DataFault("the student's chat template leaves the question out", "choose an instruct model")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in prompt_ids(tokenizer, messages):
        raise DataFault(
            "the student's chat template writes a token that its vocabulary lacks",
            "check chat_template and added tokens of the student",
        )
    if end_id(tokenizer) == unknown:
        raise DataFault(
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
