"""Wrong lines and their marks: typical slips, and homework before and after marking."""

import random
from dataclasses import dataclass

from sclite.quickstart.tutor import decompose, result_of, why_wrong

# these precede the token that judges a line, which has a larger weight in pre-training
RIGHT_HERE, WRONG_HERE = "\x01", "\x02"
ROWS = ("Row", "Line", "Item", "Sum", "Part")


def slip(result: int, draw: random.Random) -> int:
    """A plausible wrong result: a wrong digit, a lost carry, swapped digits."""
    digits = list(str(result))
    kind = draw.random()
    if kind < 0.15 and len(digits) > 1:
        i = draw.randrange(len(digits) - 1)
        digits[i], digits[i + 1] = digits[i + 1], digits[i]
        wrong = int("".join(digits))
    else:
        place = 10 ** draw.randrange(len(digits))
        wrong = result + place * draw.choice((1, -1, 1, -1, 2, -2, 3, -3, 5))
    return wrong if wrong != result and wrong >= 0 else result + draw.choice((1, 10))


MARKS = (("Mistake", "Better"), ("Wrong", "Right"), ("Error", "Fix"), ("Why", "Instead"))
REASONS = (
    "Mistake", "Wrong", "Error", "Why", "Reason", "Cause", "Because", "Fault", "Slip", "Red", "Doubt", "Flaw",
    "Cause", "Cause", "Cause",
)  # fmt: skip
REMEDIES = (
    "Better", "Right", "Fix", "Instead", "Correction", "Mended", "Rather", "Redo", "Green", "Truth", "Anew", "Cure",
    "Correction", "Correction", "Correction",
)  # fmt: skip


def two_marks(draw: random.Random, part: int) -> tuple[str, str]:
    """The names of the two notes on a wrong line. With few pairs a student learns the names, with many the form.

    Cause and Correction occur with other names, but never together: that is sclite's own format.
    """
    if part < 6:
        return draw.choice(MARKS)
    pair = draw.choice(REASONS), draw.choice(REMEDIES)
    return two_marks(draw, part) if pair == ("Cause", "Correction") else pair


def misread(operation, numbers: list[int], draw: random.Random) -> tuple[int, int]:
    """The operation's two numbers, one of them misread or taken from another line of the work."""
    left, right = operation.left, operation.right
    other = draw.choice(numbers) if draw.random() < 0.5 else slip(draw.choice((left, right)), draw)
    return (other, right) if draw.random() < 0.5 else (left, other)


@dataclass(frozen=True)
class Issue:
    """A wrong operation, and why it is wrong."""

    left: int
    right: int
    given: int
    why: str


def make_error(operation, draw: random.Random, elsewhere: list[int]) -> Issue:
    """A wrong result, or a number that is misread or taken from `elsewhere` in the work."""
    left, sign, right = operation.left, operation.sign, operation.right
    one, other = misread(operation, elsewhere, draw) if elsewhere else (left, slip(right, draw))
    found = result_of(one, sign, other)
    given = slip(operation.result, draw)
    if draw.random() < (0.3 if elsewhere else 0.2) and found is not None and 0 <= found != operation.result:
        return Issue(one, other, found, f"The sum to do is {operation.sum.split(' = ')[0]}.")
    return Issue(left, right, given, why_wrong(left, sign, right, given))


def marked(operation, item: str, tags: tuple[str, str, str], error: Issue | None) -> str:
    """One line of the work in a tag; a wrong one has the teacher's marks inside."""
    (row, mistake, remedy), what, sign = tags, operation.what, operation.sign
    if error is None:
        return f"<{row}>{what} {operation.sum} {item}.\n{RIGHT_HERE}</{row}>"
    better = f"{what} {decompose(operation.left, sign, operation.right)} {item}."
    notes = f"<{mistake}>{error.why}</{mistake}>\n<{remedy}>{better}</{remedy}>"
    line = f"{what} {error.left} {sign} {error.right} = {error.given} {item}."
    return f"<{row}>{line}\n{WRONG_HERE}{notes}\n</{row}>"


def unmarked(solution, row: str, wrong_at: int | None, error: Issue | None) -> str:
    """The work as handed in: the lines after a wrong one use its result."""
    lines, instead = [], {}
    for i, op in enumerate(solution.operations):
        left, right = instead.get(op.left, op.left), instead.get(op.right, op.right)
        result = result_of(left, op.sign, right)
        if i == wrong_at:
            left, right, result = error.left, error.right, error.given
        elif result is None or result < 0:
            left, right, result = op.left, op.right, op.result
        if result != op.result:
            instead[op.result] = result
        lines.append(
            f"<{row}{i + 1}>{op.what} {left} {op.sign} {right} = {result} {solution.item}.\n</{row}{i + 1}>"
        )
    end = instead.get(solution.answer, solution.answer)
    return "\n".join([*lines, f"<Result>{end}</Result>"])
