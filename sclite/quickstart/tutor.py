"""The bundled teacher: solves the arithmetic problems symbolically, writes templates and corrects wrong steps.

Like any teacher it is called through LiteLLM and sees only the messages of a chat, in which it looks for a problem and a
student's work.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sclite import trace
from sclite.quickstart.grammar import Operation, Solution, solve
from sclite.trace import Step, Trace

PROVIDER = "embedded"
MODEL = f"{PROVIDER}/tutor"
# A complete equation (left, sign, right, result): "4 + 7 + 1 = 12" has none, and "7 + 1 = 12" must not match.
_EQUATION = re.compile(r"(?<![-+*/] )(?<!\d)(\d{1,40}) ?([-+*/x×]) ?(\d{1,40}) ?= ?(\d{1,40})(?!\d| ?[-+*/])")
_PROBLEM = re.compile(r"(?:Problem:\n|Solve this problem\.\n\n)(.+?)(?:\n\n|\Z)", re.S)
_WORK = re.compile(r"The student's work:\n(.+)\Z", re.S)


@dataclass(frozen=True)
class Judgement:
    """The first wrong step (from 1; None: all are right), the cause, and the operation that belongs there."""

    step: int | None
    cause: str = ""
    operation: Operation | None = None
    done: frozenset[int] = frozenset()


# -- templates -----------------------------------------------------------------------------------------------------


def _step(operation: Operation, item: str) -> Step:
    """A step with a reminder: packs are multiplied before the change that they are part of."""
    packed = operation.form in ("buys packed", "gives each") and operation.sign == "*"
    return Step(f"{operation.what} {operation.sum} {item}.", "Multiply first." if packed else None)


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
    """The result of the operation; None if it is not an integer."""
    if sign == "/":
        return left // right if right and left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def _columns(left: int, sign: str, right: int) -> Iterator[tuple[str, int]]:
    """(text, value) of each column from the units: (`units 8 + 5 = 13`, 13), (`tens 4 + 7 + 1 = 12`, 12) .."""
    carry, names = 0, ("units", "tens", "hundreds", "thousands", "ten thousands")
    for place, name in enumerate(names[: max(len(str(left)), len(str(right)))]):
        upper, lower = left // 10**place % 10, right // 10**place % 10
        if sign == "+":
            text, value = f"{upper} + {lower}{' + 1' * carry}", upper + lower + carry
            carry = value // 10
        else:
            upper -= carry
            carry = int(upper < lower)
            text, value = f"{upper + 10 * carry} - {lower}", upper + 10 * carry - lower
        yield f"{name} {text} = {value}", value


def decompose(left: int, sign: str, right: int) -> str:
    """The operation split into easy ones, ending with the whole."""
    result = result_of(left, sign, right)
    whole = f"so {left} {sign} {right} = {result}"
    if sign in "+-" and left >= right * (sign == "-") and max(left, right) < 10**5:
        return ", ".join([*(text for text, _ in _columns(left, sign, right)), whole])
    if sign == "*":
        small, big = sorted((left, right))
        tens, units = big // 10 * 10, big % 10
        if tens and units:
            return (
                f"{small} * {tens} = {small * tens}, {small} * {units} = {small * units}, "
                f"{small * tens} + {small * units} = {small * big}, {whole}"
            )
    if sign == "/" and result is not None:
        tens, rest = result // 10 * 10, left - right * (result // 10 * 10)
        if tens and rest:
            return (
                f"{right} * {tens} = {right * tens}, {left} - {right * tens} = {rest}, "
                f"{rest} / {right} = {rest // right}, {whole}"
            )
    return whole.removeprefix("so ")


def why_wrong(left: int, sign: str, right: int, given: int) -> str:
    """The check that shows that `left sign right` is not `given`: the first column that is wrong."""
    result = result_of(left, sign, right)
    if result is None or result < 0:
        return f"{left} {sign} {right} does not come out here."
    if sign in "+-":
        for place, (text, value) in enumerate(_columns(left, sign, right)):
            digit = given // 10**place % 10
            if value % 10 != digit:
                return f"The {text} end in {value % 10}, not {digit}."
    if sign == "*" and result % 10 != given % 10:
        units = left % 10 * (right % 10)
        return f"The units {left % 10} * {right % 10} = {units} end in {units % 10}, not {given % 10}."
    return f"The units fit, but {left} {sign} {right} is not {given}."


# -- corrections ---------------------------------------------------------------------------------------------------


def first_wrong_step(question: str, work: Trace) -> int | None:
    """The first wrong step (from 1); 0 if all are right, None for a problem that the tutor does not know."""
    solution = solve(question)
    return (judge(solution, work).step or 0) if solution else None


def judge(solution: Solution, attempt: Trace) -> Judgement:
    """Find the first wrong step of an attempt. Steps may come in any order that the problem allows."""
    done: frozenset[int] = frozenset()
    for number, step in enumerate(attempt.steps, 1):
        ready = [i for i, used in enumerate(solution.parents) if i not in done and done.issuperset(used)]
        if not ready:
            return Judgement(number, "The problem asks for no further sum.", None, done)
        claimed = [
            (int(left), "*" if sign in "x×" else sign, int(right), int(result))
            for left, sign, right, result in _EQUATION.findall(step.text)
        ]
        needed = solution.operations[ready[0]]
        if not claimed:
            return Judgement(number, "No sum is worked out here.", needed, done)
        left, sign, right, _ = claimed[-1]
        meant = [(left, sign, right), (right, sign, left)][: 2 if sign in "+*" else 1]
        operations = {i: solution.operations[i] for i in ready}
        match = next((i for i, o in operations.items() if (o.left, o.sign, o.right) in meant), None)
        if match is None:
            cause = f"The sum to do is {needed.left} {needed.sign} {needed.right}."
            return Judgement(number, cause, needed, done)
        for left, sign, right, given in claimed:
            if result_of(left, sign, right) != given:
                cause = why_wrong(left, sign, right, given)
                return Judgement(number, cause, solution.operations[match], done)
        done |= {match}
    return Judgement(None, done=done)


def correct(solution: Solution, attempt: Trace) -> Trace:
    """The review of an attempt: its first wrong step with cause and correction, then a new solution."""
    verdict, answer = judge(solution, attempt), str(solution.answer)
    if verdict.step is None:
        return replace(attempt, generalized=_generalized(solution), answer=answer)
    correction, done = f"Nothing is left to do, the answer is {answer}.", verdict.done
    if operation := verdict.operation:
        sums = decompose(operation.left, operation.sign, operation.right)
        correction = f"{operation.what} {sums} {solution.item}."
        done |= {solution.operations.index(operation)}
    wrong = replace(attempt.steps[verdict.step - 1], cause=verdict.cause, correction=correction)
    kept = [Step(step.text, step.key) for step in attempt.steps[: verdict.step - 1]]
    rest = [_step(op, solution.item) for i, op in enumerate(solution.operations) if i not in done]
    return Trace((*kept, wrong, *rest), _generalized(solution), answer)


# -- replies -------------------------------------------------------------------------------------------------------


def reply(messages: list[dict[str, str]]) -> str:
    """The tutor's reply to a chat: a template, a correction, or a refusal of other problems."""
    text = messages[-1]["content"]
    problem = _PROBLEM.search(text)
    solution = solve(problem[1]) if problem else None
    if solution is None:
        return "I only know arithmetic stories, and I see none here."
    work = _WORK.search(text)
    return trace.render(correct(solution, trace.parse(work[1]).trace) if work else template(solution))


def register() -> None:
    """Register `embedded/tutor` with LiteLLM; pass this to Teacher as `prepare`. Replies are free and deterministic."""
    from sclite.teacher.provider import import_litellm

    litellm: Any = import_litellm()

    class Tutor(litellm.CustomLLM):
        async def acompletion(self, *args, messages, model, model_response, **options):
            text = reply(messages)
            asked = sum(len(message["content"].split()) for message in messages)
            model_response.model = model
            model_response.choices[0].message.content = text
            model_response.choices[0].finish_reason = "stop"
            model_response.usage = litellm.Usage(prompt_tokens=asked, completion_tokens=len(text.split()))
            return model_response

    litellm.custom_provider_map = [{"provider": PROVIDER, "custom_handler": Tutor()}]
    litellm.utils.custom_llm_setup()
    free = {"input_cost_per_token": 0.0, "output_cost_per_token": 0.0}
    litellm.register_model({MODEL: {"litellm_provider": PROVIDER, "mode": "chat", **free}})
