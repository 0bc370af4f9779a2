"""Rows of a problem file: which column and which part of its text is the answer, and which rows are unusable."""

import hashlib
import math
from datetime import date
from decimal import Decimal

import pytest

from sclite.data.problem_rows import read_problem
from sclite.data.sources import BadRow


def answer(**row):
    return read_problem({"question": "?", **row}, {}).answer


def refused(columns=None, **row) -> BadRow:
    with pytest.raises(BadRow) as caught:
        read_problem({"question": "?", **row}, columns or {})
    return caught.value


STEPS = "#### Step 1\nAdd 2 and 3.\n\n#### Step 2\n2 + 3 = 5, so the answer is $\\boxed{5}$."


def test_markdown_heading_is_not_a_gsm8k_answer():
    problem = read_problem({"question": "?", "solution": STEPS}, {})
    assert (problem.answer, problem.solution) == ("5", STEPS)
    assert refused(solution="#### Step 1\nAdd.\n#### Step 2: 2 + 3 = 5").reason == "no_answer"
    assert answer(answer="#### Step 1\nAdd.\n#### Answer\n5") == "5"


MARKED = [
    ("48 + 24 = 72.\n#### 72", "72"), ("48 + 24 = 72. #### 72", "72"), ("It costs that.\n#### $1,200.50", "$1,200.50"),
    ("So.\n#### -3", "-3"), ("So.\n#### \\frac{1}{2}\n", "\\frac{1}{2}"), ("So.\n#### x = 5", "x = 5"),
    ("So.\n#### B", "B"), ("So.\n#### Answer: 7", "7"), ("so.\n#### 72\nThe answer is: 72", "72"),
]  # fmt: skip
BOXED = [
    ("our answer is $\\boxed 2$.", "2"), ("our answer is $\\boxed2$.", "2"), ("our answer is \\(\\boxed 12\\).", "12"),
    ("our answer is $\\boxed 2x+1$.", "2x+1"), ("our answer is \\fbox 7 now", "7"), ("our answer is \\fbox{7}", "7"),
    ("so $\\boxed\\frac{1}{2}$", "\\frac{1}{2}"),
    ("First $\\boxed{4}$, then $x = \\boxed{\\frac{1}{\\sqrt{2}}}$.", "\\frac{1}{\\sqrt{2}}"),
    ("So \\boxed{\\boxed{5}}", "5"), ("The answer is 5. Check: 5-3=2.", "5"), ("It is 3 twice. The answer is: 6.", "6"),
    ("So the final answer is 2.5", "2.5"), ("The answer is 4? No: the answer is 5.", "5"),
    ("so.\nThe answer is: \\frac{1}{2}", "\\frac{1}{2}"),
]  # fmt: skip
CELLS = [
    (["7"], "7"),
    ([2], "2"),
    (7.0, "7"),
    (0.5, "0.5"),
    (Decimal("2.50"), "2.50"),
]
WORDS = [
    "12 square meters", "x = 3 or x = -3", "all real numbers except zero and one", "4 p.m. on Monday", "Yes.",
    "\\begin{pmatrix} 1 & 2 \\\\\n 3 & 4 \\end{pmatrix}",
]  # fmt: skip


@pytest.mark.parametrize(
    ("column", "cell", "gold"),
    [("answer", *pair) for pair in [*MARKED, *CELLS, *zip(WORDS, WORDS, strict=True)]]
    + [("solution", *pair) for pair in [*MARKED, *BOXED]],
)
def test_marked_answers_numbers_and_words_are_read_and_the_last_box(column, cell, gold):
    assert answer(**{column: cell}) == gold


@pytest.mark.parametrize(
    "row",
    [{"answer": None}, {"solution": "no box here 5"}, {"solution": r"an open \boxed{5"},
     {"solution": "The answer is 5, I think.\nOr not."}, {"answer": "proof", "solution": "So it holds."}, {"answer": "notfound"}],
)  # fmt: skip
def test_row_without_an_answer_is_rejected(row):
    error = refused(**row)
    assert error.reason == "no_answer"
    assert "####" in error.message + error.hint


def test_worked_solution_in_the_answer_column_needs_a_marked_answer():
    sentence = "If Jungkook is in 5th place, then 4 people crossed the finish line faster than him."
    error = refused(answer=sentence)
    assert error.reason == "no_answer"
    assert "answer is a worked solution without" in error.message
    assert "answer_column" in error.hint
    assert answer(answer=f"{sentence} The answer is 4.") == answer(answer=f"{sentence}\n#### 4") == "4"
    assert answer(answer=sentence, solution="So \\boxed{4}") == "4"
    problem = read_problem({"question": "?", "answer": f"{sentence} So \\boxed{{4}}."}, {})
    assert problem.solution == f"{sentence} So \\boxed{{4}}."


def test_calculator_marks_and_thoughts_are_no_part_of_a_solution():
    worked = "She sold 48/2 = <<48/2=24>>24 in May.\nThat is 48+24 = <<48+24=72>>72.\n#### 72"
    problem = read_problem({"question": "How many clips?", "answer": worked}, {})
    assert problem.answer == "72"
    assert problem.solution == "She sold 48/2 = 24 in May.\nThat is 48+24 = 72."
    text = "Hm, maybe \\boxed{1}?\n</think>\nAdd them.\nSo it is \\boxed{3}."
    for written in (text, f"<think>\n{text}"):
        problem = read_problem({"problem": "?", "solution": written}, {})
        assert (problem.answer, problem.solution) == ("3", "Add them.\nSo it is \\boxed{3}.")


def test_columns_are_found_in_any_case_or_reported_with_those_that_exist():
    assert read_problem({"question": "?", "answer": "2", "id": 7}, {}).id == "7"
    assert read_problem({"question": "?", "answer": "2", "solution": "Count on."}, {}).solution == "Count on."
    problem = read_problem({"Unique_ID": "u", "Question": "?", "ANSWER": "2", "ID": 7}, {})
    assert (problem.answer, problem.id) == ("2", "7")
    with pytest.raises(BadRow, match="no known column, found: prompt, target") as caught:
        read_problem({"prompt": "q", "target": "a"}, {})
    assert "question and answer" in caught.value.hint
    error = refused({"question": "question", "answer": "golden"}, gold="1")
    assert error.message == "no column golden, found: question, gold"
    assert "answer_column" in error.hint
    assert refused({"question": "question"}, gold="1").reason == "no_answer"


def test_id_like_those_of_the_chats_feedback_is_replaced_by_a_hash():
    problem = read_problem({"id": "feedback-1", "question": "?", "answer": "2"}, {})
    assert problem.id == hashlib.sha256(b"?").hexdigest()[:12]


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        (["3", "5"], "list"),
        ({"value": 7}, "dict"),
        ([{"value": 7}], "dict"),
        (b"2", "bytes"),
        (date(2020, 1, 2), "date"),
    ],
)
def test_other_types_are_rejected(cell, kind):
    error = refused(answer=cell)
    assert error.reason == "not_text"
    assert error.message == f"the answer is neither text nor a number, but a {kind}"


@pytest.mark.parametrize("cell", [None, "", " ", math.nan, []])
def test_missing_cells_are_not_answers_and_another_column_is_read(cell):
    assert refused(answer=cell).reason == "no_answer"
    assert refused(question=cell, answer="1").reason == "no_question"
    if not isinstance(cell, list):
        row = {"question": cell, "problem": "What is 1 + 1?", "answer": "2"}
        assert read_problem(row, {}).question == "What is 1 + 1?"


def test_lone_surrogate_is_replaced():
    problem = read_problem({"question": "What \ud83d is 1+1?", "answer": "2\udc00", "id": "\ud83d"}, {})
    assert (problem.id, problem.question, problem.answer) == ("?", "What ? is 1+1?", "2?")
