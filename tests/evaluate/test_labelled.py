"""What a review finds in labelled work: figures by hand, unknown reviews, and the table."""

import math

import pytest

from sclite.config import Config
from sclite.evaluate.evaluate import measure_labelled
from sclite.inspect.summaries import print_results
from sclite.run import Run
from sclite.student.base import Scores
from sclite.student.self_correction import NEVER
from sclite.student.step_scores import Cutoff
from sclite.trace import Step, Trace
from tests.toy import ScriptedStudent

ODDS = {"a": -1.0, "b": 2.0, "c": 1.0, "too long": math.nan}
WORKS = [
    *(("q", Trace((Step(first), Step("b"))), 2) for first in ("a", "c")),
    ("q", Trace((Step("a"), Step("a"))), 0),
    ("q", Trace((Step("c"),)), 0),
]


class Reviewer(ScriptedStudent):
    """Scores each step by its text."""

    def score(self, requests):
        for i, request in enumerate(requests):
            texts = [request.pieces[mark].partition(">")[2].strip() for mark in request.marks]
            yield Scores(i, tuple(ODDS[text] for text in texts))


def test_shares_of_located_and_accepted_work(capsys, monkeypatch):
    """One of two wrong works is flagged at its label, one of two right ones not at all; wrong steps score highest."""
    figures = measure_labelled(Config(), Reviewer(), WORKS, Cutoff(0.0))
    expected = {"n": 4, "unknown": 0, "location": 0.5, "acceptance": 0.5, "location_f1": 0.5, "auc": 1.0}
    assert {name: figures[name] for name in expected} == expected
    summary = {"models": {}, "labelled": {"dpo": figures}, "n": 0, "notes": [], "folder": "eval/p"}
    monkeypatch.setenv("COLUMNS", "120")
    print_results(Run("run"), summary)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "dpo" in line)
    assert (row.split()[:3], row.split()[-1]) == (["dpo", "4", "50.0"], "1.000")


@pytest.mark.parametrize(("threshold", "located", "accepted"), [(NEVER, None, None), (1.5, 1.0, 1.0)])
def test_the_threshold_decides(threshold, located, accepted):
    figures = measure_labelled(Config(), Reviewer(), WORKS, Cutoff(threshold))
    assert (figures["location"], figures["acceptance"]) == (located, accepted)


def test_work_that_is_too_long_to_review_is_unknown():
    work = ("q", Trace((Step("too long"),)), 1)
    figures = measure_labelled(Config(), Reviewer(), [*WORKS, work], Cutoff(0.0))
    assert (figures["n"], figures["unknown"], figures["location"]) == (4, 1, 0.5)
