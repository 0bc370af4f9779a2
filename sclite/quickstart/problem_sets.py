"""The quickstart's training, threshold and test sets: fixed by seeds, without common questions."""

from sclite.quickstart.stories import generate
from sclite.records import Problem

TEST_SEED, THRESHOLD_SEED, TRAIN_SEED = 101, 102, 103
TEST_COUNT, THRESHOLD_COUNT = 1000, 1000


def test_problems(count: int) -> list[Problem]:
    """The first `count` (at most 1000) test problems."""
    return generate(TEST_COUNT, TEST_SEED)[:count]


def threshold_problems(count: int) -> list[Problem]:
    """The first `count` (at most 1000) problems for fitting the threshold, none of them a test problem."""
    avoid = frozenset(problem.question for problem in test_problems(TEST_COUNT))
    return generate(THRESHOLD_COUNT, THRESHOLD_SEED, avoid)[:count]


def train_problems(count: int) -> list[Problem]:
    """`count` training problems, none of which is a test or threshold problem."""
    held_out = [*test_problems(TEST_COUNT), *threshold_problems(THRESHOLD_COUNT)]
    return generate(count, TRAIN_SEED, frozenset(problem.question for problem in held_out))
