"""A student's answers to problems, graded; and whether the warm-up harms them (METHOD, section 4)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.evaluate.metrics import Outcome, compute_metrics
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
FIRST_PASS = "{}/first_answers.json"
FIRST_PASS_PROBLEMS = 100
"""How many held-out problems are solved before and after the warm-up."""


@dataclass(frozen=True)
class Answer:
    """A student's answer to a problem, and whether it is right (None: unknown)."""

    problem: Problem
    reply: Reply
    parsed: ParsedTrace
    correct: bool | None

    @property
    def reviewable(self) -> Trace:
        """The trace to review; empty if the answer was cut off, as in chat."""
        return Trace() if self.reply.finish == "length" else self.parsed.trace

    def outcome(self, **review: Any) -> Outcome:
        """The row of this answer, with what its `review` changes."""
        row = {
            "id": self.problem.id,
            "question": self.problem.question,
            "gold": self.problem.answer,
            "first": self.reply.text,
            "second": None,
            "correct1": self.correct,
            "correct2": self.correct,
            "format_ok": not self.parsed.issues,
            "cut": self.reply.finish == "length",
            "tokens1": self.reply.tokens,
            "prefill1": self.reply.prefill_tokens,
        }
        return Outcome(**row | review)


def solve_problems(
    student: Student,
    problems: Sequence[Problem],
    config: Config,
    grader: Grader,
    requests: Sequence[Request] | None = None,
) -> list[Answer]:
    """Graded replies to requests, one per problem; default: greedy first answers. The verdict of a failed call is None."""
    requests = requests or [
        Request(prompts.solve_messages(p.question, config.prompts.folder), max_tokens=config.eval.max_tokens)
        for p in problems
    ]
    replies = sorted(student.generate(requests), key=lambda reply: reply.index)
    parsed = [parse(reply.text) for reply in replies]
    verdicts = grade(grader, map(answer_of, parsed), problems)
    correct = [None if r.finish == "error" else v for r, v in zip(replies, verdicts, strict=True)]
    return [Answer(*columns) for columns in zip(problems, replies, parsed, correct, strict=True)]


def grade(grader: Grader, answers: Iterable[str | None], problems: Sequence[Problem]) -> list[bool | None]:
    """Whether each answer is right; None if that could not be decided."""
    return grader.equal_many(zip(answers, (problem.answer for problem in problems), strict=True))


def review_settings(config: Config, cutoff: Cutoff | None = None) -> ReviewSettings:
    """The review settings of a configuration; without a cutoff, for corrections of given steps only."""
    cutoff = cutoff or Cutoff()
    limits = config.review.rounds, config.eval.max_tokens, config.prompts.folder
    return ReviewSettings(cutoff.threshold, *limits, confidence_weight=cutoff.confidence_weight)


# -- before and after the warm-up ----------------------------------------------------------------------------------


def measure_first_pass(
    config: Config, run: Run, stage: str, student: Student, problems: Sequence[Problem], grader: Grader
) -> None:
    """Write <stage>/first_answers.json: the share of right first answers of the sft or warmup student, unless it is there."""
    signature = digest([run.file_digest(adapter_weights(stage)), digest_rows(problems)])
    if (first_pass(run, stage) or {}).get("signature") == signature:
        return
    limit = config.eval.model_copy(update={"max_tokens": config.attempts.max_tokens})
    answers = solve_problems(student, problems, config.model_copy(update={"eval": limit}), grader)
    figures = compute_metrics([answer.outcome() for answer in answers], seed=config.seed)
    if figures["n"]:
        kept = {name: figures[name] for name in ("acc_t1", "acc_t1_interval", "n")}
        run.write_json(FIRST_PASS.format(stage), {"signature": signature, **kept})


def first_pass(run: Run, stage: str) -> dict[str, Any] | None:
    """{"acc_t1", "acc_t1_interval", "n"} of the last sft or warmup student that was measured."""
    return run.read_json(FIRST_PASS.format(stage), dict[str, Any])


def first_pass_text(run: Run, stage: str) -> str:
    """The share of right first answers, for the line of a finished stage; empty if it was not measured."""
    found = first_pass(run, stage)
    return f"; {100 * found['acc_t1']:.0f} % of {found['n']} held-out problems right" if found else ""


def harm_warning(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """A warning if first answers are worse after training: fewer are right than the interval before it (METHOD 4.5)."""
    share, now = before["acc_t1"], after["acc_t1"]
    if None in (share, now) or now >= before["acc_t1_interval"][0]:
        return ""
    hint = "lower warmup.learning_rate, or raise warmup.replay_share"
    return f"{what} made first answers worse, {100 * share:.1f} → {100 * now:.1f} % right; {hint}"
