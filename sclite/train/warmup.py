"""The warm-up of stage 2: a short supervised training on whole reviews, mixed with rows of solving (warmup_rows).

DPO alone cannot create the accusation, and reviews alone destroy solving (METHOD section 4.5). DPO starts from the adapter
of the warm-up and uses it as its reference.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from sclite import prompts
from sclite.config import Config
from sclite.records import Review, Template
from sclite.run import Report, Run, timed
from sclite.signature import digest
from sclite.train.checkpoints import sync_folder
from sclite.train.metrics_logger import Progress
from sclite.train.sft import fitting_rows, replay_templates, supervised
from sclite.train.stage import (
    BuildLesson,
    adapter_weights,
    finished_report,
    run_training_stage,
    sign_adapter,
    student_inputs,
)
from sclite.train.warmup_rows import mixed_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGE = "warmup"


def inputs_of(config: Config, run: Run, unseen: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Everything that decides the result of the warm-up."""
    return {
        "problems kept for stage 2": digest(sorted(unseen)),
        "reviews.jsonl": run.file_digest("reviews.jsonl"),
        "attempts.jsonl": run.file_digest("attempts.jsonl"),
        "templates.jsonl": run.file_digest("templates.jsonl"),
        "sft/adapter": run.file_digest(adapter_weights("sft")),
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
    """Train on reviews.jsonl, attempts.jsonl and templates.jsonl, from sft/adapter; writes warmup/adapter.

    With num_train_epochs = 0 it copies sft/adapter and needs no reviews. Raises as `train_sft` does.
    """
    inputs, report = inputs_of(config, run, unseen), Report(STAGE)
    if finished := finished_report(run, STAGE, inputs, fresh):
        return finished
    if config.warmup.num_train_epochs == 0:
        with timed(report):
            _copy_sft_adapter(run)
        sign_adapter(run, report, inputs)
        return report
    hint = "run `sclite build-data --only corrections` first, or skip the warm-up: --set warmup.num_train_epochs=0"
    reviews = run.require("reviews.jsonl", Review, hint)
    templates = run.require("templates.jsonl", Template, "run `sclite build-data` first")

    def prepare(tokenizer: PreTrainedTokenizerBase) -> BuildLesson:
        names, rows = mixed_rows(tokenizer, run, reviews, replay_templates(templates, unseen), config)
        kept = fitting_rows(run, report, names, rows, config.warmup, tokenizer, progress)
        report.counts["reviews"] = len(reviews)
        return lambda *_: supervised(
            STAGE, kept, tokenizer.pad_token_id, config.warmup.eval_share, config.seed
        )

    return run_training_stage(
        config, run, report, inputs, prepare, start_from="sft/adapter", fresh=fresh, progress=progress
    )


def _copy_sft_adapter(run: Run) -> None:
    temporary, target = run.path("warmup/.adapter"), run.path("warmup/adapter")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(run.path("sft/adapter"), temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    sync_folder(target)
