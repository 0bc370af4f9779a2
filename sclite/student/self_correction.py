"""Self-correction: guided review (read an error score after every step, mend the first past the threshold), and free.

METHOD section 5. Both work on many problems at once, because a student answers many requests at once. Neither ever
sees a gold answer.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

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
NO_REPLY, SAME_RESULT = "no reply", "the correction comes to the same result"
NEVER = 1e6  # as a threshold: no log-odds exceed it, so nothing is accused; JSON has no infinity


@dataclass(frozen=True)
class Reviewed:
    """What a review made of one attempt.

    `scores` are the log-odds (nats) that each step is wrong; `accused` the step that was mended, or with a note of
    SAME_RESULT was to be (None: none was);
    `text` the trace after the review, which is the attempt where nothing was changed; `note` says why a review was
    given up; `tokens` counts what the review generated.
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
    """How to review: the threshold on the log-odds, rounds, and the longest text in tokens."""

    threshold: float = 0.0
    rounds: int = 1
    max_tokens: int = 512
    prompt_folder: str = ""
    temperature: float = 0.0
    seed: int = 0


def score_request(question: str, trace: Trace, folder: str = "") -> ScoreRequest:
    """Ask for the log-odds of an error after each step of an attempt: one prefill for all of them."""
    pieces = tuple(step_pieces(trace.steps))
    messages = prompts.review_messages(question, render(trace), folder)
    options = tuple((CAUSE, closer) for closer in pieces[1::2])
    return ScoreRequest(messages, pieces, tuple(range(0, len(pieces), 2)), options, OTHER_TAGS)


def score_traces(
    student: Student, questions: Sequence[str], traces: Sequence[Trace], folder: str = ""
) -> list[tuple[float, ...]]:
    """The log-odds of an error for each step of each trace; empty without steps, or where it is too long to review."""
    found: list[tuple[float, ...]] = [()] * len(traces)
    asked = [i for i, trace in enumerate(traces) if trace.steps]
    requests = [score_request(questions[i], traces[i], folder) for i in asked]
    for scores in student.score(requests):
        if not any(math.isnan(value) for value in scores.log_odds):  # the review did not fit into the context
            found[asked[scores.index]] = scores.log_odds
    return found


def correction_request(
    question: str, trace: Trace, step: int, settings: ReviewSettings, sample: int = 0
) -> Request:
    """Ask for cause and correction of a step, in the review context, from `<Cause>` on."""
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
    """(cause, correction) from what follows `<Cause>`; None where either is missing."""
    step = parse(f"<Step1>x\n{CAUSE}{text}").trace.steps[0]
    return (step.cause, step.correction) if step.cause and step.correction else None


def same_result(step: str, correction: str) -> bool:
    """Whether both end in a sum of plain numbers and in the same after its equals sign: then nothing is mended.

    An equation with letters says nothing by its right side, nor does an inequality.
    """
    ends = [_result_of_sum(text) for text in (step, correction)]
    return ends[0] is not None and ends[0] == ends[1]


def _result_of_sum(text: str) -> str | None:
    left, equals, right = text.rpartition("=")
    numbers = _NUMBERS.search(left)[0].lstrip(" ,.:$")
    right = right.strip().rstrip(".").rstrip()
    return right if equals and _BEGINS.match(numbers) and _BEGINS.match(right) else None


def continuation_request(
    question: str, trace: Trace, step: int, correction: str, settings: ReviewSettings
) -> Request:
    """Go on in the solve context after the steps before `step` and the corrected step as a plain one."""
    pieces = step_pieces((*trace.steps[: step - 1], Step(clean(correction))))
    return Request(
        prompts.solve_messages(question, settings.prompt_folder),
        tuple(pieces),
        max_tokens=settings.max_tokens,
    )


def join_continuation(trace: Trace, step: int, correction: str, text: str) -> Trace:
    """The new solution: what was kept, the corrected step, and what the student wrote after it."""
    kept = (*trace.steps[: step - 1], Step(clean(correction)))
    return parse("".join(step_pieces(kept)) + text).trace


def _generate(
    student: Student, requests: list[Request], progress: Callable[[int, int], None] | None = None
) -> list[Reply | None]:
    replies: list[Reply | None] = [None] * len(requests)
    for done, reply in enumerate(student.generate(requests), 1):
        replies[reply.index] = reply
        if progress is not None:
            progress(done, len(requests))
    return replies


@dataclass
class _State:
    """One attempt on its way through the rounds."""

    question: str
    trace: Trace
    result: Reviewed
    open: bool = True
    scores: tuple[float, ...] = field(default=())


def review_guided(
    student: Student, questions: Sequence[str], attempts: Sequence[str], settings: ReviewSettings
) -> list[Reviewed]:
    """Guided review of each attempt, in at most `settings.rounds` rounds; METHOD section 5."""
    states = []
    for question, text in zip(questions, attempts, strict=True):
        trace = work_of(text)
        note = "" if trace.steps else "no steps to review"
        states.append(_State(question, trace, Reviewed(text, note=note), open=bool(trace.steps)))
    for round_number in range(settings.rounds):
        active = [s for s in states if s.open]
        if active:
            _round(student, active, settings, first=round_number == 0)
    return [state.result for state in states]


def _round(student: Student, states: list[_State], settings: ReviewSettings, first: bool) -> None:
    scores = score_traces(
        student, [s.question for s in states], [s.trace for s in states], settings.prompt_folder
    )
    accused = []
    for state, found in zip(states, scores, strict=True):
        state.scores = found
        if first:
            note = "" if found else "too long to review"
            state.result = replace(state.result, scores=found, note=note)
        step = next((n for n, value in enumerate(found, 1) if value > settings.threshold), None)
        state.open = step is not None
        if step is not None:
            accused.append((state, step))
    mended = correct_steps(student, [(s.question, s.trace, step) for s, step in accused], settings)
    for (state, _), outcome in zip(accused, mended, strict=True):
        tokens = state.result.tokens + outcome.tokens
        if not outcome.changed:  # the last text stands
            state.open, state.result = False, replace(state.result, tokens=tokens, note=outcome.note)
            continue
        state.trace = work_of(outcome.text)
        state.result = replace(outcome, scores=state.result.scores, tokens=tokens)


def correct_steps(
    student: Student, cases: Iterable[tuple[str, Trace, int]], settings: ReviewSettings
) -> list[Reviewed]:
    """Correct the given step of each (question, trace, step) and solve on from there.

    `accused` is None in a result whose cause, correction or answer could not be read; `note` says which. Where the
    correction comes to the same result as the step, the attempt stands, and `note` is SAME_RESULT.
    """
    cases = list(cases)
    replies = _generate(
        student, [correction_request(q, t, k, settings, i) for i, (q, t, k) in enumerate(cases)]
    )
    results: list[Reviewed] = [Reviewed(render(trace), note=NO_REPLY) for _, trace, _ in cases]
    going_on = []
    for i, reply in enumerate(replies):
        note = read_correction(reply.text) if reply is not None and reply.finish != "error" else None
        results[i] = replace(
            results[i], tokens=reply.tokens if reply else 0, note="the review could not be read"
        )
        if note is not None:
            _, trace, step = cases[i]
            if same_result(trace.steps[step - 1].text, note[1]):
                results[i] = Reviewed(render(trace), (), step, *note, reply.tokens, SAME_RESULT)
            else:
                going_on.append((i, *note))
    requests = [continuation_request(*cases[i], correction, settings) for i, _, correction in going_on]
    for (i, cause, correction), reply in zip(going_on, _generate(student, requests), strict=True):
        if reply is None or reply.finish == "error":
            continue
        _, trace, step = cases[i]
        solved = join_continuation(trace, step, correction, reply.text)
        tokens = results[i].tokens + reply.tokens
        if solved.answer is None:
            results[i] = replace(results[i], tokens=tokens, note="no answer after the correction")
            continue
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

    Every request has the seed of the settings, so that a request depends on nothing but its own question and attempt.
    """
    results = [Reviewed(text, note="no steps to review") for text in attempts]
    traces = [work_of(text) for text in attempts]
    asked = [i for i, trace in enumerate(traces) if trace.steps]
    requests = [
        Request(
            prompts.review_messages(questions[i], render(traces[i]), settings.prompt_folder),
            max_tokens=2 * settings.max_tokens,
            temperature=settings.temperature,
            top_p=TOP_P if settings.temperature > 0 else 1.0,
            seed=settings.seed,
        )
        for i in asked
    ]
    for i, reply in zip(asked, _generate(student, requests, progress), strict=True):
        if reply is None or reply.finish == "error":
            results[i] = Reviewed(attempts[i], note=NO_REPLY)
            continue
        review, tokens = parse(reply.text).trace, reply.tokens
        step = first_corrected(review)
        if not review.steps or review.answer is None:
            results[i] = Reviewed(attempts[i], tokens=tokens, note="the review could not be read")
        elif step is None:
            results[i] = Reviewed(attempts[i], tokens=tokens)
        else:
            wrong = review.steps[step - 1]
            results[i] = Reviewed(render(corrected(review)), (), step, wrong.cause, wrong.correction, tokens)
    return results
