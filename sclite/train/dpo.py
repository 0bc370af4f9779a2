"""Stage 2 training: cross-model DPO, starting from the warm-up's adapter, which is also the reference.

The DPO term of every pair is -log sigmoid(beta * (policy odds - reference odds)) (Rafailov et al. 2023, equation 7);
likelihood terms on the chosen texts and on solved rows (replay) keep the student from forgetting.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from sclite.config import Config, Dpo
from sclite.errors import DataError
from sclite.progress import Progress, no_progress
from sclite.records import Pair, Problem
from sclite.run import Report, Run
from sclite.signature import digest
from sclite.student.tokenization import TrainingSequence, decision_ids
from sclite.train.bundle import Bundle, build_bundles, check_bundles, collate
from sclite.train.losses import DpoLoss, Reference, reference_log_probs
from sclite.train.sft import read_templates, replay_templates, solve_rows
from sclite.train.stage import BuildTask, TrainingJob
from sclite.train.trainer import TrainingTask, catch_out_of_memory, held_out_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


def train_dpo(
    config: Config,
    run: Run,
    *,
    unseen: frozenset[str] = frozenset(),
    fresh: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Train on pairs.jsonl, from warmup/adapter; writes dpo/adapter, dpo/reference.json and dpo/metrics.jsonl.

    Resumes if it was interrupted. Raises DataError if no pair fits, UsageError as `train_sft` does.
    """

    def prepare(job: TrainingJob, tokenizer: Tokenizer) -> BuildTask:
        hint = "run `sclite train`, which builds them from the student's attempts"
        pairs = run.require("pairs.jsonl", Pair, hint)
        questions = {problem.id: problem.question for problem in run.read("problems.jsonl", Problem)}
        folder, limit = config.prompts.folder, config.dpo.max_length
        bundles = build_bundles(tokenizer, pairs, questions, folder)
        solved = solve_rows(tokenizer, replay_templates(read_templates(run), unseen), folder)
        job.warn_of_long_rows("solved rows", [len(row.ids) for row in solved])
        keys = [bundle.key.rpartition("/") for bundle in bundles]
        kept = job.drop_long_rows(
            [(id, int(sample)) for id, _, sample in keys],
            [max(len(side.ids) for side in bundle.sides) for bundle in bundles],
        )
        if not kept:
            raise DataError(f"no pair fits in dpo.max_length = {limit} tokens", "raise dpo.max_length")
        fitting = [row for row in solved if len(row.ids) <= limit]
        job.longest = max([job.longest, *(len(row.ids) for row in fitting)])
        bundles = with_replay([bundles[i] for i in kept], fitting, config.dpo.replay_share)
        check_bundles(bundles, decision_ids(tokenizer))
        job.report.counts |= {"bundles": len(bundles), "pairs": len(pairs)}
        # the reference, if the run has an intact one for these inputs
        path, signature, reference = run.path("dpo/reference.json"), digest(job.inputs), None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["digest"] != digest(content["log_probs"]):
                raise ValueError("the digest differs")
            reference = content["log_probs"] if content["signature"] == signature else None
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, KeyError):
            job.warn(f"{path} is damaged: recomputing the reference from warmup/adapter")

        def build_task(model: PeftModel, micro_batch: int) -> TrainingTask:
            log_probs = dict(reference or {})
            held_out = held_out_rows(len(bundles), config.dpo.eval_share, config.seed)
            task = preference_task(config.dpo, bundles, log_probs, tokenizer, held_out)
            used = [bundles[i] for i in sorted({*task.order(config.dpo, config.seed), *held_out})]
            if reference is None:  # the model has the adapter that DPO starts from, even on a resume
                with catch_out_of_memory(job.stage, micro_batch):
                    log_probs |= reference_log_probs(model, used, tokenizer, micro_batch, progress)
                signed = {"signature": signature, "digest": digest(log_probs), "log_probs": log_probs}
                run.write_json("dpo/reference.json", signed)
            return task

        return build_task

    return TrainingJob("dpo", config, run, unseen, fresh, progress).train(prepare)


def with_replay(bundles: Sequence[Bundle], rows: Sequence[TrainingSequence], share: float) -> list[Bundle]:
    """Spread solved rows evenly over a `share` of the bundles, cycling through the rows."""
    numbers = [int(share * number) if rows else 0 for number in range(len(bundles) + 1)]
    return [
        replace(bundle, replay=rows[before % len(rows)] if after > before else None)
        for bundle, (before, after) in zip(bundles, pairwise(numbers), strict=True)
    ]


def preference_task(
    settings: Dpo,
    bundles: Sequence[Bundle],
    reference: Reference,
    tokenizer: Tokenizer,
    held_out: Sequence[int] = (),
) -> TrainingTask:
    """The DPO task: means over the pairs of an optimizer step, and over the tokens of its solved rows."""
    lengths, counts = [], []
    for bundle in bundles:
        lengths.append(sum(len(side.ids) for side in bundle.sides))
        decisions = len(bundle.review.marks)
        solved = sum(weight > 0 for weight in bundle.replay.weights) if bundle.replay is not None else 0
        pairs = decisions + (bundle.rejected is not None)
        counts.append({"pairs": pairs, "decisions": decisions, "replay_tokens": solved})
    return TrainingTask(
        phase="dpo",
        lengths=lengths,
        counts=counts,
        collate=lambda numbers: collate([bundles[number] for number in numbers], tokenizer.pad_token_id),
        losses=DpoLoss(settings, reference, decision_ids(tokenizer)),
        held_out=held_out,
    )
