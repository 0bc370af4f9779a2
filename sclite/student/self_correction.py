"""Self-correction: guided review (score every step, correct the first above the threshold), and free review.

Each is a script for one attempt: it yields what to ask the student, is sent the reply, and yields events on the way.
`run_together` runs many scripts at once, because a student answers many requests at once; `stream` runs one
and shows what happens. Neither review ever sees a gold answer.
"""

import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Event as Flag
from typing import TypeVar

from sclite import prompts
from sclite.student.base import Reply, Request, ScoreRequest, Scores, Student
from sclite.trace import (
    CAUSE,
    OTHER_TAGS,
    Step,
    Trace,
    clean,
    corrected,
    first_corrected,
    open_piece,
    parse,
    render,
    step_pieces,
    work_of,
)

TOP_P = 0.95
_NUMBERS, _BEGINS = re.compile(r"[\d\s.,:+\-*/×()$]*\Z"), re.compile(r"[(-]?\d")
NO_REPLY, UNREADABLE = "no reply", "the review could not be read"
SAME_RESULT = "the correction comes to the same result"
NEVER = 1e6  # as a threshold: no log-odds exceed it, so nothing is accused; JSON has no infinity


@dataclass(frozen=True)
class Reviewed:
    """The result of reviewing one attempt.

    `scores` are the log-odds (nats) that each step is wrong; `accused` is the corrected step, or with the note
    SAME_RESULT the step whose correction changed nothing (None: no step); `text` is the trace after the review, equal to
    the attempt if nothing changed; `note` says why a review was abandoned; `tokens` counts what the review generated.
    """

    text: str
    scores: tuple[float, ...] = ()
    accused: int | None = None
    cause: str | None = None
    correction: str | None = None
    tokens: int = 0
    note: str = ""

    @property
    def changed(self) -> bool:
        """Whether the review changed the attempt."""
        return self.accused is not None and self.note != SAME_RESULT


@dataclass(frozen=True)
class ReviewSettings:
    """How to review: threshold on the log-odds, number of rounds, maximum length of a text in tokens."""

    threshold: float = 0.0
    rounds: int = 1
    max_tokens: int = 512
    prompt_folder: str = ""
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Writing:
    """The student begins to write a solution, a correction, a continuation or a (free) review."""

    part: str


@dataclass(frozen=True)
class StepsScored:
    """The log-odds (nats) of an error of each step (empty: too long to review), and the accused step."""

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
Script = Generator[Ask | Event, Reply | Scores | None, T]
"""Asks the student and yields events; is sent the reply (None after an event, or if there is no reply)."""


def run_together(
    student: Student, scripts: Sequence[Script[T]], progress: Callable[[int, int], None] | None = None
) -> list[T]:
    """Run scripts side by side: what they ask at the same time is one batch. `progress` counts the replies of a batch."""
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
                if progress is not None:
                    progress(done, len(written))
    return [results[i] for i in range(len(scripts))]


def stream(student: Student, script: Script[T], cancel: Flag | None = None) -> Iterator[str | Event | T]:
    """Run one script: yields its events, the text that the student writes as it is written, and at last the result.

    Setting `cancel` from another thread ends it early, without a result.
    """
    answer: Reply | Scores | None = None
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
        for found in student.stream(ask, cancel):
            if isinstance(found, str):
                yield found
            else:
                answer = found
        if cancel is not None and cancel.is_set():
            return


# -- guided ------------------------------------------------------------------------------------------------------------


def score_request(question: str, trace: Trace, folder: str = "") -> ScoreRequest:
    """Request the log-odds of an error after each step of an attempt, in a single prefill."""
    pieces = tuple(step_pieces(trace.steps))
    messages = prompts.review_messages(question, render(trace), folder)
    options = tuple((CAUSE, closer) for closer in pieces[1::2])
    return ScoreRequest(messages, pieces, tuple(range(0, len(pieces), 2)), options, OTHER_TAGS)


def score_traces(
    student: Student, questions: Sequence[str], traces: Sequence[Trace], folder: str = ""
) -> list[tuple[float, ...]]:
    """The log-odds of an error for each step of each trace; empty if it has no steps or is too long to review."""
    odds: list[tuple[float, ...]] = [()] * len(traces)
    scored = [i for i, trace in enumerate(traces) if trace.steps]
    requests = [score_request(questions[i], traces[i], folder) for i in scored]
    for scores in student.score(requests):
        odds[scored[scores.index]] = _readable(scores)
    return odds


def _readable(scores: Reply | Scores | None) -> tuple[float, ...]:
    """The log-odds; empty if they are NaN, because the review exceeds the context."""
    odds = scores.log_odds if isinstance(scores, Scores) else ()
    return () if any(map(math.isnan, odds)) else odds


def correction_request(
    question: str, trace: Trace, step: int, settings: ReviewSettings, sample: int = 0
) -> Request:
    """Request the cause and correction of a step, in the review context, starting at `<Cause>`."""
    pieces = (*step_pieces(trace.steps[: step - 1]), open_piece(step, trace.steps[step - 1]), CAUSE)
    return Request(
        prompts.review_messages(question, render(trace), settings.prompt_folder),
        pieces,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=TOP_P,
        seed=settings.seed + sample,
        stop=("</Correction>",),
    )


def read_correction(text: str) -> tuple[str, str] | None:
    """(cause, correction) from the text after `<Cause>`; None if either is missing."""
    step = parse(f"<Step1>x\n{CAUSE}{text}").trace.steps[0]
    return (step.cause, step.correction) if step.cause and step.correction else None


def same_result(step: str, correction: str) -> bool:
    """Whether both end in arithmetic on plain numbers with the same right-hand side: then nothing is corrected.

    Equations with letters and inequalities do not count: their right-hand side is not a result.
    """
    result = _arithmetic_result(step)
    return result is not None and result == _arithmetic_result(correction)


def _arithmetic_result(text: str) -> str | None:
    left, equals, right = text.rpartition("=")
    found = _NUMBERS.search(left)
    numbers = found[0].lstrip(" ,.:$") if found else ""
    right = right.strip().rstrip(".").rstrip()
    return right if equals and _BEGINS.match(numbers) and _BEGINS.match(right) else None


def continuation_request(
    question: str, trace: Trace, step: int, correction: str, settings: ReviewSettings
) -> Request:
    """Continue in the solve context after the steps before `step` and the correction as a plain step."""
    pieces = step_pieces((*trace.steps[: step - 1], Step(clean(correction))))
    return Request(
        prompts.solve_messages(question, settings.prompt_folder),
        tuple(pieces),
        max_tokens=settings.max_tokens,
    )


def join_continuation(trace: Trace, step: int, correction: str, text: str) -> Trace:
    """The new solution: the steps before `step`, the correction, and what the student wrote after it."""
    kept = (*trace.steps[: step - 1], Step(clean(correction)))
    return parse("".join(step_pieces(kept)) + text).trace


def guided(question: str, attempt: str, settings: ReviewSettings) -> Script[Reviewed]:
    """Guided review of an attempt, in at most `settings.rounds` rounds."""
    trace = work_of(attempt)
    result = Reviewed(attempt, note="" if trace.steps else "no steps to review")
    for round_number in range(settings.rounds if trace.steps else 0):
        odds = _readable((yield score_request(question, trace, settings.prompt_folder)))
        if round_number == 0:
            result = replace(result, scores=odds, note="" if odds else "too long to review")
        step = next((n for n, value in enumerate(odds, 1) if value > settings.threshold), None)
        yield StepsScored(odds, step)
        if step is None:
            break
        outcome = yield from correct_step(question, trace, step, settings)
        tokens = result.tokens + outcome.tokens
        if not outcome.changed:  # keep the text of the round before
            return replace(result, tokens=tokens, note=outcome.note)
        trace = work_of(outcome.text)
        result = replace(outcome, scores=result.scores, tokens=tokens)
    return result


def correct_step(
    question: str, trace: Trace, step: int, settings: ReviewSettings, sample: int = 0
) -> Script[Reviewed]:
    """Correct a step and solve on from there.

    `accused` is None in a result whose cause, correction or answer could not be read; `note` says which. If the
    correction comes to the same result as the step, the attempt is kept, and `note` is SAME_RESULT.
    """
    yield Writing("correction")
    reply = yield correction_request(question, trace, step, settings, sample)
    result = Reviewed(render(trace), tokens=_tokens(reply), note=UNREADABLE)
    parts = read_correction(_text(reply) or "")
    if parts is None:
        return result
    cause, correction = parts
    yield Corrected(step, cause, correction)
    if same_result(trace.steps[step - 1].text, correction):
        return Reviewed(result.text, (), step, cause, correction, result.tokens, SAME_RESULT)
    yield Writing("continuation")
    reply = yield continuation_request(question, trace, step, correction, settings)
    text = _text(reply)
    if text is None:
        return result
    solved = join_continuation(trace, step, correction, text)
    tokens = result.tokens + _tokens(reply)
    if solved.answer is None:
        return replace(result, tokens=tokens, note="no answer after the correction")
    return Reviewed(render(solved), (), step, cause, correction, tokens)


def _text(reply: Reply | Scores | None) -> str | None:
    """The text of a reply; None if it failed or is missing."""
    return reply.text if isinstance(reply, Reply) and reply.finish != "error" else None


def _tokens(reply: Reply | Scores | None) -> int:
    return reply.tokens if isinstance(reply, Reply) else 0


def review_guided(
    student: Student, questions: Sequence[str], attempts: Sequence[str], settings: ReviewSettings
) -> list[Reviewed]:
    """Guided review of each attempt."""
    columns = zip(questions, attempts, strict=True)
    return run_together(student, [guided(question, attempt, settings) for question, attempt in columns])


def correct_steps(
    student: Student, cases: Iterable[tuple[str, Trace, int]], settings: ReviewSettings
) -> list[Reviewed]:
    """Correct the given step of each (question, trace, step); each case is a sample with a seed of its own."""
    return run_together(student, [correct_step(*case, settings, n) for n, case in enumerate(cases)])


# -- free --------------------------------------------------------------------------------------------------------------


def free(question: str, attempt: str, settings: ReviewSettings) -> Script[Reviewed]:
    """Free review, the paper's protocol: one generation that repeats everything; an unreadable one changes nothing."""
    trace = work_of(attempt)
    if not trace.steps:
        return Reviewed(attempt, note="no steps to review")
    yield Writing("review")
    reply = yield Request(
        prompts.review_messages(question, render(trace), settings.prompt_folder),
        max_tokens=2 * settings.max_tokens,
        temperature=settings.temperature,
        top_p=TOP_P if settings.temperature > 0 else 1.0,
        seed=settings.seed,
    )
    text = _text(reply)
    if text is None:
        return Reviewed(attempt, note=NO_REPLY)
    review, tokens = parse(text).trace, _tokens(reply)
    step = first_corrected(review)
    if not review.steps or review.answer is None:
        return Reviewed(attempt, tokens=tokens, note=UNREADABLE)
    if step is None:
        return Reviewed(attempt, tokens=tokens)
    wrong = review.steps[step - 1]
    yield Corrected(step, wrong.cause or "", wrong.correction or "")
    return Reviewed(render(corrected(review)), (), step, wrong.cause, wrong.correction, tokens)


def review_free(
    student: Student,
    questions: Sequence[str],
    attempts: Sequence[str],
    settings: ReviewSettings,
    progress: Callable[[int, int], None] | None = None,
) -> list[Reviewed]:
    """Free review of each attempt. All have the seed of the settings, so that each depends only on its own attempt."""
    columns = zip(questions, attempts, strict=True)
    scripts = [free(question, attempt, settings) for question, attempt in columns]
    return run_together(student, scripts, progress)
