"""Stage 2 training: a warm-up on whole reviews, then cross-model DPO against the adapter that it starts from.

Source: METHOD section 4. The DPO term of every pair is -log sigmoid(beta * (policy odds - reference odds)); likelihood
terms on the chosen texts and on solved rows (replay) keep the student from forgetting.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sclite import prompts
from sclite.config import Config, Dpo
from sclite.errors import DataError
from sclite.records import Drop, Pair, Problem, Template
from sclite.run import Report, Run, timed
from sclite.signature import digest
from sclite.student.loader import load_student
from sclite.student.tokenization import Encoded, decision_ids
from sclite.train.bundle import Bundle, build_bundles, collate, likelihoods, reference_log_probs
from sclite.train.checkpoints import Checkpoints, refuse_other_inputs
from sclite.train.common import done, quiet, save_adapter, student_inputs, written
from sclite.train.label_checks import check_bundles, checked_tokenizer, tell_left_out
from sclite.train.memory import micro_batch
from sclite.train.metrics_logger import Progress
from sclite.train.sft import replay_templates, solve_rows
from sclite.train.trainer import Lesson, Part, held_out_rows, memory_told, train_adapter

STAGE, ADAPTER = "dpo", "dpo/adapter/adapter_model.safetensors"


def inputs_of(config: Config, run: Run, unseen: frozenset[str] = frozenset()) -> dict[str, Any]:
    """What decides the result of the DPO stage."""
    return {
        "problems kept for stage 2": digest(sorted(unseen)),
        "pairs.jsonl": run.file_digest("pairs.jsonl"),
        "templates.jsonl": run.file_digest("templates.jsonl"),
        "warmup/adapter": run.file_digest("warmup/adapter/adapter_model.safetensors"),
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
    """Cross-model DPO from warmup/adapter on pairs.jsonl; writes dpo/adapter, dpo/reference.json, dpo/metrics.jsonl.

    Goes on where it was broken off. Raises DataFault where no pair is there or fits, UsageFault where it was trained from
    other inputs and is not to be `fresh`.
    """
    inputs, report = inputs_of(config, run, unseen), Report(STAGE)
    if manifest := done(run, STAGE, inputs, ADAPTER, fresh):
        return Report.of(manifest)
    pairs = run.require(
        "pairs.jsonl", Pair, "run `sclite train`, which builds them from the student's attempts"
    )
    templates = run.require("templates.jsonl", Template, "run `sclite build-data` first")
    folder = run.path("dpo")
    refuse_other_inputs(run, STAGE, folder / "checkpoints", inputs, fresh)
    questions = {problem.id: problem.question for problem in run.read("problems.jsonl", Problem)}
    with timed(report):
        quiet(config.student)
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.begin(inputs, progress)
        tokenizer = checked_tokenizer(config.student)
        bundles = build_bundles(tokenizer, pairs, questions, config.prompts.folder)
        solved = solve_rows(tokenizer, replay_templates(templates, unseen), config.prompts.folder)
        tell_left_out(progress, STAGE, "solved rows", [len(row.ids) for row in solved], config.dpo.max_length)
        bundles = with_replay(
            fitting_bundles(run, report, bundles, config.dpo.max_length, progress),
            [row for row in solved if len(row.ids) <= config.dpo.max_length],
            config.dpo.replay_share,
        )
        check_bundles(bundles, decision_ids(tokenizer))
        at_once = micro_batch(config, STAGE)
        model, tokenizer = load_student(config, STAGE, run.path("warmup/adapter"), train=True)
        reference = _reference(run, model, tokenizer, bundles, digest(inputs), at_once, progress)
        outcome = train_adapter(
            model,
            tokenizer,
            preferences(config.dpo, bundles, reference, tokenizer, config.seed),
            config.dpo,
            checkpoints,
            folder / "metrics.jsonl",
            seed=config.seed,
            micro_batch=at_once,
            progress=progress,
        )
        save_adapter(model, run, STAGE, "dpo/adapter")
    report.counts |= {"bundles": len(bundles), "pairs": len(pairs), "steps": outcome.steps}
    report.figures |= {"best_step": outcome.best, "warnings": outcome.warnings, **written(run, ADAPTER)}
    run.sign(STAGE, inputs, report)
    checkpoints.forget()
    return report


def fitting_bundles(
    run: Run, report: Report, bundles: Sequence[Bundle], limit: int, progress: Progress | None = None
) -> list[Bundle]:
    """The bundles whose sequences have at most `limit` tokens; the others are told of, and named in dropped.jsonl."""
    fit, drops = [], []
    sides = [[side for side in (b.review, b.rejected) if side is not None] for b in bundles]
    lengths = [max(len(side.ids) for side in both) for both in sides]
    tell_left_out(progress, STAGE, "rows", lengths, limit)
    for bundle, longest in zip(bundles, lengths, strict=True):
        if longest <= limit:
            fit.append(bundle)
            continue
        id, _, sample = bundle.key.rpartition("/")
        told = f"{longest} tokens, {limit} fit"
        drops.append(
            Drop(stage=STAGE, id=id, sample=int(sample), reason="longer_than_max_length", detail=told)
        )
    run.replace_drops({STAGE}, drops)
    if not fit:
        raise DataError(f"no pair fits into dpo.max_length = {limit} tokens", "raise dpo.max_length")
    if drops:
        report.dropped["longer_than_max_length"] = len(drops)
    return fit


def with_replay(bundles: Sequence[Bundle], rows: Sequence[Encoded], share: float) -> list[Bundle]:
    """Give solved rows to the bundles, `share` of a row each, going round the rows; none where there are none."""
    given, due = [], 0.0
    share = share if rows else 0.0
    for number, bundle in enumerate(bundles):
        due += share
        row = rows[number % len(rows)] if due >= 1 else None
        due -= row is not None
        given.append(Bundle(bundle.key, bundle.review, bundle.rejected, row))
    return given


def _reference(
    run: Run,
    model: Any,
    tokenizer: Any,
    bundles: Sequence[Bundle],
    signature: str,
    at_once: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """The reference log-probabilities: from the run where they are whole and of these inputs, else computed and kept.

    The model is the adapter that DPO starts from, also where training resumes: computing them again gives the same.
    """
    kept, path = {}, run.path("dpo/reference.json")
    if path.is_file():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            whole = kept["digest"] == digest(kept["log_probs"])
        except (ValueError, TypeError, KeyError):
            whole = False
        if whole and kept["signature"] == signature:
            return kept["log_probs"]
        if not whole and progress is not None:
            progress(0, 0, warning=f"{path} is damaged: the reference is computed again from warmup/adapter")
    with memory_told(STAGE, at_once):
        log_probs = reference_log_probs(model, bundles, tokenizer, at_once)
    content = {"signature": signature, "digest": digest(log_probs), "log_probs": log_probs}
    run.write_json("dpo/reference.json", content)
    return log_probs


def preferences(
    settings: Dpo, bundles: Sequence[Bundle], reference: Mapping[str, Any], tokenizer: Any, seed: int
) -> Lesson:
    """DPO on bundles: means over the pairs of an optimizer step, and over the tokens of its solved rows."""

    def length(bundle: Bundle) -> int:
        return sum(
            len(part.ids) for part in (bundle.review, bundle.rejected, bundle.replay) if part is not None
        )

    def counts(bundle: Bundle) -> dict[str, int]:
        decisions = len(bundle.review.marks)
        solved = sum(weight > 0 for weight in bundle.replay.weights) if bundle.replay is not None else 0
        pairs = decisions + (bundle.rejected is not None)
        return {"pairs": pairs, "decisions": decisions, "replay_tokens": solved}

    return Lesson(
        phase=STAGE,
        lengths=[length(bundle) for bundle in bundles],
        counts=[counts(bundle) for bundle in bundles],
        collate=lambda numbers: collate([bundles[number] for number in numbers], tokenizer.pad_token_id),
        parts=PairLoss(settings, reference, decision_ids(tokenizer)),
        held_out=held_out_rows(len(bundles), settings.eval_share, seed),
    )


class PairLoss:
    """The parts of the loss of a batch of bundles, by name; METHOD section 4.7."""

    def __init__(self, settings: Dpo, reference: Mapping[str, Any], decision_tokens: tuple[int, int]):
        self.settings, self.reference, self.decision_tokens = settings, reference, decision_tokens

    def __call__(self, model: Any, batch: Any) -> dict[str, Part]:
        import torch
        from torch.nn.functional import logsigmoid

        got = likelihoods(model, batch, self.decision_tokens)
        chosen = torch.cat([got.decision_chosen, got.content_chosen])
        rejected = torch.cat([got.decision_rejected, got.content_rejected])
        chosen_before, rejected_before = self._reference(batch).to(chosen.device).unbind(1)
        margins = self.settings.beta * ((chosen - chosen_before) - (rejected - rejected_before))
        # likelihood of chosen texts: per token for contents, so that a paragraph does not outweigh a decision
        nll = -torch.cat([got.decision_chosen, got.content_chosen / got.content_tokens.clamp(min=1)])
        parts = {
            "dpo_loss": Part(-logsigmoid(margins).sum(), "pairs", 1.0),
            "nll": Part(nll.sum(), "pairs", self.settings.nll_weight),
            "margin": Part(margins.sum(), "pairs"),
            "margin_max": Part(margins.abs().max(), ""),
            "accuracy": Part((margins > 0).float().sum(), "pairs"),
            "decision_accuracy": Part(
                (got.decision_chosen > got.decision_rejected).float().sum(), "decisions"
            ),
            "chosen_logp": Part(chosen.sum(), "pairs"),
            "rejected_logp": Part(rejected.sum(), "pairs"),
            "chosen_shift": Part((chosen - chosen_before).sum(), "pairs"),
            "rejected_shift": Part((rejected - rejected_before).sum(), "pairs"),
        }
        if got.replay_log_prob is not None:
            weight = self.settings.replay_weight
            parts["replay_nll"] = Part(-got.replay_log_prob, "replay_tokens", weight)
        return parts

    def _reference(self, batch: Any) -> Any:
        """Reference log-probabilities in the order of the pairs, all decisions, then all contents: [pairs, 2]."""
        import torch

        kept = [self.reference[key] for key in batch.keys]
        decisions = [value for row in kept for value in row["decisions"]]
        return torch.tensor([*decisions, *(kept[i]["content"] for i in batch.content)])
