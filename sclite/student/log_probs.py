"""Log-probabilities of chosen positions: the decoder runs once, the vocabulary is looked at only where it is needed."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from sclite.errors import DataError
from sclite.student.tokenization import Encoded


@dataclass
class Padded:
    """Sequences padded at the right, each tensor [rows, longest].

    They stay on the CPU: what is read off them there (lengths, the tokens with weight) would make it wait for the card.
    """

    ids: Any
    mask: Any
    weights: Any


def pad(rows: Sequence[Encoded], pad_id: int) -> Padded:
    """A batch of sequences side by side."""
    import torch

    width = max(len(row.ids) for row in rows)
    return Padded(
        ids=torch.tensor([row.ids + [pad_id] * (width - len(row.ids)) for row in rows]),
        mask=torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]),
        weights=torch.tensor([row.weights + [0.0] * (width - len(row.ids)) for row in rows]),
    )


@dataclass(frozen=True)
class Hidden:
    """The last hidden states of a batch, however its rows lie in memory: row r begins at `flat[starts[r]]`.

    `flat` is [tokens, width] on the model's device, `starts` [rows] on the CPU.
    """

    flat: Any
    starts: Any

    def at(self, rows: Any, columns: Any) -> Any:
        """The states at these places, [places, width]; both are lists, or tensors on the CPU."""
        import torch

        rows, columns = (torch.as_tensor(given, dtype=torch.long) for given in (rows, columns))
        places = self.starts[rows] + columns
        return self.flat.index_select(0, places.to(self.flat.device))


def autocast(model: Any) -> Any:
    """The mixed precision that the trainer computes in on a card, for what is computed outside of it."""
    import torch

    if next(model.parameters()).device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16)


def hidden_states(model: Any, batch: Padded) -> Hidden:
    """The decoder's last hidden states.

    Where the model is `padding_free`, rows go through it end to end and nothing is computed for padding. Raises DataFault
    where the model has cut them.
    """
    decoder, device = _head(model)[0].get_decoder(), next(model.parameters()).device
    if getattr(model, "padding_free", False) and len(batch.ids) > 1:
        return _end_to_end(decoder, batch, device)
    given = {"input_ids": batch.ids.to(device), "attention_mask": batch.mask.to(device)}
    hidden = decoder(**given, use_cache=False).last_hidden_state
    _refuse_cut(hidden.shape[1], batch.ids.shape[1])
    return _laid_out(hidden)


def _refuse_cut(found: int, given: int) -> None:
    if found != given:
        raise DataError(
            f"rows of {given} tokens were cut to {found}", "lower max_length: the student has no more"
        )


def _laid_out(hidden: Any) -> Hidden:
    """Of states [rows, longest, width]."""
    import torch

    rows, longest, width = hidden.shape
    return Hidden(hidden.reshape(-1, width), torch.arange(rows) * longest)


def _end_to_end(decoder: Any, batch: Padded, device: Any) -> Hidden:
    """Rows one behind the other as one, each with positions of its own.

    Positions that begin anew tell transformers where attention ends; Unsloth's kernels are told the lengths.
    """
    import torch

    lengths = batch.mask.sum(1)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    flat_ids = batch.ids[batch.mask.bool()]
    given = {"input_ids": flat_ids[None].to(device), "position_ids": positions[None].to(device)}
    if type(decoder).forward.__module__.startswith("unsloth"):
        given["packed_seq_lengths"] = lengths.to(device, torch.int32)
    flat = decoder(attention_mask=None, use_cache=False, **given).last_hidden_state[0]
    _refuse_cut(len(flat), int(lengths.sum()))
    return Hidden(flat, lengths.cumsum(0) - lengths)


def _head(model: Any) -> tuple[Any, Any]:
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal, causal.get_output_embeddings()


def vocabulary_log_probs(model: Any, hidden: Any) -> Any:
    """Float32 log-probabilities over the vocabulary for hidden states [positions, width]."""
    import torch

    causal, head = _head(model)
    logits = head(hidden.to(head.weight.dtype)).float()
    return torch.log_softmax(_capped(causal, logits), dim=-1)


def log_probs_at(model: Any, hidden: Any, tokens: Any) -> Any:
    """Float32 log-probabilities of one token after each hidden state [positions, width]: [positions].

    The head is read in parts: all its weights in float32 would take gigabytes.
    """
    import torch

    causal, head = _head(model)
    weight, bias = head.weight, getattr(head, "bias", None)
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.float()

        def logits(rows: Any) -> Any:
            found = hidden @ weight[rows].float().T
            return _capped(causal, found if bias is None else found + bias[rows].float())

        parts = [slice(start, start + HEAD_ROWS) for start in range(0, len(weight), HEAD_ROWS)]
        norm = torch.stack([logits(part).logsumexp(-1) for part in parts]).logsumexp(0)
        own, places = torch.unique(tokens.to(weight.device), return_inverse=True)
        return logits(own).gather(1, places.unsqueeze(1)).squeeze(1) - norm


def _capped(causal: Any, logits: Any) -> Any:
    import torch

    cap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


HEAD_ROWS = 16_384
LOGITS = 1 << 26
"""Numbers of a table of logits at the most: positions times vocabulary."""


def head_chunk_size(vocabulary: int) -> int:
    """How many positions go through the head at once."""
    return max(64, LOGITS // vocabulary)


def token_log_probs(model: Any, hidden: Hidden, batch: Padded) -> tuple[Any, Any]:
    """Log-probabilities of every token that carries weight, and the row each belongs to (on the CPU); both [tokens].

    The token at position t is predicted by the hidden state at t - 1. Where there are many, the head runs over chunks of
    them: the logits of a whole batch would take gigabytes.
    """
    rows, columns = (batch.weights[:, 1:] > 0).nonzero(as_tuple=True)
    states = hidden.at(rows, columns)
    tokens = batch.ids[rows, columns + 1].to(states.device)

    def chosen(states: Any, tokens: Any) -> Any:
        return vocabulary_log_probs(model, states).gather(1, tokens.unsqueeze(1)).squeeze(1)

    head = _head(model)[1].weight
    size = head_chunk_size(head.shape[0])
    if len(tokens) <= size:
        return chosen(states, tokens), rows
    assert not head.requires_grad, "the head of the student is frozen"
    return _in_chunks(chosen, states, tokens, size), rows


def _in_chunks(function: Any, states: Any, tokens: Any, size: int) -> Any:
    """function(states, tokens), [tokens], a chunk at a time.

    Each result depends on its own state alone, so that its slope has the size of that state: it is found along with the
    result, and neither logits are kept for the backward pass nor computed twice.
    """
    import torch

    class Chunks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states):
            values, slopes = [], []
            for i in range(0, len(tokens), size):
                with torch.enable_grad():
                    part = states[i : i + size].detach().requires_grad_()
                    found = function(part, tokens[i : i + size])
                    slopes.append(torch.autograd.grad(found.sum(), part)[0])
                values.append(found.detach())
            ctx.save_for_backward(torch.cat(slopes))
            return torch.cat(values)

        @staticmethod
        def backward(ctx, given):
            (slopes,) = ctx.saved_tensors
            return (given.unsqueeze(1) * slopes).to(slopes.dtype)

    if torch.is_grad_enabled() and states.requires_grad:
        return Chunks.apply(states)
    parts = [function(states[i : i + size], tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return torch.cat(parts)
