r"""Plain numbers in an answer: value, unit, and which of them are the same.

- A percent sign is a unit: 50% equals 50, and not 0.5. Units may be missing on one side; two known ones must agree
  (5 cm is not 5 m, nothing is converted). Unknown ones (12 apples) are ignored.
- A decimal equals a number from which it differs by less than two units in the sixth place. 3:2 is the ratio 3/2.
- A sentence equals a plain gold number only when that is the one number in it, or when it ends in it, the part after
  the last "=" counting alone: "Natalia sold 72 clips." and "48 + 24 = 72 clips" equal 72, "5 apples and 3 pears" does not
  equal 3, "5 or 6" does not equal 6.
"""

import re
from fractions import Fraction

Quantity = tuple[Fraction, str, bool]
"""Value, unit ("" where there is none, "?" where it is unknown), whether it was written as a decimal."""

# one unit on each line of names, the first of which stands for all
_UNITS = """% percent; $ ¤ dollar dollars usd buck bucks; ¢ cent cents; degrees degree deg; m meter meters metre metres;
cm centimeter centimeters centimetre centimetres; mm millimeter millimeters; km kilometer kilometers kilometre kilometres;
in inch inches; ft foot feet; yd yard yards; mi mile miles; g gram grams; kg kilogram kilograms; lb lbs pound pounds;
oz ounce ounces; s sec second seconds; min mins minute minutes; h hr hrs hour hours; day days; week weeks; month months;
year years; ? unit units"""
_UNIT_OF = {name: names.split()[0] for names in _UNITS.split(";") for name in names.split()}
_WORDS = re.compile(
    r"(?!(?:and|or|to|plus|minus|times)\b)[A-Za-z][A-Za-z'-]+(?: [A-Za-z'-]+){0,4}(?<! and)(?<! or)"
)
_POWER = re.compile(r"^(?:square|sq\.?|cubic|cu\.?) | ?\^\{?[23]\}?$| (?:squared|cubed)$")
_LONG_UNITS = "|".join(re.escape(name) for name in _UNIT_OF if len(name) > 1 or not name.isalpha())
_TAIL = re.compile(rf"(?<=[\d}})]) ?(?:(?:square|sq\.?|cubic|cu\.?) )?(?:{_LONG_UNITS})(?:\^\{{?[23]\}}?)?$")
_FRACTION = re.compile(r"\\frac ?(?:\{ ?(-?\d+) ?\} ?\{ ?(\d+) ?\}|(\d) ?(\d)(?!\d))")
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_PLAIN = re.compile(
    rf"([-+]?) ?(¤?) ?(-?)(?:(?:(\d+) )?({_INTEGER}) ?/ ?({_INTEGER})|(\d+) ?: ?(\d+)"
    rf"|((?:\d{{1,3}}(?: \d{{3}})+|{_INTEGER})(?:\.\d*)?|\.\d+)"
    r"(?:(?:[eE]| ?(?:\\times|\\cdot|[x*]) ?10 ?\^) ?\{?([-+]?\d{1,3})\}?)?)(\D.*)?"
)


def quantity(text: str) -> Quantity | None:
    """What a tidied plain number says; None when the text is anything else."""
    if len(text) > 80 or not (found := _PLAIN.fullmatch(_FRACTION.sub(r" \1\3/\2\4", text).strip())):
        return None
    sign, money, sign2, whole, top, low, left, right, decimal, power, unit = found.groups("")
    unit, low = _unit(unit), re.sub(",", "", low) or right
    if unit is None or (not decimal and int(low) == 0):
        return None
    if decimal:
        value = Fraction(re.sub("[, ]", "", decimal)) * Fraction(10) ** int(power or 0)
    else:
        value = Fraction(whole or 0) + Fraction(int(re.sub(",", "", top) or left), int(low))
    value = -value if sign + sign2 == "-" else value
    return value, unit or ("$" if money else ""), "." in decimal


def without_unit(text: str) -> str:
    """A tidied formula without the known unit that ends it, and without dollars."""
    return _TAIL.sub("", text).replace("¤", "")


def _unit(text: str) -> str | None:
    """The unit that stands behind a number, None when it is none: 5x is not five, "5 and" is not either."""
    bare = _POWER.sub("", _POWER.sub("", text.strip()))
    unit = "" if not bare else _UNIT_OF.get(bare.rstrip(".").lower())
    if unit is None and text.startswith(" ") and _WORDS.fullmatch(bare):
        return "?"
    return None if unit and len(bare) == 1 and bare.isalpha() and not text.startswith(" ") else unit


def same_quantity(a: Quantity, b: Quantity) -> bool:
    """Whether both say the same, by the rules in the module's docstring."""
    if a[1] != b[1] and not {a[1], b[1]} & {"", "?"}:
        return False
    close = Fraction(2, 10**6) * min(1, max(abs(a[0]), abs(b[0])))
    return a[0] == b[0] or ((a[2] or b[2]) and abs(a[0] - b[0]) <= close)


_TOKEN = re.compile(r"(?:(?<![\w)])-)?¤?(?<![\w.])(?:\d[\d,]*(?:\.\d+)?(?:/\d+)?|\.\d+)%?(?![\w(^\\])")
_JOINED = re.compile(r"(?:[-+*/:^(]|\d\s*,|\b(?:and|or|to|by|plus|minus|times|x)|\\[a-z]+)\s*$")


def says(sentence: str, gold: Quantity) -> bool | None:
    """Whether a sentence gives that number, by the rule in the module's docstring; None when it is no sentence."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", sentence)
    if re.search(r"[\\^_]", sentence) or not any(len(w) > 2 and w != "and" for w in words):
        return None
    tail = sentence.rpartition("=")[2].strip()
    tokens = list(_TOKEN.finditer(tail))
    if not tokens:
        return False
    last = tokens[-1]
    if len(tokens) > 1 and (last.end() != len(tail) or _JOINED.search(tail[: last.start()])):
        return False
    said = quantity(tail[last.start() :]) or quantity(last.group().rstrip(","))
    return said is not None and same_quantity(said, gold)
