"""Overlap of training and evaluation problems: 13 words in a row that stand in both (METHOD section 6).

A question of fewer words overlaps only with one that says the same as a whole, signs included: `What is 2 + 1?` is
not `What is 2 - 1?`. The measure is that of GPT-3's report (Brown et al. 2020, appendix C).
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from sclite.records import Problem

SPAN = 13
"""Words in a row."""
_WORD = re.compile(r"\w+")
_SIGN = re.compile(r"\w+|[^\w\s.,;:!?\"'`’‘“”$]")
Question = tuple[str, str]
"""(the name under which an overlap is told, the text)."""


def spans(question: str) -> Iterator[int]:
    """A hash, good for this process alone, of every 13 words in a row; of all of a question that has fewer."""
    text = unicodedata.normalize("NFKC", question).lower()
    words = _WORD.findall(text)
    if len(words) < SPAN:
        yield hash(tuple(_SIGN.findall(text)))
    for start in range(len(words) - SPAN + 1):
        yield hash(tuple(words[start : start + SPAN]))


def index_of(questions: Iterable[Question]) -> dict[int, str]:
    """For each span the name of the first question that has it."""
    index: dict[int, str] = {}
    for name, question in questions:
        for span in spans(question):
            index.setdefault(span, name)
    return index


def overlap(question: str, index: Mapping[int, str]) -> str | None:
    """The name of an indexed question that this one overlaps, None where there is none."""
    if not index:
        return None
    return next((index[span] for span in spans(question) if span in index), None)


def trained_on(problems: Sequence[Problem], training: Iterable[Question]) -> dict[str, str]:
    """{id of a problem: name of a training question that it overlaps}; memory grows with the problems alone."""
    wanted = {span for problem in problems for span in spans(problem.question)}
    held: dict[int, str] = {}
    for name, question in training:
        for span in spans(question):
            if span in wanted:
                held.setdefault(span, name)
    found = ((problem.id, overlap(problem.question, held)) for problem in problems)
    return {id_: name for id_, name in found if name is not None}
