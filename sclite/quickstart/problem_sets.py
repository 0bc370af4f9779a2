"""The quickstart's problems: training, threshold and test sets, fixed by their seeds and without a common question."""

from sclite.quickstart.stories import generate
from sclite.records import Problem

TEST_SEED, THRESHOLD_SEED, TRAIN_SEED = 101, 102, 103
TEST_COUNT, THRESHOLD_COUNT = 1000, 1000


def test_problems(count: int) -> list[Problem]:
    """The first `count` (at most 1000) test problems."""
    return generate(TEST_COUNT, TEST_SEED)[:count]


def threshold_problems(count: int) -> list[Problem]:
    """Problems to fit the threshold on (at most 1000), none of them a test problem."""
    avoid = frozenset(p.question for p in generate(TEST_COUNT, TEST_SEED))
    return generate(THRESHOLD_COUNT, THRESHOLD_SEED, avoid)[:count]


def held_out_questions() -> frozenset[str]:
    """Every question of the test and threshold sets: kept out of training and of the student's pre-training."""
    return frozenset(p.question for p in [*test_problems(TEST_COUNT), *threshold_problems(THRESHOLD_COUNT)])


def train_problems(count: int) -> list[Problem]:
    """`count` training problems, none of them held out."""
    return generate(count, TRAIN_SEED, held_out_questions())
