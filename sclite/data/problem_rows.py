"""Converts a row in any of the usual formats (GSM8K, MATH, MetaMath, plain, ...) to a problem.

The columns are found by name (`USUAL`), the answer in a solution by `#### 72`, the last box or "The answer is 72".
"""

import hashlib
import math
import re
from collections.abc import Mapping
from decimal import Decimal

from sclite.data.sources import BadRow, Cells, replace_surrogates
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
_FIELDS = set(Problem.model_fields)
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_SAID = re.compile(r"\bthe (?:final |correct )?answer is:?[ \t]+", re.I)
_ANSWER_HEADING = re.compile(r"#{1,6}[ \t]*(?:final )?answer:?", re.I)
_LEAD = re.compile(r"(?:the )?(?:final )?answer(?: is)?:?[ \t]+", re.I)
_HEADING = re.compile(r"[A-Za-z]+(?: \d+)?[:.]|(?:step|part|case|solution)\b|\d+[.)]\s+[A-Za-z]", re.I)
_SENTENCE = re.compile(r"[.!?](?:\s+[A-Z]|\s*\Z)|\n")


def read_problem(row: Cells | BadRow, columns: Mapping[str, str]) -> Problem:
    """The problem in a row; `columns` maps question, answer, solution and id to column names. Raises BadRow."""
    answer, solution = _cells(row, columns, "answer", "solution")
    id_, question = read_question(row, columns)
    text, bad_answer = "", None
    try:
        text = to_text(answer, "the answer")
        text = "" if text.lower() in ("proof", "notfound") else text  # NuminaMath's words for none
    except BadRow as error:  # the solution may still have it
        bad_answer = error
    gold, worked = _extract_gold(text) if "####" in text or _is_worked(text) else (text, "")
    # the thoughts of a reasoning model are not a worked solution, and ten times as long
    solution_gold, stripped = _extract_gold(without_thoughts(to_text(solution, "the solution")))
    if not gold and not solution_gold:
        if bad_answer:
            raise bad_answer
        if text:
            why = f"no answer: {columns.get('answer', 'answer')} is a worked solution without {MARKS}"
            raise BadRow("no_answer", why, "set problems.answer_column to the column of the final answer")
        raise BadRow("no_answer", "no answer", f"add `answer`, or end the solution with {MARKS}")
    # already validated; sharing the set of fields saves a tenth of the memory
    return Problem.model_construct(
        _FIELDS,
        id=id_,
        question=question,
        answer=gold or solution_gold,
        solution=_CALCULATOR.sub("", stripped or worked).strip() or None,
    )


def read_question(row: Cells | BadRow, columns: Mapping[str, str]) -> tuple[str, str]:
    """(id, question) of a row, which needs no answer; the default id is a hash of the question. Raises BadRow."""
    cell, named = _cells(row, columns, "question", "id")
    question = to_text(cell, "the question")
    if not question:
        raise BadRow("no_question", "the question is empty", "fill it in or remove the row")
    id_ = to_text(named, "the id") if isinstance(named, str | int | float) else ""
    if id_ and not id_.startswith(FROM_FEEDBACK):
        return id_, question
    return hashlib.sha256(question.encode()).hexdigest()[:12], question


def to_text(value: object, name: str) -> str:
    """A cell, or the one element of a list, as text; empty if it is missing. BadRow for anything but text and numbers."""
    if isinstance(value, list | tuple) and len(value) < 2:
        value = value[0] if value else None
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, float | Decimal) and math.isinf(value):
        raise BadRow("not_text", f"{name} is infinite")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if not isinstance(value, str | int | float | Decimal):
        kind = "an object" if isinstance(value, dict) else type(value).__name__
        kind = f"a list of {len(value)}" if isinstance(value, list | tuple) else kind
        hint = f"write it as a string, or set problems.{name.split()[-1]}_column to another column"
        raise BadRow("not_text", f"{name} is {kind}", hint)
    return replace_surrogates(str(value)).strip()


def _cells(row: Cells | BadRow, columns: Mapping[str, str], *roles: str) -> list[object]:
    """For each role the first filled cell of its columns, or None. Raises BadRow if a column is missing."""
    if isinstance(row, BadRow):
        raise row
    by_name = {str(name).lower(): cell for name, cell in row.items()}
    found: dict[str, list[object]] = {}
    for role in roles:
        usual = [by_name[name] for name in USUAL[role] if name in by_name]
        found[role] = [row.get(columns[role])] if role in columns else usual
    absent = [role for role in (*roles, "id") if role in columns and columns[role] not in row]
    if absent or not any(cells for role, cells in found.items() if role != "id"):
        why, present = "no known column", replace_surrogates(", ".join(map(str, row))) or "none"
        hint = f"pass --set problems.question_column=NAME and problems.answer_column=NAME, or rename the columns: {FORMS}"
        if absent:
            why, key = f"no column {columns[absent[0]]}", f"--set problems.{absent[0]}_column="
            hint = f"pass {key}NAME with one of them, or {key} for the usual names"
        raise BadRow("no_known_column", f"{why}, found: {present}", hint)
    # filled in: neither None nor NaN, which does not equal itself, nor blank
    filled = (filter(lambda c: c is not None and c == c and str(c).strip(), each) for each in found.values())
    return [next(cells, None) for cells in filled]


def _is_worked(text: str) -> bool:
    """Whether a text consists of sentences rather than an answer."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)
    return len(words) >= 5 and _SENTENCE.search(text) is not None


def _extract_gold(text: str) -> tuple[str, str]:
    """(answer, text without its mark) of a worked solution: after `####`, in its last box, or from its last line."""
    # `####` may also start a Markdown heading: an answer that is not a number counts only at the start of a line
    before, mark, after = text.rpartition("####")
    answer, *rest = [line.strip() for line in after.strip().splitlines()] or [""]
    answer = _LEAD.sub("", answer, count=1) if _LEAD.match(answer) else answer
    box = boxed(text)
    if mark and answer and (not rest or (len(rest) == 1 and _SAID.search(rest[0]))):
        number = re.match(r"[-+$]{0,2}[ \t]?[\d.\\]", answer)
        alone = before.rpartition("\n")[2].strip() == "" and "####" not in before
        heading = _HEADING.match(answer) or _is_worked(answer)
        if not heading and (number or (alone and not box)):
            return answer, before
    if box:
        return box, text
    *lines, last = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if lines and _ANSWER_HEADING.fullmatch(lines[-1]):
        return last, text
    answer = _SAID.split(last)[-1] if _SAID.search(last) else ""
    return re.split(r"\.(?=\s|$)", answer, maxsplit=1)[0].strip(), text
