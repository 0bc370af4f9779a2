"""Supervised fine-tuning: stage 1 on templates, and the row checks and task that the warm-up shares.

Only the trace and its end of turn have loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sclite import prompts
from sclite.config import Config, TrainingStage
from sclite.errors import DataError
from sclite.progress import Progress, no_progress
from sclite.records import Template
from sclite.run import Report, Run
from sclite.student.adapters import adapter_weights, check_adapter
from sclite.student.log_probs import pad
from sclite.student.tokenization import TrainingSequence, encode_solution, end_id
from sclite.train.losses import negative_log_likelihood
from sclite.train.stage import BuildTask, TrainingJob
from sclite.train.trainer import TrainingTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def train_sft(
    config: Config,
    run: Run,
    *,
    unseen: frozenset[str] = frozenset(),
    fresh: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Stage 1: train on templates.jsonl; writes sft/adapter and sft/metrics.jsonl. Resumes if it was interrupted.

    Problems in `unseen` are reserved for stage 2: the student must make its own mistakes on them first. An imported
    adapter replaces the stage. Raises DataError without rows, UsageError if it was trained with other inputs and is not
    `fresh`.
    """
    if run.is_imported("sft", adapter_weights("sft")):
        check_adapter(run.path("sft/adapter"))
        return Report("sft", {"imported": 1}, skipped=True)

    def prepare(job: TrainingJob, tokenizer: Tokenizer) -> BuildTask:
        rows = [row for row in read_templates(run) if row.id not in unseen]
        encoded = solve_rows(tokenizer, rows, config.prompts.folder)
        return supervised(job, [row.id for row in rows], encoded, tokenizer)

    return TrainingJob("sft", config, run, unseen, fresh, progress).train(prepare)


def read_templates(run: Run) -> list[Template]:
    """The run's templates. Raises DataError if there are none."""
    hint = "run `sclite build-data` first, or put your own templates there"
    return run.require("templates.jsonl", Template, hint)


def replay_templates(templates: Sequence[Template], unseen: frozenset[str]) -> list[Template]:
    """The templates for replay in stage 2: those that SFT has not seen, or all if there are none."""
    return [row for row in templates if row.id in unseen] or list(templates)


def solve_rows(tokenizer: Tokenizer, templates: Sequence[Template], folder: str) -> list[TrainingSequence]:
    """Each template as (student prompt, problem) -> trace."""
    return [
        encode_solution(tokenizer, prompts.solve_messages(row.question, folder), row.parsed.trace)
        for row in templates
    ]


def supervised(
    job: TrainingJob, names: Sequence[str], rows: Sequence[TrainingSequence], tokenizer: Tokenizer
) -> BuildTask:
    """The task on the rows that fit in max_length.

    Raises DataError for rows that would teach nothing or never end: the last token, which is the end of turn, needs
    loss; the first, which is prompt, none.
    """
    kept = job.drop_long_rows([len(row.ids) for row in rows], [(name, None) for name in names])
    fitting, end = [rows[i] for i in kept], end_id(tokenizer)
    if not fitting:
        why = (
            "rows may be too long (`sclite show drops`), or all problems reserved (problems.correction_share)"
        )
        raise DataError("nothing to train on: no rows are left", why)
    for number, row in zip(kept, fitting, strict=True):
        wrong = "the prompt is not masked" if row.weights[0] else ""
        if row.ids[-1] != end or not row.weights[-1]:
            wrong = "the end-of-turn token is missing or masked"
        if wrong:
            raise DataError(f"the training row {names[number]}: {wrong}", "check the student's chat template")
    job.report.counts["rows"] = len(fitting)
    seed, pad_id = job.config.seed, tokenizer.pad_token_id
    return lambda *_: supervised_task(job.stage, job.settings, seed, fitting, pad_id)


def supervised_task(
    phase: str, settings: TrainingStage, seed: int, rows: Sequence[TrainingSequence], pad_id: int
) -> TrainingTask:
    """A supervised task: the mean over all tokens with loss in an optimizer step, each by its weight."""
    return TrainingTask(
        phase=phase,
        settings=settings,
        seed=seed,
        lengths=[len(row.ids) for row in rows],
        counts=[{"tokens": sum(weight > 0 for weight in row.weights)} for row in rows],
        collate=lambda numbers: pad([rows[number] for number in numbers], pad_id),
        losses=negative_log_likelihood,
    )
