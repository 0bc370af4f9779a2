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
    """One step of a solution: `left sign right = result`, and in words what the result is."""

    left: int
    sign: str
    right: int
    result: int
    what: str
    form: str  # the form of the sentence that asks for it

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
_SLOT = {
    "name": "(?:Mia|Anna|Lena|Rosa|Emma|Nora|Tom|Ben|Paul|Karl|Omar|Luis)",
    "other": "(?:Mia|Anna|Lena|Rosa|Emma|Nora|Tom|Ben|Paul|Karl|Omar|Luis)",
    "they": "(?:She|He)",
    "item": f"(?:{'|'.join(ITEMS)})",
    "box": f"(?:{'|'.join(BOXES)})",
}
_ASSOCIATIVE = {"+", "*"}


@cache
def _patterns() -> list[tuple[str, re.Pattern]]:
    table = {**QUESTIONS, **EVENTS, **OPENINGS}  # questions first, because one may begin like an opening
    patterns = []
    for form, sentence in table.items():
        pattern = re.escape(sentence).replace(r"\{", "{").replace(r"\}", "}")
        for slot, expression in _SLOT.items():
            pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>{expression})", 1).replace(
                f"{{{slot}}}", expression
            )
        pattern = pattern.replace("{a}", r"(?P<a>\d+)").replace("{b}", r"(?P<b>\d+)")
        patterns.append((form, re.compile(pattern + r"\s*")))
    return patterns


class _Solver:
    """Tracks the amount of the story and records each operation with its parents."""

    def __init__(self):
        self.operations: list[Operation] = []
        self.parents: list[tuple[int, ...]] = []
        self.amount = 0
        self.source: int | None = None  # the operation that produced the amount
        self.item = ""

    def add(
        self,
        left: int,
        sign: str,
        right: int,
        what: str,
        form: str,
        parents: tuple[int | None, ...] = (),
    ) -> int:
        result = {
            "+": left + right,
            "-": left - right,
            "*": left * right,
            "/": left // right if right else 0,
        }[sign]
        self.operations.append(Operation(left, sign, right, result, what, form))
        self.parents.append(tuple(p for p in parents if p is not None))
        return len(self.operations) - 1

    def change(self, sign: str, value: int, what: str, form: str, packed: int | None = None) -> None:
        self.source = self.add(self.amount, sign, value, what, form, (self.source, packed))
        self.amount = self.operations[-1].result

    def sentence(self, form: str, slots: dict[str, str]) -> None:
        a, b = int(slots.get("a") or 0), int(slots.get("b") or 0)
        self.item = slots.get("item") or self.item
        name = slots.get("name") or slots.get("other") or ""
        if form == "has":
            self.amount = a
        elif form == "packed":
            self.source = self.add(a, "*", b, f"The {slots['box']} hold", form)
            self.amount = self.operations[-1].result
        elif form == "compared":
            self.source = self.add(a, "+", b, f"{name} has", form)
            self.amount = self.operations[-1].result
        elif form in ("buys", "finds", "gets"):
            self.change(
                "+",
                a,
                {"buys": "With the new ones", "finds": "With the found ones", "gets": "With the gift"}[form],
                form,
            )
        elif form in ("gives", "loses", "sells"):
            self.change(
                "-",
                a,
                {"gives": "After giving", "loses": "After losing", "sells": "After selling"}[form],
                form,
            )
        elif form == "buys packed":
            packed = self.add(a, "*", b, f"The {slots['box']} hold", form)
            self.change("+", self.operations[-1].result, "With the new ones", form, packed)
        elif form == "gives each":
            packed = self.add(a, "*", b, "The friends get", form)
            self.change("-", self.operations[-1].result, "After giving", form, packed)
        elif form == "wants":
            self.source = self.add(a, "-", self.amount, "Missing are", form, (self.source,))
        elif form == "together":
            self.change("+", a, "Together they have", form)
        elif form == "shared":
            self.change("/", a, "In each are", form)


def solve(question: str) -> Solution | None:
    """Parse and solve a problem of this grammar; None for any other text."""
    solver = _Solver()
    for form, slots in sentences(question) or ():
        solver.sentence(form, slots)
    if not solver.operations:
        return None
    return Solution(tuple(solver.operations), tuple(solver.parents), solver.item)


def sentences(question: str) -> list[tuple[str, dict[str, str]]] | None:
    """(form, slots) of each sentence; None for other texts, or if not exactly the last sentence is a question."""
    text, position, found = question.strip(), 0, []
    while position < len(text):
        for form, pattern in _patterns():
            match = pattern.match(text, position)
            if match:
                found.append((form, match.groupdict()))
                position = match.end()
                break
        else:
            return None
    asks = [form in QUESTIONS for form, _ in found]
    return found if asks and asks[-1] and not any(asks[:-1]) else None


def same_operation(one: tuple[int, str, int], other: Operation) -> bool:
    """Whether `left sign right` is this operation; sums and products may be swapped."""
    left, sign, right = one
    if sign != other.sign:
        return False
    swapped = sign in _ASSOCIATIVE and (right, left) == (other.left, other.right)
    return (left, right) == (other.left, other.right) or swapped
