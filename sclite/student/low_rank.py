"""A linear layer and its LoRA as one product, for training on a CPU.

PEFT computes x W + s (x A) B as three products and two passes over the result, each of which a CPU waits for. Here W + s A B
is made first, and the slopes of A and B come from thin products as before: the same figures up to rounding.
"""

from functools import cache, partial
from typing import Any

WORTH = 64
"""Rows of an input from which the sum of the weights costs less than it saves."""


def join_products(model: Any) -> None:
    """Give the plain LoRA layers of a float32 model a forward of one product; every other layer stays as it is."""
    import torch
    from peft.tuners.lora.layer import Linear

    for layer in model.modules():
        if type(layer) is not Linear or type(layer.base_layer) is not torch.nn.Linear:
            continue
        base, plain = layer.base_layer, not layer.lora_variant and not any(layer.lora_bias.values())
        if plain and base.bias is None and base.weight.dtype == torch.float32:
            layer.forward = partial(_forward, layer, layer.forward)


def _forward(layer: Any, usual: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    if args or kwargs or layer.disable_adapters or layer.merged or name not in layer.lora_A:
        return usual(x, *args, **kwargs)
    drops = layer.training and getattr(layer.lora_dropout[name], "p", 0.0)
    if drops or x.numel() < WORTH * x.shape[-1]:
        return usual(x)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _joined().apply(x, layer.base_layer.weight, a, b, layer.scaling[name])


@cache
def _joined() -> Any:
    import torch

    class Joined(torch.autograd.Function):
        """x [.., in], weight [out, in], a [rank, in], b [out, rank] -> [.., out]; the weight is frozen."""

        @staticmethod
        def forward(ctx, x, weight, a, b, scale):
            whole, flat = torch.addmm(weight, b, a, alpha=scale), x.reshape(-1, x.shape[-1])
            ctx.save_for_backward(flat, whole, a, b)
            ctx.shape, ctx.scale = x.shape, scale
            return (flat @ whole.T).view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx, slope):
            flat, whole, a, b = ctx.saved_tensors
            slope = slope.reshape(-1, slope.shape[-1])
            of_x = (slope @ whole).view(ctx.shape) if ctx.needs_input_grad[0] else None
            of_b = (slope.T @ (flat @ a.T)).mul_(ctx.scale)
            of_a = (slope @ b).mul_(ctx.scale).T @ flat
            return of_x, None, of_a, of_b, None

    return Joined
