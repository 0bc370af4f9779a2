r"""Equality of two answers, as far as it needs no algebra.

Graders differ on these cases; the rules here (for numbers and units: sclite/grading/numbers.py) are:

- 1, 2 and \{1, 2\} are sets: order does not matter. (1, 2) is ordered, and so is a list that is compared with it. A column
  vector equals the tuple of its entries. (1, 2], [1, 2] and (1, 2) all differ. "or", "and" and \pm make lists.
- (C), C, "Option C" and "C. 12 apples" are the same choice, and "(C) 12" equals 12. 5:30 is a time; 4:6 is a ratio.
- x = 5 equals 5, unless the other answer has another name. A base (2516_8) may be missing on one side.
"""

import re
from collections.abc import Callable, Iterable
from fractions import Fraction

from sclite.grading.normalization import SYNONYMS, split, squeeze
from sclite.grading.numbers import number_in_sentence, parse_quantity, strip_unit

Verdict = bool | None
"""None is unknown (a timeout or a failure of the grader), which is never counted as wrong."""
Leaf = Callable[[str, str], Verdict]

_CHOICE = re.compile(
    r"(?:\(([A-Za-z])\)|\[([A-Z])\]|([A-J])(?:[).:]| -(?= \d)|(?=$)))(?: ?(\S.*))?|([a-z])[).]"
)
_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))?(?::([0-5]\d))? ?(?:([ap])\.? ?m\b\.?)?", re.IGNORECASE)
_DATE = re.compile(r"()(\d{1,2}) ([A-Z][a-z]{2,8})|([A-Z][a-z]{2,8}) (\d{1,2})()")
_BASE = re.compile(r"([0-9A-Z]*\d[0-9A-Z]*)(?:_\{(\w+)\})?")
_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z' -]+")
_VARIABLE = r"(?:[A-Za-z]|\\(?!in|frac|sqrt|pi|infty)[a-z]+)(?:_\{?\w+\}?)?'{0,3}"
_NAME = re.compile(
    rf"{_VARIABLE}|\\frac\{{d[a-z]\}}\{{d[a-z]\}}|{_VARIABLE} ?\([a-zA-Z0-9](?:, ?[a-z0-9])*\)|[A-Za-z]{{2,}}(?: [A-Za-z]+){{0,4}}|m?\\angle ?[A-Z]+|\|[A-Z]{{2}}\|"
    rf"|\({_VARIABLE}(?:, ?{_VARIABLE})+\)|{_VARIABLE} ?[:/] ?{_VARIABLE}|\\frac\{{[A-Z]{{2}}\}}\{{[A-Z]{{2}}\}}"
)
_LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_MOD = re.compile(r" ?\(?\\?p?mod ?\{?\d+\}?\)?$")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-z])")


def compare(given: str, gold: str, leaf: Leaf) -> Verdict:
    """Compare two normalized answers part by part; `leaf` decides on parts that are neither numbers nor text."""
    if squeeze(given) == squeeze(gold):
        return True
    if bool(_MOD.search(given)) != bool(_MOD.search(gold)):
        return compare(_MOD.sub("", given), _MOD.sub("", gold), leaf)
    decided = _compare_plain(given, gold)
    if decided is not None:
        return decided
    labels = _CHOICE.fullmatch(given), _CHOICE.fullmatch(gold)
    for label, other in zip(labels, (gold, given), strict=True):
        if label and label[4] and None in labels:  # (C) 12 against 12
            return compare(label[4], other, leaf)
    for one, other in ((given, gold), (gold, given)):
        if len(rounded := split(one, ("\\approx",))) == 2:  # 1/3 \approx 0.33 matches both
            return _any(compare(side, other, leaf) for side in rounded)
    (name, value), (gold_name, gold_value) = _split_name(given), _split_name(gold)
    if (value, gold_value) != (given, gold) and not (name and gold_name and name != gold_name):
        return compare(value, gold_value, leaf)
    if name or gold_name:  # y = 2x against 2x = y: two equations
        return leaf(given, gold)
    decided = _compare_parts(_parts(given), _parts(gold), leaf)
    if decided is not None:
        return decided
    (given, factor, unit), (gold, gold_factor, gold_unit) = strip_unit(given), strip_unit(gold)
    if unit and gold_unit and (unit != gold_unit or factor != gold_factor):
        return False
    return leaf(given, gold)


def _compare_plain(given: str, gold: str) -> bool | None:
    """The verdict on times, dates, numbers, choices, numbers in a base, sentences and words; None for other answers."""
    clocks = _CLOCK.fullmatch(given), _CLOCK.fullmatch(gold)
    if all(clocks) and all(c[2] or c[4] for c in clocks):
        return _same_time(*(c.groups() for c in clocks))
    if any(c and c[2] for c in clocks):
        return False if any(parse_quantity(text) for text in (given, gold)) else None
    if all(re.fullmatch(r"\d+(?: ?: ?\d+){2,}", text) for text in (given, gold)):  # 1:2:3
        ratio, gold_ratio = ([int(n) for n in text.split(":")] for text in (given, gold))
        if len(ratio) != len(gold_ratio):
            return False
        return len({Fraction(a, b or 1) for a, b in zip(ratio, gold_ratio, strict=True)}) == 1
    dates = _DATE.fullmatch(given), _DATE.fullmatch(gold)
    if all(dates):
        months = [(date[3] or date[4]).casefold() for date in dates]
        days = {date[2] or date[5] for date in dates}
        return len({SYNONYMS.get(month, month) for month in months}) == len(days) == 1
    numbers = parse_quantity(given), parse_quantity(gold)
    if all(numbers):
        return numbers[0].equals(numbers[1])
    labels = _CHOICE.fullmatch(given), _CHOICE.fullmatch(gold)
    if all(labels):
        rests = {m[4].casefold() for m in labels if m[4]}
        return len({(m[1] or m[2] or m[3] or m[5]).upper() for m in labels}) == 1 and len(rests) < 2
    bases = _BASE.fullmatch(given), _BASE.fullmatch(gold)
    if all(bases) and any(m[2] for m in bases):
        return bases[0][1] == bases[1][1] and len({m[2] for m in bases if m[2]}) == 1
    if any(numbers):
        number, other = (numbers[0], gold) if numbers[0] else (numbers[1], given)
        if re.search("[A-Za-z]{2}", other) and not re.search(r"[\\^_<>]", other):
            sentence = number_in_sentence(other)
            return sentence is not None and sentence.equals(number)
    listed = any(re.search(r"\b(?:and|or)\b", text) for text in (given, gold))
    return False if not listed and any(_WORDS.fullmatch(text) for text in (given, gold)) else None


def _same_time(a: tuple[str | None, ...], b: tuple[str | None, ...]) -> bool:
    """Compare (hours, minutes, seconds, a or p): 14:30 is 2:30 pm, and 2:30 alone may be am or pm."""

    def times(
        hour: str, minute: str | None, second: str | None, half: str | None
    ) -> set[tuple[int, int, int]]:
        hours = {int(hour) % 12 + (12 if half.lower() == "p" else 0)} if half else {int(hour)}
        return {(h, int(minute or 0), int(second or 0)) for h in hours}

    either = bool(a[3]) != bool(b[3]) and 1 <= int((b if a[3] else a)[0]) <= 12
    return bool(
        {((h % 12 if either else h), m, s) for h, m, s in times(*a)}
        & {((h % 12 if either else h), m, s) for h, m, s in times(*b)}
    )


def _split_name(text: str) -> tuple[str, str]:
    """(name, value): x and 5 for x = 5 and 5 = x, (x,y) and (1, 2) for x = 1, y = 2; for other equations the name is "="."""
    listed = _split_list(text)
    if len(listed) > 1:
        pairs = sorted(_split_name(part) for part in listed) if all("=" in part for part in listed) else []
        names = [name for name, _ in pairs]
        if len(set(names)) < max(2, len(names)) or not all(re.fullmatch(_VARIABLE, name) for name in names):
            return "", text
        return f"({','.join(names)})", f"({', '.join(value for _, value in pairs)})"
    sides = split(text, ("=", "\\in"))
    if len(sides) < 2 or _RELATION.search(text):
        return "", text
    if _NAME.fullmatch(sides[-1]) and not _NAME.fullmatch(sides[0]):
        sides.reverse()
    *names, value = sides
    if not all(_NAME.fullmatch(side) or not _LETTER.search(side) for side in names):
        return "=", text
    if (
        not any(_NAME.fullmatch(side) for side in names)
        and _LETTER.search(value)
        and not parse_quantity(value)
    ):
        return "=", text
    return next((side.replace(" ", "") for side in names if _NAME.fullmatch(side)), ""), value


def _compare_parts(given: tuple[str, list[str]], gold: tuple[str, list[str]], leaf: Leaf) -> Verdict:
    (kind, parts), (gold_kind, gold_parts) = given, gold
    kinds = {kind, gold_kind}
    if any(_RELATION.search(part) for part in (*parts, *gold_parts)) and kinds != {"list"}:
        return None
    if kinds == {"", "list"}:
        return False
    if "" in kinds or ("union" in kinds and len(kinds) > 1):
        return None
    unordered = (kinds <= {"list", "set"} or kinds == {"union"}) and len(parts) * len(gold_parts) < 2000
    column = f"matrix {len(parts)}x1"
    if not unordered and len(kinds) > 1 and kinds not in ({"list", "()"}, {"list", "[]"}, {"()", column}):
        return False
    if len(parts) != len(gold_parts) and "set" not in kinds:
        return None if kinds == {"union"} else False
    if not unordered:
        return _all(compare(a, b, leaf) for a, b in zip(parts, gold_parts, strict=True))
    rest, verdicts = list(gold_parts), []
    for part in parts:
        seen = [compare(part, other, leaf) for other in rest]
        if True in seen and "set" not in kinds:
            del rest[seen.index(True)]
        verdicts.append(_any(seen))
    if "set" in kinds:
        verdicts += [_any(compare(part, other, leaf) for part in parts) for other in gold_parts]
    return None if kinds == {"union"} and False in verdicts else _all(verdicts)


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    seen = set(verdicts)
    return False if False in seen else None if None in seen else True


def _any(verdicts: Iterable[Verdict]) -> Verdict:
    seen = set(verdicts)
    return True if True in seen else None if None in seen else False


def _parts(text: str) -> tuple[str, list[str]]:
    """(kind, parts); kind is "list", "set", "union", "matrix RxC", the two brackets, or "" for a single part."""
    if text.startswith("[[") and text.endswith("]]"):
        rows = [row.strip(" []").replace(",", "&") for row in _split_list(text[1:-1])]
        text = "\\begin{matrix}" + "\\\\".join(rows) + "\\end{matrix}"
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\(?:\[\w+\])?", matrix[2]) if row.strip()]
        return f"matrix {len(rows)}x{len(rows[0]) if rows else 0}", [
            cell.strip() for row in rows for cell in row
        ]
    united = split(text, ("\\cup",))
    if len(united) > 1:
        return "union", united
    listed = [
        new
        for part in ([text] if parse_quantity(text) else _split_list(text))
        for new in _expand_plus_minus(part)
    ]
    if len(listed) > 1:
        return "list", listed
    inner = re.fullmatch(r"(?:\\?(\{)|([(\[]))(.*?)(?:\\?\}|([)\]]))", text, re.DOTALL)
    if (
        inner
        and split(f"{text}=", ("=",)) == [text, ""]
        and split(f"{inner[3]}=", ("=",)) == [inner[3].strip(), ""]
    ):
        inside = [new for part in split(inner[3], (",", ";")) for new in _expand_plus_minus(part)]
        if len(inside) == 1:
            return "", [text]
        if inner[1]:
            return "set", inside
        kind = inner[2] + (inner[4] or "")
        return "list" if kind == "[]" and len(inside) > 2 else kind, inside
    return "", [text]


def _split_list(text: str) -> list[str]:
    text = re.sub(r"\s*(?:[,;]\s*)?(?:\b(?:and|or)\b|(?<= )\\?&(?= ))\s*", ", ", text)
    return split(text, (";",) if ";" in text else (",",))


def _expand_plus_minus(text: str) -> list[str]:
    if text.count("\\pm") != 1:
        return [text]
    return [re.sub(r"^\s*\+\s*", "", text.replace("\\pm", "+")), text.replace("\\pm", "-")]
