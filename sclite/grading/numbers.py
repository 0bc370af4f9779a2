r"""Numbers in answers, with their units: parsing and equality.

- A percent sign is a unit: 50% equals 50, and not 0.5. A unit may be missing on one side. Two units must agree: known
  units after conversion (150 minutes is 2.5 hours), other words if one side has all of the other's (12 red apples, 12
  apples).
- A decimal of six or more places equals a number from which it differs by at most a unit of its last place, if it has six
  significant digits; shorter decimals must be exact.
- A sentence equals a number if that is the only one it can mean: "Natalia sold 72 clips." and "48 + 24 = 72 clips" equal
  72; "5 apples and 3 pears", "5 or 6", "not 5" and "more than 5" equal nothing.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

MAX_DIGITS = 4000  # of an evaluated power; Python refuses to print much longer integers

# -- words ------------------------------------------------------------------------------------------------------

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()  # noqa: SIM905
_ONES += ["seventeen", "eighteen", "nineteen"]
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
_SMALL = {word: n for n, word in enumerate(_ONES)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_BIG = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = "half|halves;third;quarter|fourth;fifth;sixth;seventh;eighth;ninth;tenth"
_SCALES: dict[str, int | Fraction] = {**_BIG, "k": 1000, "dozen": 12, "ten": 10, "hundred": 100}
_SCALES |= {"hundredth": Fraction(1, 100), "thousandth": Fraction(1, 1000)}
_SCALES |= {name: Fraction(1, n) for n, names in enumerate(_PARTS.split(";"), 2) for name in names.split("|")}
_UNDER_100 = (
    rf"(?:{'|'.join(sorted(_SMALL, key=len, reverse=True))})(?:[- ](?:{'|'.join(_ONES[1:10])})(?!\w))?"
)
_UNDER_1000 = rf"{_UNDER_100}(?: hundred(?:(?: and)? {_UNDER_100})?)?"
_SPELLED = re.compile(rf"(?i)\b{_UNDER_1000}(?: (?:{'|'.join(_BIG)})(?:,? (?:and )?{_UNDER_1000})?)*\b")
_AND_PARTS = re.compile(
    rf"(?i)\band (?:an? |(\d+) )({_PARTS.replace(';', '|').replace('halves', 'half')})s?\b"
)


def words_to_digits(text: str) -> str:
    """Convert number words to digits, and "negative" or "minus" before a number and "below zero" after it to a sign."""
    if not re.search("[A-Za-z]{3}", text):
        return text

    def digits(found: re.Match[str]) -> str:
        total = group = 0
        for word in re.findall(r"[a-z]+", found.group().casefold()):
            if word in _BIG:
                total, group = total + group * _BIG[word], 0
            elif word == "hundred":
                group *= 100
            else:
                group += _SMALL.get(word, 0)
        return str(total + group)

    text = re.sub(r"(?i)^(?:an? )?(half|third|quarter|dozen|hundred|thousand|million)(?= |$)", r"1 \1", text)
    text = _SPELLED.sub(digits, text)
    text = _AND_PARTS.sub(lambda m: f"{m[1] or 1}/{1 / _SCALES[m[2].casefold()]}", text)
    text = re.sub(r"(?i)^(?:negative|minus) (?=[\d¤.\\])", "-", text)
    return re.sub(r"(?i)^(\d[\d,.]*(?: degrees?)?(?: [CF]| celsius)?) below (?:0|freezing)$", r"-\1", text)


# -- units ------------------------------------------------------------------------------------------------------

# one kind of unit per line, with the size of each unit relative to the first
_KINDS = """%: 1 % percent pct percentage
dollar: 1 ¤ $ dollar usd buck us¤; 1/100 ¢ cent
pound: 1 £ pound lb gbp; 1/16 oz ounce
euro: 1 € euro eur
yen: 1 ¥ yen
rupee: 1 ₹ rupee rs
degree: 1 degree deg
radian: 1 rad radian
length: 1 m meter metre; 1/100 cm centimeter centimetre; 1/1000 mm millimeter millimetre; 1000 km kilometer kilometre
foot: 1 ft foot feet '; 1/12 in inch inche "; 3 yd yard; 5280 mi mile
mass: 1 g gram; 1000 kg kilogram; 1/1000 mg milligram
time: 1 s sec second; 60 min minute; 3600 h hr hour; 86400 day; 604800 week wk
year: 1 year yr; 1/12 month
volume: 1 l liter litre; 1/1000 ml milliliter millilitre
gallon: 1 gal gallon
cup: 1 c cup
person: 1 person people
: 1 unit"""
_UNITS = {
    name: (line.partition(":")[0], Fraction(group.split()[0]))
    for line in _KINDS.splitlines()
    for group in line.partition(":")[2].split(";")
    for name in group.split()[1:]
}
_ALIASES = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h"}
_ALIASES |= {"per cent": "%", "percentage points": "%"}
_ATTACHED = re.compile(r"(?:[A-Za-z]{2,}|[LVWJN]|[a-z](?=\^)|st|nd|rd|th)(?![A-Za-z])")
_STOP = set("of the a an in each total all old altogether is are for at on".split())  # noqa: SIM905
# "60 miles an hour"; but "half an hour", "3/4 of an hour"
_EACH = re.compile(
    r"(?i)(?<=\S )(?<!\bof )(?<!\bfor )(?:in )?(?:an?|each|every) (?=(?:second|minute|hour|day|week|month|(?:square|cubic) [a-z]+)\b)"
)
# "in" that is not an inch: "5 in total", "12 cookies in each box"
_PREPOSITION = re.compile(r"(?i)\bin (?=(?:total|all|the|each)\b)|(?<=\S )in (?=[a-z])")
_SYMBOLS = {"A", "J", "N", "V", "W", "F", "K"}
_ABBREVIATIONS = set("kB MB GB TB Hz hz hp kW kJ kN kV mA mV dB eV Pa qt".split())  # noqa: SIM905
# words that change the meaning of a number: "not 5", "5 squared"
_NEVER = (
    "up to|not|no|none|nobody|never|neither|nor|cannot|without|except|but|or|either|wrong|incorrect|almost|nearly|over|under|above|below|"
    r"twice|double|triple|half|plus|minus|times(?=\W+\d)|divided|factorial|root|mod|(?:more|less|fewer|greater|smaller|other|older|younger) than"
)
_VETO = re.compile(rf"\b(?:{_NEVER}|and|to|than|by|if|when|squared|cubed|x|e)\b|[=<>+*(){{}}\d]")


Words = tuple[frozenset[str], ...]
"""The words of a unit's numerator, and of each denominator."""


def _parse_unit(text: str, money: str = "") -> tuple[Fraction, Words] | None:
    """(factor, words) of the text after a number and the sign before it; None if it is not a unit."""
    bare = text.strip()
    if bare and (not re.search(r"[\w%¤€£¥₹'\"]", bare) or bare[0] == "^" or re.match(r"a(?: ?\^|$)", bare)):
        return None
    if bare and not text[0].isspace() and bare[0].isalpha() and not _ATTACHED.match(bare):
        return None
    bare = re.sub(r"^(?:st|nd|rd|th)\b", "", bare) if text[:1].isalpha() else bare
    for name, unit in _ALIASES.items():
        bare = re.sub(rf"(?i)(?<![a-z]){name}(?![a-z])", unit, bare)
    bare = _EACH.sub("per ", f"{money} {bare}" if money else bare)
    factor, pieces = Fraction(1), []
    for n, piece in enumerate(re.split(r" ?/ ?| per ", re.sub("^/|^per ", " / ", bare))):
        piece, squares = re.subn(r"\b(?:square|sq)\b\.?|\^\{?2\}?|(?<=[a-z]) squared\b", " ", piece)
        piece, cubes = re.subn(r"\b(?:cubic|cu)\b\.?|\^\{?3\}?|(?<=[a-z]) cubed\b", " ", piece)
        power = 3 * cubes or 2 * squares or 1
        piece = _PREPOSITION.sub("", piece)
        if _VETO.search(piece.casefold()) or re.search(r"[\\^_|\[\]!]", piece):
            return None
        words = set()
        for written in re.split(r"[\s,;.()-]+", piece):
            name = written.casefold()
            known = _UNITS.get(name) or (_UNITS.get(name.removesuffix("s")) if len(name) > 2 else None)
            if known and not (len(name) > 1 and name.endswith("'")):
                words |= {known[0] + ("" if power == 1 else str(power))} if known[0] else set()
                factor *= known[1] ** (power if n == 0 else -power)
            elif (
                len(name) < 3
                and name.isalpha()
                and written not in _SYMBOLS
                and name not in _STOP
                and written not in _ABBREVIATIONS
            ):
                return None  # ab is a product
            elif name and name not in _STOP:
                words.add(re.sub(r"(?:e|s|es)$", "", name))
        pieces.append(frozenset(words))
    return factor, tuple(pieces) if any(pieces) else ()


# -- numbers ----------------------------------------------------------------------------------------------------

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d\d)+,\d{3}(?!\d)|\d+)"
_MONEY = r"(?:[A-Z]{1,2} ?(?=¤))?[¤£€¥₹]"
_SCALE = rf"(?:(?: |(?<=\d)-)(?:{'|'.join(sorted(_SCALES, key=len, reverse=True))})s?|k)(?![A-Za-z-])"
_NUMBER = (
    rf"(?P<sign>[-+]?) ?(?P<money>{_MONEY})? ?(?P<sign2>[-+]?)"
    rf"(?:(?:(?P<whole>\d+)(?: | and ))?(?P<top>{_INTEGER}) ?/ ?(?P<minus>-?)(?P<low>{_INTEGER})(?![\d^.!])"
    r"|(?P<decimal>(?:\d{1,3}(?: \d{3})+(?!\d)|" + _INTEGER + r")(?:\.\d*)?|\.\d+)"
    r"(?:\\overline ?\{?(?P<bar>\d+)\}?|(?P<dots>\.{2,3}|\\[lc]?dots))?"
    r"(?: ?\^ ?(?P<p>\{ ?)?(?P<power>[-+]?\d{1,4})(?(p) ?\})|(?:[eE]| ?(?:\\times|\\cdot|[x*]) ?10 ?\^ ?(?P<e>\{ ?)?)(?P<exponent>[-+]?\d{1,4})(?(e) ?\}))?)"
    rf"(?P<scale>{_SCALE})?(?P<raised> squared| cubed)?"
)
_PLAIN = re.compile(_NUMBER + r"(?P<unit>[^\d.].*|\.[^\d.].*)?", re.IGNORECASE)
_FRACTION = re.compile(r"\\frac ?(?:\{ ?(-?\d+) ?\}|(\d)) ?(?:\{ ?(-?\d+) ?\}|(\d))(?!\d)")
_RATIO = re.compile(r"(\d+) ?(?::| to ) ?(\d+)")


@dataclass(frozen=True)
class Quantity:
    """`value` as written; `factor` converts its unit to the first of its kind; `places` is the number of decimals."""

    value: Fraction
    factor: Fraction = Fraction(1)
    unit: Words = ()
    places: int | None = None

    def equals(self, other: "Quantity") -> bool:
        """Whether both are equal, by the rules in the module's docstring."""
        known = [q.places for q in (self, other) if q.places is not None] or [0]
        # 0.30000000000000004 is 0.3; 0.10000001 is not 0.1
        places = 10 if min(known) < 6 and max(known) > 10 else min(known)
        exact = len(known) == 2 and self.places == other.places
        a, b = self.value, other.value
        if self.unit and other.unit:
            if len(self.unit) != len(other.unit):
                return False
            if not all(x <= y or y <= x for x, y in zip(self.unit, other.unit, strict=True)):
                return False
            a, b = a * self.factor, b * other.factor
        return a == b or (places >= 6 and not exact and is_close(a, b, places))


def is_close(a: Any, b: Any, places: int) -> bool:
    """Whether a decimal of so many places agrees with a number to its last place; for numbers of Python or sympy."""
    size = max(abs(a), abs(b))
    unit = max(Fraction(3, 2 * 10**places), size / 10**10)
    return bool(abs(a - b) <= min(unit, size / 500_000))


def parse_quantity(text: str) -> Quantity | None:
    """Parse a normalized number with its unit (5 ft 3 in: in the smallest unit); None for any other text."""
    if len(text) > 120 or not any(c.isdigit() for c in text):
        return None
    if ratio := _RATIO.fullmatch(text):
        return Quantity(Fraction(int(ratio[1]), int(ratio[2]))) if int(ratio[2]) else None
    text = " ".join(_FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text).split())
    found = _PLAIN.fullmatch(text)
    if not found:
        return None
    # the number: a decimal, periodic or with a power or an exponent, or a fraction
    places = None
    if decimal := found["decimal"]:
        digits = re.sub("[, ]", "", decimal)
        behind = digits.partition(".")[2]
        period = found["bar"]
        if found["dots"]:  # 0.1666.. or 0.3..
            repeated = re.search(r"(\d+?)\1+$", behind)
            period = period or (repeated[1] if repeated else behind if len(behind) == 1 else None)
        if "." in digits and not period:
            places = len(behind)
        if places is not None and found["dots"]:
            return None
        value = Fraction(digits)
        if period:
            value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(behind))
        power = int(found["power"] or 0)
        if found["power"] and (abs(power) * len(decimal) > MAX_DIGITS or (not value and power < 0)):
            return None
        value = value**power if found["power"] else value * Fraction(10) ** int(found["exponent"] or 0)
    else:
        low = int(found["low"].replace(",", ""))
        if not low:
            return None
        value = Fraction(int(found["top"].replace(",", "")), -low if found["minus"] else low)
        if found["whole"] and not 0 < value < 1:
            return None
        value += int(found["whole"] or 0)
    if scale := (found["scale"] or "").strip(" -").casefold():
        value *= _SCALES.get(scale) or _SCALES[scale.removesuffix("s")]
    if found["raised"]:
        value **= 2 if "sq" in found["raised"] else 3
    value *= -1 if (found["sign"] + found["sign2"]).count("-") == 1 else 1
    unit = _parse_unit(found["unit"] or "", (found["money"] or "")[-1:])
    if unit is not None:
        return Quantity(value, *unit, places)
    # several quantities of one kind, such as 5 ft 3 in
    texts = re.split(r"(?<=[A-Za-z'\"]),? ?(?:and )?(?=\d)", text)
    parts = [quantity for part in texts if (quantity := parse_quantity(part))] if 1 < len(texts) < 5 else []
    if not parts or len(parts) < len(texts) or {len(part.unit) for part in parts} != {1}:
        return None
    if len({part.unit for part in parts}) > 1 or any(a.factor <= b.factor for a, b in pairwise(parts)):
        return None
    smallest = parts[0 if parts[0].unit[0] == {"dollar"} else -1].factor
    return Quantity(sum(part.value * part.factor for part in parts) / smallest, smallest, parts[0].unit)


_TAIL = re.compile(r"(.*(?:[\d})!]|\\pi)) ?(%|[A-Za-z]{2}.*|L|(?<= )[msg])", re.DOTALL)


def strip_unit(text: str) -> tuple[str, Fraction, Words]:
    """(text, factor, words): a normalized formula without unit and currency signs, and the unit's factor and words."""
    text = text.replace("¤", "")
    found = _TAIL.fullmatch(text)
    if not found or (len(found[2]) == 1 and re.search(r"(?<![\\A-Za-z])[A-Za-z]", found[1])):
        return text, Fraction(1), ()
    unit = _parse_unit(f" {found[2]}")
    return (found[1], *unit) if unit else (text, Fraction(1), ())


# -- sentences --------------------------------------------------------------------------------------------------

_NOT_THIS = re.compile(
    rf"(?i)\b(?:{_NEVER}|between|from|(?:jan|febr)uary \d|(?:march|april|may|june|july|august|(?:septem|octo|novem|decem)ber) \d)"
    r"\b|n't\b|(?<![\w'])(?!a\b|i\b|\w is\b)[a-z](?![\w'])"
)
_ASIDE = r"(?:^|\b)(?:in|after|within|during|for|over|every) (?=\d+ (?:day|hour|minute|week|month|year)s?\b)"
_TOKEN = re.compile(
    rf"(?i)(?<![\w.)^])(?P<aside>{_ASIDE})?{_NUMBER}%?(?P<nth>st|nd|rd|th)?(?![\w(^\\])(?!\.\d)"
)
_JOINED = re.compile(r"(?i)(?:[-+*/^(]|:(?!\s)|\d\s*,|\b(?:by|plus|minus|times|x)|\\[a-z]+)\s*$")


def number_in_sentence(sentence: str) -> Quantity | None:
    """The only number that a sentence can mean, by the rule in the module's docstring; else None."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", sentence)
    product = re.fullmatch(r"-?[\d./,]+ (?!st|nd|rd|th)([A-Za-z]{2})", sentence)
    if product and product[1] not in _ABBREVIATIONS | {"am", "pm", "AM", "PM"}:
        return None  # 5 ab
    if len(sentence) > 500 or re.search(r"[\\^_|<>]", sentence) or not words:
        return None
    sentence = re.split(r"[,(]? ?\b(?:because|since)\b", sentence)[0]
    head, _, tail = (part.strip() for part in sentence.rpartition("="))
    link = r"(?:[,;(]|\b(?:and|or|at|for|if|when|where|with)) *"
    if re.search(rf"(?:=|\b(?:is|are)\b).*\d.*{link}[A-Za-z]+$|\d.*{link}[A-Za-z]$", head):
        return None
    if _NOT_THIS.search(tail):
        return None
    tokens = [m for m in _TOKEN.finditer(tail) if not m["nth"]]
    main = [m for m in tokens if m["aside"] is None] or tokens
    if not main or _JOINED.search(tail[: main[0].start()]):
        return None
    values = [parse_quantity(m.group()[len(m["aside"] or "") :].strip()) for m in main]
    if len({q.value if q else None for q in values}) > 1 or not values[-1]:
        return None
    return parse_quantity(tail[main[-1].start() :]) or values[-1]
