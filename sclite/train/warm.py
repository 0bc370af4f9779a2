"""The warm-up of stage 2: a short supervised training on whole reviews, with solved rows between.

DPO alone cannot create the accusation, and reviews alone destroy solving (METHOD section 4.5). The adapter that comes
out is the one that DPO starts from and is compared with.
"""

import random
import shutil
from collections.abc import Sequence
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.records import Attempt, Problem, Review, Template
from sclite.run import Report, Run, digest, timed
from sclite.student.encode import Encoded, encode_review, end_id
from sclite.student.load import load_student
from sclite.trace import parse, render
from sclite.train.common import Progress, check_labels, left_out, quiet, save_adapter
from sclite.train.sft import fine_tune, replay_templates, solve_rows

STAGE = "warm"


def inputs_of(config: Config, run: Run, unseen: frozenset[str] = frozenset()) -> dict[str, Any]:
    """What decides the result of the warm-up."""
    settings = config.dpo.model_dump(
        exclude={"learning_rate", "epochs", "beta", "nll_weight", "replay_weight", "warmup"}
    )
    return {
        "unseen": digest(sorted(unseen)),
        "reviews": run.file_digest("reviews.jsonl"),
        "templates": run.file_digest("templates.jsonl"),
        "sft": run.file_digest("sft/adapter/adapter_model.safetensors"),
        "settings": digest(settings),
        "prompts": prompts.digest(
            "student_system", "student_solve", "student_review", folder=config.prompts.folder
        ),
        "seed": config.seed,
    }


def train_warm(
    config: Config, run: Run, *, unseen: frozenset[str] = frozenset(), progress: Progress | None = None
) -> Report:
    """Reads reviews.jsonl, attempts.jsonl and templates.jsonl; trains on from sft/adapter; writes dpo/warm.

    With dpo.warmup_epochs = 0 dpo/warm is a copy of sft/adapter, and no reviews are needed.
    """
    inputs, report = inputs_of(config, run, unseen), Report(STAGE)
    if manifest := run.done(STAGE, inputs, "dpo/warm/adapter_model.safetensors"):
        return Report.of(manifest)
    if config.dpo.warmup_epochs == 0:
        return _copied(run, inputs, report)
    remedy = (
        "run `sclite build-data --only corrections` first, or do without a warm-up: --set dpo.warmup_epochs=0"
    )
    reviews = run.require("reviews.jsonl", Review, remedy)
    templates = run.require("templates.jsonl", Template, "run `sclite build-data` first")
    with timed(report):
        quiet()
        model, tokenizer = load_student(config.student, config.dpo, run.path("sft/adapter"), train=True)
        rows = review_rows(tokenizer, run, reviews, config)
        solved = solve_rows(tokenizer, replay_templates(templates, unseen), config.prompts.folder)
        rows = mix(rows, solved, config.dpo.replay_share, config.seed)
        names = [f"row {number}" for number in range(1, len(rows) + 1)]
        long = set(left_out(run, STAGE, names, rows, config.dpo.max_length))
        if long:
            report.dropped["longer_than_max_length"] = len(long)
            rows = [row for i, row in enumerate(rows) if i not in long]
        report.figures["labels"] = check_labels(rows, end_id(tokenizer))
        folder = run.path("dpo")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        steps = fine_tune(
            model,
            tokenizer,
            rows,
            folder,
            config.dpo,
            config.dpo.warmup_learning_rate,
            config.dpo.warmup_epochs,
            config.seed,
            STAGE,
            progress,
        )
        save_adapter(model, folder / "warm")
    report.counts |= {"rows": len(rows), "reviews": len(reviews), "steps": steps}
    run.sign(STAGE, inputs, report)
    return report


def _copied(run: Run, inputs: dict[str, Any], report: Report) -> Report:
    """The report of a warm-up of no epochs: the adapter stays as SFT has left it."""
    with timed(report):
        beside = run.path("dpo/.warm")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(run.path("sft/adapter"), beside)
        shutil.rmtree(run.path("dpo/warm"), ignore_errors=True)
        beside.rename(run.path("dpo/warm"))
    run.sign(STAGE, inputs, report)
    return report


def review_rows(tokenizer: Any, run: Run, reviews: Sequence[Review], config: Config) -> list[Encoded]:
    """Each review as an answer to its review prompt, its decisions weighted."""
    attempts = {(a.id, a.sample): a for a in run.read("attempts.jsonl", Attempt)}
    questions = {p.id: p.question for p in run.read("problems.jsonl", Problem)}
    rows = []
    for review in reviews:
        work = render(parse(attempts[review.id, review.sample].trace).trace)
        messages = prompts.review_messages(questions[review.id], work, config.prompts.folder)
        rows.append(encode_review(tokenizer, messages, parse(review.trace).trace, config.dpo.decision_weight))
    return rows


def mix(reviews: list[Encoded], solved: list[Encoded], share: float, seed: int) -> list[Encoded]:
    """The reviews with `share` solved rows for each."""
    draw = random.Random(seed)
    wanted = round(share * len(reviews))
    picked = [solved[i % len(solved)] for i in range(wanted)] if solved else []
    rows = [*reviews, *picked]
    draw.shuffle(rows)
    return rows
