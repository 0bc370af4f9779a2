"""The warm-up of stage 2: a short supervised training on whole reviews, mixed with rows of solving (warmup_rows).

DPO alone cannot create the accusation, and reviews alone destroy solving. DPO starts from the adapter of the warm-up and
uses it as its reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sclite.config import Config
from sclite.records import Review, Template
from sclite.run import Report, Run
from sclite.train.metrics_logger import Progress
from sclite.train.sft import replay_templates, supervised
from sclite.train.stage import BuildLesson, Job
from sclite.train.warmup_rows import mixed_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    def prepare(job: Job, tokenizer: PreTrainedTokenizerBase) -> BuildLesson:
        hint = "run `sclite build-data --only corrections` first, or skip the warm-up: --set warmup.num_train_epochs=0"
        reviews = run.require("reviews.jsonl", Review, hint)
        templates = run.require("templates.jsonl", Template, "run `sclite build-data` first")
        names, rows = mixed_rows(tokenizer, run, reviews, replay_templates(templates, unseen), config)
        job.report.counts["reviews"] = len(reviews)
        return supervised(job, names, rows, tokenizer)

    return Job("warmup", config, run, unseen, fresh, progress).train(prepare)
