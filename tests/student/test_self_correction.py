"""Self-correction with a scripted student: which step is flagged, how it is corrected, when the first answer is kept."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from sclite.prompts import solve_messages
from sclite.student import self_correction
from sclite.student.base import Reply, Request, ScoreRequest, Scores
from sclite.student.self_correction import SAME_RESULT, ReviewSettings, correct_steps, free, guided
from sclite.student.step_scores import read_odds
from sclite.trace import CAUSE, Step, Trace, open_piece, parse, render, step_pieces

QUESTION = "Anna has 48 apples, buys 24, gives half away and finds 5. How many?"
UNREADABLE = "the review could not be read"
FIRST, ADVICE = Step("48 + 24 = 72", "Carry."), "Add, share, add."
RIGHT = Trace((FIRST, Step("72 / 2 = 36"), Step("36 + 5 = 41")), ADVICE, "41")
WRONG = Trace((FIRST, Step("72 / 2 = 38"), Step("38 + 5 = 43")), ADVICE, "43")
CORRECTION = "72 is not twice 38.</Cause>\n<Correction>72 / 2 = 36</Correction>"
REST = "<Step3>36 + 5 = 41\n</Step3>\n<Generalized>Add, share, add.</Generalized>\n<Answer>41</Answer>"


@dataclass
class Scripted:
    """A student with scripted scores and replies; records every request. Replies arrive in reverse order."""

    odds: Callable[[str], tuple[float, ...]] = lambda work: ()
    confidence: dict[str, float] = field(default_factory=dict)
    corrections: list[str] = field(default_factory=list)
    rest: str = REST
    finish: str = "stop"
    last: str = "stop"  # of replies that are not a correction
    requests: list[Request] = field(default_factory=list)
    scored: list = field(default_factory=list)

    def score(self, requests):
        self.scored += requests
        for index in reversed(range(len(requests))):
            work = requests[index].messages[-1]["content"].partition("Work to check:\n")[2]
            texts = [parse(text).trace.steps[0].text for text, other in requests[index].options if not other]
            written = tuple(self.confidence.get(text, 0.0) for text in texts)
            yield Scores(index, self.odds(work) if work else written)

    def generate(self, requests):
        self.requests += requests
        replies = []
        for index, request in enumerate(requests):
            text = self.corrections.pop(0) if request.pieces and request.pieces[-1] == CAUSE else self.rest
            finish = self.finish if request.stop or self.finish == "error" else self.last
            replies.append(Reply(index, text, 10, 20, finish))
        yield from reversed(replies)


def accuse_38(work: str) -> tuple[float, ...]:
    return tuple(3.0 if "= 38" in step.text else -4.0 for step in parse(work).trace.steps)


def review(student, *attempts, script=guided, **settings):
    scripts = [script(QUESTION, each, ReviewSettings(**settings)) for each in attempts]
    return self_correction.run_together(student, scripts)


def test_score_request_covers_every_step_and_scores_come_in_any_order():
    request = next(read_odds(QUESTION, WRONG))
    assert request.options == tuple((CAUSE, f"</Step{n}>\n") for n in range(1, len(WRONG.steps) + 1))
    assert request.others == ("<Key>", "<Correction>")
    opened = [open_piece(n, step) for n, step in enumerate(WRONG.steps, 1)]
    assert [request.pieces[mark] for mark in request.marks] == opened
    assert [closer for _, closer in request.options] == list(request.pieces[1::2])
    assert render(WRONG) in request.messages[-1]["content"]
    assert request.messages[0]["role"] == "system"
    student = Scripted(odds=accuse_38)
    scripts = [read_odds(QUESTION, work, weights=(0.0,)) for work in (WRONG, Trace(), RIGHT)]
    found = [odds for odds, _ in self_correction.run_together(student, scripts)]
    assert found == [(-4.0, 3.0, -4.0), (), (-4.0, -4.0, -4.0)]
    assert len(student.scored) == 2


UNSURE = {"48 + 24 = 72": 6.0, "72 / 2 = 38": -3.0, "38 + 5 = 43": 1.0, "72 / 2 = 36": -5.0}
UNSURE |= {"36 + 5 = 41": 4.0}
"""Log-odds of what the student writes as it solves, against any other text."""


def test_confidence_is_read_where_the_student_solves():
    request = next(read_odds(QUESTION, WRONG, weights=(1.0,)))
    assert request.pieces == tuple(step_pieces(WRONG.steps))
    assert [request.pieces[: mark + 1][-1:] for mark in request.marks[:2]] == [(), ("</Step1>\n",)]
    assert request.pieces[request.marks[2]] == "</Step2>\n"
    assert request.options == tuple((open_piece(n, step), None) for n, step in enumerate(WRONG.steps, 1))
    assert request.messages == solve_messages(QUESTION)
    student = Scripted(confidence=UNSURE)
    scripts = [read_odds(QUESTION, work, weights=(1.0,)) for work in (WRONG, Trace())]
    found = [odds for _, odds in self_correction.run_together(student, scripts)]
    assert found == [(-6.0, 3.0, -1.0), ()]


@pytest.mark.parametrize(
    ("weight", "scores", "accused", "requests"),
    [
        (0.0, (-4.0, -4.0, -4.0), None, 1),
        (0.25, (-4.5, -2.25, -3.25), None, 2),
        (0.75, (-5.5, 1.25, -1.75), 2, 2),
        (1.0, (-6.0, 3.0, -1.0), 2, 1),
    ],
)
def test_scores_are_the_weighted_mean_of_review_and_confidence(weight, scores, accused, requests):
    student = Scripted(odds=lambda _: (-4.0,) * 3, confidence=UNSURE, corrections=[CORRECTION])
    (got,) = review(student, WRONG, confidence_weight=weight)
    assert (got.scores, got.accused, len(student.scored)) == (scores, accused, requests)


@pytest.mark.parametrize("weight", [0.75, 1.0])
def test_a_correction_that_the_student_would_not_write_is_not_accused(weight):
    student = Scripted(odds=lambda _: (-4.0,) * 3, confidence=UNSURE, corrections=[CORRECTION] * 2)
    (got,) = review(student, WRONG, confidence_weight=weight, rounds=2)
    assert UNSURE["72 / 2 = 36"] < 0
    assert (got.trace, got.accused, got.note, len(student.requests)) == (RIGHT, 2, "", 2)


@pytest.mark.parametrize(("weight", "scores"), [(0.5, (-5.0, -4.0, -4.0)), (1.0, (-6.0, -4.0, -4.0))])
def test_a_correction_made_while_solving_has_no_confidence(weight, scores):
    step = Step("72 / 2 = 38", None, "72 is not twice 38.", "72 / 2 = 36")
    work = Trace((FIRST, step, Step("36 + 5 = 41")), ADVICE, "41")
    (got,) = review(Scripted(odds=lambda _: (-4.0,) * 3, confidence=UNSURE), work, confidence_weight=weight)
    assert (got.scores, got.accused) == (scores, None)


@pytest.mark.parametrize("unread", ["review", "confidence"])
def test_work_that_one_of_the_two_cannot_score_is_too_long(unread):
    class Short(Scripted):
        def score(self, requests):
            for found in super().score(requests):
                asked = "review" if requests[found.index].options[0][1] else "confidence"
                yield replace(found, log_odds=(math.nan,) * 3) if asked == unread else found

    (got,) = review(Short(odds=accuse_38, confidence=UNSURE), WRONG, confidence_weight=0.5)
    assert (got.scores, got.accused, got.note) == ((), None, "too long to review")


def test_wrong_step_is_corrected_and_correct_work_unchanged():
    student = Scripted(odds=accuse_38, corrections=[CORRECTION])
    (got,) = review(student, WRONG, threshold=0.0)
    assert (got.accused, got.scores, got.trace) == (2, (-4.0, 3.0, -4.0), RIGHT)
    assert (got.cause, got.correction) == ("72 is not twice 38.", "72 / 2 = 36")
    assert (got.tokens, got.note) == (20, "")
    (got,) = review(Scripted(odds=accuse_38), RIGHT)
    assert (got.trace, got.accused, got.tokens, got.note) == (None, None, 0, "")
    assert got.scores == (-4.0, -4.0, -4.0)


@pytest.mark.parametrize(("threshold", "accused"), [(-2.0, 1), (0.0, 2), (2.0, 3), (5.0, None), (4.0, None)])
def test_first_step_above_the_threshold_is_flagged(threshold, accused):
    student = Scripted(odds=lambda _: (-1.0, 1.0, 4.0), corrections=[CORRECTION])
    (got,) = review(student, WRONG, threshold=threshold)
    assert got.accused == accused


def test_requests_continue_from_the_cause_tag_and_then_without_the_wrong_tail():
    student = Scripted(odds=accuse_38, corrections=[CORRECTION])
    review(student, WRONG, max_tokens=77)
    first, second = student.requests
    assert first.pieces == (*student.scored[0].pieces[:3], CAUSE)
    assert "Work to check:" in first.messages[-1]["content"]
    assert (first.stop, first.max_tokens) == (("</Correction>",), 77)
    assert second.pieces == (open_piece(1, FIRST), "</Step1>\n", "<Step2>72 / 2 = 36\n", "</Step2>\n")
    asked = "".join(m["content"] for m in second.messages)
    assert QUESTION in asked
    assert "38" not in asked


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_rounds_are_bounded(rounds):
    changing = [CORRECTION.replace("= 36", f"= {36 + number}") for number in range(9)]
    student = Scripted(odds=lambda work: (-1.0, 9.0, 9.0), corrections=changing)
    (got,) = review(student, WRONG, rounds=rounds)
    assert len(student.requests) == 2 * rounds
    assert len(student.scored) == rounds
    assert got.tokens == 20 * rounds
    assert (got.accused is None) == (rounds == 0)


def test_second_round_reviews_the_corrected_work_and_its_own_corrections():
    student = Scripted(odds=accuse_38, corrections=[CORRECTION])
    (got,) = review(student, WRONG, rounds=5)
    assert len(student.scored) == 2
    assert render(RIGHT) in student.scored[1].messages[-1]["content"]
    assert got.accused == 2
    assert got.scores == (-4.0, 3.0, -4.0)  # the first answer's
    rest = "<Step3>36 + 5 = 38\n<Cause>Too few.</Cause>\n<Correction>36 + 5 = 41</Correction>\n</Step3>\n<Answer>41</Answer>"
    student = Scripted(odds=accuse_38, corrections=[CORRECTION], rest=rest)
    (got,) = review(student, WRONG, rounds=2)
    assert got.accused == 2
    assert len(student.scored) == 2
    assert len(student.requests) == 2


NO_CORRECTION = ("no tags at all", "only a cause</Cause>", "</Cause>\n<Correction>72</Correction>", "")


@pytest.mark.parametrize(
    ("correction", "rest", "finish", "note"),
    [
        *((text, REST, "stop", UNREADABLE) for text in NO_CORRECTION),
        (CORRECTION, "<Step3>36 + 5 = 41\n</Step3>\n", "stop", "no answer after the correction"),
        (CORRECTION, REST, "error", UNREADABLE),
        (CORRECTION, REST.removesuffix("</Answer>"), "cut", "no answer after the correction"),
        ("72 is not twice 38.</Cause>\n<Correction>72 / 2 = 3", REST, "length", UNREADABLE),
    ],
)
def test_unreadable_review_keeps_the_first_answer(correction, rest, finish, note):
    last = "length" if finish == "cut" else "stop"
    finish = "stop" if finish == "cut" else finish
    student = Scripted(odds=accuse_38, corrections=[correction], rest=rest, finish=finish, last=last)
    (got,) = review(student, WRONG)
    assert (got.trace, got.accused, got.note, got.scores) == (None, 2, note, (-4.0, 3.0, -4.0))
    assert got.tokens > 0


@pytest.mark.parametrize("script", [guided, free])
def test_corrections_made_while_solving_are_applied_before_review(script):
    steps = (WRONG.steps[0], Step("72 / 2 = 38", None, "Too many.", "72 / 2 = 36"), Step("36 + 5 = 41"))
    student = Scripted(odds=accuse_38, rest=render(RIGHT))
    (got,) = review(student, Trace(steps, None, "41"), script=script)
    assert (got.trace, got.accused, got.note) == (None, None, "")
    assert got.scores == ((-4.0, -4.0, -4.0) if script is guided else ())
    (request,) = student.scored or student.requests
    for shown in (request.messages[-1]["content"], *(["".join(request.pieces)] if script is guided else [])):
        assert "= 38" not in shown
        assert "72 / 2 = 36" in shown


AGAIN = "The halves fit not.</Cause>\n<Correction>Half of 72: 70 / 2 = 35, 2 / 2 = 1, so 72 / 2 = 38.</Correction>"


def test_correction_with_the_same_result_changes_nothing():
    student = Scripted(odds=accuse_38, corrections=[AGAIN])
    (got,) = review(student, WRONG, rounds=3)
    assert (got.trace, got.accused, got.note, got.tokens) == (None, 2, SAME_RESULT, 10)
    assert len(student.requests) == 1
    (result,) = correct_steps(Scripted(corrections=[AGAIN]), [(QUESTION, WRONG, 2)], ReviewSettings())
    assert (result.accused, result.note, result.trace) == (2, SAME_RESULT, None)
    assert result.correction.endswith("72 / 2 = 38.")  # still usable for training as a wrong correction


@pytest.mark.parametrize(
    ("step", "correction", "same"),
    [
        ("2 + 2 = 5 nuts.", "units 2 + 2 = 5, so 2 + 2 = 5 nuts", True),
        ("2 + 2 = 5 nuts.", "2 + 2 = 4 nuts.", False),
        (r"so $x = \frac{3}{4}$.", r"so $x = \frac{5}{4}$.", False),
        ("5 nuts", "5 nuts", False),
        ("After 3 days, 2 * 3 = 6.", "3 * 2 = 6", True),
        ("x^2 - 5x + 6 = 0", "x^2 - 5x - 6 = 0", False),
        ("x + 6 = 0", "x + 7 = 0", False),
        ("3 <= 5", "3 >= 5", False),
        ("a = 3, c = 5", "a = 2, c = 5", False),
        ("2 + 2 =", "2 + 3 =", False),
        ("5 nuts", "2 + 2 = 5 nuts", False),
    ],
)
def test_result_follows_the_last_equals_sign(step, correction, same):
    student = Scripted(corrections=[f"No.</Cause>\n<Correction>{correction}</Correction>"])
    (got,) = correct_steps(student, [(QUESTION, Trace((Step(step),), None, "1"), 1)], ReviewSettings())
    assert (got.note == SAME_RESULT) is same


@pytest.mark.parametrize(
    ("second", "note"),
    [("nothing", UNREADABLE), ("No.</Cause>\n<Correction>60 / 2 + 6 = 36</Correction>", SAME_RESULT)],
)
def test_second_round_without_a_correction_keeps_the_solution_of_the_first(second, note):
    student = Scripted(odds=lambda _: (-1.0, 2.0, -1.0), corrections=[CORRECTION, second])
    (got,) = review(student, WRONG, rounds=2)
    assert (got.trace, got.accused, got.correction, got.note) == (RIGHT, 2, "72 / 2 = 36", note)


def test_after_two_rounds_the_first_is_reported_with_the_last_solution():
    third = "Too few.</Cause>\n<Correction>36 + 5 = 42</Correction>"
    odds = {render(WRONG): (-1.0, 2.0, 1.0), render(RIGHT): (-1.0, -1.0, 3.0)}
    student = Scripted(odds=odds.get, corrections=[CORRECTION, third])
    (got,) = review(student, WRONG, rounds=2)
    assert [step.text for step in got.trace.steps[:3]] == [FIRST.text, "72 / 2 = 36", "36 + 5 = 42"]
    assert (got.scores, got.accused) == ((-1.0, 2.0, 1.0), 2)
    assert (got.cause, got.correction) == ("72 is not twice 38.", "72 / 2 = 36")
    assert got.tokens == 40


def test_a_later_round_that_corrects_the_same_step_is_the_one_reported():
    odds = iter([(-1.0, 2.0, 1.0), (-1.0, 3.0, -1.0)])
    worse = "72 is not twice 38.</Cause>\n<Correction>72 / 2 = 35</Correction>"
    student = Scripted(odds=lambda _: next(odds), corrections=[worse, CORRECTION])
    (got,) = review(student, WRONG, rounds=2)
    assert got.trace.steps[1].text == got.correction == "72 / 2 = 36"
    assert got.accused == 2


def test_attempts_do_not_affect_each_other():
    student = Scripted(odds=accuse_38, corrections=[CORRECTION, "junk"])
    got = review(student, RIGHT, WRONG, Trace(), WRONG)
    assert [g.accused for g in got] == [None, 2, None, 2]
    assert [g.note for g in got] == ["", "", "no steps to review", UNREADABLE]
    assert [g.trace for g in got] == [None, RIGHT, None, None]


def test_student_never_sees_the_gold_answer():
    """The review cannot know it: neither function takes it, and no request mentions it."""
    wrong = {"corrections": [CORRECTION.replace("36", "30")], "rest": REST.replace("41", "35")}
    student = Scripted(odds=accuse_38, **wrong)
    (got,) = review(student, WRONG)
    assert got.trace.answer == "35"  # still wrong, and kept
    asked = "".join(m["content"] for r in [*student.requests, *student.scored] for m in r.messages)
    assert "41" not in asked
    assert not {"gold", "answer", "problem"} & set(guided.__annotations__)
    assert not {"gold", "answer", "problem"} & set(free.__annotations__)


class Streaming(Scripted):
    """Streams its replies in pieces of seven characters."""

    def stream(self, ask, cancel=None, pieces=True):
        for found in self.score([ask]) if isinstance(ask, ScoreRequest) else self.generate([ask]):
            text = getattr(found, "text", "")
            yield from (text[at : at + 7] for at in range(0, len(text), 7))
            yield found


def test_streamed_review_yields_events_in_order_and_the_same_result():
    student = Streaming(odds=accuse_38, corrections=[CORRECTION, CORRECTION])
    (wanted,) = review(student, WRONG)
    seen = list(self_correction.stream(student, guided(QUESTION, WRONG, ReviewSettings())))
    assert [event for event in seen if not isinstance(event, str)] == [
        self_correction.StepsScored((-4.0, 3.0, -4.0), 2),
        self_correction.Writing("correction"),
        self_correction.Corrected(2, "72 is not twice 38.", "72 / 2 = 36"),
        self_correction.Writing("continuation"),
        wanted,
    ]
    texts = "".join(event if isinstance(event, str) else "|" for event in seen)
    assert texts == f"||{CORRECTION}||{REST}|"
    assert student.requests[:2] == student.requests[2:]


def test_cancelled_review_ends_without_a_result():
    cancel = threading.Event()
    student = Streaming(odds=accuse_38, corrections=[CORRECTION])
    seen = []
    for event in self_correction.stream(student, guided(QUESTION, WRONG, ReviewSettings()), cancel):
        seen.append(event)
        if isinstance(event, str):
            cancel.set()
    assert seen[0] == self_correction.StepsScored((-4.0, 3.0, -4.0), 2)
    assert isinstance(seen[-1], str)
    assert len(student.requests) == 1


def test_samples_of_one_correction_have_different_seeds():
    student = Scripted(corrections=[CORRECTION] * 3)
    correct_steps(student, [(QUESTION, WRONG, 2)] * 3, ReviewSettings(temperature=0.8, seed=5))
    asked = [r for r in student.requests if r.pieces[-1] == CAUSE]
    assert [r.seed for r in asked] == [5, 6, 7]
    assert {r.temperature for r in asked} == {0.8}
    assert {r.temperature for r in student.requests if r.pieces[-1] != CAUSE} == {0.0}


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (CORRECTION, ("72 is not twice 38.", "72 / 2 = 36")),
        ("a</cause> <CORRECTION: >b", ("a", "b")),
        ("a\n<Correction>b</Correction>", ("a", "b")),
        ("a</Cause>", None),
        ("<Correction>b</Correction>", None),
        ("", None),
    ],
)
def test_corrections_are_parsed_leniently(text, read):
    (got,) = correct_steps(Scripted(corrections=[text]), [(QUESTION, WRONG, 2)], ReviewSettings())
    assert (got.cause, got.correction) == (read or (None, None))
    assert got.note == (UNREADABLE if read is None else "")


def test_free_review_returns_the_corrected_solution():
    noted = Step(WRONG.steps[1].text, None, "72 is not twice 38.", "72 / 2 = 36")
    student = Scripted(rest=render(Trace((RIGHT.steps[0], noted, RIGHT.steps[2]), None, "41")))
    (got,) = review(student, WRONG, script=free, max_tokens=50)
    assert (got.accused, got.tokens, got.scores) == (2, 10, ())
    assert got.trace == Trace(RIGHT.steps, None, "41")
    (asked,) = student.requests
    assert (asked.pieces, asked.max_tokens) == ((), 100)  # it repeats the steps and adds new ones


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (render(RIGHT), ""),
        *((text, UNREADABLE) for text in ("gibberish", "", "<Step1>a</Step1>", "<Answer>41</Answer>")),
    ],
)
def test_free_review_that_flags_nothing_or_is_unreadable_keeps_the_first_answer(text, note):
    (got,) = review(Scripted(rest=text), WRONG, script=free)
    assert (got.trace, got.accused, got.note, got.tokens) == (None, None, note, 10)


@pytest.mark.parametrize("script", [guided, free])
def test_answer_without_steps_is_not_reviewed(script):
    student = Scripted(rest=render(RIGHT))
    (got,) = review(student, Trace(answer="41"), script=script)
    assert (got.trace, got.note, got.accused) == (None, "no steps to review", None)
    assert student.scored == student.requests == []
