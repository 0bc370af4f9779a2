"""Stage 2 training: cross-model DPO, starting from the warm-up's adapter, which is also the reference.

Source: METHOD section 4. The DPO term of every pair is -log sigmoid(beta * (policy odds - reference odds)); likelihood
terms on the chosen texts and on solved rows (replay) keep the student from forgetting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sclite import prompts
from sclite.config import Config, Dpo
from sclite.errors import DataError
from sclite.records import Pair, Problem, Template
from sclite.run import Report, Run
from sclite.signature import digest
from sclite.student.tokenization import Encoded, decision_ids
from sclite.train.bundle import Bundle, build_bundles, collate
from sclite.train.label_checks import check_bundles, drop_long_rows, warn_of_long_rows
from sclite.train.losses import DpoLoss, reference_log_probs
from sclite.train.metrics_logger import Progress
from sclite.train.sft import replay_templates, solve_rows
from sclite.train.stage import (
    BuildLesson,
    adapter_weights,
    finished_report,
    run_training_stage,
    student_inputs,
)
from sclite.train.trainer import Lesson, catch_out_of_memory, held_out_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

STAGE = "dpo"


def inputs_of(config: Config, run: Run, unseen: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Everything that decides the result of the DPO stage."""
    return {
        "problems kept for stage 2": digest(sorted(unseen)),
        "pairs.jsonl": run.file_digest("pairs.jsonl"),
        "templates.jsonl": run.file_digest("templates.jsonl"),
        "warmup/adapter": run.file_digest(adapter_weights("warmup")),
        "dpo": config.dpo.signed_settings(),
        **student_inputs(config),
        "prompts": prompts.digest(
            "student_system", "student_solve", "student_review", folder=config.prompts.folder
        ),
        "seed": config.seed,
    }


def train_dpo(
    config: Config,
    run: Run,
    *,
    unseen: frozenset[str] = frozenset(),
    fresh: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Train on pairs.jsonl, from warmup/adapter; writes dpo/adapter, dpo/reference.json and dpo/metrics.jsonl.

    Resumes if it was interrupted. Raises DataError if there are no pairs or none fits, UsageError if it was trained with
    other inputs and `fresh` is not set.
    """
    inputs, report = inputs_of(config, run, unseen), Report(STAGE)
    if finished := finished_report(run, STAGE, inputs, fresh):
        return finished
    hint = "run `sclite train`, which builds them from the student's attempts"
    pairs = run.require("pairs.jsonl", Pair, hint)
    templates = run.require("templates.jsonl", Template, "run `sclite build-data` first")
    questions = {problem.id: problem.question for problem in run.read("problems.jsonl", Problem)}
    folder, limit = config.prompts.folder, config.dpo.max_length

    def prepare(tokenizer: PreTrainedTokenizerBase) -> BuildLesson:
        bundles = build_bundles(tokenizer, pairs, questions, folder)
        solved = solve_rows(tokenizer, replay_templates(templates, unseen), folder)
        warn_of_long_rows(progress, STAGE, "solved rows", [len(row.ids) for row in solved], limit)
        bundles = with_replay(
            fitting_bundles(run, report, bundles, limit, progress),
            [row for row in solved if len(row.ids) <= limit],
            config.dpo.replay_share,
        )
        check_bundles(bundles, decision_ids(tokenizer))
        report.counts |= {"bundles": len(bundles), "pairs": len(pairs)}

        def build_lesson(model: PeftModel, micro_batch: int) -> Lesson:
            reference = _load_reference(run, model, tokenizer, bundles, digest(inputs), micro_batch, progress)
            return preferences(config.dpo, bundles, reference, tokenizer, config.seed)

        return build_lesson

    return run_training_stage(
        config, run, report, inputs, prepare, start_from="warmup/adapter", fresh=fresh, progress=progress
    )


def fitting_bundles(
    run: Run, report: Report, bundles: Sequence[Bundle], limit: int, progress: Progress | None = None
) -> list[Bundle]:
    """The bundles whose sequences have at most `limit` tokens. Raises DataError if there are none."""
    keys = [bundle.key.rpartition("/") for bundle in bundles]
    lengths = [max(len(side.ids) for side in (b.review, b.rejected) if side is not None) for b in bundles]
    kept = drop_long_rows(
        run, report, [(id, int(sample)) for id, _, sample in keys], lengths, limit, progress
    )
    if not kept:
        raise DataError(f"no pair fits in dpo.max_length = {limit} tokens", "raise dpo.max_length")
    return [bundles[i] for i in kept]


def with_replay(bundles: Sequence[Bundle], rows: Sequence[Encoded], share: float) -> list[Bundle]:
    """Spread solved rows over the bundles, `share` of a row for each, cycling through the rows."""
    given, due = [], 0.0
    share = share if rows else 0.0
    for number, bundle in enumerate(bundles):
        due += share
        row = rows[number % len(rows)] if due >= 1 else None
        due -= row is not None
        given.append(Bundle(bundle.key, bundle.review, bundle.rejected, row))
    return given


def _load_reference(
    run: Run,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    bundles: Sequence[Bundle],
    signature: str,
    micro_batch: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """The reference log-probabilities: from the run if they are intact and of these inputs, else computed and kept.

    The model is the adapter that DPO starts from, on a resume too, so computing them again gives the same values.
    """
    kept, path = {}, run.path("dpo/reference.json")
    if path.is_file():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            intact = kept["digest"] == digest(kept["log_probs"])
        except (ValueError, TypeError, KeyError):
            intact = False
        if intact and kept["signature"] == signature:
            return kept["log_probs"]
        if not intact and progress is not None:
            progress(0, 0, warning=f"{path} is damaged: recomputing the reference from warmup/adapter")
    with catch_out_of_memory(STAGE, micro_batch):
        log_probs = reference_log_probs(model, bundles, tokenizer, micro_batch)
    content = {"signature": signature, "digest": digest(log_probs), "log_probs": log_probs}
    run.write_json("dpo/reference.json", content)
    return log_probs


def preferences(
    settings: Dpo,
    bundles: Sequence[Bundle],
    reference: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Lesson:
    """The DPO lesson: means over the pairs of an optimizer step, and over the tokens of its solved rows."""

    def count(bundle: Bundle) -> dict[str, int]:
        decisions = len(bundle.review.marks)
        solved = sum(weight > 0 for weight in bundle.replay.weights) if bundle.replay is not None else 0
        pairs = decisions + (bundle.rejected is not None)
        return {"pairs": pairs, "decisions": decisions, "replay_tokens": solved}

    sides = [[side for side in (b.review, b.rejected, b.replay) if side is not None] for b in bundles]
    return Lesson(
        phase=STAGE,
        lengths=[sum(len(side.ids) for side in both) for both in sides],
        counts=[count(bundle) for bundle in bundles],
        collate=lambda numbers: collate([bundles[number] for number in numbers], tokenizer.pad_token_id),
        losses=DpoLoss(settings, reference, decision_ids(tokenizer)),
        held_out=held_out_rows(len(bundles), settings.eval_share, seed),
    )
