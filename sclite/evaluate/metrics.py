"""Evaluation metrics: accuracy before and after review, and the quality of the step scores."""

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import Field

from sclite.records import Row
from sclite.trace import Trace, parse


class Outcome(Row):
    """One model's result on one problem. None means unknown: a failed call, a timeout, a grader error.

    If review changes nothing, `correct2` is `correct1`; `accused` is the flagged step. `true_step` None with
    `true_known`: no step is wrong. `step_labels` end at the first wrong step: one that follows from it is neither right
    nor wrong. `tokens1` and `tokens2` count generated tokens, `prefill1` and `prefill2` computed prompt tokens.
    """

    id: str
    question: str
    gold: str
    first: str
    second: str | None
    correct1: bool | None
    correct2: bool | None
    accused: int | None = Field(None, ge=1)
    cause: str | None = None
    correction: str | None = None
    true_step: int | None = Field(None, ge=1)
    true_known: bool = False
    step_scores: tuple[float, ...] = ()
    step_labels: tuple[bool, ...] = ()
    format_ok: bool
    cut: bool = False
    tokens1: int = 0
    tokens2: int = 0
    prefill1: int = Field(0, exclude=True)  # depends on the cache, so it is not written
    prefill2: int = Field(0, exclude=True)
    note: str = ""

    @cached_property
    def work(self) -> Trace:
        """The steps and the answer of the first answer."""
        return parse(self.first).work

    @cached_property
    def revised(self) -> Trace:
        """The solution after review; empty if review has changed nothing."""
        return parse(self.second or "").trace


def compute_metrics(outcomes: Sequence[Outcome], bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """All figures of one model, ready for JSON; undefined figures are None.

    Outcomes with an unknown answer are excluded and counted in `unknown`; `n` counts the rest. Over n: acc_t1, acc_t2,
    difference, wrong_to_right, right_to_wrong, format_validity, tokens. Over subsets: location (labelled wrong work
    whose first wrong step is flagged), acceptance (right work where nothing is flagged), location_f1 (their harmonic
    mean: ProcessBench, arXiv 2412.06559), correction_rate_own (corrected, among wrong answers whose step was located),
    auc. A lucky answer after a wrong step is wrong work.

    Each share has a 95 % interval: percentiles over `bootstrap` resamples of the problems; a share of 0 or 1, which
    cannot vary between resamples, gets the exact binomial one (Clopper-Pearson). `mcnemar_p` is exact and two-sided.
    """
    known = [o for o in outcomes if o.correct1 is not None and o.correct2 is not None]
    n = len(known)

    def array(values: Iterable[bool]) -> np.ndarray:
        return np.fromiter(values, float, n)

    first, second = array(bool(o.correct1) for o in known), array(bool(o.correct2) for o in known)
    labelled = array(o.true_known and o.true_step is not None for o in known)
    located = labelled * array(o.accused == o.true_step for o in known)
    right, every, correctable = first * (1 - labelled), np.ones(n), located * (1 - first)
    shares = {  # what each problem adds to the numerator, and to the denominator
        "acc_t1": (first, every),
        "acc_t2": (second, every),
        "difference": (second - first, every),
        "wrong_to_right": (second * (1 - first), every),
        "right_to_wrong": (first * (1 - second), every),
        "format_validity": (array(o.format_ok for o in known), every),
        "location": (located, labelled),
        "acceptance": (right * array(o.accused is None for o in known), right),
        "correction_rate_own": (correctable * second, correctable),
    }
    gained, spoiled = int((second > first).sum()), int((first > second).sum())
    assert int(second.sum() - first.sum()) == gained - spoiled
    samples = np.zeros((bootstrap, n))  # how often each resample draws each problem
    if n:
        samples += np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), bootstrap)
    figures: dict[str, Any] = {"n": n, "unknown": len(outcomes) - n, "cut": sum(o.cut for o in known)}
    drawn = {}
    for name, (part, whole) in shares.items():
        figures[name] = float(part.sum() / whole.sum()) if whole.sum() else None
        with np.errstate(invalid="ignore"):  # NaN in resamples where it is undefined
            drawn[name] = (samples @ part) / (samples @ whole)
        figures[f"{name}_interval"] = _interval(drawn[name])
        if figures[name] in (0, 1) and name != "difference":
            edge = float(0.025 ** (1 / whole.sum()))
            figures[f"{name}_interval"] = [edge, 1.0] if figures[name] else [0.0, 1 - edge]
    if n and not gained + spoiled:
        most = figures["wrong_to_right_interval"][1]
        figures["difference_interval"] = [-most, most]
    both = figures["location"], figures["acceptance"]
    figures["location_f1"] = None if None in both else float(_harmonic_mean(*both))
    figures["location_f1_interval"] = _interval(_harmonic_mean(drawn["location"], drawn["acceptance"]))
    changed = gained + spoiled
    tail = sum(math.comb(changed, k) for k in range(min(gained, spoiled) + 1))
    figures["mcnemar_p"] = min(1.0, 2 * tail / 2**changed) if n else None
    steps = [pair for o in known for pair in zip(o.step_scores, o.step_labels, strict=False)]
    figures["auc"] = auc([score for score, _ in steps], [wrong for _, wrong in steps])
    spent = {
        "tokens": [o.tokens1 + o.tokens2 for o in known],
        "tokens_first": [o.tokens1 for o in known],
        "prefill": [o.prefill1 + o.prefill2 for o in known],
        "prefill_first": [o.prefill1 for o in known],
    }
    return figures | {name: sum(each) / n if n else None for name, each in spent.items()}


def compare_outcomes(
    outcomes: Sequence[Outcome], others: Sequence[Outcome], answer: Literal["correct1", "correct2"]
) -> dict[str, Any]:
    """How much more often a student is right than another one, on the n questions that both answered.

    `this` and `other` are the shares of right answers, `only_this` and `only_other` those of answers that only one has
    right; interval and p-value are those of `compute_metrics`.
    """
    verdicts = {outcome.question: getattr(outcome, answer) for outcome in others}
    pairs = [
        outcome.model_copy(
            update={"correct1": verdicts[outcome.question], "correct2": getattr(outcome, answer)}
        )
        for outcome in outcomes
        if outcome.question in verdicts
    ]
    figures, shares = compute_metrics(pairs), ("acc_t2", "acc_t1", "wrong_to_right", "right_to_wrong")
    named = zip(("this", "other", "only_this", "only_other"), shares, strict=True)
    same = ("difference", "difference_interval", "mcnemar_p", "n", "unknown")
    return {name: figures[key] for name, key in named} | {key: figures[key] for key in same}


def auc(scores: Sequence[float], wrong: Sequence[bool]) -> float | None:
    """The probability that a wrong step scores above a right one, ties counting half; None if a class is missing."""
    values, bad = np.array(scores, float), np.array(wrong, bool)
    right, found = np.sort(values[~bad]), values[bad]
    if not len(right) or not len(found):
        return None
    twice = np.searchsorted(right, found, "left") + np.searchsorted(right, found, "right")
    return float(twice.sum() / (2 * len(right) * len(found)))


def _harmonic_mean(a: float | np.ndarray, b: float | np.ndarray) -> np.ndarray:
    """2ab / (a + b), elementwise; 0 if both are 0."""
    total = np.asarray(a + b)
    return np.where(total == 0, 0.0, 2 * a * b / np.where(total == 0, 1, total))


def _interval(values: np.ndarray) -> list[float] | None:
    """The 2.5 and 97.5 percentiles over the resamples in which the figure is defined."""
    values = values[~np.isnan(values)]
    return [float(v) for v in np.percentile(values, (2.5, 97.5))] if len(values) else None
