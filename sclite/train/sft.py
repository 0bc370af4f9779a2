"""Supervised fine-tuning: stage 1 on templates, and the row checks and task that the warm-up shares.

Only the trace and its end of turn have loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sclite import prompts
from sclite.config import Config
from sclite.errors import DataError
from sclite.progress import Progress, no_progress
from sclite.records import Template
from sclite.run import Report, Run
from sclite.student.adapters import adapter_weights, check_adapter
from sclite.student.chat_template import opens_thinking
from sclite.student.log_probs import pad
from sclite.student.tokenization import TrainingSequence, encode_solution, end_id
from sclite.train.losses import negative_log_likelihood
from sclite.train.stage import BuildTask, TrainingJob
from sclite.train.trainer import TrainingTask, held_out_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

CHECK_TEMPLATE = "check the student's chat template"


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
        templates = read_templates(run)
        rows = [row for row in templates if row.id not in unseen]
        if not rows:
            raise DataError(
                f"all {len(templates)} templates belong to problems reserved for stage 2: SFT has no rows to train on",
                "`sclite build-data` writes those of the other problems; problems.correction_share sets the reserved share",
            )
        if opens_thinking(tokenizer.get_chat_template(), tokenizer.special_tokens_map):
            empty = "the student's chat template opens a <think> block: sclite trains and uses it with an empty one"
            job.warn(f"{empty}; other programs must send the closing tag themselves")
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
    """The task on the rows that fit in max_length; the report gets the share of their tokens with loss.

    Raises DataError for rows that would teach nothing or never end: the last token, which is the end of turn, needs
    loss; the first, which is prompt, none.
    """
    kept = job.drop_long_rows([(name, None) for name in names], [len(row.ids) for row in rows])
    fitting, end = [rows[i] for i in kept], end_id(tokenizer)
    if not fitting:
        raise DataError("nothing to train on: no rows are left", "dropped.jsonl in the run folder says why")
    for number, row in enumerate(fitting, 1):
        where = f"training row {number} ({names[kept[number - 1]]})"
        if not any(row.weights):
            raise DataError(f"{where}: every label is masked", "it would teach nothing; please report this")
        if row.weights[0]:
            raise DataError(f"{where}: the prompt is not masked", CHECK_TEMPLATE)
        if row.ids[-1] != end or not row.weights[-1]:
            raise DataError(f"{where}: the end-of-turn token is missing or masked", CHECK_TEMPLATE)
    tokens = sum(len(row.ids) for row in fitting)
    trained = sum(weight > 0 for row in fitting for weight in row.weights)
    share = {"rows": len(fitting), "tokens": tokens, "trained_share": round(trained / tokens, 4)}
    job.report.figures["labels"] = share
    job.report.counts["rows"] = len(fitting)
    held_out = held_out_rows(len(fitting), job.settings.eval_share, job.config.seed)
    return lambda *_: supervised_task(job.stage, fitting, tokenizer.pad_token_id, held_out)


def supervised_task(
    phase: str, rows: Sequence[TrainingSequence], pad_id: int, held_out: Sequence[int] = ()
) -> TrainingTask:
    """A supervised task: the mean over all tokens with loss in an optimizer step, each by its weight."""
    return TrainingTask(
        phase=phase,
        lengths=[len(row.ids) for row in rows],
        counts=[{"tokens": sum(weight > 0 for weight in row.weights)} for row in rows],
        collate=lambda numbers: pad([rows[number] for number in numbers], pad_id),
        losses=negative_log_likelihood,
        held_out=held_out,
    )
