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
    pad,
    token_log_probs,
    vocabulary_log_probs,
)
from sclite.student.tokenization import decision_ids

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from sclite.train.dpo import Bundle

Reference = Mapping[str, Mapping[str, Any]]
"""By bundle key {"decisions": [[chosen, rejected] ..], "content": [chosen, rejected] or None}: log p in nats."""


@dataclass(frozen=True)
class LossTerm:
    """A sum over rows, divided by the count named `per`; with `weight` 0 it is only logged."""

    total: Tensor
    per: str
    weight: float = 0.0


def weighted_loss(
    terms: Mapping[str, LossTerm], totals: Mapping[str, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the loss, the figures to log): each term over its count in `totals`."""
    means = {name: term.total / max(1, totals[term.per]) for name, term in terms.items()}
    loss: Any = sum(term.weight * means[name] for name, term in terms.items() if term.weight)
    # a single term is the loss itself
    return loss, {name: mean.detach() for name, mean in means.items()} if len(terms) > 1 else {}


def negative_log_likelihood(model: Module, batch: PaddedBatch) -> dict[str, LossTerm]:
    """The weighted negative log-likelihood of the tokens with loss, in nats."""
    log_probs, _ = token_log_probs(model, hidden_states(model, batch), batch)
    weights = batch.weights[:, 1:]
    carried = weights[weights > 0].to(log_probs.device)
    return {"nll": LossTerm(-(log_probs * carried).sum(), "tokens", 1.0)}


def dpo_loss(
    model: Module, bundles: Sequence[Bundle], tokenizer: Tokenizer, settings: Dpo, reference: Reference
) -> dict[str, LossTerm]:
    """The DPO loss of a batch of bundles, with likelihood terms on chosen texts and solved rows."""
    import torch
    from torch.nn.functional import logsigmoid

    decisions, contents, tokens = pair_log_probs(model, bundles, tokenizer)
    policy = torch.cat([decisions, contents])  # [pairs, 2]
    kept = [reference[bundle.key] for bundle in bundles]
    before = [value for row in kept for value in row["decisions"]]
    before += [row["content"] for row in kept if row["content"] is not None]
    shifts = policy - torch.tensor(before).to(policy.device)
    margins = settings.beta * (shifts[:, 0] - shifts[:, 1])
    # likelihood of chosen texts: per token for contents, so that a paragraph does not outweigh a decision
    nll = -torch.cat([decisions[:, 0], contents[:, 0] / tokens.clamp(min=1)])
    terms = {
        "dpo_loss": LossTerm(-logsigmoid(margins).sum(), "pairs", 1.0),
        "nll": LossTerm(nll.sum(), "pairs", settings.nll_weight),
        "margin": LossTerm(margins.sum(), "pairs"),
        "accuracy": LossTerm((margins > 0).float().sum(), "pairs"),
        "decision_accuracy": LossTerm((decisions[:, 0] > decisions[:, 1]).float().sum(), "decisions"),
        "chosen_logp": LossTerm(policy[:, 0].sum(), "pairs"),
        "rejected_logp": LossTerm(policy[:, 1].sum(), "pairs"),
        "chosen_shift": LossTerm(shifts[:, 0].sum(), "pairs"),
    }
    if replay := [bundle.replay for bundle in bundles if bundle.replay is not None]:
        solved = negative_log_likelihood(model, pad(replay, tokenizer.pad_token_id))["nll"].total
        terms["replay_nll"] = LossTerm(solved, "replay_tokens", settings.replay_weight)
    return terms


def pair_log_probs(
    model: Module, bundles: Sequence[Bundle], tokenizer: Tokenizer
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of decisions [decisions, 2] and contents [contents, 2], chosen and rejected, and the contents' tokens.

    In the order of the bundles; contents are summed over their tokens, [contents] counts those of the chosen text. Reviews
    and rejected texts are padded separately.
    """
    import torch

    def row_sums(hidden: HiddenStates, rows: PaddedBatch) -> tuple[Tensor, Tensor]:
        """The summed log-probability of the weighted tokens of each row, and how many there are; both [rows]."""
        log_probs, owner = token_log_probs(model, hidden, rows)
        counts = torch.bincount(owner, minlength=len(rows.ids)).to(log_probs)
        sums = log_probs.new_zeros(len(rows.ids)).index_add(0, owner.to(log_probs.device), log_probs)
        return sums, counts

    reviews = pad([bundle.review for bundle in bundles], tokenizer.pad_token_id)
    hidden = hidden_states(model, reviews)
    rows = [row for row, bundle in enumerate(bundles) for _ in bundle.review.marks]
    columns = [mark for bundle in bundles for mark in bundle.review.marks]
    log_probs = vocabulary_log_probs(model, hidden.at(rows, columns))
    accuse, close = (log_probs[:, token] for token in decision_ids(tokenizer))
    verdicts = [wrong for bundle in bundles for wrong in bundle.review.accused]
    accused = torch.tensor(verdicts, device=log_probs.device)
    decisions = [torch.where(accused, accuse, close), torch.where(accused, close, accuse)]
    chosen, tokens = row_sums(hidden, reviews)
    numbers = [number for number, bundle in enumerate(bundles) if bundle.rejected is not None]
    content = torch.tensor(numbers, dtype=torch.long, device=chosen.device)
    rejected = chosen[:0]
    if others := [bundle.rejected for bundle in bundles if bundle.rejected is not None]:
        batch = pad(others, tokenizer.pad_token_id)
        rejected, _ = row_sums(hidden_states(model, batch), batch)
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

    was_training = model.training
    model.eval()
    found: dict[str, dict[str, Any]] = {}
    by_length = sorted(bundles, key=lambda bundle: -len(bundle.review.ids))  # so that little is padded
    for start in range(0, len(by_length), size):
        batch = by_length[start : start + size]
        with torch.no_grad(), autocast(model):
            of_decisions, of_contents, _ = pair_log_probs(model, batch, tokenizer)
        decisions, contents = iter(of_decisions.tolist()), iter(of_contents.tolist())
        for bundle in batch:
            found[bundle.key] = {
                "decisions": [next(decisions) for _ in bundle.review.marks],
                "content": next(contents) if bundle.rejected is not None else None,
            }
        progress(0, 0, note=f"reference of {len(found)} of {len(bundles)} reviews")
    model.train(was_training)
    return found
