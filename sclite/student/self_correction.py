"""Self-correction: guided review (score every step, correct the first above the threshold), and free review.

METHOD section 5. Both review many problems together, because a student answers many requests at once. Neither ever
sees a gold answer.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from sclite import prompts
from sclite.student.base import Reply, Request, ScoreRequest, Student
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
        if not any(math.isnan(value) for value in scores.log_odds):  # NaN: the review exceeds the context
            odds[scored[scores.index]] = scores.log_odds
    return odds


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
    numbers = _NUMBERS.search(left)[0].lstrip(" ,.:$")
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


def _generate(
    student: Student, requests: list[Request], progress: Callable[[int, int], None] | None = None
) -> list[Reply | None]:
    """The reply to each request, in order; None if it is missing."""
    replies: list[Reply | None] = [None] * len(requests)
    for done, reply in enumerate(student.generate(requests), 1):
        replies[reply.index] = reply
        if progress is not None:
            progress(done, len(requests))
    return replies


def review_guided(
    student: Student, questions: Sequence[str], attempts: Sequence[str], settings: ReviewSettings
) -> list[Reviewed]:
    """Guided review of each attempt, in at most `settings.rounds` rounds; METHOD section 5."""
    traces = [work_of(text) for text in attempts]
    results = [
        Reviewed(text, note="" if trace.steps else "no steps to review")
        for text, trace in zip(attempts, traces, strict=True)
    ]
    active = [i for i, trace in enumerate(traces) if trace.steps]
    for round_number in range(settings.rounds):
        if not active:
            break
        odds = score_traces(
            student, [questions[i] for i in active], [traces[i] for i in active], settings.prompt_folder
        )
        accused = []
        for i, values in zip(active, odds, strict=True):
            if round_number == 0:
                note = "" if values else "too long to review"
                results[i] = replace(results[i], scores=values, note=note)
            step = next((n for n, value in enumerate(values, 1) if value > settings.threshold), None)
            if step is not None:
                accused.append((i, step))
        outcomes = correct_steps(student, [(questions[i], traces[i], step) for i, step in accused], settings)
        active = []
        for (i, _), outcome in zip(accused, outcomes, strict=True):
            tokens = results[i].tokens + outcome.tokens
            if outcome.changed:
                traces[i] = work_of(outcome.text)
                results[i] = replace(outcome, scores=results[i].scores, tokens=tokens)
                active.append(i)
            else:  # keep the text of the round before
                results[i] = replace(results[i], tokens=tokens, note=outcome.note)
    return results


def correct_steps(
    student: Student, cases: Iterable[tuple[str, Trace, int]], settings: ReviewSettings
) -> list[Reviewed]:
    """Correct the given step of each (question, trace, step) and solve on from there.

    `accused` is None in a result whose cause, correction or answer could not be read; `note` says which. If the
    correction comes to the same result as the step, the attempt is kept, and `note` is SAME_RESULT.
    """
    cases = list(cases)
    requests = [correction_request(*case, settings, sample) for sample, case in enumerate(cases)]
    results: list[Reviewed] = []
    corrected_cases = []
    for (question, trace, step), reply in zip(cases, _generate(student, requests), strict=True):
        tokens = reply.tokens if reply is not None else 0
        result = Reviewed(render(trace), tokens=tokens, note=UNREADABLE)
        readable = reply is not None and reply.finish != "error"
        if readable and (parts := read_correction(reply.text)) is not None:
            cause, correction = parts
            if same_result(trace.steps[step - 1].text, correction):
                result = Reviewed(render(trace), (), step, cause, correction, tokens, SAME_RESULT)
            else:
                corrected_cases.append((len(results), question, trace, step, cause, correction))
        results.append(result)
    requests = [
        continuation_request(question, trace, step, correction, settings)
        for _, question, trace, step, _, correction in corrected_cases
    ]
    replies = _generate(student, requests)
    for (i, _, trace, step, cause, correction), reply in zip(corrected_cases, replies, strict=True):
        if reply is None or reply.finish == "error":
            continue
        solved = join_continuation(trace, step, correction, reply.text)
        tokens = results[i].tokens + reply.tokens
        if solved.answer is None:
            results[i] = replace(results[i], tokens=tokens, note="no answer after the correction")
        else:
            results[i] = Reviewed(render(solved), (), step, cause, correction, tokens)
    return results


def review_free(
    student: Student,
    questions: Sequence[str],
    attempts: Sequence[str],
    settings: ReviewSettings,
    progress: Callable[[int, int], None] | None = None,
) -> list[Reviewed]:
    """Free review, the paper's protocol: one generation that repeats everything; an unreadable one changes nothing.

    Every request has the seed of the settings, so that it depends only on its own question and attempt.
    """
    results = [Reviewed(text, note="no steps to review") for text in attempts]
    traces = [work_of(text) for text in attempts]
    reviewable = [i for i, trace in enumerate(traces) if trace.steps]
    requests = [
        Request(
            prompts.review_messages(questions[i], render(traces[i]), settings.prompt_folder),
            max_tokens=2 * settings.max_tokens,
            temperature=settings.temperature,
            top_p=TOP_P if settings.temperature > 0 else 1.0,
            seed=settings.seed,
        )
        for i in reviewable
    ]
    for i, reply in zip(reviewable, _generate(student, requests, progress), strict=True):
        if reply is None or reply.finish == "error":
            results[i] = Reviewed(attempts[i], note=NO_REPLY)
            continue
        review, tokens = parse(reply.text).trace, reply.tokens
        step = first_corrected(review)
        if not review.steps or review.answer is None:
            results[i] = Reviewed(attempts[i], tokens=tokens, note=UNREADABLE)
        elif step is None:
            results[i] = Reviewed(attempts[i], tokens=tokens)
        else:
            wrong = review.steps[step - 1]
            results[i] = Reviewed(render(corrected(review)), (), step, wrong.cause, wrong.correction, tokens)
    return results
