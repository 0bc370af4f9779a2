"""Generation of arithmetic word problems with one to four operations and random numbers.

`grammar.solve` sees only the text that `generate` writes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sclite.quickstart.grammar import BOXES, EVENTS, ITEMS, NAMES, OPENINGS, QUESTIONS, sentences, solve
from sclite.records import Problem


@dataclass(frozen=True)
class Ranges:
    """The ranges of the numbers in stories, each as (minimum, maximum)."""

    start: tuple[int, int]
    second: tuple[int, int]
    change: tuple[int, int]
    packs: tuple[int, int]
    each: tuple[int, int]
    amount: tuple[int, int]
    wanted: tuple[int, int]  # above the amount
    together: tuple[int, int]


LENGTHS = (1, 2, 2, 3, 3, 4)
"""Numbers of operations; repetitions are weights."""
PARTS = (2, 6)
"""Range of the number of boxes to share into."""
TINY = Ranges((3, 30), (2, 20), (2, 20), (2, 9), (2, 12), (1, 99), (2, 30), (2, 30))
SMALL = Ranges((14, 95), (11, 48), (11, 59), (2, 6), (3, 16), (5, 190), (11, 79), (12, 89))
LARGE = Ranges((40, 480), (21, 240), (25, 290), (3, 7), (8, 36), (12, 980), (25, 290), (30, 390))
STORIES = (TINY, LARGE, LARGE)
"""The ranges of the quickstart's stories; repetitions are weights."""


def _packed(draw: random.Random, ranges: Ranges) -> dict[str, int]:
    return {"a": draw.randint(*ranges.packs), "b": draw.randint(*ranges.each)}


def _opening(draw: random.Random, ranges: Ranges) -> tuple[str, dict[str, int], int]:
    """(form, numbers, starting amount) of the first sentence."""
    opening = draw.choices(list(OPENINGS), weights=(5, 3, 2))[0]
    if opening == "packed":
        values = _packed(draw, ranges)
        return opening, values, values["a"] * values["b"]
    values = {"a": draw.randint(*ranges.start), "b": draw.randint(*ranges.second)}
    return opening, values, values["a"] + (values["b"] if opening == "compared" else 0)


def _event(draw: random.Random, forms: list[str], ranges: Ranges) -> tuple[str, dict[str, int], int]:
    """(form, numbers, change of the amount) of one event."""
    form = draw.choice(forms)
    sign = 1 if form in ("buys", "finds", "gets", "buys packed") else -1
    if " " in form:
        values = _packed(draw, ranges)
        return form, values, sign * values["a"] * values["b"]
    values = {"a": draw.randint(*ranges.change)}
    return form, values, sign * values["a"]


def _question(draw: random.Random, form: str, amount: int, ranges: Ranges) -> int | None:
    """The number in the question; None if no number fits."""
    if form == "wants":
        return amount + draw.randint(*ranges.wanted)
    if form == "together":
        return draw.randint(*ranges.together)
    if form == "shared":
        parts = draw.randint(*PARTS)
        return parts if amount % parts == 0 and amount // parts >= 3 else None
    return 0


def _story(draw: random.Random, operations: int, ranges: Ranges) -> str | None:
    """Try to write a story with this number of operations; None if the numbers do not work out."""
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
    remaining = operations - (opening != "has") - (question != "left")
    previous = None
    while remaining > 0:
        forms = [f for f in EVENTS if f != previous and (remaining >= 2 or " " not in f)]
        previous, values, change = _event(draw, forms, ranges)
        amount += change
        if not ranges.amount[0] <= amount <= ranges.amount[1]:
            return None
        sentences.append(EVENTS[previous].format(**words, **values))
        remaining -= 2 if " " in previous else 1
    number = _question(draw, question, amount, ranges)
    if remaining < 0 or number is None:
        return None
    sentences.append(QUESTIONS[question].format(**words, a=number))
    return " ".join(sentences)


def generate(
    count: int, seed: int, avoid: frozenset[str] = frozenset(), ranges: Sequence[Ranges] = STORIES
) -> list[Problem]:
    """`count` different problems whose questions are not in `avoid`; the same seed gives the same problems."""
    draw = random.Random(seed)
    problems, seen = [], set(avoid)
    while len(problems) < count:
        question = _story(draw, draw.choice(LENGTHS), draw.choice(ranges))
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


def within(question: str, ranges: Sequence[Ranges] = STORIES) -> bool:
    """Whether this is a story of this grammar with a length and numbers that `generate` could have chosen."""
    return any(_within(question, each) for each in ranges)


def _within(question: str, ranges: Ranges) -> bool:
    packed = (ranges.packs, ranges.each)
    limits = {
        "has": (ranges.start,),
        "compared": (ranges.start, ranges.second),
        "together": (ranges.together,),
        "shared": (PARTS,),
        "left": (),
        "wants": (),
    }
    found, solution = sentences(question), solve(question)
    if found is None or solution is None or [form for form, _ in found if form in OPENINGS] != [found[0][0]]:
        return False
    for form, slots in found:
        bounds = limits.get(form, packed if "packed" in form or "each" in form else (ranges.change,))
        for slot, (least, most) in zip("ab", bounds, strict=False):
            if not least <= int(slots[slot]) <= most:
                return False
    most = ranges.amount[1] + ranges.together[1]
    results = [op.result <= (ranges.wanted[1] if op.form == "wants" else most) for op in solution.operations]
    positive = all(op.result > 0 for op in solution.operations)
    return len(solution.operations) in LENGTHS and positive and all(results)
