"""The bundled teacher: solves the arithmetic problems symbolically, writes templates and corrects wrong steps.

Like any teacher it sees only the messages of a chat, in which it looks for a problem and a student's work.
"""

import re
from dataclasses import dataclass, replace

from sclite import trace
from sclite.quickstart.grammar import Operation, Solution, same_operation, solve
from sclite.trace import Step, Trace

# A complete equation: "4 + 7 + 1 = 12" has none, and "7 + 1 = 12" must not match.
_SUM = re.compile(r"(?<![-+*/] )(?<!\d)(\d+) ?([-+*/x×]) ?(\d+) ?= ?(\d+)(?!\d| ?[-+*/])")
_PROBLEM = re.compile(r"Problem:\n(.+?)\n\n", re.S)
_WORK = re.compile(r"The student's work:\n(.+)\Z", re.S)


@dataclass(frozen=True)
class Judgement:
    """The first wrong step (from 1; None: all are right), the cause, and the operation that belongs there."""

    step: int | None
    cause: str = ""
    operation: Operation | None = None
    done: frozenset[int] = frozenset()


# -- templates -----------------------------------------------------------------------------------------------------


def _key(operation: Operation) -> str | None:
    """A reminder: packs are multiplied before the change that they are part of."""
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
    """The result of the operation; None if it is no integer."""
    if sign == "/":
        return left // right if right and left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def _columns(left: int, sign: str, right: int):
    """Column by column from the units: (upper digit after borrowing, lower digit, carry in, value)."""
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
    """One entry per column: units 8 + 5 = 13, tens 4 + 7 + 1 = 12 .."""
    return [
        f"{place} {upper} {sign} {lower}{' + 1' if carry else ''} = {value}"
        for place, (upper, lower, carry, value) in zip(_PLACES, _columns(left, sign, right), strict=False)
    ]


def decompose(left: int, sign: str, right: int) -> str:
    """The operation split into easy ones, ending with the whole."""
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
    """The check that shows that `left sign right` is not `given`: the first column that is wrong."""
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


def find_equations(text: str) -> list[tuple[int, str, int, int]]:
    """All equations (left, sign, right, result) in a text."""
    return [
        (int(a), sign.replace("x", "*").replace("×", "*"), int(b), int(c))
        for a, sign, b, c in _SUM.findall(text)
    ]


def _judge_step(
    text: str, solution: Solution, done: frozenset[int]
) -> tuple[int | None, str, Operation | None]:
    """(operation, "", None) for a right step; (None, cause, the operation that belongs there) for a wrong one."""
    numbers = range(len(solution.operations))
    ready = [i for i in numbers if i not in done and all(p in done for p in solution.parents[i])]
    if not ready:
        return None, "The problem asks for no further sum.", None
    claimed = find_equations(text)
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
    """Find the first wrong step of an attempt. Steps may come in any order that the problem allows."""
    done: frozenset[int] = frozenset()
    for number, step in enumerate(attempt.steps, 1):
        match, cause, operation = _judge_step(step.text, solution, done)
        if match is None:
            return Judgement(number, cause, operation, done)
        done |= {match}
    return Judgement(None, done=done)


def correct(solution: Solution, attempt: Trace) -> Trace:
    """The review of an attempt: its first wrong step with cause and correction, then a new solution."""
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
            f"{operation.what} {decompose(operation.left, operation.sign, operation.right)} {solution.item}."
        )
        done |= {solution.operations.index(operation)}
    rest = [_step(op, solution.item) for i, op in enumerate(solution.operations) if i not in done]
    kept = [Step(step.text, step.key) for step in attempt.steps[: verdict.step - 1]]
    return Trace((*kept, Step(wrong.text, wrong.key, verdict.cause, correction), *rest), **end)


# -- talking -------------------------------------------------------------------------------------------------------


def reply(messages: list[dict[str, str]]) -> str:
    """The tutor's reply to a chat: a template, a correction, or a refusal of other problems."""
    text = messages[-1]["content"]
    problem = _PROBLEM.search(text)
    solution = solve(problem[1]) if problem else None
    if solution is None:
        return "I only know arithmetic stories, and I see none here."
    work = _WORK.search(text)
    if work is None:
        return trace.render(template(solution))
    return trace.render(correct(solution, trace.parse(work[1]).trace))
