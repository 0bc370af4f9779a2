"""The grammar of the arithmetic stories, and `solve`, which parses a story and computes its answer.

Each form of sentence is a text with slots and a change of the amount that the story is about.
"""

import re
from dataclasses import dataclass
from functools import cache

NAMES = {
    "She": ("Mia", "Anna", "Lena", "Rosa", "Emma", "Nora"),
    "He": ("Tom", "Ben", "Paul", "Karl", "Omar", "Luis"),
}
ITEMS = ("pencils", "apples", "stamps", "marbles", "cards", "shells", "coins", "books", "beads", "nuts")
BOXES = ("boxes", "bags", "packs", "trays")


@dataclass(frozen=True)
class Operation:
    """One step of a solution: `left sign right = result`, and the words for the result."""

    left: int
    sign: str
    right: int
    what: str
    form: str  # the form of the sentence that asks for it

    @property
    def result(self) -> int:
        left, right = self.left, self.right
        if self.sign == "/":
            return left // right
        return {"+": left + right, "-": left - right, "*": left * right}[self.sign]

    @property
    def sum(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"


@dataclass(frozen=True)
class Solution:
    """The operations in order; `parents[i]` are the operations whose results operation i uses."""

    operations: tuple[Operation, ...]
    parents: tuple[tuple[int, ...], ...]
    item: str

    @property
    def answer(self) -> int:
        return self.operations[-1].result


# form: sentence. Slots: {name} {other} {they} (She/He) {item} {box} and the numbers {a} {b}.
OPENINGS = {
    "has": "{name} has {a} {item}.",
    "packed": "{name} has {a} {box} with {b} {item} each.",
    "compared": "{other} has {a} {item} and {name} has {b} more than {other}.",
}
EVENTS = {
    "buys": "{they} buys {a} more.",
    "finds": "{they} finds {a} {item} at home.",
    "gets": "{they} gets {a} {item} from {other}.",
    "gives": "{they} gives {a} {item} to {other}.",
    "loses": "{they} loses {a} of them.",
    "sells": "{they} sells {a} {item}.",
    "buys packed": "{they} buys {a} {box} with {b} {item} each.",
    "gives each": "{they} gives {b} {item} to each of {a} friends.",
}
QUESTIONS = {
    "left": "How many {item} does {name} have now?",
    "wants": "{they} wants to have {a} {item}. How many {item} are missing?",
    "together": "{other} has {a} {item}. How many {item} do they have together?",
    "shared": "{they} puts all of them into {a} equal {box}. How many {item} are in each?",
}
CHANGES = {
    "buys": ("+", "With the new ones"),
    "finds": ("+", "With the found ones"),
    "gets": ("+", "With the gift"),
    "gives": ("-", "After giving"),
    "loses": ("-", "After losing"),
    "sells": ("-", "After selling"),
    "buys packed": ("+", "With the new ones"),
    "gives each": ("-", "After giving"),
    "together": ("+", "Together they have"),
    "shared": ("/", "In each are"),
}
"""The sign of each form's change of the amount, and the words for the result."""
_PEOPLE = "|".join(name for names in NAMES.values() for name in names)
_SLOTS = {"they": "She|He", "item": "|".join(ITEMS), "box": "|".join(BOXES)}
_SLOTS |= {"name": _PEOPLE, "other": _PEOPLE, "a": r"\d{1,9}", "b": r"\d{1,9}"}


@cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    patterns = []
    for form, sentence in {**QUESTIONS, **EVENTS, **OPENINGS}.items():  # a question may begin like an opening
        pattern = re.escape(sentence).replace(r"\{", "{").replace(r"\}", "}")
        for slot, words in _SLOTS.items():
            pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>{words})", 1)
            pattern = pattern.replace(f"{{{slot}}}", f"(?:{words})")
        patterns.append((form, re.compile(pattern + r"\s*")))
    return patterns


def solve(question: str) -> Solution | None:
    """Parse and solve a problem of this grammar; None for any other text, or if it cannot be shared equally."""
    operations: list[Operation] = []
    parents: list[tuple[int, ...]] = []

    def add(left: int, sign: str, right: int, what: str, *uses: int | None) -> int:
        operations.append(Operation(left, sign, right, what, form))
        parents.append(tuple(parent for parent in uses if parent is not None))
        return len(operations) - 1

    amount, item = 0, ""
    source: int | None = None  # the operation that produced the amount
    for form, slots in sentences(question) or ():
        a, b = int(slots.get("a") or 0), int(slots.get("b") or 0)
        item = slots.get("item") or item
        if form == "has":
            amount = a
        elif form == "packed":
            source = add(a, "*", b, f"The {slots['box']} hold")
        elif form == "compared":
            source = add(a, "+", b, f"{slots['name']} has")
        elif form == "wants":
            source = add(a, "-", amount, "Missing are", source)
        elif form in CHANGES:
            sign, what = CHANGES[form]
            if sign == "/" and (a == 0 or amount % a):
                return None
            packed = None
            if " " in form:
                given = "The friends get" if form == "gives each" else f"The {slots['box']} hold"
                packed = add(a, "*", b, given)
                a = operations[packed].result
            source = add(amount, sign, a, what, source, packed)
        amount = operations[-1].result if form not in ("has", "left") else amount
    return Solution(tuple(operations), tuple(parents), item) if operations else None


def sentences(question: str) -> list[tuple[str, dict[str, str]]] | None:
    """(form, slots) of each sentence; None for other texts, or if not exactly the last sentence is a question."""
    text, position, found = question.strip(), 0, []
    while position < len(text):
        for form, pattern in _patterns():
            if match := pattern.match(text, position):
                found.append((form, match.groupdict()))
                position = match.end()
                break
        else:
            return None
    asks = [form in QUESTIONS for form, _ in found]
    return found if asks and asks[-1] and not any(asks[:-1]) else None


def in_order(left: int, sign: str, right: int) -> tuple[str, int, int]:
    """An operation with the numbers of a sum or product, which may be swapped, in ascending order."""
    if sign in "+*" and left > right:
        left, right = right, left
    return sign, left, right
