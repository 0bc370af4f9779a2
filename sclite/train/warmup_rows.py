"""The rows of the warm-up: whole reviews, mixed with three kinds of solving that keep the two tasks separate.

A *solved* row is a template, if possible one that SFT has not seen. A *continued* row continues after a corrected step, as
guided review asks for it: a correction is seldom written like a step, and a student that never saw one there gets lost
after it.
A *closed* row is wrong work in the solve context, with loss only on the closing tags of its steps and the end: steps are
accused in a review, never while solving. Without such rows a small student accuses its own steps as it solves, and what
review could correct is corrected, or spoiled, before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, TypeVar

from sclite import prompts
from sclite.config import Config
from sclite.records import Attempt, Problem, Review, Template
from sclite.run import Run
from sclite.student.tokenization import Encoded, encode_closing, encode_continuation, encode_review
from sclite.trace import Trace, corrected, parse, render, work_of
from sclite.train.sft import solve_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

R = TypeVar("R")


def mixed_rows(
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    reviews: Sequence[Review],
    templates: Sequence[Template],
    config: Config,
) -> tuple[list[str], list[Encoded]]:
    """(names, rows) of the warm-up, in the order of `mix`; reads attempts.jsonl and problems.jsonl.

    If a review is too long to be trained, its work is not closed either: nothing would say that the step is wrong.
    """
    attempts = {(a.id, a.sample): a.trace for a in run.read("attempts.jsonl", Attempt)}
    questions = {p.id: p.question for p in run.read("problems.jsonl", Problem)}
    reviewed, continued, closed = [], [], []
    for review in reviews:
        name, question = f"{review.id}/{review.sample}", questions[review.id]
        work = work_of(attempts[review.id, review.sample])
        reviewed.append((name, review_row(tokenizer, question, work, review, config)))
        if review.step is not None:
            continued.append((f"{name}/continued", continued_row(tokenizer, question, review, config)))
        if is_closed(work, review) and len(reviewed[-1][1].ids) <= config.warmup.max_length:
            closed.append((f"{name}/closed", closed_row(tokenizer, question, work, review, config)))
    rows = solve_rows(tokenizer, templates, config.prompts.folder)
    solved = [(template.id, row) for template, row in zip(templates, rows, strict=True)]
    share, seed = config.warmup.replay_share, config.seed
    mixed = mix(reviewed, closed, solved=solved, continued=continued, share=share, seed=seed)
    return [name for name, _ in mixed], [row for _, row in mixed]


def mix(
    reviewed: Sequence[R],
    closed: Sequence[R],
    *,
    solved: Sequence[R],
    continued: Sequence[R],
    share: float,
    seed: int,
) -> list[R]:
    """All reviews and all closed rows, and `share` rows of solving for each review; shuffled.

    The rows of solving alternate between solved ones, in random order, and continued ones, in their order; none is used
    twice before each was used once. With a share of 1 and half of the reviews confirmations, every continued row is used.
    """
    draw = random.Random(seed)
    pairs = zip_longest(draw.sample(solved, len(solved)), continued)
    solving = [row for pair in pairs for row in pair if row is not None]
    wanted = round(share * len(reviewed)) if solving else 0
    rows = [*reviewed, *closed, *(solving[i % len(solving)] for i in range(wanted))]
    draw.shuffle(rows)
    return rows


def is_closed(work: Trace, review: Review) -> bool:
    """Whether a review's work makes a closed row: it is wrong, and has an answer, else the row would teach to end there."""
    return review.step is not None and work.answer is not None


def review_row(
    tokenizer: PreTrainedTokenizerBase, question: str, work: Trace, review: Review, config: Config
) -> Encoded:
    """A review as an answer to the review prompt, its decisions weighted."""
    messages = prompts.review_messages(question, render(work), config.prompts.folder)
    return encode_review(tokenizer, messages, parse(review.trace).trace, config.warmup.decision_weight)


def continued_row(
    tokenizer: PreTrainedTokenizerBase, question: str, review: Review, config: Config
) -> Encoded:
    """The rest of the solution after the step that a review corrects."""
    messages = prompts.solve_messages(question, config.prompts.folder)
    return encode_continuation(tokenizer, messages, corrected(parse(review.trace).trace), review.step)


def closed_row(
    tokenizer: PreTrainedTokenizerBase, question: str, work: Trace, review: Review, config: Config
) -> Encoded:
    """The wrong work that a review corrects, in the solve context: its wrong step is closed like any other."""
    messages = prompts.solve_messages(question, config.prompts.folder)
    return encode_closing(tokenizer, messages, work, review.step, config.warmup.decision_weight)
