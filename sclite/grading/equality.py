r"""Comparing two written answers part by part, as far as it takes no algebra.

What is decided here and in sclite/grading/numbers.py, because graders differ on it:

- 1, 2 and {1, 2} are sets: order does not matter. (1, 2) is ordered, and so is a list compared with it. A column
  vector equals the tuple of its entries. (1, 2], [1, 2] and (1, 2) all differ. "or", "and" and \pm make lists.
- (C), C and "C. 12 apples" are the same choice. 5:30 is a time. A base (2516_8) may be missing on one side.
"""

import functools
import re
from collections.abc import Callable, Iterable

from sclite.grading.numbers import Quantity, quantity, same_quantity, says, without_unit

Verdict = bool | None
"""None is unknown (a time-out or a fault of the grader), which is never counted as wrong."""
Leaf = Callable[[str, str], Verdict]

# -- one way of writing -----------------------------------------------------------------------------------------

# fmt: off
_SIGNS = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00f7": "/", "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u2019": "'",
    "\u221a": r"\sqrt ", "\u00b0": r"^\circ ", "\u222a": r"\cup ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ",
    "\u00b1": r"\pm ", "\u00bd": r" \frac{1}{2}",
})
# fmt: on
_REWRITES = [
    (r"\\!|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])\.?", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"(?<!\\)\\[()\[\]]|\*\*(?=\S.*\*\*$)|^\*\*|\*\*$", ""),
    (r"\*\*", "^"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|emph)\s*\{([^{}]*)\}", r"\1"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", " degrees"),
    (r"\\%", "%"),
    (r"\\(?:leq|geq|neq)(?![A-Za-z])", lambda m: m.group()[:-1]),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|pi)(?![A-Za-z])", r"\\\1"),
    (r"(?<![\\A-Za-z])(?:infinity|infty|inf|oo)(?![A-Za-z])", r"\\infty"),
    (r"([)\]])\s*U\s*([(\[])", r"\1\\cup \2"),
    (r"\^(-?\d{2,})", r"^{\1}"),
    (r"\\varnothing|\\\{ ?\\\}", r"\\emptyset"),
]
_REWRITES = [(re.compile(pattern), new) for pattern, new in _REWRITES]


@functools.lru_cache(4096)  # gold answers come again with every attempt
def tidy(answer: str) -> str:
    """The answer without what only concerns its looks: dollar signs of mathematics, spacing, fonts, a final period."""
    if re.fullmatch(r"-?[\d,.]+", answer):
        return answer.rstrip(".,")
    # an escaped dollar sign is money, and so is a single one; two enclose mathematics
    text = answer.translate(_SIGNS).replace("\\$", "¤")
    text = text.replace("$", "" if text.count("$") % 2 == 0 else "¤")
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return " ".join(text.split()).rstrip(".;, ").strip()


def _squeeze(text: str) -> str:
    """For comparing as plain text: case, articles and spaces beside signs do not count."""
    text = re.sub(r"^(?:an?|the) ", "", text.casefold())
    return re.sub(r" ?([^\w ]) ?", r"\1", text).strip("'\"")


# -- comparing --------------------------------------------------------------------------------------------------

_CHOICE = re.compile(r"\(([A-Za-z])\)(?: .*)?|([A-J])(?:[).:](?: .*)?)?")
_CLOCK = re.compile(r"0?(\d{1,2}):([0-5]\d) ?(?:([ap])\.? ?m\.?)?", re.IGNORECASE)
_BASE = re.compile(r"([0-9A-Za-z]+)(?:_\{?(\w+)\}?)?")
_BASES = dict(zip(("two", "three", "four", "five", "six", "seven", "eight", "nine"), "23456789", strict=True))
_ASSIGN = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?|[a-z]\([a-z]\)|\\[a-z]+) ?(?:=|\\in(?![a-z])) ?([^=]+)")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_PIECES = re.compile(r"\\cup(?![A-Za-z])|\\[a-zA-Z]+|\\.|[()\[\]{},;]")


def compare(given: str, gold: str, leaf: Leaf) -> Verdict:
    """Compares two tidied answers part by part; what is neither number nor text nor made of parts goes to `leaf`."""
    if _squeeze(given) == _squeeze(gold):
        return True
    clocks = _CLOCK.fullmatch(given), _CLOCK.fullmatch(gold)
    if all(clocks):
        (a, b), halves = (c.groups()[:2] for c in clocks), {c[3].lower() for c in clocks if c[3]}
        return a == b and len(halves) < 2
    numbers = quantity(given), quantity(gold)
    if all(numbers):
        return same_quantity(*numbers)
    decided = _compare_words(given, gold, numbers[1])
    if decided is not None:
        return decided
    names = _ASSIGN.fullmatch(given), _ASSIGN.fullmatch(gold)
    if any(names) and not (all(names) and names[0][1] != names[1][1]):
        return compare(*(n[2] if n else text for n, text in zip(names, (given, gold), strict=True)), leaf)
    decided = _compare_parts(_parts(given), _parts(gold), leaf)
    return leaf(without_unit(given), without_unit(gold)) if decided is None else decided


def _compare_words(given: str, gold: str, value: Quantity | None) -> bool | None:
    """Choices, sentences, numbers in a base and plain words; None when it is none of them."""
    labels = _CHOICE.fullmatch(given), _CHOICE.fullmatch(gold)
    if all(labels):
        return len({(m[1] or m[2]).upper() for m in labels}) == 1
    said = says(given, value) if value else None
    if said is not None:
        return said
    bases = _BASE.fullmatch(given), _BASE.fullmatch(gold)
    if all(bases) and any(m[2] for m in bases) and all(re.search(r"\d", m[1]) for m in bases):
        return (
            bases[0][1].upper() == bases[1][1].upper()
            and len({_BASES.get(m[2], m[2]) for m in bases if m[2]}) == 1
        )
    worded = [bool(re.fullmatch(r"(?=.*[A-Za-z]{3})[A-Za-z' -]+", text)) for text in (given, gold)]
    listed = any(re.search(r"\b(?:and|or)\b", text) for text in (given, gold))
    return False if any(worded) and not listed else None


def _compare_parts(given: tuple[str, list[str]], gold: tuple[str, list[str]], leaf: Leaf) -> Verdict:
    (kind, parts), (gold_kind, gold_parts) = given, gold
    kinds = {kind, gold_kind}
    if "" in kinds and not kinds - {"", "set"} and len(parts) == len(gold_parts) == 1 and len(kinds) == 2:
        return compare(parts[0], gold_parts[0], leaf)
    if "" in kinds or ("union" in kinds and len(kinds) > 1):
        return None
    unordered = kinds <= {"list", "set"} or kinds == {"union"}
    column = f"matrix {len(parts)}x1"
    if not unordered and len(kinds) > 1 and kinds not in ({"list", "()"}, {"()", column}):
        return False
    if len(parts) != len(gold_parts):
        return None if kinds == {"union"} else False
    if not unordered:
        return _all(compare(a, b, leaf) for a, b in zip(parts, gold_parts, strict=True))
    rest, verdicts = list(gold_parts), []
    for part in parts:
        seen = [compare(part, other, leaf) for other in rest]
        if True in seen:
            del rest[seen.index(True)]
        else:
            verdicts.append(None if None in seen else False)
    return None if kinds == {"union"} and verdicts else _all(verdicts)


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    seen = set(verdicts)
    return False if False in seen else None if None in seen else True


def _parts(text: str) -> tuple[str, list[str]]:
    """What an answer is made of: ("list" | "set" | "union" | "matrix RxC" | its two brackets | "", parts)."""
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\(?:\[\w+\])?", matrix[2]) if row.strip()]
        return f"matrix {len(rows)}x{len(rows[0]) if rows else 0}", [
            cell.strip() for row in rows for cell in row
        ]
    united = _split(text, ("\\cup",))
    if len(united) > 1:
        return "union", united
    listed = _split(re.sub(r"\s*(?:[,;]\s*)?\b(?:and|or)\b\s*", ", ", text), (",", ";"))
    if len(listed) > 1:
        return "list", listed
    if text.count("\\pm") == 1:
        before, after = (side.strip() for side in text.split("\\pm"))
        return "list", [f"{before} + {after}" if before else after, f"{before} - {after}".strip()]
    if text.startswith("\\{") and text.endswith("\\}"):
        return "set", _split(text[2:-2], (",", ";"))
    if len(text) > 1 and text[0] in "([" and text[-1] in ")]":
        inside = _split(text[1:-1], (",", ";"))
        if len(inside) > 1:
            kind = text[0] + text[-1]
            return "list" if kind == "[]" and len(inside) > 2 else kind, inside
    return "", [text]


def _split(text: str, marks: tuple[str, ...]) -> list[str]:
    """The text cut at those marks that stand outside all brackets; uncut where brackets do not match."""
    depth, start, parts = 0, 0, []
    for piece in _PIECES.finditer(text):
        mark = piece.group()
        depth += (mark.lstrip("\\") in ("(", "[", "{")) - (mark.lstrip("\\") in (")", "]", "}"))
        if depth < 0:
            return [text]
        if depth == 0 and mark in marks:
            parts.append(text[start : piece.start()].strip())
            start = piece.end()
    return [text] if depth else [*parts, text[start:].strip()]
