"""The quickstart's training, threshold and test sets: fixed by seeds, with no question in common."""

from typing import Literal

from sclite.quickstart.stories import generate
from sclite.records import Problem

SEEDS = {"test": 101, "threshold": 102, "train": 103}
HELD_OUT = 1000
"""The number of problems in the test set and in the threshold set."""


def problem_set(name: Literal["test", "threshold", "train"], count: int) -> list[Problem]:
    """The first `count` problems of a set, at most HELD_OUT unless it is for training."""
    avoid: frozenset[str] = frozenset()
    for held_out in ("test", "threshold"):
        if name == held_out:
            return generate(min(count, HELD_OUT), SEEDS[name], avoid)
        avoid |= {problem.question for problem in generate(HELD_OUT, SEEDS[held_out], avoid)}
    return generate(count, SEEDS[name], avoid)
