"""What the chat shows of an answer while it is written, reviewed and corrected."""

import pytest

from sclite.chat.answer import Answer, Settings, probability, solve_and_review
from sclite.chat.view import AnswerView
from sclite.student.base import Reply
from sclite.student.self_correction import SAME_RESULT, Reviewed, StepsScored, Writing, stream
from sclite.trace import Step, Trace, render
from tests.chat.scripted import CORRECTING, Scripted


def lines_of(view: AnswerView, width: int = 0) -> list[str]:
    return [line.plain.rstrip() for line in view.render(width) if line.plain.strip()]


def watched(student, **settings) -> tuple[list[list[str]], AnswerView]:
    """What the view shows after each event, and the view."""
    view, seen = AnswerView(), []
    for event in stream(student, solve_and_review("How many?", Settings(**settings))):
        view.feed(event)
        seen.append(lines_of(view))
    return seen, view


def test_flagged_step_is_followed_by_its_correction_others_have_a_neutral_mark():
    seen, view = watched(Scripted(**CORRECTING))
    assert lines_of(view) == [
        "  ·  1  12% 2 + 2 = 4",
        "  ✗  2  95% 4 + 1 = 6",
        "            why 4 and 1 are 5.",
        "  →  2      4 + 1 = 5",
        "     3      5 + 1 = 6",
        "  answer 6  (was 7)",
    ]
    first = ["     1      2 + 2 = 4", "     2      4 + 1 = 6", "     3      6 + 1 = 7", "  answer 7"]
    assert first in seen
    assert ["  ·  1  12% 2 + 2 = 4", "  ✗  2  95% 4 + 1 = 6"] in seen
    flagged = next(line for line in view.render(80) if "4 + 1 = 6" in line.plain)
    assert any("strike" in str(span.style) for span in flagged.spans)
    _, view = watched(Scripted())
    assert lines_of(view) == ["  ·  1   5% 2 + 2 = 4", "  ·  2   5% 4 + 1 = 5", "  answer 5"]


SAME = "No.</Cause>\n<Correction>1 + 4 = 6</Correction>"


@pytest.mark.parametrize(
    "change", [{"correction": "unreadable"}, {"rest": "no answer"}, {"correction": SAME}]
)
def test_failed_correction_or_one_to_the_same_result_leaves_the_first_answer(change):
    _, view = watched(Scripted(**CORRECTING | change))
    assert (view.answer.note == SAME_RESULT) == (change == {"correction": SAME})
    assert lines_of(view) == [
        "  ·  1  12% 2 + 2 = 4", "  ·  2  95% 4 + 1 = 6", "  ·  3  27% 6 + 1 = 7", "  answer 7",
    ]  # fmt: skip


def test_free_review_shows_the_correction_it_found():
    steps = (Step("2 + 2 = 4"), Step("4 + 1 = 6", None, "Too many.", "4 + 1 = 5"), Step("5 + 1 = 6"))
    student = Scripted(**CORRECTING)
    solve = student.generate

    def generate(requests):
        (reply,) = solve(requests)
        review = render(Trace(steps, None, "6"))
        yield reply if len(student.asked) == 1 else Reply(0, review, 30, 50, "stop")

    student.generate = generate
    _, view = watched(student, mode="free")
    assert lines_of(view) == [
        "     1      2 + 2 = 4", "  ✗  2      4 + 1 = 6", "            why Too many.", "  →  2      4 + 1 = 5",
        "     3      5 + 1 = 6", "  answer 6  (was 7)",
    ]  # fmt: skip


def test_second_round_corrects_the_corrected_work():
    view = AnswerView()
    first = Trace((Step("a = 1"), Step("b = 2")), None, "2")
    view.feed(Writing("solution"))
    view.feed(render(first))
    for step, rest in ((1, "<Step2>b = 4\n</Step2>\n<Answer>4</Answer>"), (2, "<Answer>5</Answer>")):
        view.feed(StepsScored((0.0, 0.0), step))
        view.feed(Writing("correction"))
        view.feed(f"Because.</Cause>\n<Correction>{'a = 3' if step == 1 else 'b = 5'}</Correction>")
        view.feed(Writing("continuation"))
        view.feed(rest)
    assert [line for line in lines_of(view) if "why" not in line] == [
        "  ✗  1  50% a = 1", "  →  1  50% a = 3", "  ✗  2  50% b = 4", "  →  2      b = 5", "  answer 5",
    ]  # fmt: skip
    final = Trace((Step("a = 3"), Step("b = 5")), None, "5")
    review = Reviewed(final, (0.0, 0.0), 1, "Because.", "a = 3")  # of the earliest corrected step
    view.feed(Answer("?", Reply(0, render(first), 9, 9, "stop"), first, review))
    assert [line for line in lines_of(view) if "why" not in line] == [
        "  ✗  1  50% a = 1", "  →  1      a = 3", "     2      b = 5", "  answer 5  (was 2)",
    ]  # fmt: skip


def test_cut_off_answer_reports_the_limit_that_it_reached():
    cut_off = {most: watched(Scripted(finish="length"), max_tokens=most)[1].answer.note for most in (5, 6)}
    settings = "raise max_tokens (/set max_tokens, or eval.max_tokens)"
    assert cut_off[5] == f"the answer was cut off at 5 tokens; {settings}"
    assert "the context is full" in cut_off[6]


def test_step_corrected_while_solving_shows_cause_and_correction():
    noted = Step("2 + 2 = 5", "Count.", "The units end in 4.", "2 + 2 = 4")
    own = Trace((noted, Step("4 + 1 = 5")), None, "5")
    _, view = watched(Scripted(text=render(own)), mode="")
    assert lines_of(view) == [
        "  ✗  1      2 + 2 = 5", "            key Count.", "            why The units end in 4.",
        "  →  1      2 + 2 = 4", "     2      4 + 1 = 5", "  answer 5",
    ]  # fmt: skip


def test_step_is_marked_at_its_cause():
    view = AnswerView()
    view.feed(Writing("solution"))
    view.feed("<Step1>2 + 2 = 5\n<Cause>The units end in 4.</Cause>\n")
    assert lines_of(view) == ["  ✗  1      2 + 2 = 5", "            why The units end in 4."]


@pytest.mark.parametrize("steps", [(Step("2 < 3 and 4 > 1", "Compare."),), ()])
def test_tags_never_show_while_they_arrive(steps):
    view = AnswerView()
    view.feed(Writing("solution"))
    for letter in render(Trace(steps, "All.", "yes")):
        view.feed(letter)
        shown = "".join(lines_of(view)).replace("2 < 3", "").replace("4 >", "")
        assert ">" not in shown
    lines = ["     1      2 < 3 and 4 > 1", "            key Compare."] if steps else []
    assert lines_of(view) == [*lines, "  answer yes"]


def test_lines_are_wrapped_and_controls_are_visible():
    view = AnswerView()
    view.feed(Writing("solution"))
    view.feed("<Step1>" + "many words " * 10 + "\x1b[2J\n</Step1>\n<Answer>\x1b[2J</Answer>")
    *lines, answer = lines_of(view, 40)
    assert len(lines) > 3
    assert max(map(len, lines)) <= 40
    assert all(line.startswith(" " * 12) for line in lines[1:])
    assert "\x1b" not in "".join(lines)
    assert answer == "  answer ␛[2J"
    view = AnswerView()
    view.feed(Writing("solution"))
    view.feed("Just text.")
    assert lines_of(view) == ["Just text."]


def test_probability_is_the_sigmoid_of_the_log_odds():
    assert probability(0.0) == 0.5
    assert probability(3.0) == pytest.approx(0.9526, abs=1e-4)
    assert (probability(-1e6), probability(1e6)) == (pytest.approx(0, abs=1e-12), 1.0)
