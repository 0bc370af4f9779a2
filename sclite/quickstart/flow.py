"""The quickstart: the whole pipeline with bundled problems, teacher and student; no GPU, API key or download."""

from collections.abc import Mapping
from typing import Any

from sclite import evaluation, exports, pipeline
from sclite.config import Config
from sclite.context import Context
from sclite.data.problems import gather_problems, split_problems
from sclite.errors import UsageError
from sclite.evaluate.evaluate import HeldOut, result_folder
from sclite.progress import ProgressDisplay
from sclite.quickstart import tutor
from sclite.quickstart.stories import HELD_OUT, problem_set
from sclite.records import Problem, from_feedback
from sclite.run import Run
from sclite.student.adapters import STUDENTS

STAGE = {"batch_size": 16, "per_device_train_batch_size": 8, "max_length": 1024, "eval_share": 0}
DEFAULTS: Mapping[str, Any] = {
    "run": "runs/quickstart",
    "teacher": {"model": tutor.MODEL, "concurrency": 8},
    "problems": {"fit_share": 5 / 13},
    "student": {"model": "embedded", "backend": "plain", "batch": 64},
    "attempts": {"samples": 2, "max_tokens": 160, "reviews": 2, "confirmation_share": 0.4},
    "sft": {**STAGE, "learning_rate": 2e-3, "num_train_epochs": 3},
    # at a learning rate of 2e-3 the student gets worse at solving
    "warmup": {**STAGE, "learning_rate": 1e-3, "num_train_epochs": 1.5}
    | {"decision_weight": 8.0, "replay_share": 0.6},
    "dpo": {**STAGE, "learning_rate": 3e-4, "num_train_epochs": 1, "replay_share": 0.6},
    "export": {"quant": "q8_0", "num_ctx": 2048},
    "eval": {"limit": 300, "max_tokens": 320, "context": 1024},
}

PROBLEMS = 640  # and 400 for the threshold


def quickstart(config: Config, quiet: bool = False, fresh: bool = False) -> dict[str, Any]:
    """Run all stages that are not done; returns the summary of the evaluation.

    `fresh` retrains stages that were trained from other inputs.
    """
    run = Run(config.run)
    share = config.problems.fit_share
    before = run.read("problems.jsonl", Problem, whole=run.is_imported("problems", "problems.jsonl"))
    judged = list(filter(from_feedback, before))
    known = [row.question for row in before if not from_feedback(row)]
    ours = {row.question for row in (*problem_set("train", len(known)), *problem_set("threshold", HELD_OUT))}
    if not ours.issuperset(known):
        raise UsageError(f"{run.folder} already contains other problems", "choose another folder with --run")
    signed = run.manifest("problems")  # its count includes damaged lines
    total = max(len(known), signed["counts"]["problems"] if signed else 0)
    count = config.problems.limit or max(round(total * (1 - share)), total - HELD_OUT) or PROBLEMS
    fitting = problem_set("threshold", round(count * share / (1 - share)))
    found = [*problem_set("train", count), *fitting]
    run.replace("problems.jsonl", [*judged, *found])
    # signed, so that `eval` on other problems takes these for the run's
    problems = split_problems(config, gather_problems(Config(), run, reread=False))
    context = Context(config, run, ProgressDisplay(quiet), prepare=tutor.register, problems=problems)
    pipeline.build_templates(context, fresh)
    pipeline.train(context, fresh=fresh)
    exports.export(context, STUDENTS)
    count = config.eval.limit
    held_out = HeldOut(
        problems=problem_set("test", count),
        fitting=problems.fit,
        source="the arithmetic stories of the quickstart",
        dataset=tutor.MODEL,
        folder=result_folder(run, tutor.MODEL, ["quickstart"], count, DEFAULTS["eval"]["limit"]),
    )
    return evaluation.evaluate(context, STUDENTS, held_out, tutor.first_wrong_step)
