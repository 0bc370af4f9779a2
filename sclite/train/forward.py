"""Log-probabilities of chosen positions: the decoder runs once, the vocabulary is looked at only where it is needed."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from sclite.student.encode import Encoded


def pad(rows: Sequence[Encoded], pad_id: int) -> dict[str, Any]:
    """A batch of sequences, padded at the right: ids, mask and weights, each [rows, longest]."""
    import torch

    width = max(len(row.ids) for row in rows)
    return {
        "input_ids": torch.tensor([row.ids + [pad_id] * (width - len(row.ids)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]),
        "weights": torch.tensor([row.weights + [0.0] * (width - len(row.ids)) for row in rows]),
    }


def autocast(model: Any) -> Any:
    """The mixed precision that the trainer computes in on a card, for what is computed outside of it."""
    import torch

    if next(model.parameters()).device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)


def hidden_states(model: Any, ids: Any, mask: Any) -> Any:
    """The decoder's last hidden states, [rows, longest, width]."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def _head(model: Any) -> tuple[Any, Any]:
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal, causal.get_output_embeddings()


def vocabulary_log_probs(model: Any, hidden: Any) -> Any:
    """Float32 log-probabilities over the vocabulary for hidden states [positions, width]."""
    import torch

    causal, head = _head(model)
    logits = head(hidden.to(head.weight.dtype)).float()
    cap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return torch.log_softmax(logits, dim=-1)


LOGITS = 1 << 26
"""Numbers of a table of logits at the most: positions times vocabulary."""


def chunk_of(vocabulary: int) -> int:
    """How many positions go through the head at once."""
    return max(64, LOGITS // vocabulary)


def token_log_probs(model: Any, hidden: Any, ids: Any, weights: Any) -> tuple[Any, Any]:
    """Log-probabilities of every token that carries weight, and the row each belongs to; both [tokens].

    The token at position t is predicted by the hidden state at t - 1. Where there are many, the head runs over chunks of
    them, and once more for each in the backward pass: the logits of a whole batch would take gigabytes.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    rows, columns = (weights[:, 1:] > 0).nonzero(as_tuple=True)
    states, tokens = hidden[rows, columns], ids[rows, columns + 1]

    def chosen(states: Any, tokens: Any) -> Any:
        return vocabulary_log_probs(model, states).gather(1, tokens.unsqueeze(1)).squeeze(1)

    size = chunk_of(_head(model)[1].weight.shape[0])
    if len(tokens) <= size:
        return chosen(states, tokens), rows
    parts = [
        checkpoint(chosen, states[i : i + size], tokens[i : i + size], use_reentrant=False)
        for i in range(0, len(tokens), size)
    ]
    return torch.cat(parts), rows
