"""The texts of a run that an export is measured on: prompts and traces as the student sees and writes them."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from sclite import prompts
from sclite.config import Config
from sclite.records import Attempt, Problem, Review, Template
from sclite.run import Run
from sclite.student.base import Messages
from sclite.trace import Step, Trace, all_pieces

T = TypeVar("T")
ROWS = 100  # of each file of the run
HELD_OUT = 8  # samples of the run to compare probabilities on
QUESTION = "Anna has 12 nuts and buys 3 more. How many does she have?"
TRACE = Trace((Step("12 + 3 = 15.", "Add.", "The sum is 15.", "12 + 3 = 15."),), "Add what is bought.", "15")


class Sample(NamedTuple):
    """A chat, and the pieces of its answer in the run."""

    chat: Messages
    pieces: list[str]


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
    for attempt in spread(attempts, ROWS):
        if attempt.id in questions:
            found.append((prompts.solve_messages(questions[attempt.id], folder), attempt.parsed.trace))
    for review in spread(run.read("reviews.jsonl", Review), ROWS):
        reviewed = traces.get((review.id, review.sample))
        if review.id in questions and reviewed:
            chat = prompts.review_messages(questions[review.id], reviewed, folder)
            found.append((chat, review.parsed.trace))
    return [Sample(chat, all_pieces(trace)) for chat, trace in found]


def spread(rows: list[T], count: int) -> list[T]:
    """Up to `count` of the rows, evenly spaced."""
    return rows[:: max(1, -(-len(rows) // count))]


def split_samples(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The samples to compare probabilities on (the first two, and up to HELD_OUT of the others), and the rest.

    Both are spread over the run's files, in an order that mixes the files: memory may suffice for the first ones only.
    """

    def mix(rows: list[Sample], count: int) -> list[Sample]:
        return [row for start in range(count) for row in rows[start::count]]

    others = samples[2:]
    step = max(1, -(-len(others) // HELD_OUT))
    rest = [sample for number, sample in enumerate(others) if number % step]
    return samples[:2] + mix(others[::step], 3), mix(rest, 7)
