"""The warm-up of stage 2: a short supervised training on whole reviews, with rows of solving between (warmup_rows).

DPO alone cannot create the accusation, and reviews alone destroy solving (METHOD section 4.5). The adapter that comes
out is the one that DPO starts from and is compared with.
"""

import shutil
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.records import Review, Template
from sclite.run import Report, Run, timed
from sclite.signature import digest
from sclite.student.loader import load_student
from sclite.student.tokenization import end_id
from sclite.train.checkpoints import Checkpoints, refuse_other_inputs, sync_folder
from sclite.train.common import done, quiet, save_adapter, student_inputs, written
from sclite.train.label_checks import checked_tokenizer
from sclite.train.memory import micro_batch
from sclite.train.metrics_logger import Progress
from sclite.train.sft import fitting_rows, replay_templates, supervised
from sclite.train.trainer import train_adapter
from sclite.train.warmup_rows import mixed_rows

STAGE, ADAPTER = "warmup", "warmup/adapter/adapter_model.safetensors"


def inputs_of(config: Config, run: Run, unseen: frozenset[str] = frozenset()) -> dict[str, Any]:
    """What decides the result of the warm-up."""
    return {
        "problems kept for stage 2": digest(sorted(unseen)),
        "reviews.jsonl": run.file_digest("reviews.jsonl"),
        "attempts.jsonl": run.file_digest("attempts.jsonl"),
        "templates.jsonl": run.file_digest("templates.jsonl"),
        "sft/adapter": run.file_digest("sft/adapter/adapter_model.safetensors"),
        "warmup": config.warmup.signed_settings(),
        **student_inputs(config),
        "prompts": prompts.digest(
            "student_system", "student_solve", "student_review", folder=config.prompts.folder
        ),
        "seed": config.seed,
        "solving": "solved and continued rows in turn, and wrong work closed",
    }


def train_warmup(
    config: Config,
    run: Run,
    *,
    unseen: frozenset[str] = frozenset(),
    fresh: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Reads reviews.jsonl, attempts.jsonl and templates.jsonl; trains on from sft/adapter; writes warmup/adapter.

    With num_train_epochs = 0 it is a copy of sft/adapter, and no reviews are needed. Raises as `train_sft` does.
    """
    inputs, report = inputs_of(config, run, unseen), Report(STAGE)
    if manifest := done(run, STAGE, inputs, ADAPTER, fresh):
        return Report.of(manifest)
    folder = run.path("warmup")
    if config.warmup.num_train_epochs == 0:
        return _copied(run, inputs, report)
    refuse_other_inputs(run, STAGE, folder / "checkpoints", inputs, fresh)
    remedy = "run `sclite build-data --only corrections` first, or skip the warm-up: --set warmup.num_train_epochs=0"
    reviews = run.require("reviews.jsonl", Review, remedy)
    templates = run.require("templates.jsonl", Template, "run `sclite build-data` first")
    with timed(report):
        quiet(config.student)
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.begin(inputs, progress)
        tokenizer = checked_tokenizer(config.student)
        rows = fitting_rows(
            run, report, *mixed_rows(tokenizer, run, reviews, replay_templates(templates, unseen), config),
            config.warmup.max_length, end_id(tokenizer), progress,
        )  # fmt: skip
        at_once = micro_batch(config, STAGE)
        model, tokenizer = load_student(config, STAGE, run.path("sft/adapter"), train=True)
        outcome = train_adapter(
            model,
            tokenizer,
            supervised(STAGE, rows, tokenizer.pad_token_id, config.warmup.eval_share, config.seed),
            config.warmup,
            checkpoints,
            folder / "metrics.jsonl",
            seed=config.seed,
            micro_batch=at_once,
            progress=progress,
        )
        save_adapter(model, run, STAGE, "warmup/adapter")
    report.counts |= {"rows": len(rows), "reviews": len(reviews), "steps": outcome.steps}
    report.figures |= {"best_step": outcome.best, "warnings": outcome.warnings, **written(run, ADAPTER)}
    run.sign(STAGE, inputs, report)
    checkpoints.forget()
    return report


def _copied(run: Run, inputs: dict[str, Any], report: Report) -> Report:
    """The report of a warm-up of no epochs: the adapter stays as SFT has left it."""
    with timed(report):
        beside = run.path("warmup/.adapter")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(run.path("sft/adapter"), beside)
        shutil.rmtree(run.path("warmup/adapter"), ignore_errors=True)
        beside.rename(run.path("warmup/adapter"))
        sync_folder(run.path("warmup/adapter"))
    report.figures |= written(run, ADAPTER)
    run.sign(STAGE, inputs, report)
    return report
