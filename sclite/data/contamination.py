"""Contamination check: training and evaluation problems overlap if they share 13 words in a row.

A shorter question overlaps only with an identical one, signs included: `What is 2 + 1?` is not `What is 2 - 1?`.
The 13-gram criterion is that of GPT-3 (Brown et al. 2020, appendix C).
"""

import re
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from sclite.records import Problem

NGRAM = 13
SHARES = f"shares {NGRAM} words in a row, or the whole question, with"
_WORD = re.compile(r"\w+")
_SIGN = re.compile(r"\w+|[^\w\s.,;:!?\"'`’‘“”$]")
Question = tuple[str, str]
"""(its name in reports, its text)."""


def ngram_hashes(question: str) -> Iterator[int]:
    """A hash of every 13-gram, or of the whole question if it is shorter; valid within this process only."""
    text = unicodedata.normalize("NFKC", question).lower()
    words = _WORD.findall(text)
    if len(words) < NGRAM:
        yield hash(tuple(_SIGN.findall(text)))
    for start in range(len(words) - NGRAM + 1):
        yield hash(tuple(words[start : start + NGRAM]))


def build_index(questions: Iterable[Question], wanted: Container[int] | None = None) -> dict[int, str]:
    """{n-gram hash: name of the first question that contains it}, of the `wanted` hashes (default: all)."""
    index: dict[int, str] = {}
    for name, question in questions:
        for ngram in ngram_hashes(question):
            if wanted is None or ngram in wanted:
                index.setdefault(ngram, name)
    return index


def find_overlap(question: str, index: Mapping[int, str]) -> str | None:
    """The name of an indexed question that overlaps this one, or None."""
    return next((index[ngram] for ngram in ngram_hashes(question) if ngram in index), None) if index else None


def find_contaminated(problems: Sequence[Problem], training: Iterable[Question]) -> dict[str, str]:
    """{problem id: name of an overlapping training question}; memory grows with `problems`, not with `training`."""
    index = build_index(training, {ngram for p in problems for ngram in ngram_hashes(p.question)})
    return {p.id: name for p in problems if (name := find_overlap(p.question, index)) is not None}
