"""Supervised fine-tuning: stage 1 on templates, and what the warm-up of stage 2 shares with it.

The loss is on the trace and its end of turn alone. Source: METHOD sections 3 and 4.5.
"""

from collections.abc import Sequence
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.records import Template
from sclite.run import Report, Run, timed
from sclite.signature import digest
from sclite.student.adapters import adapted_layers, check_adapter
from sclite.student.loader import load_student
from sclite.student.log_probs import Padded, hidden_states, pad, token_log_probs
from sclite.student.tokenization import Encoded, encode_solution, end_id
from sclite.trace import parse
from sclite.train.checkpoints import Checkpoints, refuse_other_inputs
from sclite.train.common import done, quiet, save_adapter, student_inputs, written
from sclite.train.label_checks import check_labels, checked_tokenizer, left_out, rows_of_sft, tell_left_out
from sclite.train.memory import micro_batch
from sclite.train.metrics_logger import Progress
from sclite.train.trainer import Lesson, Part, held_out_rows, train_adapter

STAGE, ADAPTER = "sft", "sft/adapter/adapter_model.safetensors"


def inputs_of(config: Config, run: Run, unseen: frozenset[str] = frozenset()) -> dict[str, Any]:
    """What decides the result of the SFT stage."""
    return {
        "problems kept for stage 2": digest(sorted(unseen)),
        "templates.jsonl": run.file_digest("templates.jsonl"),
        "lora": config.lora.model_dump(mode="json"),
        "sft": config.sft.signed_settings(),
        **student_inputs(config),
        "prompts": prompts.digest("student_system", "student_solve", folder=config.prompts.folder),
        "seed": config.seed,
    }


def train_sft(
    config: Config,
    run: Run,
    *,
    unseen: frozenset[str] = frozenset(),
    fresh: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Stage 1. Reads templates.jsonl; writes sft/adapter and sft/metrics.jsonl; goes on where it was broken off.

    Problems whose ids are in `unseen` are kept for stage 2: the student must make its own mistakes on them first.
    An adapter in sft/adapter that no such stage wrote takes its place. Raises DataFault where there are no templates or
    the labels are not as they should be, UsageFault where it was trained from other inputs and is not to be `fresh`.
    """
    if run.is_imported(STAGE, ADAPTER):
        return _adopt(run)
    inputs = inputs_of(config, run, unseen)
    report = Report(STAGE)
    if manifest := done(run, STAGE, inputs, ADAPTER, fresh):
        return Report.of(manifest)
    rows = run.require(
        "templates.jsonl", Template, "run `sclite build-data` first, or put your own templates there"
    )
    folder = run.path("sft")
    refuse_other_inputs(run, STAGE, folder / "checkpoints", inputs, fresh)
    rows = rows_of_sft(rows, unseen)
    with timed(report):
        quiet(config.student)
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.begin(inputs, progress)
        tokenizer = checked_tokenizer(config.student, progress)
        encoded = fitting_rows(
            run, report, [row.id for row in rows], solve_rows(tokenizer, rows, config.prompts.folder),
            config.sft.max_length, end_id(tokenizer), progress,
        )  # fmt: skip
        at_once = micro_batch(config, STAGE)
        model, tokenizer = load_student(config, STAGE, train=True)
        outcome = train_adapter(
            model,
            tokenizer,
            supervised(STAGE, encoded, tokenizer.pad_token_id, config.sft.eval_share, config.seed),
            config.sft,
            checkpoints,
            folder / "metrics.jsonl",
            seed=config.seed,
            micro_batch=at_once,
            progress=progress,
        )
        save_adapter(model, run, STAGE, "sft/adapter")
    report.counts |= {"rows": len(encoded), "steps": outcome.steps}
    report.figures |= {"best_step": outcome.best, "warnings": outcome.warnings, "lora": adapted_layers(model)}
    report.figures |= written(run, ADAPTER)
    run.sign(STAGE, inputs, report)
    checkpoints.forget()
    return report


def _adopt(run: Run) -> Report:
    """The report of an adapter that was put into the run, with PEFT's configuration beside it."""
    check_adapter(run.path("sft/adapter"))
    return Report(STAGE, {"imported": 1}, skipped=True)


def replay_templates(templates: Sequence[Template], unseen: frozenset[str]) -> list[Template]:
    """The templates for replay in stage 2: those that SFT has not seen, where there are any."""
    return [row for row in templates if row.id in unseen] or list(templates)


def solve_rows(tokenizer: Any, templates: Sequence[Template], folder: str) -> list[Encoded]:
    """Each template as (student prompt, problem) -> trace."""
    return [
        encode_solution(tokenizer, prompts.solve_messages(row.question, folder), parse(row.trace).trace)
        for row in templates
    ]


def fitting_rows(
    run: Run,
    report: Report,
    names: Sequence[str],
    rows: Sequence[Encoded],
    limit: int,
    end: int,
    progress: Progress | None = None,
) -> list[Encoded]:
    """The rows of at most `limit` tokens, their labels checked; the others are counted, named and told of."""
    tell_left_out(progress, report.stage, "rows", [len(row.ids) for row in rows], limit)
    long = set(left_out(run, report.stage, names, rows, limit))
    if long:
        report.dropped["longer_than_max_length"] = len(long)
    kept = [i for i in range(len(rows)) if i not in long]
    report.figures["labels"] = check_labels([rows[i] for i in kept], end, [names[i] for i in kept])
    return [rows[i] for i in kept]


def supervised(phase: str, rows: Sequence[Encoded], pad_id: int, eval_share: float, seed: int) -> Lesson:
    """A supervised stage: the mean over all tokens with loss in an optimizer step, each by its weight."""
    return Lesson(
        phase=phase,
        lengths=[len(row.ids) for row in rows],
        counts=[{"tokens": sum(weight > 0 for weight in row.weights)} for row in rows],
        collate=lambda numbers: pad([rows[number] for number in numbers], pad_id),
        parts=lambda model, batch: negative_log_likelihood(model, batch),
        held_out=held_out_rows(len(rows), eval_share, seed),
    )


def negative_log_likelihood(model: Any, batch: Padded) -> dict[str, Part]:
    """The weighted negative log-likelihood of the tokens with loss, in nats."""
    hidden = hidden_states(model, batch)
    log_probs, _ = token_log_probs(model, hidden, batch)
    weights = batch.weights[:, 1:]
    carried = weights[weights > 0].to(log_probs.device)
    return {"nll": Part(-(log_probs * carried).sum(), "tokens", 1.0)}
