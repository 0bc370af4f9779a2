"""Log-probabilities of chosen positions: the decoder runs once, the vocabulary is looked at only where it is needed."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from sclite.errors import DataFault
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
    """The decoder's last hidden states for rows padded at the right, [rows, longest, width].

    Where the model is `padding_free`, rows go through it end to end and nothing is computed for padding. Raises DataFault
    where the model has cut them.
    """
    decoder = _head(model)[0].get_decoder()
    lengths = mask.sum(1)
    if getattr(model, "padding_free", False) and len(ids) > 1:
        return _end_to_end(decoder, ids, mask.bool(), lengths)
    hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    if hidden.shape[1] != ids.shape[1]:
        raise DataFault(
            f"rows of {ids.shape[1]} tokens were cut to {hidden.shape[1]}",
            "lower max_length: the student has no more",
        )
    return hidden


def _end_to_end(decoder: Any, ids: Any, mask: Any, lengths: Any) -> Any:
    """Rows one behind the other as one, each with positions of its own, and laid out again as they were.

    Positions that begin anew tell transformers where attention ends; Unsloth's kernels are told the lengths.
    """
    import torch

    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths.tolist()])
    given = {"input_ids": ids[mask].unsqueeze(0), "position_ids": positions.unsqueeze(0), "use_cache": False}
    if type(decoder).forward.__module__.startswith("unsloth"):
        given["packed_seq_lengths"] = lengths.to(torch.int32)
    flat = decoder(attention_mask=None, **given).last_hidden_state[0]
    laid = flat.new_zeros(*ids.shape, flat.shape[-1])
    return laid.masked_scatter(mask.unsqueeze(-1), flat)


def _head(model: Any) -> tuple[Any, Any]:
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal, causal.get_output_embeddings()


def vocabulary_log_probs(model: Any, hidden: Any) -> Any:
    """Float32 log-probabilities over the vocabulary for hidden states [positions, width]."""
    import torch

    causal, head = _head(model)
    logits = head(hidden.to(head.weight.dtype)).float()
    return torch.log_softmax(_capped(causal, logits), dim=-1)


def two_logits(model: Any, hidden: Any, one: int, other: int) -> Any:
    """Float32 logits of two tokens for hidden states [positions, width]: [positions, 2]."""
    causal, head = _head(model)
    import torch

    bias = getattr(head, "bias", None)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.float() @ head.weight[[one, other]].float().T
        if bias is not None:
            logits = logits + bias[[one, other]].float()
        return _capped(causal, logits)


def _capped(causal: Any, logits: Any) -> Any:
    import torch

    cap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


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
