"""A student's answers to problems, graded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sclite import prompts
from sclite.config import Config
from sclite.grading.extract import answer_of
from sclite.grading.grader import Grader
from sclite.records import Problem
from sclite.run import Report, Run
from sclite.student.base import Reply, Request, Student
from sclite.student.self_correction import ReviewSettings
from sclite.student.step_scores import Cutoff
from sclite.trace import ParsedTrace, Trace, parse

NO_STEPS = "its answers have no steps"
FIRST_PASS = "sft/first_pass.json"
"""The share of right first answers before the warm-up."""


@dataclass(frozen=True)
class FirstAnswers:
    """A student's first answers to some problems: replies, parsed traces, verdicts (None: unknown)."""

    problems: Sequence[Problem]
    replies: list[Reply]
    parsed: list[ParsedTrace]
    correct: list[bool | None]

    @property
    def reviewable(self) -> list[Trace]:
        """The trace to review of each answer; empty if the answer was cut off, as in chat."""
        pairs = zip(self.replies, self.parsed, strict=True)
        return [Trace() if reply.finish == "length" else parsed.trace for reply, parsed in pairs]


def solve_problems(
    student: Student, problems: Sequence[Problem], config: Config, grader: Grader
) -> FirstAnswers:
    """Turn 1: greedy answers to all problems, graded. The verdict of a failed call is None."""
    requests = [
        Request(prompts.solve_messages(p.question, config.prompts.folder), max_tokens=config.eval.max_tokens)
        for p in problems
    ]
    replies = sorted(student.generate(requests), key=lambda reply: reply.index)
    parsed = [parse(reply.text) for reply in replies]
    verdicts = grade(grader, map(answer_of, parsed), problems)
    correct = [None if r.finish == "error" else v for r, v in zip(replies, verdicts, strict=True)]
    return FirstAnswers(problems, replies, parsed, correct)


def check_first_pass(
    config: Config,
    run: Run,
    stage: str,
    student: Student,
    problems: Sequence[Problem],
    grader: Grader,
    report: Report,
) -> str:
    """Count the right first answers, as "first_pass" in the report: before the warm-up (attempts) or after it (pairs).

    Returns a warning if it has harmed solving: fewer are right than the 95 % interval of those before admits (METHOD 4.5).
    """
    known = [
        verdict
        for verdict in solve_problems(student, problems, config, grader).correct
        if verdict is not None
    ]
    if not known:
        return ""
    report.figures["first_pass"] = after = sum(known) / len(known)
    if stage == "attempts":
        run.write_json(FIRST_PASS, {"right": after, "n": len(known)})
    before = run.read_json(FIRST_PASS, dict[str, float])
    if (
        before is None
        or after >= before["right"] - 1.96 * (before["right"] * (1 - before["right"]) / before["n"]) ** 0.5
    ):
        return ""
    shares = (
        f"{100 * after:.0f} % of {len(known)} held-out problems right, {100 * before['right']:.0f} % before"
    )
    hint = "lower warmup.learning_rate, or raise warmup.replay_share"
    return f"the warm-up made first answers worse: {shares}; {hint}"


def grade(grader: Grader, answers: Iterable[str | None], problems: Sequence[Problem]) -> list[bool | None]:
    """Whether each answer is right; None if that could not be decided."""
    return grader.equal_many(zip(answers, (problem.answer for problem in problems), strict=True))


def review_settings(config: Config, cutoff: Cutoff | None = None) -> ReviewSettings:
    """The review settings of a configuration; without a cutoff, for corrections of given steps only."""
    cutoff = cutoff or Cutoff()
    limits = config.review.rounds, config.eval.max_tokens, config.prompts.folder
    return ReviewSettings(cutoff.threshold, *limits, confidence_weight=cutoff.confidence_weight)
