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
    avoid = frozenset(p.question for p in generate(TEST_COUNT, TEST_SEED))
    return generate(THRESHOLD_COUNT, THRESHOLD_SEED, avoid)[:count]


def held_out_questions() -> frozenset[str]:
    """All questions of the test and threshold sets, which training and the student's pre-training must avoid."""
    return frozenset(p.question for p in [*test_problems(TEST_COUNT), *threshold_problems(THRESHOLD_COUNT)])


def train_problems(count: int) -> list[Problem]:
    """`count` training problems, none of which is held out."""
    return generate(count, TRAIN_SEED, held_out_questions())
