"""The arithmetic stories: they can be solved from their text, and the sets share no question."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sclite.quickstart.grammar import EVENTS, OPENINGS, QUESTIONS, solve
from sclite.quickstart.stories import generate, problem_set

CALCULATE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


@pytest.fixture(scope="module")
def problems():
    return generate(1500, 7)


def test_every_problem_is_solved_from_its_text_and_every_sentence_used(problems):
    for problem in problems:
        solution = solve(problem.question)
        assert str(solution.answer) == problem.answer
        assert re.search(rf"= {problem.answer}\.$", problem.solution)
        assert 1 <= len(solution.operations) <= 4
        operations = zip(solution.operations, solution.parents, strict=True)
        for number, (operation, parents) in enumerate(operations):
            assert CALCULATE[operation.sign](operation.left, operation.right) == operation.result >= 0
            assert operation.sign != "/" or operation.left % operation.right == 0
            assert all(parent < number for parent in parents)
            used = {solution.operations[parent].result for parent in parents}
            assert used <= {operation.left, operation.right}
    used = {operation.form for p in problems for operation in solve(p.question).operations}
    assert used >= {*EVENTS, *QUESTIONS, *OPENINGS} - {"has", "left"}  # these two ask for no sum


def test_the_seed_determines_unique_problems_and_the_sets_share_none(problems):
    assert generate(50, 3)[:20] == generate(20, 3)
    assert len({p.question for p in problems}) == len({p.id for p in problems}) == 1500
    avoid = frozenset(p.question for p in generate(100, 3))
    assert not avoid & {p.question for p in [*generate(300, 3, avoid), *generate(50, 4)]}
    sets = problem_set("test", 1000), problem_set("threshold", 1000), problem_set("train", 1200)
    assert len({problem.question for problems in sets for problem in problems}) == 3200


@settings(deadline=None, database=None, max_examples=300)
@given(st.text())
def test_other_texts_are_not_solved(text):
    assert solve(text) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q + " Please.",
        lambda q: q.replace("How many", "How few"),
        lambda q: "Once upon a time. " + q,
        lambda q: re.sub(r"\d+", "some", q),
        lambda q: q[: len(q) // 2],
    ],
)
def test_a_changed_question_is_not_solved_like_the_original(problems, change):
    for problem in problems[:100]:
        found = solve(change(problem.question))
        assert found is None or found != solve(problem.question)
    assert solve(f"\n {problems[0].question} \n") == solve(problems[0].question)


def test_stories_without_a_usable_answer_are_not_solved():
    story = "Tom has {} nuts. He puts all of them into {} equal boxes. How many nuts are in each?"
    assert solve(story.format(8, 2)).answer == 4
    for numbers in ((7, 2), (8, 0), ("9" * 5000, 3)):
        assert solve(story.format(*numbers)) is None
