"""Stage 2 training: a warm-up on whole reviews, then cross-model DPO against the adapter that it starts from.

Source: METHOD section 4. The DPO term of every pair is -log sigmoid(beta * (policy odds - reference odds)); likelihood
terms on the chosen texts and on solved rows (replay) keep the student from forgetting.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sclite import prompts
from sclite.config import Config, Dpo
from sclite.errors import DataFault
from sclite.records import Pair, Problem, Template
from sclite.run import Report, Run, digest, timed
from sclite.student.encode import Encoded, decision_ids
from sclite.student.load import load_student
from sclite.train.bundle import Bundle, build_bundles, collate, likelihoods, reference_odds
from sclite.train.common import (
    Progress,
    arguments,
    forget_metrics,
    metrics_writer,
    numbered,
    quiet,
    save_adapter,
    trainable_as_they_are,
)
from sclite.train.sft import replay_templates, solve_rows

STAGE = "dpo"


def inputs_of(config: Config, run: Run, unseen: frozenset[str] = frozenset()) -> dict[str, Any]:
    """What decides the result of the DPO stage."""
    return {
        "unseen": digest(sorted(unseen)),
        "pairs": run.file_digest("pairs.jsonl"),
        "templates": run.file_digest("templates.jsonl"),
        "warm": run.file_digest("dpo/warm/adapter_model.safetensors"),
        "settings": digest(config.dpo.model_dump()),
        "prompts": prompts.digest(
            "student_system", "student_solve", "student_review", folder=config.prompts.folder
        ),
        "seed": config.seed,
    }


def train_dpo(
    config: Config, run: Run, *, unseen: frozenset[str] = frozenset(), progress: Progress | None = None
) -> Report:
    """Cross-model DPO from dpo/warm on pairs.jsonl; writes dpo/adapter, dpo/reference.json, dpo/metrics.jsonl."""
    inputs, report = inputs_of(config, run, unseen), Report(STAGE)
    if manifest := run.done(STAGE, inputs, "dpo/adapter/adapter_model.safetensors"):
        return Report.of(manifest)
    pairs = run.require(
        "pairs.jsonl", Pair, "run `sclite train`, which builds them from the student's attempts"
    )
    templates = run.require("templates.jsonl", Template, "run `sclite build-data` first")
    questions = {problem.id: problem.question for problem in run.read("problems.jsonl", Problem)}
    with timed(report):
        quiet()
        model, tokenizer = load_student(config.student, config.dpo, run.path("dpo/warm"), train=True)
        bundles = build_bundles(tokenizer, pairs, questions, config.prompts.folder)
        bundles, long = _fitting(bundles, config.dpo.max_length)
        if long:
            report.dropped["longer_than_max_length"] = long
        bundles = with_replay(
            bundles,
            solve_rows(tokenizer, replay_templates(templates, unseen), config.prompts.folder),
            config.dpo.replay_share,
        )
        forget_metrics(run.path("dpo/metrics.jsonl"), STAGE)
        reference = _reference(run, model, tokenizer, bundles, digest(inputs))
        folder = run.path("dpo")
        steps = prefer(model, tokenizer, bundles, reference, folder, config.dpo, config.seed, progress)
        save_adapter(model, folder / "adapter")
    report.counts |= {"bundles": len(bundles), "pairs": len(pairs), "steps": steps}
    run.sign(STAGE, inputs, report)
    return report


def _fitting(bundles: Sequence[Bundle], limit: int) -> tuple[list[Bundle], int]:
    """The bundles whose sequences fit, and how many do not."""
    fit = [b for b in bundles if max(len(b.review.ids), len(b.rejected.ids) if b.rejected else 0) <= limit]
    if not fit:
        raise DataFault(f"no pair fits into dpo.max_length = {limit} tokens", "raise dpo.max_length")
    return fit, len(bundles) - len(fit)


def with_replay(bundles: Sequence[Bundle], rows: Sequence[Encoded], share: float) -> list[Bundle]:
    """Give solved rows to the bundles, `share` of a row each, going round the rows."""
    given, due = [], 0.0
    for number, bundle in enumerate(bundles):
        due += share
        row = rows[number % len(rows)] if due >= 1 else None
        due -= row is not None
        given.append(Bundle(bundle.key, bundle.review, bundle.rejected, row))
    return given


def _reference(
    run: Run, model: Any, tokenizer: Any, bundles: Sequence[Bundle], signature: str
) -> dict[str, Any]:
    """The reference log-odds: from the run where they are of this adapter and these pairs, else computed and kept."""
    kept = run.read_json("dpo/reference.json")
    if kept is not None and kept["signature"] == signature:
        return kept["odds"]
    odds = reference_odds(model, bundles, tokenizer)
    run.write_json("dpo/reference.json", {"signature": signature, "odds": odds})
    return odds


def prefer(
    model: Any,
    tokenizer: Any,
    bundles: Sequence[Bundle],
    reference: dict[str, Any],
    folder: Path,
    settings: Dpo,
    seed: int,
    progress: Progress | None = None,
) -> int:
    """Train the model's adapter in place on the bundles; returns the number of optimizer steps."""
    from transformers import PrinterCallback
    from trl import DPOConfig

    given = arguments(folder, settings, settings.learning_rate, settings.epochs, seed)
    with trainable_as_they_are(model):
        trainer = _trainer_class()(
            model=model,
            args=DPOConfig(**given, beta=settings.beta, max_length=None),
            train_dataset=numbered([len(bundle.review.ids) for bundle in bundles]),
            data_collator=lambda items: {
                "batch": collate([bundles[i["number"]] for i in items], tokenizer.pad_token_id)
            },
            processing_class=tokenizer,
            callbacks=[metrics_writer(folder / "metrics.jsonl", "dpo", progress)],
        )
    trainer.remove_callback(PrinterCallback)
    if "ref" in model.peft_config:  # trl's copy of the adapter; our reference is kept in the run
        model.delete_adapter("ref")
    trainer.pairs = PairLoss(settings, reference, decision_ids(tokenizer))
    trainer.train()
    return trainer.state.global_step


class PairLoss:
    """The loss of a batch of bundles, and its parts by name."""

    def __init__(self, settings: Dpo, reference: dict[str, Any], decision_tokens: tuple[int, int]):
        self.settings, self.reference, self.decision_tokens = settings, reference, decision_tokens

    def __call__(self, model: Any, batch: Any) -> tuple[Any, dict[str, float]]:
        import torch
        from torch.nn.functional import logsigmoid

        got = likelihoods(model, batch, self.decision_tokens)
        chosen = torch.cat([got.decision_chosen, got.content_chosen])
        rejected = torch.cat([got.decision_rejected, got.content_rejected])
        margins = self.settings.beta * (chosen - rejected - self._reference(batch).to(chosen.device))
        dpo = -logsigmoid(margins).mean()
        # likelihood of chosen texts: per token for contents, so that a paragraph does not outweigh a decision
        nll = -torch.cat([got.decision_chosen, got.content_chosen / got.content_tokens.clamp(min=1)]).mean()
        loss = dpo + self.settings.nll_weight * nll
        figures = {
            "dpo_loss": dpo,
            "margin": margins.mean(),
            "margin_max": margins.abs().max(),
            "accuracy": (margins > 0).float().mean(),
            "decision_accuracy": (got.decision_chosen > got.decision_rejected).float().mean(),
            "chosen_logp": chosen.mean(),
            "rejected_logp": rejected.mean(),
            "nll": nll,
        }
        if got.replay_nll is not None:
            loss = loss + self.settings.replay_weight * got.replay_nll
            figures["replay_nll"] = got.replay_nll
        return loss, {name: float(value.detach()) for name, value in figures.items()}

    def _reference(self, batch: Any) -> Any:
        """Reference log-odds in the order of the pairs: all decisions, then all contents."""
        import torch

        kept = [self.reference[key] for key in batch.keys]
        decisions = [value for row in kept for value in row["decisions"]]
        return torch.tensor(decisions + [kept[i]["content"] for i in batch.content])


def _trainer_class() -> type:
    """TRL's DPOTrainer on bundles: pairs that share one forward pass, reference odds from the run."""
    from trl import DPOTrainer

    class BundledDpo(DPOTrainer):
        pairs: PairLoss

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _prepare_inputs(self, inputs):
            return inputs

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, figures = self.pairs(model, inputs["batch"])
            for name, value in figures.items():
                self._metrics["train"][name].append(value)
            return (loss, None) if return_outputs else loss

    return BundledDpo
