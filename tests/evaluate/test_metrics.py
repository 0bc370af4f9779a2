"""Evaluation metrics: values computed by hand, and properties of any outcomes."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sclite.evaluate.metrics import Outcome, auc, compare_outcomes, compute_metrics

VERDICTS = st.sampled_from([True, False, None])


def outcome(correct1, correct2, number=0, **more):
    base = {"id": f"p{number}", "question": "1 + 1?", "gold": "2", "first": "2", "second": None}
    return Outcome(**base | {"correct1": correct1, "correct2": correct2, "format_ok": True} | more)


def outcomes(*verdicts):
    return [outcome(*pair, number=k) for k, pair in enumerate(verdicts)]


def test_gains_and_losses_are_shares_of_all_problems():
    rows = outcomes((True, True), (True, False), (False, True), (False, True), (False, False))
    expected = {"n": 5, "acc_t1": 0.4, "acc_t2": 0.6, "wrong_to_right": 0.4, "right_to_wrong": 0.2}
    expected |= {"difference": 0.2, "mcnemar_p": 1.0}  # 2 against 1
    figures = compute_metrics(rows)
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_students_are_compared_on_the_questions_that_both_answered():
    """By hand: of four shared questions one is unknown, two are right here only and none there only: p = 2 / 2**2."""
    mine = [
        outcome(False, right, n, question=f"{n}?") for n, right in enumerate((True, True, True, None, True))
    ]
    theirs = [outcome(True, right, n, question=f"{n}?") for n, right in enumerate((False, True, False, True))]
    found = compare_outcomes(mine, theirs[::-1], "correct2")
    expected = {"this": 1, "other": 1 / 3, "only_this": 2 / 3, "only_other": 0, "difference": 2 / 3}
    expected |= {"n": 3, "unknown": 1, "mcnemar_p": 0.5}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert compare_outcomes(mine, theirs, "correct1")["difference"] == -1


def test_unknown_outcome_is_not_a_wrong_answer():
    figures = compute_metrics(outcomes((True, True), (None, True), (True, None), (None, None)))
    assert (figures["n"], figures["unknown"]) == (1, 3)
    assert figures["acc_t1"] == figures["acc_t2"] == 1.0
    assert figures["right_to_wrong"] == 0.0
    failed_review = [outcome(True, None, 0), outcome(True, False, 1, accused=1)]
    assert compute_metrics(failed_review)["acceptance"] == 0.0
    rows = [outcome(True, True, 0, tokens1=10, tokens2=4, prefill1=7, cut=True)]
    rows += [outcome(None, None, 1, format_ok=False, tokens1=99, prefill1=88, cut=True)]
    figures = compute_metrics(rows)
    assert (figures["tokens"], figures["format_validity"], figures["cut"]) == (14.0, 1.0, 1)
    assert (figures["tokens_first"], figures["prefill_first"]) == (10.0, 7.0)


def test_no_change_in_few_answers_does_not_prove_that_review_changes_nothing():
    figures = compute_metrics(outcomes(*[(True, True)] * 60, *[(False, False)] * 40))
    most = 1 - 0.025 ** (1 / 100)  # Clopper-Pearson's bound for 0 of 100
    assert figures["difference"] == 0.0
    assert figures["difference_interval"] == pytest.approx([-most, most])


def test_undefined_figures_are_none_and_not_zero():
    figures = compute_metrics([])
    assert (figures.pop("n"), figures.pop("unknown"), figures.pop("cut")) == (0, 0, 0)
    assert set(figures.values()) == {None}
    figures = compute_metrics(outcomes((True, True)))
    assert figures["acceptance"] == 1.0
    assert figures["auc"] is None
    for name in ("location", "location_f1", "correction_rate_own"):
        assert figures[name] is None
        assert figures[f"{name}_interval"] is None


def test_location_and_acceptance_follow_the_labels():
    rows = [
        outcome(False, True, 0, accused=2, true_step=2, true_known=True),  # located and fixed
        outcome(False, False, 1, accused=3, true_step=3, true_known=True),  # located
        outcome(False, True, 2, accused=1, true_step=2, true_known=True),  # fixed, but at another step
        outcome(False, False, 3, true_step=1, true_known=True),  # missed
        outcome(False, False, 4, accused=1),  # the wrong step is unknown
        outcome(True, True, 5, true_known=True),  # accepted
        outcome(True, True, 6),  # accepted
        outcome(True, False, 7, accused=1),  # flagged without cause
    ]
    figures = compute_metrics(rows)
    f1 = 2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3)
    expected = {"location": 2 / 4, "acceptance": 2 / 3, "location_f1": f1, "correction_rate_own": 1 / 2}
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    # labels decide what is wrong work
    lucky = compute_metrics([outcome(True, True, accused=2, true_step=2, true_known=True)])
    assert (lucky["location"], lucky["acceptance"], lucky["correction_rate_own"]) == (1.0, None, None)
    right_steps = compute_metrics([outcome(False, False, true_known=True)])
    assert (right_steps["location"], right_steps["acceptance"]) == (None, None)


def test_auc_uses_only_labelled_scores():
    rows = [outcome(False, False, 0, step_scores=(-1.0, 2.0, 9.0), step_labels=(False, True))]
    rows += [outcome(True, True, 1, step_scores=(2.0, -3.0), step_labels=(False, False))]
    assert compute_metrics(rows)["auc"] == pytest.approx((1 + 0.5 + 1) / 3)


def test_intervals_match_the_binomial_and_depend_only_on_the_seed():
    figures = compute_metrics(outcomes(*[(True, True)] * 300, *[(False, True)] * 200), bootstrap=2000)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 500)
    assert figures["acc_t1_interval"] == pytest.approx([0.6 - half, 0.6 + half], abs=0.006)
    assert figures["difference_interval"] == pytest.approx([0.4 - half, 0.4 + half], abs=0.006)
    figures = compute_metrics(outcomes(*[(True, True)] * 20))
    assert figures["right_to_wrong_interval"] == pytest.approx([0.0, 0.16843], abs=1e-5)  # Clopper-Pearson
    assert figures["acc_t2_interval"] == pytest.approx([0.83157, 1.0], abs=1e-5)
    rows = outcomes(*[(True, True), (False, True), (False, False)] * 20)
    assert compute_metrics(rows, seed=0) == compute_metrics(rows, seed=0) != compute_metrics(rows, seed=1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(VERDICTS, VERDICTS), max_size=30))
def test_difference_is_gains_minus_losses(verdicts):
    figures = compute_metrics(outcomes(*verdicts), bootstrap=20)
    assert figures["n"] + figures["unknown"] == len(verdicts)
    json.dumps(figures, allow_nan=False)
    if figures["n"]:
        gained, spoiled = figures["wrong_to_right"], figures["right_to_wrong"]
        assert figures["difference"] == pytest.approx(gained - spoiled)
        assert figures["difference"] == pytest.approx(figures["acc_t2"] - figures["acc_t1"])
        for name in ("acc_t1", "acc_t2", "wrong_to_right", "right_to_wrong"):
            low, high = figures[f"{name}_interval"]
            assert 0 <= low <= high <= 1


SPLIT = st.tuples(st.lists(st.integers(-9, 9), min_size=1), st.lists(st.integers(-9, 9), min_size=1))


@given(SPLIT)
def test_auc_is_the_share_of_pairs_in_order(split):
    good, bad = split
    pairs = [(b > g) + (b == g) / 2 for b in bad for g in good]
    wrong = [False] * len(good) + [True] * len(bad)
    assert auc(good + bad, wrong) == pytest.approx(sum(pairs) / len(pairs))
    for one_class in ([], [True, True], [False]):
        assert auc([0.0] * len(one_class), one_class) is None


@pytest.mark.parametrize(
    ("gained", "spoiled", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (8, 1, 20 / 512), (1, 8, 20 / 512)]
)
def test_mcnemar_is_the_exact_binomial(gained, spoiled, p):
    rows = outcomes((True, True), *[(False, True)] * gained, *[(True, False)] * spoiled)
    assert compute_metrics(rows, bootstrap=0)["mcnemar_p"] == pytest.approx(p)
    rows = outcomes(*[(False, True)] * 2100, *[(True, False)] * 1900)  # so many do not overflow
    assert 0 < compute_metrics(rows, bootstrap=0)["mcnemar_p"] < 0.01
