"""The losses: negative log-likelihood for SFT and warm-up, DPO on pairs.

Each is a dict of `LossTerm`s over a micro-batch; `weighted_loss` divides each by its count in the optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sclite.config import Dpo
from sclite.progress import Progress, no_progress
from sclite.student.log_probs import (
    HiddenStates,
    PaddedBatch,
    autocast,
    hidden_states,
    token_log_probs,
    vocabulary_log_probs,
)
from sclite.student.tokenization import decision_ids
from sclite.train.bundle import Batch, Bundle, collate

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase as Tokenizer


Reference = Mapping[str, Mapping[str, Any]]
"""By bundle key {"decisions": [[chosen, rejected] ..], "content": [chosen, rejected] or None}: log p in nats."""


@dataclass(frozen=True)
class LossTerm:
    """A sum over rows, divided by the count named `per`; with `weight` 0 it is only logged.

    With an empty `per` it is a maximum over the micro-batches of a step, and only logged too.
    """

    total: Tensor
    per: str
    weight: float = 0.0


def weighted_loss(
    terms: Mapping[str, LossTerm], totals: Mapping[str, int]
) -> tuple[Tensor, dict[str, Tensor | list[Tensor]]]:
    """(the loss, the figures to log): each term over its count in `totals`; maxima are in lists."""
    loss: Any = 0.0
    figures: dict[str, Tensor | list[Tensor]] = {}
    for name, term in terms.items():
        value = term.total / max(1, totals[term.per]) if term.per else term.total
        if term.weight:
            loss = loss + term.weight * value
        if len(terms) > 1:  # a single term is the loss itself
            figures[name] = value.detach() if term.per else [value.detach()]
    return loss, figures


def negative_log_likelihood(model: Module, batch: PaddedBatch) -> dict[str, LossTerm]:
    """The weighted negative log-likelihood of the tokens with loss, in nats."""
    log_probs, _ = token_log_probs(model, hidden_states(model, batch), batch)
    weights = batch.weights[:, 1:]
    carried = weights[weights > 0].to(log_probs.device)
    return {"nll": LossTerm(-(log_probs * carried).sum(), "tokens", 1.0)}


@dataclass(frozen=True)
class DpoLoss:
    """The DPO loss of a batch of bundles, with likelihood terms on chosen texts and solved rows."""

    settings: Dpo
    reference: Reference
    decision_tokens: tuple[int, int]

    def __call__(self, model: Module, batch: Batch) -> dict[str, LossTerm]:
        import torch
        from torch.nn.functional import logsigmoid

        decisions, contents, tokens = pair_log_probs(model, batch, self.decision_tokens)
        policy = torch.cat([decisions, contents])  # [pairs, 2]
        kept = [self.reference[bundle.key] for bundle in batch.bundles]
        before = [value for row in kept for value in row["decisions"]]
        before += [row["content"] for row in kept if row["content"] is not None]
        chosen, rejected = policy.unbind(1)
        chosen_shift, rejected_shift = (policy - torch.tensor(before).to(policy.device)).unbind(1)
        margins = self.settings.beta * (chosen_shift - rejected_shift)
        # likelihood of chosen texts: per token for contents, so that a paragraph does not outweigh a decision
        nll = -torch.cat([decisions[:, 0], contents[:, 0] / tokens.clamp(min=1)])
        right = (decisions[:, 0] > decisions[:, 1]).float()
        terms = {
            "dpo_loss": LossTerm(-logsigmoid(margins).sum(), "pairs", 1.0),
            "nll": LossTerm(nll.sum(), "pairs", self.settings.nll_weight),
            "margin": LossTerm(margins.sum(), "pairs"),
            "margin_max": LossTerm(margins.abs().max(), ""),
            "accuracy": LossTerm((margins > 0).float().sum(), "pairs"),
            "decision_accuracy": LossTerm(right.sum(), "decisions"),
            "chosen_logp": LossTerm(chosen.sum(), "pairs"),
            "rejected_logp": LossTerm(rejected.sum(), "pairs"),
            "chosen_shift": LossTerm(chosen_shift.sum(), "pairs"),
            "rejected_shift": LossTerm(rejected_shift.sum(), "pairs"),
        }
        if batch.replay is not None:
            solved = negative_log_likelihood(model, batch.replay)["nll"].total
            terms["replay_nll"] = LossTerm(solved, "replay_tokens", self.settings.replay_weight)
        return terms


def pair_log_probs(
    model: Module, batch: Batch, decision_tokens: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of decisions [decisions, 2] and contents [contents, 2], chosen and rejected, and the contents' tokens.

    In the order of the bundles; contents are summed over their tokens, [contents] counts those of the chosen text.
    `decision_tokens` are those that flag and close a step.
    """
    import torch

    def row_sums(hidden: HiddenStates, rows: PaddedBatch) -> tuple[Tensor, Tensor]:
        """The summed log-probability of the weighted tokens of each row, and how many there are; both [rows]."""
        log_probs, owner = token_log_probs(model, hidden, rows)
        counts = torch.bincount(owner, minlength=len(rows.ids)).to(log_probs)
        sums = log_probs.new_zeros(len(rows.ids)).index_add(0, owner.to(log_probs.device), log_probs)
        return sums, counts

    hidden = hidden_states(model, batch.reviews)
    rows = [row for row, bundle in enumerate(batch.bundles) for _ in bundle.review.marks]
    columns = [mark for bundle in batch.bundles for mark in bundle.review.marks]
    log_probs = vocabulary_log_probs(model, hidden.at(rows, columns))
    accuse, close = (log_probs[:, token] for token in decision_tokens)
    verdicts = [wrong for bundle in batch.bundles for wrong in bundle.review.accused]
    accused = torch.tensor(verdicts, device=log_probs.device)
    chosen, tokens = row_sums(hidden, batch.reviews)
    numbers = [number for number, bundle in enumerate(batch.bundles) if bundle.rejected is not None]
    content = torch.tensor(numbers, dtype=torch.long, device=chosen.device)
    rejected = chosen[:0]
    if batch.rejected is not None:
        rejected, _ = row_sums(hidden_states(model, batch.rejected), batch.rejected)
    decisions = [torch.where(accused, accuse, close), torch.where(accused, close, accuse)]
    return torch.stack(decisions, 1), torch.stack([chosen[content], rejected], 1), tokens[content]


def reference_log_probs(
    model: Module,
    bundles: Sequence[Bundle],
    tokenizer: Tokenizer,
    size: int = 8,
    progress: Progress = no_progress,
) -> Reference:
    """log p of both sides of every pair under the current model, in float32, by bundle key.

    Computed once and stored in the run: it adds no time to steps, and a resumed training compares with its true start.
    """
    import torch

    tokens, was_training = decision_ids(tokenizer), model.training
    model.eval()
    found: dict[str, dict[str, Any]] = {}
    by_length = sorted(bundles, key=lambda bundle: -len(bundle.review.ids))  # so that little is padded
    for start in range(0, len(by_length), size):
        batch = collate(by_length[start : start + size], tokenizer.pad_token_id)
        with torch.no_grad(), autocast(model):
            of_decisions, of_contents, _ = pair_log_probs(model, batch, tokens)
        decisions, contents = iter(of_decisions.tolist()), iter(of_contents.tolist())
        for bundle in batch.bundles:
            found[bundle.key] = {
                "decisions": [next(decisions) for _ in bundle.review.marks],
                "content": next(contents) if bundle.rejected is not None else None,
            }
        progress(0, 0, note=f"reference of {len(found)} of {len(bundles)} reviews")
    model.train(was_training)
    return found
