"""Preference pairs: decisions at every judged step, contents from the student's corrections, and drops."""

from collections import defaultdict
from dataclasses import dataclass, field

import pytest

from sclite.config import Config
from sclite.data.pairs import continuation, make_pairs, write_pairs
from sclite.errors import DataError
from sclite.progress import no_progress
from sclite.records import Attempt, Drop, Pair, Problem, Review
from sclite.student.base import Reply
from sclite.trace import CAUSE, Step, Trace, close_piece, open_piece, render

WORK = Trace((Step("48 + 24 = 72", "Carry."), Step("72 / 2 = 38"), Step("38 + 5 = 43")), "Go on.", "43")
REVIEW = Review(id="p0", sample=0, step=2, cause="2 * 38 is 76.", correction="72 / 2 = 36", trace="")
CONFIRMED = Review(id="p0", sample=0, step=None, trace="")
TEACHERS = "2 * 38 is 76.</Cause>\n<Correction>72 / 2 = 36</Correction>\n"
WRONG = "Hm.</Cause>\n<Correction>72 / 2 = 30</Correction>\n"
RIGHT = "Twice 38 is too much.</Cause>\n<Correction>72 / 2 = 36</Correction>\n"


@pytest.mark.parametrize(
    ("review", "sides"),
    [
        (REVIEW, [("</Step1>\n", CAUSE), (CAUSE, "</Step2>\n")]),
        (CONFIRMED, [(f"</Step{n}>\n", CAUSE) for n in (1, 2, 3)]),
    ],
)
def test_every_step_up_to_the_wrong_one_is_a_decision_after_the_attempt_so_far(review, sides):
    pairs, _ = make_pairs(review, WORK)
    assert [(p.chosen, p.rejected) for p in pairs] == sides
    for number, pair in enumerate(pairs, 1):
        assert (pair.kind, pair.step, pair.attempt) == ("decision", number, render(WORK))
        assert "".join(pair.prefix) == render(WORK).partition(f"</Step{number}>")[0]
        assert pair.prefix[-1] == open_piece(number, WORK.steps[number - 1])
        assert pair.prefix[1::2] == tuple(close_piece(n) for n in range(1, number))


@pytest.mark.parametrize(
    ("own", "chosen", "origin"),
    [
        ([(WRONG, False)], TEACHERS, "teacher"),
        # unknown outcomes are not used
        ([("odd", None), (WRONG, False), ("odder", None)], TEACHERS, "teacher"),
        ([(RIGHT, True), (WRONG, False)], RIGHT, "student"),
        ([(WRONG, False), (RIGHT, True)], RIGHT, "student"),
    ],
)
def test_students_right_correction_else_the_teachers_is_chosen_over_a_wrong_one(own, chosen, origin):
    (*_, decision, pair), drop = make_pairs(REVIEW, WORK, own)
    assert (pair.chosen, pair.rejected, pair.origin, pair.step) == (chosen, WRONG, origin, 2)
    assert pair.prefix == (*decision.prefix, CAUSE)
    assert drop is None
    noted = Trace((Step("x", None, REVIEW.cause, REVIEW.correction),))
    assert render(noted) == f"<Step1>x\n{CAUSE}{continuation(REVIEW)}</Step1>"
    assert continuation(REVIEW) == TEACHERS


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ([(RIGHT, True)], "student_review_already_right"),
        ([(RIGHT, True), (RIGHT, None)], "student_review_already_right"),
        ([], "student_review_not_readable"),
        ([(WRONG, None)], "grader_unknown"),
        ([(TEACHERS, False)], "chosen_equals_rejected"),
        ([(RIGHT, True), (RIGHT, False)], "chosen_equals_rejected"),
    ],
)
def test_review_without_a_content_pair_is_dropped_with_a_reason(own, reason):
    pairs, drop = make_pairs(REVIEW, WORK, own)
    assert (drop.stage, drop.id, drop.sample, drop.reason) == ("pairs", "p0", 0, reason)
    assert drop.raw == (own[0][0] if own else "")
    assert len(pairs) == 2  # the decisions stay


@dataclass
class Scripted:
    """A student with a list of texts per problem: corrections if it is guided, whole reviews if it is free.

    A free one is an endpoint, which gets no prefix to continue. After a correction it goes on to an answer that follows.
    """

    texts: dict[str, list[str]]
    free: bool = False
    requests: list = field(default_factory=list)

    def generate(self, requests):
        self.requests += requests
        for index in reversed(range(len(requests))):
            request = requests[index]
            number = next((n for n in self.texts if f"{n}: What" in request.messages[-1]["content"]), "")
            if self.free:
                assert request.pieces == ()
                text = self.texts[number][request.seed]
            elif request.pieces[-1] == CAUSE:
                text = self.texts[number].pop(0)
            else:
                said = 41 if "= 36" in request.pieces[-2] else 35
                text = f"<Step3>so {said}\n</Step3>\n<Answer>{said}</Answer>"
            yield Reply(index, text, 8, 30, "stop" if text else "error", None if text else "no_reply")


def fill(run, count):
    """`count` wrong attempts with the teacher's review, and one confirmation at the end."""
    ids = [f"p{i}" for i in range(count)]
    run.replace("problems.jsonl", [Problem(id=i, question=f"{i}: What?", answer="41") for i in [*ids, "r"]])
    wrong = [Attempt(id=i, sample=0, trace=render(WORK), answer="43", correct=False) for i in ids]
    right = Attempt(id="r", sample=0, trace=render(WORK), answer="41", correct=True)
    run.replace("attempts.jsonl", [*wrong, right])
    reviews = [REVIEW.model_copy(update={"id": i}) for i in ids]
    run.replace("reviews.jsonl", [*reviews, CONFIRMED.model_copy(update={"id": "r"})])


CONFIG = Config.model_validate({"student": {"batch": 2}, "attempts": {"reviews": 2}})
FREE = Config.model_validate({"attempts": {"reviews": 2, "student": "openai/small", "api_base": "http://x"}})


def build(run, grader, texts=None, config=CONFIG, progress=no_progress):
    """(the stage's report, the content pairs by problem, the student's requests)."""
    student = None if texts is None else Scripted(texts, free=config is FREE)
    report = write_pairs(config, run, student=student, grader=grader, progress=progress)
    contents = {p.id: p for p in run.read("pairs.jsonl", Pair) if p.kind == "content"}
    return report, contents, student.requests if student else []


def sides(contents):
    return {i: (p.chosen, p.rejected, p.origin) for i, p in contents.items()}


def test_student_corrections_become_pairs_by_their_answers(run, grader):
    fill(run, 4)
    texts = {"p0": [WRONG, WRONG], "p1": [RIGHT, WRONG], "p2": [RIGHT, RIGHT]}
    report, contents, _ = build(run, grader, texts | {"p3": ["no tags", "only a cause</Cause>"]})
    assert sides(contents) == {"p0": (TEACHERS, WRONG, "teacher"), "p1": (RIGHT, WRONG, "student")}
    drops = {d.id: d.reason for d in run.read("dropped.jsonl", Drop)}
    assert drops == {"p2": "student_review_already_right", "p3": "student_review_not_readable"}
    assert report.dropped == {"student_review_already_right": 1, "student_review_not_readable": 1}
    assert report.counts == {"decision": 4 * 2 + 3, "content": 2, "own_corrections_chosen": 1}


def test_student_corrects_each_wrong_attempt_at_the_teachers_step(run, grader):
    fill(run, 3)
    _, _, requests = build(run, grader, {f"p{i}": [WRONG, WRONG] for i in range(3)})
    asked = [r for r in requests if r.pieces[-1] == CAUSE]
    assert len(asked) == 6
    assert {(r.pieces[-2], r.temperature) for r in asked} == {("<Step2>72 / 2 = 38\n", 0.8)}
    for i in range(3):
        same = [r for r in asked if f"p{i}: What" in r.messages[-1]["content"]]
        assert len({r.seed for r in same}) == 2  # two different samples


def test_without_a_student_there_are_only_decisions_and_finished_pairs_stay(run, grader):
    with pytest.raises(DataError, match=r"reviews\.jsonl is missing or empty") as error:
        build(run, grader)
    assert "sclite build-data" in error.value.hint
    fill(run, 2)
    report, contents, _ = build(run, grader)
    assert contents == {}
    assert report.dropped == {"no_student_review": 2}
    run.path("warmup/adapter").mkdir(parents=True)
    run.path("warmup/adapter/adapter_model.safetensors").write_bytes(b"trained")
    made, contents, _ = build(run, grader, {"p0": [WRONG, WRONG], "p1": [WRONG, WRONG]})
    assert len(contents) == 2
    again, _, _ = build(run, grader)
    assert (again.skipped, again.counts) == (True, made.counts)


def whole_review(step=2, cause="Hm.", correction="72 / 2 = 30", answer="35", first="48 + 24 = 72"):
    """A review of WORK that flags `step` (None: no step)."""
    notes = {step: (None, cause, correction)}
    texts = enumerate((first, "72 / 2 = 38", "38 + 5 = 43"), 1)
    return render(Trace(tuple(Step(t, *notes.get(n, ())) for n, t in texts), "Go on.", answer or None))


def test_free_review_of_the_right_step_becomes_a_content_pair(run, grader):
    fill(run, 2)
    wrong = whole_review()
    right = whole_review(cause="Twice 38 is too much.", correction="72 / 2 = 36", answer="41")
    report, contents, _ = build(run, grader, {"p0": [wrong, wrong], "p1": [wrong, right]}, FREE)
    assert sides(contents) == {"p0": (TEACHERS, WRONG, "teacher"), "p1": (RIGHT, WRONG, "student")}
    assert {p.prefix[-2:] for p in contents.values()} == {("<Step2>72 / 2 = 38\n", CAUSE)}
    assert report.figures["own_reviews"] == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I would not know.", "student_review_not_readable"),
        (whole_review(answer=""), "student_review_not_readable"),
        (whole_review(cause=None), "student_review_not_readable"),
        (whole_review(step=None), "student_review_accuses_another_step"),
        (whole_review(step=1), "student_review_accuses_another_step"),
        (whole_review(step=3), "student_review_accuses_another_step"),
        (whole_review(first="48 + 24 = 70"), "student_review_accuses_another_step"),
        (whole_review(answer="41"), "student_review_already_right"),
        ("", "student_did_not_reply"),
    ],
)
def test_unusable_free_reviews_are_counted_by_reason(run, grader, text, reason):
    fill(run, 1)
    report, _, _ = build(run, grader, {"p0": [text, text]}, FREE)
    assert report.dropped == {reason: 1}
    assert report.counts == {"decision": 2 + 3, "own_corrections_chosen": 0}
    if reason != "student_review_already_right":
        assert report.figures["own_reviews"] == {reason: 2}


def test_review_seed_does_not_depend_on_the_position_of_the_row(run, grader):
    """Otherwise adding a row would change requests that are already in the ledger."""
    fill(run, 3)
    _, _, requests = build(run, grader, {f"p{i}": [whole_review()] * 2 for i in range(3)}, FREE)
    by_problem = defaultdict(list)
    for request in requests:
        by_problem[request.messages[-1]["content"]].append(request.seed)
    assert list(by_problem.values()) == [[0, 1]] * 3
    assert {r.temperature for r in requests} == {0.8}


def test_next_run_requests_unanswered_reviews_again(run, grader):
    fill(run, 1)
    first, _, _ = build(run, grader, {"p0": ["", whole_review()]}, FREE)
    assert first.counts["content"] == 1
    second, _, _ = build(run, grader, {"p0": [whole_review()] * 2}, FREE)
    assert (second.skipped, second.figures["own_reviews"]) == (False, {})
    assert build(run, grader, None, FREE)[0].skipped
