"""The score of a step: the log-odds that it is wrong, from the student's review and from its confidence while solving."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sclite import prompts
from sclite.student.base import ScoreRequest
from sclite.trace import CAUSE, OTHER_TAGS, Trace, corrected, corrected_steps, render, step_pieces

if TYPE_CHECKING:
    from sclite.config import Review
    from sclite.student.self_correction import Script

Odds = tuple[float, ...]
"""The log-odds (nats) that each step is wrong; empty without steps, or if they are too long to score."""


def read_odds(
    question: str,
    attempt: Trace,
    folder: str = "",
    weights: Sequence[float] = (0.0, 1.0),
    rewritten: Collection[int] | None = None,
) -> Script[tuple[Odds, Odds]]:
    """The log-odds of review and confidence of the steps of an attempt, one prefill each; zeros for one that no weight uses.

    The review decides at the end of each step: `<Cause>` or the closing tag. Confidence compares each step with anything
    else that the student might write while solving: if well calibrated, it is wrong as often as it would write something
    else. A correction is not written while solving, so steps that are `rewritten` (default: those that the attempt
    corrects) have the review's log-odds in both.
    """
    work = corrected(attempt)
    pieces = tuple(step_pieces(work.steps))
    review = confidence = (0.0,) * len(work.steps)
    rewritten = corrected_steps(attempt) if rewritten is None else rewritten
    if pieces and (min(weights) < 1 or rewritten):
        messages = prompts.review_messages(question, render(work), folder)
        marks, decisions = tuple(range(0, len(pieces), 2)), tuple((CAUSE, closer) for closer in pieces[1::2])
        review = (yield ScoreRequest(messages, pieces, marks, decisions, OTHER_TAGS)).log_odds
    if pieces and any(weights):
        messages = prompts.solve_messages(question, folder)
        marks, written = tuple(range(-1, len(pieces) - 1, 2)), tuple((text, None) for text in pieces[::2])
        found = yield ScoreRequest(messages, pieces, marks, written)
        confidence = tuple(-value for value in found.log_odds)
    # NaN: too long to score
    review, confidence = (() if any(map(math.isnan, odds)) else odds for odds in (review, confidence))
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
        """The configured values; 0 where none is set."""
        return cls(review.threshold or 0.0, review.confidence_weight or 0.0)
