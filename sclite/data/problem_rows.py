"""Converts a row in any of the usual formats (GSM8K, MATH, plain) to a problem."""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from sclite.data.sources import BadRow, replace_surrogates
from sclite.grading.extract import boxed
from sclite.records import Problem

FORMS = "question and answer (GSM8K, or plain), or problem and solution with \\boxed{} (MATH)"
MARKS = "`#### ANSWER`, `\\boxed{ANSWER}` or `The answer is ANSWER.`"
_USUAL = {"question": ("question", "problem"), "answer": ("answer",), "solution": ("solution",)}
_USUAL_IDS = ("id", "unique_id")
_FIELDS = set(Problem.model_fields)
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_SAID = re.compile(r"\bthe (?:final |correct )?answer is:?[ \t]+", re.I)
_ANSWER_HEADING = re.compile(r"#{1,6}[ \t]*(?:final )?answer:?", re.I)
_LEAD = re.compile(r"(?:the )?(?:final )?answer(?: is)?:?[ \t]+", re.I)
_HEADING = re.compile(r"[A-Za-z]+(?: \d+)?[:.]|(?:step|part|case|solution)\b|\d+[.)]\s+[A-Za-z]", re.I)
_SENTENCE = re.compile(r"[.!?](?:\s+[A-Z]|\s*\Z)|\n")
_WORDS_OF_A_SENTENCE = 5


def read_problem(row: Mapping[str, Any] | BadRow, columns: Mapping[str, str]) -> Problem:
    """The problem in a row. `columns` maps question, answer, solution and id to column names (default: the usual names).

    Raises BadRow with reason columns_missing, not_text, no_question or no_answer.
    """
    cells = _cells(row, columns, ("question", "answer", "solution"))
    question = _read_question(cells["question"])
    given, bad_answer = "", None
    try:
        given = to_text(cells["answer"], "the answer")
    except BadRow as error:  # the solution may still have it
        bad_answer = error
    solution = to_text(cells["solution"], "the solution")
    gold, worked = _extract_gold(given) if "####" in given or _is_worked(given) else (given, "")
    solution_gold, stripped = _extract_gold(solution)
    if not gold and not solution_gold:
        if bad_answer:
            raise bad_answer
        if given:
            why = f"no answer: {columns.get('answer', 'answer')} is a worked solution without {MARKS}"
            raise BadRow("no_answer", why, "set answer_column to the column of the final answer")
        raise BadRow("no_answer", "no answer", f"add `answer`, or end the solution with {MARKS}")
    # already validated; sharing the set of fields saves a tenth of the memory
    return Problem.model_construct(
        _FIELDS,
        id=_id(row, question, columns),
        question=question,
        answer=gold or solution_gold,
        solution=_CALCULATOR.sub("", stripped or worked).strip() or None,
    )


def read_question(row: Mapping[str, Any] | BadRow, columns: Mapping[str, str]) -> tuple[str, str]:
    """(id, question) of a row, which needs no answer; raises BadRow."""
    question = _read_question(_cells(row, columns, ("question",))["question"])
    return _id(row, question, columns), question


def to_text(value: Any, name: str) -> str:
    """A cell as text; empty if it is missing (None, NaN, an empty list).

    A list of one is read as its element. Raises BadRow (not_text) for anything else but text and numbers. Lone
    surrogates, which UTF-8 cannot encode, become U+FFFD.
    """
    if isinstance(value, list | tuple) and len(value) < 2:
        value = value[0] if value else None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise BadRow("not_text", f"{name} is bytes that are not UTF-8") from error
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        return ""
    if isinstance(value, float | Decimal) and math.isinf(value):
        raise BadRow("not_text", f"{name} is infinite")
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if not isinstance(value, str | int | float | Decimal):
        kind = {"list": f"a list of {len(value)}", "dict": "an object"} if hasattr(value, "__len__") else {}
        hint = f"write it as a string, or set {name.split()[-1]}_column to another column"
        raise BadRow("not_text", f"{name} is {kind.get(type(value).__name__, type(value).__name__)}", hint)
    return replace_surrogates(str(value)).strip()


def _cells(
    row: Mapping[str, Any] | BadRow, columns: Mapping[str, str], wanted: Iterable[str]
) -> dict[str, Any]:
    """{part: its cell or None} from the named columns, else the usual ones.

    Raises BadRow with the row's columns if a named one is absent, or none is known.
    """
    if isinstance(row, BadRow):
        raise row
    present = replace_surrogates(", ".join(map(str, row))) or "none"
    for part, name in columns.items():
        if name not in row and part in (*wanted, "id"):
            why = f"no column {name}, found: {present}"
            raise BadRow("columns_missing", why, f"set {part}_column to one of them")
    names = {part: [columns[part]] if part in columns else _USUAL[part] for part in wanted}
    known = {part for part, usual in names.items() if any(name in row for name in usual)}
    gold = {"answer", "solution"} & names.keys()
    if "question" not in known or (gold and not gold & known):
        hint = f"set question_column, answer_column and solution_column, or rename the columns: {FORMS}"
        raise BadRow("columns_missing", f"no known columns, found: {present}", hint)
    return {
        part: next((row[n] for n in usual if not _is_missing(row.get(n))), None)
        for part, usual in names.items()
    }


def _is_missing(cell: Any) -> bool:
    if isinstance(cell, str):
        return not cell.strip()
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _read_question(cell: Any) -> str:
    question = to_text(cell, "the question")
    if not question:
        raise BadRow("no_question", "the question is empty", "fill it in or remove the row")
    return question


def _id(row: Mapping[str, Any], question: str, columns: Mapping[str, str]) -> str:
    """The row's own id if it is a string or a number, else a hash of the question."""
    for name in [columns["id"]] if "id" in columns else _USUAL_IDS:
        value = row.get(name)
        if isinstance(value, str | int | float) and (own := to_text(value, "the id")):
            return own
    return hashlib.sha256(question.encode()).hexdigest()[:12]


# -- the answer in a worked solution -------------------------------------------------------------------------------


def _is_worked(text: str) -> bool:
    """Whether a text consists of sentences rather than an answer."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)
    return len(words) >= _WORDS_OF_A_SENTENCE and _SENTENCE.search(text) is not None


def _extract_gold(text: str) -> tuple[str, str]:
    """(answer, text without its mark) of a worked solution: after `####`, in its last box, or from its last line."""
    gold, worked = _extract_gsm8k(text)
    if gold:
        return gold, worked
    if gold := boxed(text):
        return gold, text
    *before, last = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if before and _ANSWER_HEADING.fullmatch(before[-1]):
        return last, text
    answer = _SAID.split(last)[-1] if _SAID.search(last) else ""
    return re.split(r"\.(?=\s|$)", answer, maxsplit=1)[0].strip(), text


def _extract_gsm8k(text: str) -> tuple[str, str]:
    """(answer, text before it) of GSM8K's final `#### 72`; ("", text) if `####` starts a Markdown heading.

    MetaMath adds a last line `The answer is: 72`. An answer that is not a number has a line of its own.
    """
    before, mark, after = text.rpartition("####")
    answer, *rest = [line.strip() for line in after.strip().splitlines()] or [""]
    answer = _LEAD.sub("", answer, count=1) if _LEAD.match(answer) else answer
    if not mark or not answer or (rest and not (len(rest) == 1 and _SAID.search(rest[0]))):
        return "", text
    number = re.match(r"[-+$]{0,2}[ \t]?[\d.\\]", answer)
    alone = before.rpartition("\n")[2].strip() == "" and "####" not in before
    if _HEADING.match(answer) or _is_worked(answer) or not (number or (alone and not boxed(text))):
        return "", text
    return answer, before
