"""How the rows of the warm-up are mixed: whatever stands for a row, the same are drawn in the same order."""

import random
from collections.abc import Sequence
from itertools import zip_longest
from typing import TypeVar

R = TypeVar("R")


def mix(
    reviewed: Sequence[R],
    closed: Sequence[R],
    *,
    solved: Sequence[R],
    continued: Sequence[R],
    share: float,
    seed: int,
) -> list[R]:
    """All reviews and all closed rows (see warm_rows), and `share` rows of solving for each review; shuffled.

    These are solved ones, drawn from all, and continued ones in their order, in turn; no row comes twice before each came
    once. With a share of 1 and half of the reviews confirmations every continued row is among them.
    """
    draw = random.Random(seed)
    solving = in_turn(draw.sample(solved, len(solved)), continued)
    wanted = round(share * len(reviewed)) if solving else 0
    rows = [*reviewed, *closed, *(solving[i % len(solving)] for i in range(wanted))]
    draw.shuffle(rows)
    return rows


def in_turn(*kinds: Sequence[R]) -> list[R]:
    """One of each kind in turn, until the longest is used up."""
    return [row for one in zip_longest(*kinds) for row in one if row is not None]
