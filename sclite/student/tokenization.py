"""Messages and pieces to token ids, loss weights and decision marks: the only place where training text is tokenized.

The ids of a sequence are those of the generation prompt, then of each piece on its own, in training and in use.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sclite.errors import DataError
from sclite.prompts import Messages
from sclite.student.chat_template import render_chat
from sclite.trace import CAUSE, Trace, all_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

TOKENIZER_FILE = "tokenizer.json"
TRICKY = (
    "\n", "\n\n", "\n \n", "  ", " 7", "  42", " 1234567890", "3.14159", "1,234.5", "x1y2", "a\tb", "- one\n- two",
    "1. First\n2. Second\n\n   a) third", "if x:\n    return y\n", "don't we'll I'm", "…–—“”‘’", "naïve café Größe",
    "数学的问题", "привет мир", "🙂👩‍👩‍👧", "∑ᵢ xᵢ² ≤ ∞", r"\frac{1}{2} \times \sqrt{x}", "$x^2$ and \\(y\\)",
    "A" * 50, "0" * 30, "!?!?...", "<Step1>", "</Step12>\n", "<Answer>-0.5</Answer>\n",
)  # fmt: skip
"""Texts on which tokenizers differ: line ends, runs of spaces, digits after spaces, scripts, markup."""


@dataclass(frozen=True)
class TrainingSequence:
    """One training sequence: `ids`, and the loss weight of each id (0 in the prompt).

    `marks` are the positions whose next token is a decision: flag the step (`<Cause>`) or close it.
    """

    ids: list[int]
    weights: list[float]
    marks: tuple[int, ...] = ()
    accused: tuple[bool, ...] = ()


def is_ignored(tokenizer: "Tokenizer", name: str) -> bool:
    """Whether a tokenizer loaded from a folder or Hub ID produces other tokens than its tokenizer.json.

    Transformers' classes for DeepSeek and for SmolLM2 from the Hub read that file only in part. False without one, and for
    SentencePiece, where tokenizer.model counts.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import cached_file

    silent = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    path = cached_file(name, TOKENIZER_FILE, **silent)
    if path is None or b'"ByteLevel"' not in Path(path).read_bytes():
        return False
    whole = PreTrainedTokenizerFast(tokenizer_file=path)
    ids, other = (each(list(TRICKY), add_special_tokens=False)["input_ids"] for each in (whole, tokenizer))
    return bool(ids != other)


def prompt_text(tokenizer: "Tokenizer", messages: Messages, generation_prompt: bool = True) -> str:
    """The chat in the model's template, up to where the assistant begins; thinking is off if it has a switch."""
    if not tokenizer.chat_template:
        raise DataError("the student's tokenizer has no chat template", "choose an instruct model")
    template, tokens = tokenizer.get_chat_template(), tokenizer.special_tokens_map
    return render_chat(template, messages, tokens, generation_prompt=generation_prompt)


def prompt_ids(tokenizer: "Tokenizer", messages: Messages) -> list[int]:
    """The ids of `prompt_text`."""
    return tokenizer(prompt_text(tokenizer, messages), add_special_tokens=False)["input_ids"]


def piece_ids(tokenizer: "Tokenizer", pieces: Iterable[str]) -> list[list[int]]:
    """The ids of each piece, tokenized on its own."""
    pieces = list(pieces)
    return tokenizer(pieces, add_special_tokens=False)["input_ids"] if pieces else []


def end_id(tokenizer: "Tokenizer") -> int:
    """The token that ends an assistant's turn in this chat template; not always the tokenizer's own end token."""
    chat = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "QQQ"})
    text = prompt_text(tokenizer, chat, generation_prompt=False)
    after = tokenizer(text.rpartition("QQQ")[2], add_special_tokens=False)["input_ids"]
    # all_special_ids lacks <|end|> and the like if the tokenizer's own end token is another
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = next((i for i in after if i in special), tokenizer.eos_token_id)
    if end is None:
        raise DataError("the student's tokenizer has no end-of-turn token", "choose an instruct model")
    return end


def decision_ids(tokenizer: "Tokenizer") -> tuple[int, int]:
    """The first tokens of `<Cause>` and of a step's closer, on which decisions are trained. They must differ.

    In use, whole tags are compared if others begin with the same token (`ScoreRequest`). Training on whole tags was
    tried: DPO then raised `Cause` after `<` everywhere, and the quickstart's student flagged its own steps while solving in 44
    of 300 answers.
    """
    cause, close = (ids[0] for ids in piece_ids(tokenizer, [CAUSE, "</Step1>\n"]))
    if cause == close:
        message = "the student's vocabulary writes <Cause> and </Step with the same first token"
        raise DataError(message, "choose another student")
    return cause, close


def encode_pieces(
    tokenizer: "Tokenizer",
    messages: Messages,
    pieces: Sequence[str],
    weights: Sequence[tuple[float, float]],
    accused: Sequence[bool | None] = (),
) -> TrainingSequence:
    """A sequence with loss on its end token and, by `weights`, on the first token of each piece and on its others.

    `accused` says for each piece whether its first token flags a step, closes it, or decides nothing (None).
    """
    ids = prompt_ids(tokenizer, messages)
    loss, starts = [0.0] * len(ids), []
    for piece, (first, rest) in zip(piece_ids(tokenizer, pieces), weights, strict=True):
        starts.append(len(ids))
        ids = ids + piece
        loss += [first] + [rest] * (len(piece) - 1)
    judged = zip(starts, accused, strict=False)
    decisions = {start - 1: wrong for start, wrong in judged if wrong is not None}
    ids, loss = [*ids, end_id(tokenizer)], [*loss, 1.0]
    return TrainingSequence(ids, loss, tuple(decisions), tuple(decisions.values()))


def encode_solution(
    tokenizer: "Tokenizer", messages: Messages, trace: Trace, after: int = 0
) -> TrainingSequence:
    """A trace as an answer to `messages`, with loss on what follows step `after` and on its end token."""
    pieces = all_pieces(trace)
    cut = 2 * after  # a step without notes is two pieces
    return encode_pieces(tokenizer, messages, pieces, [(0.0, 0.0)] * cut + [(1.0, 1.0)] * (len(pieces) - cut))


def encode_review(
    tokenizer: "Tokenizer", messages: Messages, review: Trace, decision_weight: float = 0.0
) -> TrainingSequence:
    """A whole review, with a decision marked after every step up to the first wrong one, whose text has no loss.

    The decision's token weighs `1 + decision_weight`; otherwise one token among hundreds would hardly count.
    """
    pieces = all_pieces(review)
    end = pieces.index(CAUSE) + 1 if CAUSE in pieces else len(pieces)
    accused = [
        piece == CAUSE if before.startswith("<Step") else None
        for before, piece in zip(["", *pieces], pieces[:end], strict=False)
    ]
    accused += [None] * (len(pieces) - end)
    weights = [(1.0 if wrong is None else 1.0 + decision_weight, 1.0) for wrong in accused]
    if CAUSE in pieces:
        weights[end - 2] = (0.0, 0.0)  # the wrong step is repeated unchanged: loss would train the mistake
    return encode_pieces(tokenizer, messages, pieces, weights, accused)
