r"""Equality of two answers, where it needs no algebra.

Graders differ on these cases; the rules here (for numbers and units: sclite/grading/numbers.py) are:

- 1, 2 and \{1, 2\} are sets: order does not matter. (1, 2) is ordered, and so is a list that is compared with it. A
  column vector equals the tuple of its entries. (1, 2], [1, 2] and (1, 2) all differ. "or", "and" and \pm make lists.
- (C), C, "Option C" and "C. 12 apples" are the same choice, and "(C) 12" equals 12. 5:30 is a time, except next to 6 to
  36; 4:6 is a ratio.
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
_RATIOS = re.compile(r"\d+(?:(?: ?: ?| to )\d+)+")  # 1:2:3, 1 to 2
_DATE = re.compile(r"()(\d{1,2}) ([A-Z][a-z]{2,8})|([A-Z][a-z]{2,8}) (\d{1,2})()")
_BASE = re.compile(r"([0-9A-Z]*\d[0-9A-Z]*)(?:_\{(\w+)\})?")
_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z' -]+")
_VARIABLE = r"(?:[A-Za-z]|\\(?!in|frac|sqrt|pi|infty)[a-z]+)(?:_\{?\w+\}?)?'{0,3}"
_NAME = re.compile(
    rf"{_VARIABLE}|\\frac\{{d[a-z]\}}\{{d[a-z]\}}|{_VARIABLE} ?\([a-zA-Z0-9](?:, ?[a-z0-9])*\)|[A-Za-z]{{2,}}(?: [A-Za-z]+){{0,4}}|m?\\angle ?[A-Z]+|\|[A-Z]{{2}}\|"
    rf"|\({_VARIABLE}(?:, ?{_VARIABLE})+\)|{_VARIABLE} ?[:/] ?{_VARIABLE}|\\frac\{{[A-Z]{{2}}\}}\{{[A-Z]{{2}}\}}"
)
_GREEK = "alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|(?:var)?phi|chi|psi|omega|Delta|Omega|Phi|Lambda|Sigma"
_LETTER = re.compile(rf"(?<![\\A-Za-z])[A-Za-z]|\\(?:{_GREEK})(?![a-z])")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_BRACKETED = re.compile(r"(?:\\?(\{)|([(\[]))(.*?)(?:\\?\}|([)\]]))", re.DOTALL)
_MOD = re.compile(r" ?\(?\\?p?mod ?\{?\d+\}?\)?$")
_RELATION = re.compile(r"[<>]|!=|\\(?:[lg]t|[lgn]eq?|[lg]eqslant)(?![a-z])")


def compare(given: str, gold: str, leaf: Leaf) -> Verdict:
    """Compare two normalized answers part by part; `leaf` decides on parts that are neither numbers nor text."""
    if squeeze(given) == squeeze(gold):
        return True
    if bool(_MOD.search(given)) != bool(_MOD.search(gold)):
        return compare(_MOD.sub("", given), _MOD.sub("", gold), leaf)
    decided = _compare_plain(given, gold)
    if decided is not None:
        return decided
    for one, other in ((given, gold), (gold, given)):
        label = _CHOICE.fullmatch(one)
        if label and label[4] and not _CHOICE.fullmatch(other):  # (C) 12 against 12
            return compare(label[4], other, leaf)
    for one, other in ((given, gold), (gold, given)):
        if len(rounded := split(one, ("\\approx",))) == 2:  # 1/3 \approx 0.33 matches both
            sides = [side for side in rounded if side == "e" or not _NAME.fullmatch(side)]
            return _any(compare(side, other, leaf) for side in sides or rounded)
    both = all(len(_split_list(text)) == text.count("=") for text in (given, gold))
    (name, value), (gold_name, gold_value) = _split_name(given, both), _split_name(gold, both)
    if (value, gold_value) != (given, gold) and not (name and gold_name and name != gold_name):
        return compare(value, gold_value, leaf)
    if name or gold_name:  # y = 2x against 2x = y: two equations
        return leaf(given, gold)
    # lists, sets, tuples, intervals and matrices: part by part
    (kind, parts), (gold_kind, gold_parts) = _parts(given), _parts(gold)
    kinds = {kind, gold_kind}
    related = kinds != {"list"} and any(_RELATION.search(part) for part in (*parts, *gold_parts))
    if kinds == {"", "list"} and not related:
        return False
    if "" not in kinds and not related:
        unordered = kinds <= {"list", "set"} and len(parts) * len(gold_parts) < 2000
        column = f"matrix {len(parts)}x1"
        if not unordered and len(kinds) > 1 and kinds not in ({"list", "()"}, {"list", "[]"}, {"()", column}):
            return False
        if len(parts) != len(gold_parts) and "set" not in kinds:
            return False
        if unordered:
            rest, verdicts = list(gold_parts), []
            for part in parts:
                seen = [compare(part, other, leaf) for other in rest]
                if True in seen and "set" not in kinds:
                    del rest[seen.index(True)]
                verdicts.append(_any(seen))
            if "set" in kinds:
                verdicts += [_any(compare(part, other, leaf) for part in parts) for other in gold_parts]
        else:
            verdicts = [compare(a, b, leaf) for a, b in zip(parts, gold_parts, strict=True)]
        if False in verdicts:
            return False
        if None not in verdicts:
            return True
    (given, factor, unit), (gold, gold_factor, gold_unit) = strip_unit(given), strip_unit(gold)
    if unit and gold_unit and (unit != gold_unit or factor != gold_factor):
        return False
    return leaf(given, gold)


def _compare_plain(given: str, gold: str) -> bool | None:
    """The verdict on times, dates, numbers, choices, numbers in a base, sentences and words; None for other answers."""

    def matches(pattern: re.Pattern[str]) -> list[re.Match[str]]:
        return [found for text in (given, gold) if (found := pattern.fullmatch(text))]

    number, gold_number = parse_quantity(given), parse_quantity(gold)
    clocks = matches(_CLOCK)
    if len(clocks) == 2 and all(m[2] or m[4] for m in clocks):
        alone = [int(m[1]) for m in clocks if not m[4]]
        either = len(alone) == 1 and 1 <= alone[0] <= 12  # 14:30 is 2:30 pm, and 2:30 alone may be am or pm
        hours = [int(m[1]) % 12 + 12 * (m[4] in "pP") if m[4] else int(m[1]) for m in clocks]
        minutes = {(int(m[2] or 0), int(m[3] or 0)) for m in clocks}
        return len({hour % 12 if either else hour for hour in hours}) == len(minutes) == 1
    if any(m[2] for m in clocks) and " to " not in f"{given} {gold}":
        return False if number or gold_number else None
    ratios = [[int(n) for n in re.findall(r"\d+", m[0])] for m in matches(_RATIOS)]
    if len(ratios) == 2:
        same_length = len(ratios[0]) == len(ratios[1])
        return same_length and len({Fraction(a, b or 1) for a, b in zip(*ratios, strict=True)}) == 1
    dates = matches(_DATE)
    if len(dates) == 2:
        months = [(m[3] or m[4]).casefold() for m in dates]
        days = {m[2] or m[5] for m in dates}
        return len({SYNONYMS.get(month, month) for month in months}) == len(days) == 1
    if number and gold_number:
        return number.equals(gold_number)
    labels = matches(_CHOICE)
    if len(labels) == 2:
        rests = {m[4].casefold() for m in labels if m[4]}
        return len({(m[1] or m[2] or m[3] or m[5]).upper() for m in labels}) == 1 and len(rests) < 2
    bases = matches(_BASE)
    if len(bases) == 2 and any(m[2] for m in bases):
        return bases[0][1] == bases[1][1] and len({m[2] for m in bases if m[2]}) == 1
    if quantity := number or gold_number:
        other = gold if number else given
        if re.search("[A-Za-z]{2}", other) and not re.search(r"[\\^_<>]", other):
            sentence = number_in_sentence(other)
            if sentence is not None or not re.search("=", other):
                return sentence is not None and sentence.equals(quantity)
    listed = any(re.search(r"\b(?:and|or)\b", text) for text in (given, gold))
    return False if not listed and matches(_WORDS) else None


def _split_name(text: str, sort: bool = True) -> tuple[str, str]:
    """(name, value): x and 5 for x = 5 and 5 = x, (x,y) and (1, 2) for x = 1, y = 2; "=" and all for other equations."""
    listed = _split_list(text)
    if len(listed) > 1:
        pairs = sorted(_split_name(part) for part in listed) if all("=" in part for part in listed) else []
        names = [name for name, _ in pairs]
        if len(set(names)) < max(2, len(names)) or not all(re.fullmatch(_VARIABLE, name) for name in names):
            return "", text
        ordered = pairs if sort or set(names) <= {"x", "y", "z"} else [_split_name(part) for part in listed]
        return f"({','.join(names)})", f"({', '.join(value for _, value in ordered)})"
    sides = split(text, ("=", "\\in"))
    if len(sides) < 2 or _RELATION.search(text):
        return "", text
    if _NAME.fullmatch(sides[-1]) and not _NAME.fullmatch(sides[0]):
        sides.reverse()
    *names, value = sides
    if not all(_NAME.fullmatch(side) or not _LETTER.search(side) for side in names):
        return "=", text
    named = [side.replace(" ", "") for side in names if _NAME.fullmatch(side)]
    if not named and _LETTER.search(value) and not parse_quantity(value):
        return "=", text
    return named[0] if named else "", value


def _any(verdicts: Iterable[Verdict]) -> Verdict:
    seen = set(verdicts)
    return True if True in seen else None if None in seen else False


def _parts(text: str) -> tuple[str, list[str]]:
    """(kind, parts); kind is "list", "set", "matrix RxC", the two brackets, or "" for a single part."""
    if text.startswith("[[") and text.endswith("]]"):
        lines = [row.strip(" []").replace(",", "&") for row in _split_list(text[1:-1])]
        text = "\\begin{matrix}" + "\\\\".join(lines) + "\\end{matrix}"
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\(?:\[\w+\])?", matrix[2]) if row.strip()]
        columns = len(rows[0]) if rows else 0
        return f"matrix {len(rows)}x{columns}", [cell.strip() for row in rows for cell in row]
    pieces = [text] if parse_quantity(text) else _split_list(text)
    listed = [part for piece in pieces for part in _expand_plus_minus(piece)]
    if len(listed) > 1:
        return "list", listed
    inner = _BRACKETED.fullmatch(text)
    if inner and all(split(f"{part}=", ("=",)) == [part.strip(), ""] for part in (text, inner[3])):
        inside = [part for piece in split(inner[3], (",", ";")) for part in _expand_plus_minus(piece)]
        kind = "set" if inner[1] else inner[2] + (inner[4] or "")
        if len(inside) > 1:
            return "list" if kind == "[]" and len(inside) > 2 else kind, inside
    return "", [text]


def _split_list(text: str) -> list[str]:
    text = re.sub(r"\s*(?:[,;]\s*)?(?:\b(?:and|or)\b|(?<= )\\?&(?= ))\s*", ", ", text)
    return split(text, (";",) if ";" in text else (",",))


def _expand_plus_minus(text: str) -> list[str]:
    if text.count("\\pm") != 1:
        return [text]
    return [re.sub(r"^\s*\+\s*", "", text.replace("\\pm", "+")), text.replace("\\pm", "-")]
