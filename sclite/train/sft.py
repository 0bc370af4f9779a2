"""Supervised fine-tuning: stage 1 on templates, and the warm-up of stage 2 on whole reviews with solved rows between.

The loss is on the trace and its end of turn alone. Source: METHOD sections 3 and 4.5.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sclite import prompts
from sclite.config import Config, Lora
from sclite.errors import DataFault
from sclite.records import Template
from sclite.run import Report, Run, digest, timed
from sclite.student.encode import Encoded, encode_solution, end_id
from sclite.student.load import load_student, model_name
from sclite.trace import parse
from sclite.train.common import (
    Progress,
    arguments,
    check_labels,
    left_out,
    metrics_writer,
    numbered,
    quiet,
    save_adapter,
    trainable_as_they_are,
)
from sclite.train.forward import hidden_states, pad, token_log_probs

STAGE, ADAPTER = "sft", "sft/adapter/adapter_model.safetensors"


def inputs_of(config: Config, run: Run, unseen: frozenset[str] = frozenset()) -> dict[str, Any]:
    """What decides the result of the SFT stage."""
    return {
        "unseen": digest(sorted(unseen)),
        "templates": run.file_digest("templates.jsonl"),
        "settings": digest(config.sft.model_dump()),
        "student": digest([model_name(config.student), config.student.load_in_4bit]),
        "prompts": prompts.digest("student_system", "student_solve", folder=config.prompts.folder),
        "seed": config.seed,
    }


def train_sft(
    config: Config, run: Run, *, unseen: frozenset[str] = frozenset(), progress: Progress | None = None
) -> Report:
    """Stage 1. Reads templates.jsonl; writes sft/adapter and sft/metrics.jsonl.

    Problems whose ids are in `unseen` are kept for stage 2: the student must make its own mistakes on them first.
    An adapter in sft/adapter that no such stage wrote takes its place. Raises DataFault where there are no templates or
    the labels are not as they should be.
    """
    if run.brought_along(STAGE, ADAPTER):
        return _adopt(run)
    inputs = inputs_of(config, run, unseen)
    report = Report(STAGE)
    if manifest := run.done(STAGE, inputs, ADAPTER):
        return Report.of(manifest)
    rows = run.require(
        "templates.jsonl", Template, "run `sclite build-data` first, or put your own templates there"
    )
    rows = [row for row in rows if row.id not in unseen]
    with timed(report):
        quiet()
        model, tokenizer = load_student(config.student, config.sft, train=True, seed=config.seed)
        encoded = solve_rows(tokenizer, rows, config.prompts.folder)
        long = set(left_out(run, STAGE, [row.id for row in rows], encoded, config.sft.max_length))
        if long:
            report.dropped["longer_than_max_length"] = len(long)
            encoded = [row for i, row in enumerate(encoded) if i not in long]
        report.figures["labels"] = check_labels(encoded, end_id(tokenizer))
        folder = run.path("sft")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        steps = fine_tune(
            model,
            tokenizer,
            encoded,
            folder,
            config.sft,
            config.sft.learning_rate,
            config.sft.epochs,
            config.seed,
            "sft",
            progress,
        )
        run.begin(STAGE)
        save_adapter(model, folder / "adapter")
        report.counts |= {"rows": len(encoded), "steps": steps}
    run.sign(STAGE, inputs, report)
    return report


def _adopt(run: Run) -> Report:
    """The report of an adapter that was put into the run, with PEFT's configuration beside it."""
    name = "sft/adapter/adapter_config.json"
    found = run.read_json(name)
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise DataFault(
            f"{run.path(name)} is {'missing' if found is None else 'not that of a LoRA adapter'}",
            "put the whole folder there that PEFT's save_pretrained writes",
        )
    return Report(STAGE, {"brought_along": 1}, skipped=True)


def replay_templates(templates: Sequence[Template], unseen: frozenset[str]) -> list[Template]:
    """The templates for replay in stage 2: those that SFT has not seen, where there are any."""
    return [row for row in templates if row.id in unseen] or list(templates)


def solve_rows(tokenizer: Any, templates: Sequence[Template], folder: str) -> list[Encoded]:
    """Each template as (student prompt, problem) -> trace."""
    return [
        encode_solution(tokenizer, prompts.solve_messages(row.question, folder), parse(row.trace).trace)
        for row in templates
    ]


def fine_tune(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    folder: Path,
    lora: Lora,
    rate: float,
    epochs: float,
    seed: int,
    phase: str,
    progress: Progress | None = None,
) -> int:
    """Train the model's adapter in place; returns the number of optimizer steps. Metrics go to folder/metrics.jsonl."""
    from transformers import PrinterCallback
    from trl import SFTConfig

    settings = SFTConfig(**arguments(folder, lora, rate, epochs, seed), max_length=None, packing=False)
    with trainable_as_they_are(model):
        trainer = _trainer_class()(
            model=model,
            args=settings,
            train_dataset=numbered([len(row.ids) for row in rows]),
            data_collator=_Collator(rows, tokenizer.pad_token_id),
            processing_class=tokenizer,
            callbacks=[metrics_writer(folder / "metrics.jsonl", phase, progress)],
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.global_step


class _Collator:
    """Row numbers to a padded batch; `labels` only tell the trainer how many tokens carry loss."""

    def __init__(self, rows: Sequence[Encoded], pad_id: int):
        self.rows, self.pad_id = rows, pad_id

    def __call__(self, items: Sequence[dict[str, int]]) -> dict[str, Any]:
        batch = pad([self.rows[item["number"]] for item in items], self.pad_id)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["weights"] == 0, -100)}


def _trainer_class() -> type:
    """TRL's SFTTrainer on rows that are tokenised and weighted already."""
    from trl import SFTTrainer

    class WeightedSft(SFTTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids, weights = inputs["input_ids"], inputs["weights"]
            hidden = hidden_states(model, ids, inputs["attention_mask"])
            log_probs, _ = token_log_probs(model, hidden, ids, weights)
            carried = weights[:, 1:][weights[:, 1:] > 0]
            # with gradient accumulation the trainer hands in the number of tokens of the whole optimizer step
            loss = -(log_probs * carried).sum() / (num_items_in_batch or len(carried))
            return (loss, None) if return_outputs else loss

    return WeightedSft
