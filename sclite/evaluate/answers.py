"""A student's answers to problems, graded."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.grading.extract import answer_of
from sclite.grading.grader import Grader
from sclite.records import Problem
from sclite.run import Run
from sclite.signature import digest, digest_rows
from sclite.student.adapters import adapter_weights
from sclite.student.base import Reply, Request, Student
from sclite.student.self_correction import ReviewSettings
from sclite.student.step_scores import Cutoff
from sclite.trace import ParsedTrace, Trace, parse

NO_STEPS = "its answers have no steps"
FIRST_PASS = "first_pass.json"


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


def measure_first_pass(
    config: Config, run: Run, stage: str, student: Student, problems: Sequence[Problem], grader: Grader
) -> None:
    """Write <stage>/first_pass.json: the share of right first answers of the sft or warmup student, unless it is there."""
    identity, path = (
        digest([run.file_digest(adapter_weights(stage)), digest_rows(problems)]),
        f"{stage}/{FIRST_PASS}",
    )
    if (run.read_json(path, dict[str, Any]) or {}).get("signature") == identity:
        return
    limit = config.eval.model_copy(update={"max_tokens": config.attempts.max_tokens})
    verdicts = solve_problems(student, problems, config.model_copy(update={"eval": limit}), grader).correct
    known = [verdict for verdict in verdicts if verdict is not None]
    if known:
        figures = {"signature": identity, "right": sum(known) / len(known), "n": len(known)}
        run.write_json(path, figures)


def first_pass(run: Run, stage: str) -> dict[str, Any] | None:
    """{"right", "n"} of the last sft or warmup student that was measured."""
    return run.read_json(f"{stage}/{FIRST_PASS}", dict[str, Any])


def first_pass_warning(run: Run) -> str:
    """A warning if the warm-up made first answers worse: fewer are right than Wilson's 95 % interval before it (METHOD 4.5)."""
    before, after = first_pass(run, "sft"), first_pass(run, "warmup")
    if before is None or after is None:
        return ""
    share, n, z = before["right"], before["n"], 1.96
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    if after["right"] >= (share + z * z / (2 * n) - spread) / (1 + z * z / n):
        return ""
    shares = f"{100 * share:.0f} → {100 * after['right']:.0f} % of {n} held-out problems right"
    hint = "lower warmup.learning_rate, or raise warmup.replay_share"
    return f"the warm-up made first answers worse, {shares}; {hint}"


def grade(grader: Grader, answers: Iterable[str | None], problems: Sequence[Problem]) -> list[bool | None]:
    """Whether each answer is right; None if that could not be decided."""
    return grader.equal_many(zip(answers, (problem.answer for problem in problems), strict=True))


def review_settings(config: Config, cutoff: Cutoff | None = None) -> ReviewSettings:
    """The review settings of a configuration; without a cutoff, for corrections of given steps only."""
    cutoff = cutoff or Cutoff()
    limits = config.review.rounds, config.eval.max_tokens, config.prompts.folder
    return ReviewSettings(cutoff.threshold, *limits, confidence_weight=cutoff.confidence_weight)
