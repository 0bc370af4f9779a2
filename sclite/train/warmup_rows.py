"""The rows of the warm-up: whole reviews, and between them three kinds of solving, which keep both tasks apart.

A *solved* row is a template, one that SFT has not seen where there are such. A *continued* row goes on after a corrected
step, as guided review asks for it: a correction is seldom written like a step, and a student that never saw one there
loses its way behind it.
A *closed* row is wrong work in the solve context, with loss on nothing but the closers of its steps and the end: a step
is accused in a review, never while solving. Without such rows a small student accuses its own steps as it solves, and
what review could mend is mended, or spoiled, before.
"""

from collections.abc import Sequence
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.records import Attempt, Problem, Review, Template
from sclite.run import Run
from sclite.student.tokenization import Encoded, encode_closing, encode_continuation, encode_review
from sclite.trace import Trace, corrected, parse, render, work_of
from sclite.train.mixture import mix
from sclite.train.sft import solve_rows


def mixed_rows(
    tokenizer: Any, run: Run, reviews: Sequence[Review], templates: Sequence[Template], config: Config
) -> tuple[list[str], list[Encoded]]:
    """(names, rows) of the warm-up, in the order of `mix`; reads attempts.jsonl and problems.jsonl.

    Where a review is too long to be trained its work is not closed either: nothing would say that the step is wrong.
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


def is_closed(work: Trace, review: Review) -> bool:
    """Whether a review's work makes a closed row: it is wrong work, and the row does not teach to end without an answer."""
    return review.step is not None and work.answer is not None


def review_row(tokenizer: Any, question: str, work: Trace, review: Review, config: Config) -> Encoded:
    """A review as an answer to the review prompt, its decisions weighted."""
    messages = prompts.review_messages(question, render(work), config.prompts.folder)
    return encode_review(tokenizer, messages, parse(review.trace).trace, config.warmup.decision_weight)


def continued_row(tokenizer: Any, question: str, review: Review, config: Config) -> Encoded:
    """How to solve on after the step that a review corrects."""
    messages = prompts.solve_messages(question, config.prompts.folder)
    return encode_continuation(tokenizer, messages, corrected(parse(review.trace).trace), review.step)


def closed_row(tokenizer: Any, question: str, work: Trace, review: Review, config: Config) -> Encoded:
    """The wrong work of a review that corrects, as it stands while solving: its wrong step is closed like any other."""
    messages = prompts.solve_messages(question, config.prompts.folder)
    return encode_closing(tokenizer, messages, work, review.step, config.warmup.decision_weight)
