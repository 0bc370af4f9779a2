"""The embedded tutor: solves the arithmetic problems symbolically, writes templates, finds and corrects wrong steps.

It is a teacher like any other: it sees only the messages of a chat, in which it looks for a problem, and for a
student's work where a correction is asked for.
"""

import re
from dataclasses import dataclass, replace

from sclite import trace
from sclite.quickstart.grammar import Operation, Solution, same_operation, solve
from sclite.trace import Step, Trace

# A sum that stands alone: in "4 + 7 + 1 = 12" neither "7 + 1 = 12" nor anything else is one.
_SUM = re.compile(r"(?<![-+*/] )(?<!\d)(\d+) ?([-+*/x×]) ?(\d+) ?= ?(\d+)(?!\d| ?[-+*/])")
_PROBLEM = re.compile(r"Problem:\n(.+?)\n\n", re.S)
_WORK = re.compile(r"The student's work:\n(.+)\Z", re.S)


@dataclass(frozen=True)
class Judgement:
    """The first wrong step (from 1; None: all are right), why, and the operation that belongs there."""

    step: int | None
    cause: str = ""
    operation: Operation | None = None
    done: frozenset[int] = frozenset()


# -- templates -----------------------------------------------------------------------------------------------------


def _key(operation: Operation) -> str | None:
    """A reminder for the steps that are tricky: packs come before the change that they are part of."""
    packed = operation.form in ("buys packed", "gives each") and operation.sign == "*"
    return "Multiply first." if packed else None


def _step(operation: Operation, item: str) -> Step:
    return Step(f"{operation.what} {operation.sum} {item}.", _key(operation))


def _generalized(solution: Solution) -> str:
    signs = {operation.sign for operation in solution.operations}
    if "/" in signs:
        return "Follow the amount through each change, then share it."
    if "*" in signs:
        return "Multiply what comes in packs, then follow the amount through each change."
    return "Follow the amount through each change."


def template(solution: Solution) -> Trace:
    """The hierarchical thought trace of a solved problem."""
    steps = tuple(_step(operation, solution.item) for operation in solution.operations)
    return Trace(steps, _generalized(solution), str(solution.answer))


# -- sums ----------------------------------------------------------------------------------------------------------


def result_of(left: int, sign: str, right: int) -> int | None:
    """What the sum gives; None where it gives no whole number."""
    if sign == "/":
        return left // right if right and left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def _columns(left: int, sign: str, right: int):
    """Column by column from the units: (upper digit with what it borrowed or lost, lower digit, carried in, value)."""
    carry = 0
    for place in range(max(len(str(left)), len(str(right)))):
        upper, lower = left // 10**place % 10, right // 10**place % 10
        if sign == "+":
            value = upper + lower + carry
            yield upper, lower, carry, value
            carry = value // 10
        else:
            upper -= carry
            carry = int(upper < lower)
            upper += 10 * carry
            yield upper, lower, 0, upper - lower


_PLACES = ("units", "tens", "hundreds", "thousands", "ten thousands")


def columns_in_words(left: int, sign: str, right: int) -> list[str]:
    """units 8 + 5 = 13, tens 4 + 7 + 1 = 12 ..: one entry a column."""
    return [
        f"{place} {upper} {sign} {lower}{' + 1' if carry else ''} = {value}"
        for place, (upper, lower, carry, value) in zip(_PLACES, _columns(left, sign, right), strict=False)
    ]


def apart(left: int, sign: str, right: int) -> str:
    """The sum taken apart into ones that a beginner can do, ending in the whole."""
    whole = f"so {left} {sign} {right} = {result_of(left, sign, right)}"
    if sign in "+-" and left >= right * (sign == "-") and max(left, right) < 10**5:
        return ", ".join([*columns_in_words(left, sign, right), whole])
    if sign == "*":
        small, big = sorted((left, right))
        tens, units = big // 10 * 10, big % 10
        if tens and units:
            return (
                f"{small} * {tens} = {small * tens}, {small} * {units} = {small * units}, "
                f"{small * tens} + {small * units} = {small * big}, {whole}"
            )
    if sign == "/" and result_of(left, sign, right) is not None:
        tens = left // right // 10 * 10
        rest = left - right * tens
        if tens and rest:
            return f"{right} * {tens} = {right * tens}, {left} - {right * tens} = {rest}, {rest} / {right} = {rest // right}, {whole}"
    return whole.removeprefix("so ")


def why_wrong(left: int, sign: str, right: int, given: int) -> str:
    """The check that shows that `left sign right` is not `given`: the first column that does not fit."""
    result = result_of(left, sign, right)
    if result is None or result < 0:
        return f"{left} {sign} {right} does not come out here."
    if sign in "+-":
        columns = zip(_PLACES, _columns(left, sign, right), strict=False)
        for index, (place, (upper, lower, carry, value)) in enumerate(columns):
            if value % 10 != given // 10**index % 10:
                carried = " + 1" if carry else ""
                return f"The {place} {upper} {sign} {lower}{carried} = {value} end in {value % 10}, not {given // 10**index % 10}."
    if sign == "*" and result % 10 != given % 10:
        units = left % 10 * (right % 10)
        return f"The units {left % 10} * {right % 10} = {units} end in {units % 10}, not {given % 10}."
    return f"The units fit, but {left} {sign} {right} is not {given}."


# -- corrections ---------------------------------------------------------------------------------------------------


def sums(text: str) -> list[tuple[int, str, int, int]]:
    """Every (left, sign, right, result) that a text claims."""
    return [
        (int(a), sign.replace("x", "*").replace("×", "*"), int(b), int(c))
        for a, sign, b, c in _SUM.findall(text)
    ]


def _judge_step(
    text: str, solution: Solution, done: frozenset[int]
) -> tuple[int | None, str, Operation | None]:
    """Which operation a step does; or None, why it is wrong, and the operation that belongs there."""
    numbers = range(len(solution.operations))
    ready = [i for i in numbers if i not in done and all(p in done for p in solution.parents[i])]
    if not ready:
        return None, "The problem asks for no further sum.", None
    claimed = sums(text)
    needed = solution.operations[ready[0]]
    if not claimed:
        return None, "No sum is worked out here.", needed
    left, sign, right, _ = claimed[-1]
    match = next((i for i in ready if same_operation((left, sign, right), solution.operations[i])), None)
    if match is None:
        return None, f"The sum to do is {needed.left} {needed.sign} {needed.right}.", needed
    for one, by, other, given in claimed:
        if result_of(one, by, other) != given:
            return None, why_wrong(one, by, other, given), solution.operations[match]
    return match, "", None


def judge(solution: Solution, attempt: Trace) -> Judgement:
    """Walk an attempt to its first wrong step. Steps may come in any order that the problem allows."""
    done: frozenset[int] = frozenset()
    for number, step in enumerate(attempt.steps, 1):
        match, cause, operation = _judge_step(step.text, solution, done)
        if match is None:
            return Judgement(number, cause, operation, done)
        done |= {match}
    return Judgement(None, done=done)


def correct(solution: Solution, attempt: Trace) -> Trace:
    """The review of an attempt: its first wrong step with cause and correction, the rest solved anew."""
    verdict = judge(solution, attempt)
    end = {"generalized": _generalized(solution), "answer": str(solution.answer)}
    if verdict.step is None:
        return replace(attempt, **end)
    wrong = attempt.steps[verdict.step - 1]
    done = verdict.done
    if verdict.operation is None:
        correction = f"Nothing is left to do, the answer is {solution.answer}."
    else:
        operation = verdict.operation
        correction = (
            f"{operation.what} {apart(operation.left, operation.sign, operation.right)} {solution.item}."
        )
        done |= {solution.operations.index(operation)}
    rest = [_step(op, solution.item) for i, op in enumerate(solution.operations) if i not in done]
    kept = [Step(step.text, step.key) for step in attempt.steps[: verdict.step - 1]]
    return Trace((*kept, Step(wrong.text, wrong.key, verdict.cause, correction), *rest), **end)


# -- talking -------------------------------------------------------------------------------------------------------


def reply(messages: list[dict[str, str]]) -> str:
    """What the tutor says to a chat: a template, a correction, or that it knows only its own kind of problem."""
    text = messages[-1]["content"]
    problem = _PROBLEM.search(text)
    solution = solve(problem[1]) if problem else None
    if solution is None:
        return "I only know arithmetic stories, and I see none here."
    work = _WORK.search(text)
    if work is None:
        return trace.render(template(solution))
    return trace.render(correct(solution, trace.parse(work[1]).trace))
