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
        return {"+": left + right, "-": left - right, "*": left * right, "/": left // max(1, right)}[
            self.sign
        ]

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
# with the sign of the change of the amount, and the words for the result
EVENTS = {
    "buys": ("{they} buys {a} more.", "+", "With the new ones"),
    "finds": ("{they} finds {a} {item} at home.", "+", "With the found ones"),
    "gets": ("{they} gets {a} {item} from {other}.", "+", "With the gift"),
    "gives": ("{they} gives {a} {item} to {other}.", "-", "After giving"),
    "loses": ("{they} loses {a} of them.", "-", "After losing"),
    "sells": ("{they} sells {a} {item}.", "-", "After selling"),
    "buys packed": ("{they} buys {a} {box} with {b} {item} each.", "+", "With the new ones"),
    "gives each": ("{they} gives {b} {item} to each of {a} friends.", "-", "After giving"),
}
QUESTIONS = {
    "left": "How many {item} does {name} have now?",
    "wants": "{they} wants to have {a} {item}. How many {item} are missing?",
    "together": "{other} has {a} {item}. How many {item} do they have together?",
    "shared": "{they} puts all of them into {a} equal {box}. How many {item} are in each?",
}
_CHANGES = {form: change for form, (_, *change) in EVENTS.items()}
_CHANGES |= {"together": ["+", "Together they have"], "shared": ["/", "In each are"]}
_PEOPLE = "|".join(name for names in NAMES.values() for name in names)
_SLOTS = {"they": "She|He", "item": "|".join(ITEMS), "box": "|".join(BOXES)}
_SLOTS |= {"name": _PEOPLE, "other": _PEOPLE, "a": r"\d{1,9}", "b": r"\d{1,9}"}


@cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    patterns, events = [], {form: sentence for form, (sentence, *_) in EVENTS.items()}
    for form, sentence in {**QUESTIONS, **events, **OPENINGS}.items():  # a question may begin like an opening
        pattern = re.escape(sentence).replace(r"\{", "{").replace(r"\}", "}")
        for slot, words in _SLOTS.items():
            pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>{words})", 1)
            pattern = pattern.replace(f"{{{slot}}}", f"(?:{words})")
        patterns.append((form, re.compile(pattern + r"\s*")))
    return patterns


def solve(question: str) -> Solution | None:
    """Parse and solve a problem of this grammar; None for any other text, or if it cannot be shared equally.

    Exactly the last sentence is a question.
    """
    operations: list[Operation] = []
    parents: list[tuple[int, ...]] = []

    def add(left: int, sign: str, right: int, what: str, *uses: int | None) -> int:
        operations.append(Operation(left, sign, right, what, form))
        parents.append(tuple(parent for parent in uses if parent is not None))
        return len(operations) - 1

    text, position, sentences = question.strip(), 0, []
    while position < len(text):
        matches = ((form, pattern.match(text, position)) for form, pattern in _patterns())
        form, match = next((each for each in matches if each[1]), ("", None))
        if match is None:
            return None
        sentences.append((form, match.groupdict()))
        position = match.end()
    if [form in QUESTIONS for form, _ in sentences] != [False] * (len(sentences) - 1) + [True]:
        return None
    amount, item = 0, ""
    source: int | None = None  # the operation that produced the amount
    for form, slots in sentences:
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
        elif form in _CHANGES:
            sign, what = _CHANGES[form]
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
