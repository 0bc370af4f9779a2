"""The losses: negative log-likelihood for SFT and warm-up, DPO on pairs. Source: METHOD section 4.7.

A loss is a dict of `LossTerm`s, sums over the rows of a micro-batch, so that `weighted_loss` can divide each by its count in
the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sclite.config import Dpo
from sclite.student.log_probs import (
    Hidden,
    Padded,
    autocast,
    hidden_states,
    token_log_probs,
    vocabulary_log_probs,
)
from sclite.student.tokenization import decision_ids
from sclite.train.bundle import Batch, Bundle, collate

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LossTerm:
    """A sum over rows, divided by the count named `per`; with `weight` 0 it is only logged.

    With an empty `per` it is a maximum over the micro-batches of a step, and only logged too.
    """

    total: Tensor
    per: str
    weight: float = 0.0


def weighted_loss(terms: Mapping[str, LossTerm], totals: Mapping[str, int]) -> tuple[Any, dict[str, Any]]:
    """(the loss, the figures to log): each term over its count in `totals`; maxima are in lists."""
    loss, figures = 0.0, {}
    for name, term in terms.items():
        value = term.total / max(1, totals[term.per]) if term.per else term.total
        if term.weight:
            loss = loss + term.weight * value
        if len(terms) > 1:  # a single one is the loss itself
            figures[name] = value.detach() if term.per else [value.detach()]
    return loss, figures


def negative_log_likelihood(model: PreTrainedModel, batch: Padded) -> dict[str, LossTerm]:
    """The weighted negative log-likelihood of the tokens with loss, in nats."""
    log_probs, _ = token_log_probs(model, hidden_states(model, batch), batch)
    weights = batch.weights[:, 1:]
    carried = weights[weights > 0].to(log_probs.device)
    return {"nll": LossTerm(-(log_probs * carried).sum(), "tokens", 1.0)}


class DpoLoss:
    """The DPO loss of a batch of bundles, with likelihood terms on chosen texts and solved rows."""

    def __init__(self, settings: Dpo, reference: Mapping[str, Any], decision_tokens: tuple[int, int]):
        self.settings, self.reference, self.decision_tokens = settings, reference, decision_tokens

    def __call__(self, model: PreTrainedModel, batch: Batch) -> dict[str, LossTerm]:
        import torch
        from torch.nn.functional import logsigmoid

        policy = pair_log_probs(model, batch, self.decision_tokens)
        chosen = torch.cat([policy.decision_chosen, policy.content_chosen])
        rejected = torch.cat([policy.decision_rejected, policy.content_rejected])
        chosen_before, rejected_before = self._reference(batch).to(chosen.device).unbind(1)
        margins = self.settings.beta * ((chosen - chosen_before) - (rejected - rejected_before))
        # likelihood of chosen texts: per token for contents, so that a paragraph does not outweigh a decision
        nll = -torch.cat([policy.decision_chosen, policy.content_chosen / policy.content_tokens.clamp(min=1)])
        right = (policy.decision_chosen > policy.decision_rejected).float()
        terms = {
            "dpo_loss": LossTerm(-logsigmoid(margins).sum(), "pairs", 1.0),
            "nll": LossTerm(nll.sum(), "pairs", self.settings.nll_weight),
            "margin": LossTerm(margins.sum(), "pairs"),
            "margin_max": LossTerm(margins.abs().max(), ""),
            "accuracy": LossTerm((margins > 0).float().sum(), "pairs"),
            "decision_accuracy": LossTerm(right.sum(), "decisions"),
            "chosen_logp": LossTerm(chosen.sum(), "pairs"),
            "rejected_logp": LossTerm(rejected.sum(), "pairs"),
            "chosen_shift": LossTerm((chosen - chosen_before).sum(), "pairs"),
            "rejected_shift": LossTerm((rejected - rejected_before).sum(), "pairs"),
        }
        if policy.replay_log_prob is not None:
            terms["replay_nll"] = LossTerm(
                -policy.replay_log_prob, "replay_tokens", self.settings.replay_weight
            )
        return terms

    def _reference(self, batch: Batch) -> Tensor:
        """Reference log-probabilities in the order of the pairs, all decisions, then all contents: [pairs, 2]."""
        import torch

        kept = [self.reference[key] for key in batch.keys]
        decisions = [value for row in kept for value in row["decisions"]]
        return torch.tensor([*decisions, *(kept[i]["content"] for i in batch.content)])


@dataclass
class PairLogProbs:
    """Log-probabilities of the chosen and the rejected side of every pair, and token counts of the contents."""

    decision_chosen: Tensor  # [decisions]
    decision_rejected: Tensor
    content_chosen: Tensor  # [contents], summed over tokens
    content_rejected: Tensor
    content_tokens: Tensor  # [contents], of the chosen text
    replay_log_prob: Tensor | None  # scalar, summed over tokens


def pair_log_probs(model: PreTrainedModel, batch: Batch, decision_tokens: tuple[int, int]) -> PairLogProbs:
    """Run the model over a batch; `decision_tokens` are those of accusing and of closing a step."""
    import torch

    hidden = hidden_states(model, batch.reviews)
    log_probs = vocabulary_log_probs(model, hidden.at(batch.decision_rows, batch.decision_columns))
    accuse, close = (log_probs[:, token] for token in decision_tokens)
    accused = torch.tensor(batch.decision_accused, device=log_probs.device)
    chosen, tokens = _row_sums(model, hidden, batch.reviews, len(batch.keys))
    content = torch.tensor(batch.content, dtype=torch.long, device=chosen.device)
    content_rejected, replay = chosen[:0], None
    if batch.rejected is not None:
        other = hidden_states(model, batch.rejected)
        content_rejected, _ = _row_sums(model, other, batch.rejected, len(batch.content))
    if batch.replay is not None:
        replay = token_log_probs(model, hidden_states(model, batch.replay), batch.replay)[0].sum()
    return PairLogProbs(
        decision_chosen=torch.where(accused, accuse, close),
        decision_rejected=torch.where(accused, close, accuse),
        content_chosen=chosen[content],
        content_rejected=content_rejected,
        content_tokens=tokens[content],
        replay_log_prob=replay,
    )


def _row_sums(model: PreTrainedModel, hidden: Hidden, rows: Padded, count: int) -> tuple[Tensor, Tensor]:
    """The summed log-probability of the weighted tokens of each row, and how many there are; both [rows]."""
    import torch

    log_probs, owner = token_log_probs(model, hidden, rows)
    counts = torch.bincount(owner, minlength=count).to(log_probs)
    return log_probs.new_zeros(count).index_add(0, owner.to(log_probs.device), log_probs), counts


def reference_log_probs(
    model: PreTrainedModel, bundles: Sequence[Bundle], tokenizer: PreTrainedTokenizerBase, size: int = 8
) -> dict[str, dict[str, Any]]:
    """log p of both sides of every pair under the model as it is now, in float32, by bundle key.

    Computed once before DPO and kept in the run, so that no step pays for a second forward pass and a resumed training
    compares with the adapter that it started from.
    {"decisions": [[chosen, rejected] ..], "content": [chosen, rejected] or None}, in nats.
    """
    import torch

    tokens = decision_ids(tokenizer)
    was_training = model.training
    model.eval()
    found: dict[str, dict[str, Any]] = {}
    by_length = sorted(bundles, key=lambda bundle: -len(bundle.review.ids))  # so that little is padded
    for start in range(0, len(by_length), size):
        rows = [Bundle(b.key, b.review, b.rejected) for b in by_length[start : start + size]]
        batch = collate(rows, tokenizer.pad_token_id)
        with torch.no_grad(), autocast(model):
            got = pair_log_probs(model, batch, tokens)
        decisions = list(zip(got.decision_chosen.tolist(), got.decision_rejected.tolist(), strict=True))
        contents = list(zip(got.content_chosen.tolist(), got.content_rejected.tolist(), strict=True))
        for number, key in enumerate(batch.keys):
            own = [list(d) for row, d in zip(batch.decision_rows, decisions, strict=True) if row == number]
            content = list(contents[batch.content.index(number)]) if number in batch.content else None
            found[key] = {"decisions": own, "content": content}
    model.train(was_training)
    return found
