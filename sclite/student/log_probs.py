"""Log-probabilities at chosen positions: one pass through the decoder, and logits only where they are needed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from sclite.errors import DataError
from sclite.student.backends import half_dtype
from sclite.student.tokenization import TrainingSequence

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

LOGITS = 1 << 26
"""Maximum size of a table of logits: positions times vocabulary."""


@dataclass
class PaddedBatch:
    """Sequences padded on the right, tensors [rows, longest] on the CPU, where reading them does not wait for the GPU."""

    ids: "Tensor"
    mask: "Tensor"
    weights: "Tensor"


def pad(rows: Sequence[TrainingSequence], pad_id: int) -> PaddedBatch:
    """A padded batch of sequences."""
    import torch

    width = max(len(row.ids) for row in rows)
    return PaddedBatch(
        ids=torch.tensor([row.ids + [pad_id] * (width - len(row.ids)) for row in rows]),
        mask=torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]),
        weights=torch.tensor([row.weights + [0.0] * (width - len(row.ids)) for row in rows]),
    )


@dataclass(frozen=True)
class HiddenStates:
    """The last hidden states of a batch in either layout: row r begins at `flat[starts[r]]`.

    `flat` is [tokens, width] on the model's device, `starts` [rows] on the CPU.
    """

    flat: "Tensor"
    starts: "Tensor"

    def at(self, rows: "Tensor | Sequence[int]", columns: "Tensor | Sequence[int]") -> "Tensor":
        """The states at these positions, [positions, width]; both arguments are lists, or tensors on the CPU."""
        import torch

        rows, columns = (torch.as_tensor(numbers, dtype=torch.long) for numbers in (rows, columns))
        positions = self.starts[rows] + columns
        return self.flat.index_select(0, positions.to(self.flat.device))


def mixed_precision(model: "torch.nn.Module") -> "torch.dtype | None":
    """The 16-bit type that training computes in; None: the type of the weights, such as float32 on a CPU."""
    import torch

    first = next(model.parameters())
    if first.device.type == "cuda":
        # set by Unsloth, on GPUs without bfloat16, for families that overflow in float16
        return None if getattr(model, "_unsloth_forced_float32", False) else half_dtype()
    return torch.bfloat16 if first.dtype == torch.bfloat16 else None


def autocast(model: "torch.nn.Module") -> AbstractContextManager[None]:
    """The trainer's mixed precision, for computations outside the trainer."""
    import torch

    dtype = mixed_precision(model)
    return torch.autocast(next(model.parameters()).device.type, dtype) if dtype else nullcontext()


def hidden_states(model: "torch.nn.Module", batch: PaddedBatch) -> HiddenStates:
    """The decoder's last hidden states.

    If the model is `padding_free`, the rows are concatenated into one and nothing is computed for padding. Each row has
    its own positions: transformers infers the end of attention from positions that restart; Unsloth's kernels need
    the lengths. Raises DataError if the model has truncated the rows.
    """
    import torch

    decoder, device = _head(model)[0].get_decoder(), next(model.parameters()).device
    if getattr(model, "padding_free", False) and len(batch.ids) > 1:
        lengths = batch.mask.sum(1)
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        flat_ids = batch.ids[batch.mask.bool()]
        inputs = {"input_ids": flat_ids[None].to(device), "position_ids": positions[None].to(device)}
        if type(decoder).forward.__module__.startswith("unsloth.models"):
            inputs["packed_seq_lengths"] = lengths.to(device, torch.int32)
        hidden = decoder(attention_mask=None, use_cache=False, **inputs).last_hidden_state
        expected, starts = len(flat_ids), lengths.cumsum(0) - lengths
    else:
        inputs = {"input_ids": batch.ids.to(device), "attention_mask": batch.mask.to(device)}
        hidden = decoder(**inputs, use_cache=False).last_hidden_state
        rows, expected = batch.ids.shape
        starts = torch.arange(rows) * expected
    if hidden.shape[1] != expected:
        hint = "lower max_length to what the student supports"
        raise DataError(f"rows of {expected} tokens were truncated to {hidden.shape[1]}", hint)
    return HiddenStates(hidden.reshape(-1, hidden.shape[-1]), starts)


def _head(model: "torch.nn.Module") -> "tuple[PreTrainedModel, torch.nn.Linear]":
    """The model without its adapter, and its output layer."""
    causal = cast("PreTrainedModel", getattr(model, "get_base_model", lambda: model)())
    return causal, cast("torch.nn.Linear", causal.get_output_embeddings())


def vocabulary_log_probs(model: "torch.nn.Module", hidden: "Tensor") -> "Tensor":
    """Float32 log-probabilities over the vocabulary for hidden states [positions, width]."""
    causal, head = _head(model)
    config = causal.config.get_text_config()
    logits = head(hidden.to(head.weight.dtype)).float()
    # Cohere and Falcon-H1 multiply the logits, Granite divides them
    scale = (getattr(config, "logit_scale", None) or 1) * (getattr(config, "lm_head_multiplier", None) or 1)
    scale /= getattr(config, "logits_scaling", None) or 1
    if scale != 1:
        logits *= scale  # in place: a second table of logits takes gigabytes
    cap = getattr(config, "final_logit_softcapping", None)
    return ((logits / cap).tanh() * cap if cap else logits).log_softmax(-1)


def check_log_probs(model: "torch.nn.Module", ids: list[int], padding_free: bool | None = None) -> None:
    """Raise DataError if the model's log-probabilities differ from those of `vocabulary_log_probs`, which are trained.

    That happens if transformers treats a family's hidden states or logits in a way that is unknown here. If the rows of a
    model would see those before them, as in Unsloth's Gemma 2 without flash attention, they are padded from now on; DataError
    if `padding_free` rows were asked for explicitly.
    """
    import torch

    causal = _head(model)[0]
    if type(causal).forward.__module__.startswith("transformers."):  # Unsloth's need not return logits
        batch = pad([TrainingSequence(ids, [0.0] * len(ids))], 0)
        with torch.no_grad(), autocast(model):
            ours = vocabulary_log_probs(model, hidden_states(model, batch).flat)
            logits = causal(input_ids=batch.ids.to(ours.device), use_cache=False).logits[0].float()
        spread = (logits - logits.mean(-1, keepdim=True)).norm()
        if (ours - logits.log_softmax(-1)).norm() > 0.05 * spread:  # in 16 bits less than 0.01 of it
            why = "compute their logits in a way that sclite cannot train"
            raise DataError(f"{causal.config.model_type} models {why}", "choose another student")
    if not getattr(model, "padding_free", False):
        return
    rows = [TrainingSequence(row, [0.0] * len(row)) for row in (ids, ids[: len(ids) // 2])]
    positions, was_training = range(len(rows[1].ids)), model.training
    model.eval()
    with torch.no_grad(), autocast(model):
        hidden = hidden_states(model, pad(rows, 0))
        first, second = (
            vocabulary_log_probs(model, hidden.at([row] * len(positions), positions)) for row in (0, 1)
        )
    model.train(was_training)
    spread = (first - first.mean(-1, keepdim=True)).norm()
    if (second - first).norm() <= 0.1 * spread:
        return
    if padding_free:
        family = causal.config.model_type
        raise DataError(f"padding_free = true: {family} models would mix the rows", "unset padding_free")
    model.padding_free = False  # type: ignore[assignment]


def head_chunk_size(vocabulary: int) -> int:
    """How many positions go through the head at a time."""
    return max(64, LOGITS // vocabulary)


def token_log_probs(
    model: "torch.nn.Module", hidden: HiddenStates, batch: PaddedBatch
) -> "tuple[Tensor, Tensor]":
    """Log-probabilities of every token with a loss weight, and the row of each (on the CPU); both [tokens].

    The token at position t is predicted by the hidden state at t - 1. Many tokens go through the head in chunks: the
    logits of a whole batch would take gigabytes.
    """
    import torch

    rows, columns = (batch.weights[:, 1:] > 0).nonzero(as_tuple=True)
    states = hidden.at(rows, columns)
    tokens = batch.ids[rows, columns + 1].to(states.device)

    def chosen(states: "Tensor", tokens: "Tensor") -> "Tensor":
        return vocabulary_log_probs(model, states).gather(1, tokens.unsqueeze(1)).squeeze(1)

    size = head_chunk_size(len(_head(model)[1].weight))
    chunks = [slice(start, start + size) for start in range(0, max(1, len(tokens)), size)]
    if len(chunks) == 1 or not torch.is_grad_enabled() or not states.requires_grad:
        return torch.cat([chosen(states[chunk], tokens[chunk]) for chunk in chunks]), rows

    class Chunked(torch.autograd.Function):
        # Each result depends only on its own state, so the gradient has the size of the states: it is computed along
        # with the result, and logits are neither kept for the backward pass nor computed twice.
        @staticmethod
        def forward(ctx, states):
            values, gradients = [], []
            for chunk in chunks:
                with torch.enable_grad():
                    part = states[chunk].detach().requires_grad_()
                    result = chosen(part, tokens[chunk])
                    gradients.append(torch.autograd.grad(result.sum(), part)[0])
                values.append(result.detach())
            ctx.save_for_backward(torch.cat(gradients))
            return torch.cat(values)

        @staticmethod
        def backward(ctx, upstream):
            (gradients,) = ctx.saved_tensors
            return (upstream.unsqueeze(1) * gradients).to(gradients.dtype)

    return Chunked.apply(states), rows
