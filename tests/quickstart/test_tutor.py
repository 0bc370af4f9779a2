"""The bundled tutor: its templates and corrections pass the filters, and it finds the first wrong step."""

import operator
import random
import re
from dataclasses import replace

import pytest

from sclite import config, prompts
from sclite.data.corrections import check_review
from sclite.data.templates import check_template
from sclite.quickstart import tutor
from sclite.quickstart.grammar import solve
from sclite.quickstart.stories import generate
from sclite.records import Attempt
from sclite.teacher.client import Job, Teacher
from sclite.teacher.ledger import Ledger
from sclite.trace import Step, Trace, first_corrected, parse, render

PROBLEMS = generate(400, 11)
CALCULATE = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def damaged(problem, draw):
    """(trace, its first wrong step): the right solution with one wrong result."""
    trace = tutor.template(solve(problem.question))
    step = draw.randrange(len(trace.steps))
    text = trace.steps[step].text
    result = int(re.search(r"= (\d+)", text)[1])
    wrong = result + draw.choice((-10, -1, 1, 2, 10))
    steps = list(trace.steps)
    steps[step] = Step(text.replace(f"= {result}", f"= {abs(wrong)}"), steps[step].key)
    return replace(trace, steps=tuple(steps), answer=str(int(trace.answer) + 1)), step + 1


def test_every_template_passes_the_filters_and_is_right(grader):
    for problem in PROBLEMS:
        messages = prompts.teacher_messages(problem.question, problem.solution, problem.answer)
        reply = tutor.reply(list(messages))
        assert isinstance(check_template(reply, problem, grader), Trace)
        assert reply == render(parse(reply).trace)
        assert tutor.judge(solve(problem.question), parse(reply).trace).step is None


def test_every_correction_passes_the_filters_and_is_true(grader):
    draw = random.Random(2)
    for problem in PROBLEMS:
        attempt, wrong = damaged(problem, draw)
        row = Attempt(id=problem.id, sample=0, trace=render(attempt), answer=attempt.answer, correct=False)
        given = (problem.question, problem.solution, problem.answer)
        messages = prompts.teacher_messages(*given, work=row.trace)
        reply = tutor.reply(list(messages))
        assert isinstance(check_review(reply, row, problem, grader), Trace), reply
        review = parse(reply).trace
        assert first_corrected(review) == wrong
        correction = review.steps[wrong - 1].correction
        found = re.findall(r"(\d+) ([-+*/]) (\d+)( \+ 1)? = (\d+)", correction)
        assert found
        for left, sign, right, carry, result in found:
            assert CALCULATE[sign](int(left), int(right)) + bool(carry) == int(result), correction


def test_missing_and_superfluous_steps_are_wrong():
    problem = next(p for p in PROBLEMS if len(solve(p.question).operations) == 3)
    solution = solve(problem.question)
    trace = tutor.template(solution)
    more = replace(trace, steps=(*trace.steps, Step("And 1 + 1 = 2 more.")))
    verdict = tutor.judge(solution, more)
    assert (verdict.step, verdict.operation) == (4, None)
    assert "no further sum" in verdict.cause
    without = replace(trace, steps=(Step("I think a little."), *trace.steps[1:]))
    assert tutor.judge(solution, without).step == 1


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("She has 48 + 24 = 72 apples", None),
        ("48+24=72", None),
        ("24 + 48 = 72", None),  # swapped
        ("First 6x7=42 and 8 × 2 = 16, so 48 + 24 = 72", None),
        ("First 6x7=41, so 48 + 24 = 72", "The units 6 * 7 = 42 end in 2, not 1."),
        ("48 + 24 = 73", "The units 8 + 4 = 12 end in 2, not 3."),
        ("48 - 24 = 24", "The sum to do is 48 + 24."),
        ("47 + 1 + 24 = 72", "No sum is worked out here."),  # no complete equation
        ("48 + 24 = 71 + 1", "No sum is worked out here."),
        (f"48 + 24 = {'7' * 5000}", "No sum is worked out here."),
        ("no sums", "No sum is worked out here."),
    ],
)
def test_only_complete_equations_are_judged(text, wrong):
    question = "Mia has 48 apples. She buys 24 more. How many apples does Mia have now?"
    verdict = tutor.judge(solve(question), Trace((Step(text),)))
    assert (verdict.step, verdict.cause) == ((1, wrong) if wrong else (None, ""))
    assert tutor.first_wrong_step(question, Trace((Step(text),))) == (1 if wrong else 0)
    assert tutor.first_wrong_step("What is the capital of France?", Trace((Step(text),))) is None


def test_an_operation_is_split_into_easy_ones():
    assert tutor.decompose(47, "+", 38) == "units 7 + 8 = 15, tens 4 + 3 + 1 = 8, so 47 + 38 = 85"
    assert tutor.decompose(6, "*", 14) == "6 * 10 = 60, 6 * 4 = 24, 60 + 24 = 84, so 6 * 14 = 84"
    assert tutor.decompose(96, "/", 4) == "4 * 20 = 80, 96 - 80 = 16, 16 / 4 = 4, so 96 / 4 = 24"
    assert tutor.decompose(3, "*", 5) == "3 * 5 = 15"


def test_other_problems_are_declined_and_work_without_steps_gets_a_reply():
    messages = prompts.teacher_messages("What is the capital of France?", "Paris.", "Paris")
    assert tutor.reply(list(messages)) == "I only know arithmetic stories, and I see none here."
    problem = PROBLEMS[0]
    for work in ("", "I do not know.", "<Step1>", "<Step1>9 / 0 = 0\n</Step1>", "<Answer>5</Answer>"):
        given = (problem.question, problem.solution, problem.answer)
        messages = prompts.teacher_messages(*given, work=work)
        assert tutor.reply(list(messages))


def test_tutor_is_reached_through_litellm_free_of_charge(tmp_path):
    chats = [prompts.teacher_messages(p.question, p.solution, p.answer) for p in PROBLEMS[:12]]
    jobs = [Job(str(n), lambda error, chat=chat: chat, lambda reply: None) for n, chat in enumerate(chats)]
    settings = config.Teacher(model=tutor.MODEL)
    with Ledger(tmp_path / "ledger") as ledger, Teacher(settings, ledger, tutor.register) as teacher:
        results = {int(result.id): result.text for result in teacher.ask_all(jobs)}
        totals = ledger.totals()
    assert results == {number: tutor.reply(chat) for number, chat in enumerate(chats)}
    assert (totals["requests"], totals["cost_usd"], totals["unpriced"]) == (12, 0.0, 0)
    assert totals["completion_tokens"] > 200
