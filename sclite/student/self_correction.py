"""Self-correction: guided review (score every step, correct the first above the threshold), and free review.

Each is a script for one attempt: it yields requests, is sent the replies, and yields events along the way. `run_together`
runs many at once, `stream` shows what one does. Neither review ever sees a gold answer.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from threading import Event as Flag
from typing import Any, TypeVar

from sclite import prompts
from sclite.progress import Progress, no_progress
from sclite.student.base import Reply, Request, ScoreRequest, Scores, Student
from sclite.student.step_scores import pool, read_odds
from sclite.trace import (
    CAUSE,
    Step,
    Trace,
    corrected,
    corrected_steps,
    first_corrected,
    open_piece,
    parse,
    render,
    step_pieces,
)

TOP_P = 0.95
_NUMBERS, _BEGINS = re.compile(r"[\d\s.,:+\-*/×()$]*\Z"), re.compile(r"[(-]?\d")
NO_STEPS, NO_REPLY, UNREADABLE = "no steps to review", "no reply", "the review could not be read"
SAME_RESULT = "the correction comes to the same result"
NEVER = 1e6  # as a threshold: no log-odds exceed it, so nothing is flagged; JSON has no infinity


@dataclass(frozen=True)
class Reviewed:
    """The result of reviewing one attempt.

    `trace` is the new solution (None: the attempt is kept). `scores` are the log-odds (nats) that each step is wrong: the
    weighted mean of review and confidence.
    `accused` is the flagged step, even if its correction changes nothing or is unreadable; cause and correction belong to
    it. After several rounds, they are those of the earliest corrected step, and the scores those of the first round.
    `note` says why a review was abandoned; `tokens` counts what the review generated, `prefill` the tokens of
    its prompts that were not in the cache.
    """

    trace: Trace | None = None
    scores: tuple[float, ...] = ()
    accused: int | None = None
    cause: str | None = None
    correction: str | None = None
    tokens: int = 0
    note: str = ""
    prefill: int = 0

    @property
    def answer(self) -> str | None:
        """The answer of the new solution."""
        return self.trace.answer if self.trace is not None else None


@dataclass(frozen=True)
class ReviewSettings:
    """How to review: a step above the threshold is corrected, in at most `rounds` rounds and in texts of at most `max_tokens`.

    A step's log-odds of an error are the weighted mean of what the review decides (at weight 0) and of the confidence
    with which the student solves the step (at weight 1).
    """

    threshold: float = 0.0
    rounds: int = 1
    max_tokens: int = 512
    prompt_folder: str = ""
    temperature: float = 0.0
    seed: int = 0
    confidence_weight: float = 0.0


@dataclass(frozen=True)
class Writing:
    """The student begins to write a solution, a correction, a continuation or a (free) review."""

    part: str


@dataclass(frozen=True)
class StepsScored:
    """The log-odds (nats) of an error of each step (empty: too long to review), and the flagged step."""

    scores: tuple[float, ...]
    accused: int | None


@dataclass(frozen=True)
class Corrected:
    """The student's correction of a step."""

    step: int
    cause: str
    correction: str


Ask = Request | ScoreRequest
Event = Writing | StepsScored | Corrected
T = TypeVar("T")
Script = Generator[Ask | Event, Any, T]
"""Asks the student and yields events; is sent the Reply or the Scores, and None after an event."""


def run_together(student: Student, scripts: Sequence[Script[T]], progress: Progress = no_progress) -> list[T]:
    """Run scripts side by side, batching what they request at the same time. `progress` counts the replies of a batch."""
    results: dict[int, T] = {}
    answers: dict[int, Reply | Scores | None] = dict.fromkeys(range(len(scripts)))
    while answers:
        asked: dict[int, Ask] = {}
        for i, answer in answers.items():
            try:
                ask = scripts[i].send(answer)
                while not isinstance(ask, Ask):
                    ask = next(scripts[i])
                asked[i] = ask
            except StopIteration as end:
                results[i] = end.value
        answers = dict.fromkeys(asked)
        scored = {i: ask for i, ask in asked.items() if isinstance(ask, ScoreRequest)}
        written = {i: ask for i, ask in asked.items() if isinstance(ask, Request)}
        if scored:
            owners = list(scored)
            answers |= {owners[found.index]: found for found in student.score(list(scored.values()))}
        if written:
            owners = list(written)
            for done, reply in enumerate(student.generate(list(written.values())), 1):
                answers[owners[reply.index]] = reply
                progress(done, len(written))
    return [results[i] for i in range(len(scripts))]


def stream(
    student: Student, script: Script[T], cancel: Flag | None = None, pieces: bool = True
) -> Iterator[str | Event | T]:
    """Run one script: yields its events, the text as the student writes it, and finally the result.

    Without `pieces` each text is yielded once it is complete, which costs less. Setting `cancel` from another thread ends it
    early, without a result.
    """
    answer = None
    while True:
        try:
            ask = script.send(answer)
        except StopIteration as end:
            yield end.value
            return
        answer = None
        if not isinstance(ask, Ask):
            yield ask
            continue
        for found in student.stream(ask, cancel, pieces):
            if isinstance(found, str):
                yield found
            else:
                answer = found
        if cancel is not None and cancel.is_set():
            return


def review(question: str, attempt: Trace, settings: ReviewSettings, mode: str) -> Script[Reviewed]:
    """Review an attempt, guided or free, and count the prompt tokens that it computes."""
    script = (guided if mode == "guided" else free)(question, attempt, settings)
    prefill, answer = 0, None
    while True:
        try:
            ask = script.send(answer)
        except StopIteration as end:
            return replace(end.value, prefill=prefill)
        answer = yield ask
        prefill += answer.prefill_tokens if answer else 0


# -- guided ------------------------------------------------------------------------------------------------------------


def guided(question: str, attempt: Trace, settings: ReviewSettings) -> Script[Reviewed]:
    """Guided review of an attempt, in at most `settings.rounds` rounds."""
    if not attempt.steps:
        return Reviewed(note=NO_STEPS)
    weight, result, rewritten = settings.confidence_weight, Reviewed(), corrected_steps(attempt)
    for round_number in range(settings.rounds):
        both = yield from read_odds(question, attempt, settings.prompt_folder, (weight,), rewritten)
        odds = pool(*both, weight)
        if round_number == 0:
            result = Reviewed(scores=odds, note="" if odds else "too long to review")
        step = next((n for n, value in enumerate(odds, 1) if value > settings.threshold), None)
        yield StepsScored(odds, step)
        if step is None:
            break
        outcome = yield from correct_step(question, corrected(attempt), step, settings)
        tokens = result.tokens + outcome.tokens
        if outcome.trace is None:  # keep the solution of the previous round
            return replace(result, accused=result.accused or step, tokens=tokens, note=outcome.note)
        attempt = outcome.trace
        rewritten = {each for each in rewritten if each < step} | {step} | corrected_steps(attempt)
        # report the earliest corrected step; later rounds may correct later ones
        found = outcome if step <= (result.accused or step) else result
        result = replace(found, trace=outcome.trace, scores=result.scores, tokens=tokens)
    return result


def correct_step(question: str, work: Trace, step: int, settings: ReviewSettings) -> Script[Reviewed]:
    """Correct a step in the review context, starting at `<Cause>`, and solve on from there in the solve context.

    The work is kept without a cause, a complete correction and an answer, and if the correction comes to the same result
    as the step.
    """
    before, wrong = work.steps[: step - 1], work.steps[step - 1]
    yield Writing("correction")
    reply = yield Request(
        prompts.review_messages(question, render(work), settings.prompt_folder),
        (*step_pieces(before), open_piece(step, wrong), CAUSE),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=TOP_P,
        seed=settings.seed,
        stop=("</Correction>",),
    )
    tokens, written = reply.tokens, parse(f"<Step1>x\n{CAUSE}{reply.text}").trace.steps[0]
    cause, correction = written.cause, written.correction
    if reply.finish != "stop" or cause is None or correction is None:
        return Reviewed(accused=step, tokens=tokens, note=UNREADABLE)
    yield Corrected(step, cause, correction)
    if (result := _result(wrong.text)) is not None and result == _result(correction):
        return Reviewed(None, (), step, cause, correction, tokens, SAME_RESULT)
    yield Writing("continuation")
    pieces = tuple(step_pieces((*before, Step(correction))))
    messages = prompts.solve_messages(question, settings.prompt_folder)
    reply = yield Request(messages, pieces, max_tokens=settings.max_tokens)
    tokens, solved = tokens + reply.tokens, parse("".join(pieces) + reply.text).trace
    if solved.answer is None or reply.finish != "stop":
        return Reviewed(accused=step, tokens=tokens, note="no answer after the correction")
    return Reviewed(solved, (), step, cause, correction, tokens)


def correct_steps(
    student: Student, cases: Iterable[tuple[str, Trace, int]], settings: ReviewSettings
) -> list[Reviewed]:
    """Correct the given step of each (question, work, step); each case has its own seed."""
    seeds = (replace(settings, seed=settings.seed + number) for number in count())
    return run_together(student, [correct_step(*case, next(seeds)) for case in cases])


def _result(text: str) -> str | None:
    """The right-hand side of the arithmetic on plain numbers that a text ends in.

    None for equations with letters and for inequalities: their right-hand side is not a result.
    """
    left, equals, right = text.rpartition("=")
    found = _NUMBERS.search(left)
    numbers = found[0].lstrip(" ,.:$") if found else ""
    right = right.strip().rstrip(".").rstrip()
    return right if equals and _BEGINS.match(numbers) and _BEGINS.match(right) else None


# -- free --------------------------------------------------------------------------------------------------------------


def free(question: str, attempt: Trace, settings: ReviewSettings) -> Script[Reviewed]:
    """Free review, the paper's protocol: one generation that repeats everything; an unreadable one changes nothing."""
    work = corrected(attempt)
    if not work.steps:
        return Reviewed(note=NO_STEPS)
    yield Writing("review")
    reply = yield Request(
        prompts.review_messages(question, render(work), settings.prompt_folder),
        max_tokens=2 * settings.max_tokens,
        temperature=settings.temperature,
        top_p=TOP_P if settings.temperature > 0 else 1.0,
        seed=settings.seed,
    )
    if reply.finish == "error":
        return Reviewed(note=NO_REPLY)
    review = parse(reply.text).trace
    if not review.steps or review.answer is None:
        return Reviewed(tokens=reply.tokens, note=UNREADABLE)
    step = first_corrected(review)
    if step is None:
        return Reviewed(tokens=reply.tokens)
    wrong = review.steps[step - 1]
    yield Corrected(step, wrong.cause or "", wrong.correction or "")
    return Reviewed(corrected(review), (), step, wrong.cause, wrong.correction, reply.tokens)
