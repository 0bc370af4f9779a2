"""Converts a row in any of the usual formats (GSM8K, MATH, MetaMath, plain, ...) to a problem.

The columns are found by name (`USUAL`), the answer in a solution by the last box, `#### 72` or "The answer is 72".
"""

import hashlib
import re
from collections.abc import Mapping
from decimal import Decimal

from sclite.data.sources import BadRow, Cells
from sclite.grading.extract import boxed
from sclite.records import FROM_FEEDBACK, Problem
from sclite.trace import without_thoughts

FORMS = "question and answer (GSM8K, or plain), or problem and solution with \\boxed{} (MATH)"
MARKS = "`#### ANSWER`, `\\boxed{ANSWER}` or `The answer is ANSWER.`"
USUAL = {
    "question": ("question", "problem", "query"),
    "answer": ("answer", "final_answer", "expected_answer"),
    "solution": ("solution", "response", "r1_solution_1", "generated_solution"),
    "id": ("id", "unique_id"),
}
"""The columns that are read by default; the first non-empty one counts. Case is ignored."""
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_SAID = re.compile(r"\bthe (?:final |correct )?answer is:?[ \t]+", re.I)
_LEAD = re.compile(r"(?:the )?(?:final )?answer(?: is)?:?\s+", re.I)
_HEADING = re.compile(r"(?:step|part|case|solution|remark|note)\b|\d+[.)]\s+[A-Za-z]", re.I)
_SENTENCE = re.compile(r"[.!?](?:\s+[A-Z]|\s*\Z)|\n")


def read_problem(row: Cells | BadRow, columns: Mapping[str, str]) -> Problem:
    """The problem in a row; `columns` maps question, answer, solution and id to column names. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    id_, question = read_question(row, columns)
    text = to_text(_cell(row, columns, "answer"), "the answer")
    text = "" if text.lower() in ("proof", "notfound") else text  # NuminaMath's words for none
    worked = len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)) >= 5 and _SENTENCE.search(text)
    gold, solution = _extract_gold(text) if worked or "####" in text else (text, "")
    # the thoughts of a reasoning model are not a worked solution, and ten times as long
    written = without_thoughts(to_text(_cell(row, columns, "solution"), "the solution"))
    solution_gold, stripped = _extract_gold(written)
    if not gold and not solution_gold:
        why, hint = "no answer", f"add `answer`, or end the solution with {MARKS}"
        if text:
            why = f"no answer: {columns.get('answer', 'answer')} is a worked solution without {MARKS}"
            hint = "set problems.answer_column to the column of the final answer"
        raise BadRow("no_answer", why, hint)
    solution = _CALCULATOR.sub("", stripped or solution).strip()
    return Problem(id=id_, question=question, answer=gold or solution_gold, solution=solution or None)


def read_question(row: Cells | BadRow, columns: Mapping[str, str]) -> tuple[str, str]:
    """(id, question) of a row, which needs no answer; the default id is a hash of the question. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    question = to_text(_cell(row, columns, "question"), "the question")
    if not question:
        if columns.get("question") or {name.lower() for name in row}.intersection(USUAL["question"]):
            raise BadRow("no_question", "the question is empty", "fill it in or remove the row")
        hint = f"pass --set problems.question_column=NAME and problems.answer_column=NAME, or rename the columns: {FORMS}"
        raise BadRow("no_known_column", f"no known column, found: {', '.join(row)}", hint)
    cell = _cell(row, columns, "id")
    id_ = to_text(cell, "the id") if isinstance(cell, str | int | float) else ""
    if not id_ or id_.startswith(FROM_FEEDBACK):
        id_ = hashlib.sha256(question.encode()).hexdigest()[:12]
    return id_, question


def to_text(value: object, name: str) -> str:
    """A cell, or the one element of a list, as text; empty if it is missing. BadRow for anything but text and numbers."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == [] or value != value:  # NaN does not equal itself
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float | Decimal):
        hint = f"write it as a string, or set problems.{name.split()[-1]}_column to another column"
        raise BadRow("not_text", f"{name} is neither text nor a number, but a {type(value).__name__}", hint)
    return str(value).encode("utf-8", "replace").decode().strip()  # lone surrogates cannot be written


def _cell(row: Cells, columns: Mapping[str, str], role: str) -> object:
    """The first filled cell of a role's columns, or None. Raises BadRow if a configured column is missing."""
    if role in columns and columns[role] not in row:
        why = f"no column {columns[role]}, found: {', '.join(row)}"
        key = f"--set problems.{role}_column="
        raise BadRow("no_known_column", why, f"pass {key}NAME with one of them, or {key} for the usual names")
    by_name = {name.lower(): cell for name, cell in row.items()}
    names = [columns[role].lower()] if role in columns else USUAL[role]
    cells = [by_name[name] for name in names if name in by_name]
    return next((cell for cell in cells if cell == cell and str("" if cell is None else cell).strip()), None)


def _extract_gold(text: str) -> tuple[str, str]:
    """(answer, text without its mark) of a worked solution: in its last box, after `####`, or from its last line."""
    if box := boxed(text):
        return box, text
    # `####` may also start a Markdown heading
    before, mark, after = text.rpartition("####")
    answer = _LEAD.sub("", after.strip(), count=1).partition("\n")[0].strip()
    if mark and answer and not _HEADING.match(answer):
        return answer, before
    *_, last = text.strip().splitlines() or [""]
    answer = _SAID.split(last)[-1] if _SAID.search(last) else ""
    return re.split(r"\.(?=\s|$)", answer, maxsplit=1)[0].strip(), text
