"""The score of a step: the log-odds that it is wrong, by the student's review and by its confidence as it solves."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sclite import prompts
from sclite.student.base import ScoreRequest, Scores
from sclite.trace import CAUSE, OTHER_TAGS, Trace, corrected, corrected_steps, render, step_pieces

if TYPE_CHECKING:
    from sclite.config import Review
    from sclite.student.self_correction import Script

Odds = tuple[float, ...]
"""The log-odds (nats) that each step is wrong; empty without steps, or if they are too long to be scored."""


def review_odds(question: str, work: Trace, folder: str = "") -> Script[Odds]:
    """What the review decides at the end of each step, from one prefill: `<Cause>` or the closing tag."""
    pieces = tuple(step_pieces(work.steps))
    options = tuple((CAUSE, closer) for closer in pieces[1::2])
    marks = tuple(range(0, len(pieces), 2))
    messages = prompts.review_messages(question, render(work), folder)
    return (yield from _odds(ScoreRequest(messages, pieces, marks, options, OTHER_TAGS)))


def confidence_odds(question: str, work: Trace, folder: str = "") -> Script[Odds]:
    """The log-odds that the student, solving, would write anything else than each step, from one prefill.

    A well calibrated student is wrong as often as it would write something else.
    """
    pieces = tuple(step_pieces(work.steps))
    options = tuple((text, None) for text in pieces[::2])
    marks = tuple(range(-1, len(pieces) - 1, 2))
    written = yield from _odds(ScoreRequest(prompts.solve_messages(question, folder), pieces, marks, options))
    return tuple(-value for value in written)


def _odds(request: ScoreRequest) -> Script[Odds]:
    scores = (yield request) if request.marks else None
    odds = scores.log_odds if isinstance(scores, Scores) else ()
    return () if any(map(math.isnan, odds)) else odds


def read_odds(
    question: str,
    attempt: Trace,
    folder: str = "",
    weights: Sequence[float] = (0.0, 1.0),
    rewritten: Collection[int] | None = None,
) -> Script[tuple[Odds, Odds]]:
    """The log-odds of review and confidence of the steps of an attempt; zeros for one that none of `weights` uses.

    A correction is not what a student writes as it solves. So steps that are `rewritten` (default: those that the attempt
    corrects) have the review's log-odds in both.
    """
    work, unread = corrected(attempt), (0.0,) * len(attempt.steps)
    rewritten = corrected_steps(attempt) if rewritten is None else rewritten
    decides = min(weights) < 1 or rewritten
    review = (yield from review_odds(question, work, folder)) if decides else unread
    confidence = (yield from confidence_odds(question, work, folder)) if any(weights) else unread
    pairs = enumerate(zip(review, confidence, strict=False), 1)
    return review, tuple(r if n in rewritten else c for n, (r, c) in pairs)


def pool(review: Odds, confidence: Odds, weight: float) -> Odds:
    """The weighted mean of two log-odds for each step (a logarithmic opinion pool); empty if either is."""
    return tuple((1 - weight) * r + weight * c for r, c in zip(review, confidence, strict=False))


class Cutoff(NamedTuple):
    """When to correct a step: the threshold on its log-odds, and the weight of the confidence in them."""

    threshold: float = 0.0
    confidence_weight: float = 0.0

    @classmethod
    def of(cls, review: Review) -> Cutoff:
        """What a configuration sets by hand; 0 for what it leaves open."""
        return cls(review.threshold or 0.0, review.confidence_weight or 0.0)
