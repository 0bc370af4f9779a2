"""Generation of arithmetic word problems with one to four operations and random numbers.

`grammar.solve` sees only the text that `generate` writes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sclite.quickstart.grammar import BOXES, EVENTS, ITEMS, NAMES, OPENINGS, QUESTIONS, solve
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
SEEDS = {"test": 101, "threshold": 102, "train": 103}
"""The seeds of the quickstart's sets."""
HELD_OUT = 1000
"""The number of problems in the test set and in the threshold set."""


def _story(draw: random.Random, operations: int, ranges: Ranges) -> str | None:
    """Try to write a story with this number of operations; None if the numbers do not work out."""
    they = draw.choice(("She", "He"))
    name = draw.choice(NAMES[they])
    other = draw.choice([n for names in NAMES.values() for n in names if n != name])
    words = {"they": they, "name": name, "other": other}
    words |= {"item": draw.choice(ITEMS), "box": draw.choice(BOXES)}

    opening = draw.choices(list(OPENINGS), weights=(5, 3, 2))[0]
    if opening == "packed":
        values = {"a": draw.randint(*ranges.packs), "b": draw.randint(*ranges.each)}
        amount = values["a"] * values["b"]
    else:
        values = {"a": draw.randint(*ranges.start), "b": draw.randint(*ranges.second)}
        amount = values["a"] + (values["b"] if opening == "compared" else 0)
    sentences = [OPENINGS[opening].format(**words, **values)]
    question = draw.choices(list(QUESTIONS), weights=(5, 2, 2, 1))[0]
    remaining = operations - (opening != "has") - (question != "left")
    form = ""
    while remaining > 0:
        form = draw.choice([f for f in EVENTS if f != form and (remaining >= 2 or " " not in f)])
        values = {"a": draw.randint(*(ranges.packs if " " in form else ranges.change))}
        if " " in form:
            values["b"] = draw.randint(*ranges.each)
        change = values["a"] * values.get("b", 1)
        amount += change if EVENTS[form][1] == "+" else -change
        if not ranges.amount[0] <= amount <= ranges.amount[1]:
            return None
        sentences.append(EVENTS[form][0].format(**words, **values))
        remaining -= 2 if " " in form else 1
    number = 0
    if question == "wants":
        number = amount + draw.randint(*ranges.wanted)
    elif question == "together":
        number = draw.randint(*ranges.together)
    elif question == "shared":
        number = draw.randint(*PARTS)
        if amount % number or amount // number < 3:
            return None
    if remaining < 0:
        return None
    return " ".join([*sentences, QUESTIONS[question].format(**words, a=number)])


def generate(
    count: int, seed: int, avoid: frozenset[str] = frozenset(), ranges: Sequence[Ranges] = STORIES
) -> list[Problem]:
    """`count` different problems whose questions are not in `avoid`; the same seed gives the same problems."""
    draw = random.Random(seed)
    problems: list[Problem] = []
    seen = set(avoid)
    while len(problems) < count:
        question = _story(draw, draw.choice(LENGTHS), draw.choice(ranges))
        if question is None or question in seen or not (solution := solve(question)):
            continue
        seen.add(question)
        id, answer = f"arithmetic-{seed}-{len(problems)}", str(solution.answer)
        worked = " ".join(f"{op.what}: {op.sum}." for op in solution.operations)
        problems.append(Problem(id=id, question=question, answer=answer, solution=worked))
    return problems


def problem_set(name: Literal["test", "threshold", "train"], count: int) -> list[Problem]:
    """The first `count` problems of a set, at most HELD_OUT unless it is for training; no two sets share a question."""
    avoid: frozenset[str] = frozenset()
    for held_out in ("test", "threshold"):
        if name == held_out:
            return generate(min(count, HELD_OUT), SEEDS[name], avoid)
        avoid |= {problem.question for problem in generate(HELD_OUT, SEEDS[held_out], avoid)}
    return generate(count, SEEDS[name], avoid)
