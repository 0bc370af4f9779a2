"""Arithmetic word problems with two to four operations: a small grammar, written and read by the same sentences.

Each sentence form of the grammar is one line of a table: a text with slots, and what it does to the amount that the
story follows. `generate` fills the slots with random values; `solve` reads a problem's text back, sentence by
sentence, and gives its operations. Nothing but the text passes between the two.
"""

import random
import re
from dataclasses import dataclass
from functools import cache

from sclite.records import Problem

NAMES = {
    "She": ("Mia", "Anna", "Lena", "Rosa", "Emma", "Nora"),
    "He": ("Tom", "Ben", "Paul", "Karl", "Omar", "Luis"),
}
ITEMS = ("pencils", "apples", "stamps", "marbles", "cards", "shells", "coins", "books", "beads", "nuts")
BOXES = ("boxes", "bags", "packs", "trays")


@dataclass(frozen=True)
class Operation:
    """One step of a solution: `left sign right = result`, and what the result is, in words."""

    left: int
    sign: str
    right: int
    result: int
    what: str
    form: str  # which sentence of the grammar asks for it

    @property
    def sum(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"


@dataclass(frozen=True)
class Solution:
    """The operations in order; `parents[i]` are the earlier operations whose results operation i uses."""

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


# -- writing a problem ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranges:
    """How large the numbers of the stories are, each as (least, most)."""

    start: tuple[int, int]
    second: tuple[int, int]
    change: tuple[int, int]
    packs: tuple[int, int]
    each: tuple[int, int]
    amount: tuple[int, int]
    wanted: tuple[int, int]  # above the amount
    together: tuple[int, int]


LENGTHS = (2, 2, 3, 3, 4)
"""How many operations a story asks for, each as often as it stands here."""
PARTS = (2, 6)
"""Into how many boxes all is put."""
SMALL = Ranges((14, 95), (11, 48), (11, 59), (2, 6), (3, 16), (5, 190), (11, 79), (12, 89))
LARGE = Ranges((40, 480), (21, 240), (25, 290), (3, 7), (8, 36), (12, 980), (25, 290), (30, 390))


def _packed(draw: random.Random, ranges: Ranges) -> dict[str, int]:
    return {"a": draw.randint(*ranges.packs), "b": draw.randint(*ranges.each)}


def _opening(draw: random.Random, ranges: Ranges) -> tuple[str, dict[str, int], int]:
    """The form of the first sentence, its numbers, and the amount that the story begins with."""
    opening = draw.choices(list(OPENINGS), weights=(5, 3, 2))[0]
    if opening == "packed":
        values = _packed(draw, ranges)
        return opening, values, values["a"] * values["b"]
    values = {"a": draw.randint(*ranges.start), "b": draw.randint(*ranges.second)}
    return opening, values, values["a"] + (values["b"] if opening == "compared" else 0)


def _event(draw: random.Random, forms: list[str], ranges: Ranges) -> tuple[str, dict[str, int], int]:
    """One change: its form, its numbers, and what it adds to the amount."""
    form = draw.choice(forms)
    sign = 1 if form in ("buys", "finds", "gets", "buys packed") else -1
    if " " in form:
        values = _packed(draw, ranges)
        return form, values, sign * values["a"] * values["b"]
    values = {"a": draw.randint(*ranges.change)}
    return form, values, sign * values["a"]


def _question(draw: random.Random, form: str, amount: int, ranges: Ranges) -> int | None:
    """The number in the question; None where it does not come out."""
    if form == "wants":
        return amount + draw.randint(*ranges.wanted)
    if form == "together":
        return draw.randint(*ranges.together)
    if form == "shared":
        parts = draw.randint(*PARTS)
        return parts if amount % parts == 0 and amount // parts >= 3 else None
    return 0


def _story(draw: random.Random, operations: int, ranges: Ranges) -> str | None:
    """One try at a story of just so many operations; None where the numbers do not come out."""
    they = draw.choice(("She", "He"))
    everybody = [name for names in NAMES.values() for name in names]
    name = draw.choice(NAMES[they])
    other = draw.choice([n for n in everybody if n != name])
    words = {
        "they": they,
        "name": name,
        "other": other,
        "item": draw.choice(ITEMS),
        "box": draw.choice(BOXES),
    }
    opening, values, amount = _opening(draw, ranges)
    sentences = [OPENINGS[opening].format(**words, **values)]
    question = draw.choices(list(QUESTIONS), weights=(5, 2, 2, 1))[0]
    room = operations - (opening != "has") - (question != "left")
    previous = None
    while room > 0:
        forms = [f for f in EVENTS if f != previous and (room >= 2 or " " not in f)]
        previous, values, change = _event(draw, forms, ranges)
        amount += change
        if not ranges.amount[0] <= amount <= ranges.amount[1]:
            return None
        sentences.append(EVENTS[previous].format(**words, **values))
        room -= 2 if " " in previous else 1
    number = _question(draw, question, amount, ranges)
    if room < 0 or number is None:
        return None
    sentences.append(QUESTIONS[question].format(**words, a=number))
    return " ".join(sentences)


def generate(
    count: int, seed: int, avoid: frozenset[str] = frozenset(), ranges: Ranges = LARGE
) -> list[Problem]:
    """`count` different problems, none of whose questions is in `avoid`; the same seed gives the same problems."""
    draw = random.Random(seed)
    problems, seen = [], set(avoid)
    while len(problems) < count:
        question = _story(draw, draw.choice(LENGTHS), ranges)
        if question is None or question in seen:
            continue
        seen.add(question)
        solution = solve(question)
        problems.append(
            Problem(
                id=f"arithmetic-{seed}-{len(problems)}",
                question=question,
                answer=str(solution.answer),
                solution=" ".join(f"{op.what}: {op.sum}." for op in solution.operations),
            )
        )
    return problems


# -- reading a problem ---------------------------------------------------------------------------------------------


@cache
def _patterns() -> list[tuple[str, re.Pattern]]:
    table = {**QUESTIONS, **EVENTS, **OPENINGS}  # a question may begin like an opening, so it is tried first
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
    """Follows the amount of the story and notes each operation with the earlier ones that it needs."""

    def __init__(self):
        self.operations: list[Operation] = []
        self.parents: list[tuple[int, ...]] = []
        self.amount = 0
        self.source: int | None = None  # the operation that gave the amount
        self.item = ""

    def note(self, left, sign, right, what, form, parents=()) -> int:
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
        self.source = self.note(self.amount, sign, value, what, form, (self.source, packed))
        self.amount = self.operations[-1].result

    def sentence(self, form: str, slots: dict[str, str]) -> None:
        a, b = int(slots.get("a") or 0), int(slots.get("b") or 0)
        self.item = slots.get("item") or self.item
        name = slots.get("name") or slots.get("other") or ""
        if form == "has":
            self.amount = a
        elif form == "packed":
            self.source = self.note(a, "*", b, f"The {slots['box']} hold", form)
            self.amount = self.operations[-1].result
        elif form == "compared":
            self.source = self.note(a, "+", b, f"{name} has", form)
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
            packed = self.note(a, "*", b, f"The {slots['box']} hold", form)
            self.change("+", self.operations[-1].result, "With the new ones", form, packed)
        elif form == "gives each":
            packed = self.note(a, "*", b, "The friends get", form)
            self.change("-", self.operations[-1].result, "After giving", form, packed)
        elif form == "wants":
            self.source = self.note(a, "-", self.amount, "Missing are", form, (self.source,))
        elif form == "together":
            self.change("+", a, "Together they have", form)
        elif form == "shared":
            self.change("/", a, "In each are", form)


def solve(question: str) -> Solution | None:
    """Read a problem of this grammar and work it out; None for any other text."""
    solver = _Solver()
    for form, slots in _sentences(question) or ():
        solver.sentence(form, slots)
    if not solver.operations:
        return None
    return Solution(tuple(solver.operations), tuple(solver.parents), solver.item)


def _sentences(question: str) -> list[tuple[str, dict[str, str]]] | None:
    """(form, slots) of each sentence; None where one is not of this grammar."""
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
    return found


def within(question: str, ranges: Ranges = LARGE) -> bool:
    """Whether this is a story of this grammar, as long and with numbers as large as `generate` writes them with `ranges`."""
    packed = (ranges.packs, ranges.each)
    limits = {
        "has": (ranges.start,),
        "compared": (ranges.start, ranges.second),
        "together": (ranges.together,),
        "shared": (PARTS,),
        "left": (),
        "wants": (),
    }
    for form, slots in _sentences(question) or [("no sentence", {})]:
        if form not in OPENINGS | EVENTS | QUESTIONS:
            return False
        bounds = limits.get(form, packed if "packed" in form or "each" in form else (ranges.change,))
        for slot, (least, most) in zip("ab", bounds, strict=False):
            if not least <= int(slots[slot]) <= most:
                return False
    return len(solve(question).operations) in LENGTHS


def same_operation(one: tuple[int, str, int], other: Operation) -> bool:
    """Whether `left sign right` asks for the same as the operation; sums and products may be turned round."""
    left, sign, right = one
    if sign != other.sign:
        return False
    turned = sign in _ASSOCIATIVE and (right, left) == (other.left, other.right)
    return (left, right) == (other.left, other.right) or turned
