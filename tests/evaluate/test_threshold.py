"""The review threshold: its fit, which corrections are tried, and what is stored for a GGUF."""

import itertools
import json
import math
import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sclite.config import Config
from sclite.context import Context
from sclite.evaluate import threshold
from sclite.evaluate.answers import Answer
from sclite.evaluate.threshold import FILE, MIN_PROBLEMS, FittedThreshold, ensure_threshold, fit_threshold
from sclite.evaluation import held_out
from sclite.progress import ProgressDisplay
from sclite.records import Problem
from sclite.run import Run
from sclite.student.base import Reply
from sclite.student.self_correction import NEVER, SAME_RESULT, Reviewed
from sclite.student.step_scores import Cutoff
from sclite.trace import Trace, parse
from tests.toy import SameVerdict, ScriptedStudent, write_rows

NONE = "no threshold corrects more answers than it spoils"
VERDICTS = st.sampled_from([True, False, None])


def scored(correct, scores, corrected, number=0):
    """A trial; `corrected` has the outcome for each step, None if unknown."""
    problem = Problem(id=f"p{number}", question="1 + 1?", answer="2")
    return threshold.Trial(problem, Trace(), correct, scores, scores, results=dict(enumerate(corrected, 1)))


@pytest.mark.parametrize(
    ("n", "max_harm", "count"),
    [
        (50, 0.005, 1),
        (200, 0.005, 1),
        (201, 0.005, 2),
        (318, 0.01, 4),
        (300, 0.01, 3),
        (100, 0.07, 7),
        (9, 0, 0),
        (9, 1, 9),
    ],
)
def test_harm_is_at_most_the_configured_share_rounded_up(n, max_harm, count):
    assert threshold.most_spoiled(n, max_harm) == count


def rows_of(**counts):
    """Rows of one step with the score 1: so many spoiled, fixed and untouched answers, with higher scores for the first."""
    kinds = {"spoiled": (True, 2.0, False), "fixed": (False, 1.0, True), "right": (True, -1.0, True)}
    rows = [kinds[kind] for kind, count in counts.items() for _ in range(count)]
    return [scored(right, (score,), (result,), k) for k, (right, score, result) in enumerate(rows)]


def test_the_cost_of_the_bound_is_shown_and_too_much_harm_turns_review_off():
    surest = [scored(False, (3.0,), (True,), k) for k in range(1000, 1010)]
    fitted = fit_threshold([*surest, *rows_of(spoiled=6, fixed=40, right=344)], 0.005)  # 6 of 400
    assert (fitted.threshold, fitted.acc_t2, fitted.right_to_wrong) == (2.5, 0.9, 0.0)
    assert (fitted.best_threshold, fitted.best_right_to_wrong) == (0.0, 0.015)
    assert fitted.best_acc_t2 == pytest.approx(0.985)
    done, best = fitted.summary.split("; ")
    assert done == "2.50 fitted on 400 problems: 87.5 → 90.0 % right, 0.0 % spoiled"
    assert best == "0.00 would reach 98.5 % and spoil 1.5 %, more than review.max_harm (0.5 %) allows"
    fitted = fit_threshold(rows_of(spoiled=2, fixed=40, right=358), 0.005)
    assert (fitted.threshold, fitted.right_to_wrong, fitted.wrong_to_right) == (0.0, 0.005, 0.1)
    assert fitted.given_up == ""
    fitted = fit_threshold(rows_of(spoiled=3, fixed=40, right=357), 0.005)
    assert (fitted.threshold, fitted.acc_t1, fitted.acc_t2) == (None, 0.9, 0.9)
    limit = "with at most 0.5 % spoiled (review.max_harm)"
    assert fitted.off == f"on the 400 problems used for the fit, {NONE}, {limit}"


def test_unknown_results_count_as_the_worse_outcome_or_not_at_all():
    spoils = [scored(True, (9.0,), (None,)), scored(False, (5.0,), (True,)), scored(False, (5.0,), (True,))]
    fitted = fit_threshold(spoils, 1.0)
    assert (fitted.right_to_wrong, fitted.assumed) == (pytest.approx(1 / 3), 1)
    fitted = fit_threshold([scored(False, (5.0,), (None,))], 1.0)
    assert (fitted.threshold, fitted.accused, fitted.best_threshold) == (None, 0, None)
    assert fitted.off == f"on the 1 problems used for the fit, {NONE}"
    fitted = fit_threshold([scored(None, (1.0,), (True,)), scored(True, (), ())], 0.0)
    assert (fitted.problems, fitted.n, fitted.acc_t2) == (2, 1, 1.0)
    fitted = fit_threshold([scored(None, (1.0,), (True,))], 0.5)
    assert (fitted.threshold, fitted.acc_t1) == (None, None)
    assert fitted.off == "no fitting problem has a known outcome"


def replay(trials, at):
    """Apply a threshold step by step: (right at turn 2, spoiled, flagged steps)."""
    right = harm = 0
    accused = [next((k for k, score in enumerate(t.scores, 1) if score > at), None) for t in trials]
    for trial, step in zip(trials, accused, strict=True):
        verdict = trial.correct if step is None else trial.results[step] is True
        right += verdict
        harm += trial.correct and not verdict
    return right, harm, accused


STEPS = st.lists(st.tuples(st.integers(-4, 4), VERDICTS), max_size=4)
PROBLEMS = st.lists(st.tuples(VERDICTS, STEPS), max_size=7)
GRID = [-NEVER, *(k / 2 for k in range(-9, 10)), NEVER]  # the scores are integers: this covers every policy


@settings(max_examples=300, deadline=None)
@given(PROBLEMS, st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_fitted_threshold_is_as_good_as_the_best_allowed_one(problems, limit):
    columns = [zip(*steps, strict=True) if steps else ((), ()) for _, steps in problems]
    rows = [scored(problems[k][0], *column, k) for k, column in enumerate(columns)]
    fitted = fit_threshold(rows, limit)
    known = [row for row in rows if row.correct is not None]
    if not known:
        return
    n, before = len(known), sum(row.correct for row in known)
    tried = [replay(known, at)[:2] for at in GRID]
    assert max(fitted.best_acc_t2, fitted.acc_t1) == pytest.approx(max(right for right, _ in tried) / n)
    best = max(right for right, harm in tried if harm <= threshold.most_spoiled(n, limit))
    assert (fitted.threshold is None) is (best == before)
    if fitted.threshold is not None:
        right, harm, accused = replay(known, fitted.threshold)
        assert before < right
        assert best - right <= 1.645 * math.sqrt(n)
        assert harm <= threshold.most_spoiled(n, limit)
        found = (fitted.acc_t1 * n, fitted.acc_t2 * n, fitted.right_to_wrong * n, fitted.accused)
        assert found == pytest.approx((before, right, harm, sum(step is not None for step in accused)))
    json.dumps(fitted.model_dump(), allow_nan=False)


def test_middle_of_equal_thresholds_is_taken_even_if_it_rounds_to_a_neighbour():
    """Fixed answers score 1 to 9, spoiled ones -9 to -1: 9 are gained at 0, and one less with each score on either side.

    A difference of 2 of 2 answers is within 1.645 * sqrt(2) = 2.3, one of 3 of 3 is beyond 1.645 * sqrt(3) = 2.8. So the
    thresholds from -2.5 to 2.5 are as good as 0; with a harm of none, those from 0 to 2.5 are.
    """
    rows = [scored(False, (float(score),), (True,), score) for score in range(1, 10)]
    rows += [scored(True, (float(-score),), (False,), 100 + score) for score in range(1, 10)]
    assert fit_threshold(rows, 1.0).threshold == 0.0
    assert fit_threshold(rows, 0.0).threshold == 1.5
    # a midpoint that rounds to its neighbour is judged as used
    for first, second in itertools.permutations([1.0, math.nextafter(1.0, 2)]):
        rows = [scored(False, (first,), (True,), 0), scored(True, (second,), (False,), 1)]
        fitted = fit_threshold(rows, 0.0)
        at = NEVER if fitted.threshold is None else fitted.threshold
        assert replay(rows, at)[:2] == (round(fitted.acc_t2 * 2), 0)


MANY = [Problem(id=f"p{n}", question=f"question {n}", answer="1") for n in range(200)]


class Known:
    """Simulates student, reviews and grader: three step scores per problem and the result of correcting each.

    A wrong answer has one wrong step, which scores `lead` above the others; only correcting that step is right.
    """

    def __init__(self, monkeypatch, run, gguf, lead: float):
        self.run, self.gguf = run, gguf
        draw = random.Random(0)
        self.correct = [draw.random() < 0.7 for _ in MANY]
        self.wrong_step = [None if right else draw.randrange(3) for right in self.correct]
        leads = [[lead * (step == wrong) for step in range(3)] for wrong in self.wrong_step]
        self.scores = [tuple(draw.gauss(0, 1) + each for each in row) for row in leads]
        self.tried: list[tuple[int, int]] = []
        self.solved = 0
        monkeypatch.setattr(threshold, "solve_problems", self.solve)
        twice = lambda question, *_: (self.scores[self.number(question)],) * 2  # noqa: E731
        monkeypatch.setattr(threshold, "read_odds", twice)
        monkeypatch.setattr(threshold, "run_together", lambda _, scripts: scripts)
        monkeypatch.setattr(threshold, "correct_steps", self.correct_steps)
        monkeypatch.setattr(threshold, "grade", lambda _, answers, __: [each == "right" for each in answers])

    @staticmethod
    def number(question: str) -> int:
        return int(question.split()[1])

    def solve(self, _, problems, *__):
        self.solved += len(problems)
        reply, parsed = Reply(0, "", 0, 0, "stop"), parse("")
        return [Answer(each, reply, parsed, self.correct[self.number(each.question)]) for each in problems]

    def fixes(self, number: int, step: int) -> bool:
        return self.wrong_step[number] == step - 1

    def correct_steps(self, _, cases, __):
        found = []
        for question, _, step in cases:
            self.tried.append((self.number(question), step))
            answer = "right" if self.fixes(*self.tried[-1]) else "wrong"
            found.append(Reviewed(Trace(answer=answer), accused=step))
        return found

    def fit(self, max_harm=0.005, problems=MANY) -> FittedThreshold:
        self.run.path(FILE).unlink(missing_ok=True)
        config = Config.model_validate({"review": {"max_harm": max_harm}})
        fitted = ensure_threshold(config, self.run, self.gguf, self, problems, None)
        return fitted.model_copy(update={"confidence_weight": 0.0})

    def by_trying_everything(self, max_harm: float) -> FittedThreshold:
        results = [tuple(self.fixes(i, step) for step in (1, 2, 3)) for i in range(len(MANY))]
        rows = zip(self.correct, self.scores, results, strict=True)
        return fit_threshold([scored(*row, number=i) for i, row in enumerate(rows)], max_harm)

    @property
    def share_tried(self) -> float:
        return len({number for number, _ in self.tried}) / self.solved


@pytest.fixture
def known_with(monkeypatch, run, gguf):
    """Known students by their `lead`."""
    return partial(Known, monkeypatch, run, gguf)


@pytest.mark.parametrize(
    ("review", "confidence", "weight"),
    [
        ([1.0, 2.0, 3.0, 9.0], [9.0, 2.0, 3.0, 1.0], 0.0),
        ([4.0, 2.0, 1.0, 9.0], [1.0, 2.0, 5.0, 1.0], 0.5),  # 2.5, 2.0, 3.0
        ([1.0, 2.0, 3.0, 0.0], [1.0, 2.0, 3.0, 0.0], 0.5),  # no worse than the review alone
    ],
)
def test_weight_of_the_confidence_ranks_fixed_answers_above_spoiled_ones(review, confidence, weight):
    """Correcting the second step spoils two answers, fixes one and leaves one unchanged. First steps score lower."""
    results = [(True, False), (True, False), (False, True), (False, False)]
    trials = [scored(right, (), (None, result)) for right, result in results]
    for trial, *last in zip(trials, review, confidence, strict=True):
        trial.review, trial.confidence = ((-9.0, score) for score in last)
    assert threshold.choose_weight(trials, threshold.WEIGHTS) == weight
    unknown = [scored(None, (1.0,), (True,)), scored(True, (), ()), scored(True, (1.0,), (None,)), trials[2]]
    assert threshold.choose_weight(unknown, threshold.WEIGHTS) == 0.5  # nothing is spoiled


@pytest.mark.parametrize("given", [None, 0.25])
def test_a_fit_chooses_the_weight_of_the_confidence_unless_it_is_set(known_with, monkeypatch, given):
    """The review contradicts the confidence, which is right."""
    known, asked = known_with(5.0), []

    def read_odds(question, work, folder, weights):
        asked.append(weights)
        confidence = known.scores[known.number(question)]
        return tuple(-score for score in confidence), tuple(3 * score for score in confidence)

    monkeypatch.setattr(threshold, "read_odds", read_odds)
    config = Config.model_validate({"review": {"confidence_weight": given}})
    fitted = ensure_threshold(config, known.run, known.gguf, known, MANY, None)
    weights = [0.0, 0.5] if given is None else [given]
    assert asked == [weights] * 200
    assert threshold.load_threshold(config, known.run, known.gguf) == fitted
    for other in (0.5, None if given else 0):
        config = Config.model_validate({"review": {"confidence_weight": other}})
        assert threshold.load_threshold(config, known.run, known.gguf) is None
    if given is None:
        expected = Cutoff(known.by_trying_everything(0.005).threshold, 0.5)
        assert fitted.cutoff == pytest.approx(expected)
        said = f"{expected.threshold:.2f}, confidence weight 0.5, fitted on 200 problems"
        assert fitted.summary.startswith(said)
    else:
        assert (fitted.cutoff, fitted.confidence_weight) == (None, given)


@pytest.mark.parametrize("lead", [1.5, 3.0, 5.0])
@pytest.mark.parametrize("max_harm", [0.005, 0.03])
def test_threshold_equals_that_of_trying_every_step(known_with, lead, max_harm):
    known = known_with(lead)
    assert known.fit(max_harm) == known.by_trying_everything(max_harm)
    assert len(known.tried) < 0.75 * 3 * len(MANY)
    assert len(set(known.tried)) == len(known.tried)


@pytest.mark.parametrize("spoils", [True, False])
def test_fit_stops_after_two_blocks_that_fix_no_more_than_they_spoil(known_with, monkeypatch, spoils):
    known = known_with(-1.0)
    monkeypatch.setattr(known, "fixes", lambda number, _: known.correct[number] and not spoils)
    assert known.fit().threshold is None
    assert known.share_tried == pytest.approx(2 * threshold.BLOCK)


def test_fit_stops_at_its_share(known_with):
    known = known_with(8.0)
    known.correct = [False] * len(MANY)
    known.wrong_step = [number % 3 for number in range(len(MANY))]
    known.fit(max_harm=1.0)
    assert known.share_tried == pytest.approx(threshold.MAX_SHARE)


def test_blocks_without_a_wrong_answer_do_not_stop_the_fit(known_with):
    """The highest scores belong to right answers that stay right: nothing to fix, and nothing spoiled."""
    known = known_with(8.0)
    surest = [i for i, right in enumerate(known.correct) if right][::3]
    for i in surest:
        known.scores[i] = (20.0 + i / 1000, 0.0, 0.0)
    fixes = known.fixes
    known.fixes = lambda number, step: number in surest or fixes(number, step)
    assert len(surest) > 2 * threshold.BLOCK * len(MANY)
    assert known.fit(0.01).wrong_to_right == known.by_trying_everything(0.01).wrong_to_right > 0.1


def test_correction_that_changes_nothing_neither_spoils_nor_fixes(known_with, monkeypatch):
    known = known_with(8.0)
    same = [Reviewed(accused=1, note=SAME_RESULT), Reviewed(note="no answer after the correction")]

    def unchanged(student, cases, settings):
        return [same[i % 2] for i, _ in enumerate(cases)]

    monkeypatch.setattr(threshold, "correct_steps", unchanged)
    fitted = known.fit(0.01)
    assert (fitted.threshold, fitted.wrong_to_right, fitted.right_to_wrong) == (None, 0.0, 0.0)


def test_too_few_problems_or_verdicts_fit_no_threshold(known_with):
    known = known_with(3.0)
    few = known.fit(problems=MANY[: MIN_PROBLEMS - 1])
    assert (few.threshold, few.problems, known.solved) == (None, 49, 0)
    assert few.off == "49 problems are too few to fit the threshold (50 needed)"
    assert known.fit(problems=MANY[:MIN_PROBLEMS]).n == 50
    known.correct[:50] = [None] * 49 + [True]
    assert known.fit(problems=MANY[:60]).off == "only 11 of 60 answers to fitting problems could be graded"


def fitted_on(problems, at=1.0, max_harm=0.005):
    return FittedThreshold(threshold=at, problems=problems, max_harm=max_harm)


@pytest.mark.parametrize(
    ("problems", "count", "kept"), [(60, 60, True), (59, 60, False), (60, MIN_PROBLEMS - 1, True)]
)
def test_a_stored_fit_is_kept_if_as_many_problems_fitted_it(run, gguf, problems, count, kept):
    stored = threshold.store_threshold(Config(), run, gguf, fitted_on(problems))
    student = ScriptedStudent("the answer is 1")
    found = ensure_threshold(Config(), run, gguf, student, MANY[:count], SameVerdict(True))
    assert (found == stored) is kept
    assert len(student.requests) == (0 if kept else 60)
    assert kept or (found.threshold, found.off) == (None, "its answers have no steps")
    assert threshold.load_threshold(Config(), run, gguf) == found


def test_a_fit_with_other_settings_does_not_replace_the_one_of_the_configuration(run, gguf):
    usual, careless = fitted_on(60, at=2.0), fitted_on(60, at=0.0, max_harm=0.2)
    threshold.store_threshold(Config(), run, gguf, usual)
    other = Config.model_validate({"review": {"max_harm": 0.2}})
    threshold.store_threshold(other, run, gguf, careless)
    weighted = Config.model_validate({"review": {"confidence_weight": 1.0}})
    threshold.store_threshold(weighted, run, gguf, fitted_on(60, at=3.0))
    found = [threshold.load_threshold(each, run, gguf).threshold for each in (Config(), other, weighted)]
    assert found == [2.0, 0.0, 3.0]
    unknown = Config.model_validate({"review": {"max_harm": 0.1}})
    assert threshold.load_threshold(unknown, run, gguf) is None


def test_problems_that_a_threshold_was_fitted_on_are_not_tested(run, gguf, tmp_path):
    """A later evaluation of all problems leaves out those on which an earlier one fitted the threshold."""
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(300)]
    config = Config.model_validate({"eval": {"source": str(write_rows(tmp_path / "e.jsonl", rows))}})
    context = Context(config, run, ProgressDisplay(quiet=True))
    earlier = held_out(context)
    student = ScriptedStudent("the answer is 1")
    ensure_threshold(config, run, gguf, student, earlier.fitting, SameVerdict(True))
    untrained = [Problem(id=f"u{i}", question=f"What is {i} - {i}?", answer="0") for i in range(200)]
    later = held_out(context, untrained)
    assert later.fitting == untrained
    assert later.problems == earlier.problems
    assert later.dropped == {"used_for_threshold": len(earlier.fitting)}
    assert len(earlier.fitting) > 50


def test_a_stored_fit_applies_to_one_file_and_one_set_of_prompts(run, gguf, tmp_path):
    threshold.store_threshold(Config(), run, gguf, fitted_on(60))
    other = gguf.with_name("dpo-q2_k.gguf")
    other.write_bytes(b"GGUF2")
    assert threshold.load_threshold(Config(), run, other) is None
    elsewhere = Run(tmp_path / "elsewhere")
    assert threshold.load_threshold(Config(), elsewhere, gguf).threshold == 1.0  # stored next to the GGUF
    (tmp_path / "student_review.txt").write_text("Review it.")
    prompts = Config.model_validate({"prompts": {"folder": str(tmp_path)}})
    assert threshold.load_threshold(prompts, run, gguf) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"a": 3}', '{"a": {"threshold": "x", "problems": 1, "max_harm": 0}}', "\0"]
)
def test_a_damaged_file_is_ignored_and_rewritten(run, gguf, text, capsys):
    run.path(FILE).write_text(text)
    assert threshold.load_threshold(Config(), run, gguf) is None
    assert "threshold.json is damaged" in capsys.readouterr().err
    threshold.store_threshold(Config(), run, gguf, fitted_on(60, at=1.5))
    assert threshold.load_threshold(Config(), run, gguf).threshold == 1.5
