"""Checks a teacher's review of a wrong attempt: it must keep the work and correct its first wrong step."""

from sclite.data.templates import find_leak
from sclite.grading.worker import Grader
from sclite.records import Attempt, Problem
from sclite.teacher.client import Rejection
from sclite.trace import Trace, first_corrected, parse, render, work_of


def review_rejection(text: str, attempt: Attempt, problem: Problem, grader: Grader) -> Rejection | None:
    """Why a teacher's review of an attempt is unusable, or None if it is usable."""
    parsed = parse(text)
    if parsed.issues:
        return Rejection("not_readable", str(parsed.issues[0]))
    if "\ufffd" in text:
        return Rejection("broken_text", "it has characters that are no text")
    if rejection := step_rejection(work_of(attempt.trace), parsed.trace, attempt.first_error):
        return rejection
    if find_leak(render(parsed.trace)):
        return Rejection("leak", "the text mentions a given solution or answer")
    right = grader.equal(parsed.trace.answer, problem.answer)
    if right is None:
        return Rejection("grader_unknown", "the answer could not be compared")
    return (
        None if right else Rejection("wrong_answer", f"{parsed.trace.answer} is not the right final answer")
    )


def step_rejection(work: Trace, review: Trace, label: int | None) -> Rejection | None:
    """Why a review does not accuse exactly one step, with cause and correction, and keep the text up to it; else None."""
    step = first_corrected(review)
    if step is None:
        why = "no step carries <Cause> and <Correction>, but the answer of this work is wrong"
        return Rejection("no_error_found", why)
    if step > len(work.steps):
        why = f"the work has {len(work.steps)} steps, the cause stands in step {step}"
        return Rejection("step_out_of_range", why)
    if label is not None and step != label:
        return Rejection("other_step_than_label", f"step {step} is not the first wrong one")
    if review.steps[step - 1].cause is None or review.steps[step - 1].correction is None:
        return Rejection("cause_or_correction_missing", f"step {step} needs both <Cause> and <Correction>")
    if any(s.cause or s.correction for s in review.steps[step:]):
        why = "only the first wrong step carries <Cause> and <Correction>"
        return Rejection("several_steps_corrected", why)
    for number, (new, old) in enumerate(zip(review.steps[:step], work.steps, strict=False), 1):
        if new.text.split() != old.text.split():
            return Rejection("steps_changed", f"step {number} must stand as the student wrote it")
    return None
