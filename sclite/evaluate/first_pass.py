"""First answers before and after the warm-up, which must not harm solving (METHOD, section 4)."""

import math
from collections.abc import Sequence
from typing import Any

from sclite.config import Config
from sclite.evaluate.answers import solve_problems
from sclite.grading.grader import Grader
from sclite.records import Problem
from sclite.run import Run
from sclite.signature import digest, digest_rows
from sclite.student.adapters import adapter_weights
from sclite.student.base import Student

FILE = "{}/first_pass.json"
PROBLEMS = 100
"""How many held-out problems are solved."""


def measure_first_pass(
    config: Config, run: Run, stage: str, student: Student, problems: Sequence[Problem], grader: Grader
) -> None:
    """Write <stage>/first_pass.json: the share of right first answers of the sft or warmup student, unless it is there."""
    signature = digest([run.file_digest(adapter_weights(stage)), digest_rows(problems)])
    if (first_pass(run, stage) or {}).get("signature") == signature:
        return
    limit = config.eval.model_copy(update={"max_tokens": config.attempts.max_tokens})
    verdicts = solve_problems(student, problems, config.model_copy(update={"eval": limit}), grader).correct
    known = [verdict for verdict in verdicts if verdict is not None]
    if known:
        figures = {"signature": signature, "right": sum(known) / len(known), "n": len(known)}
        run.write_json(FILE.format(stage), figures)


def first_pass(run: Run, stage: str) -> dict[str, Any] | None:
    """{"right", "n"} of the last sft or warmup student that was measured."""
    return run.read_json(FILE.format(stage), dict[str, Any])


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


def first_pass_text(run: Run, stage: str) -> str:
    """The share of right first answers, for the line of a finished stage; empty if it was not measured."""
    found = first_pass(run, stage)
    return f"; {100 * found['right']:.0f} % of {found['n']} held-out problems right" if found else ""
