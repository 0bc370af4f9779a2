"""Is the exported GGUF the model that was trained? Token ids, probabilities, and how much of the adapter is in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sclite.student.base import Messages
from sclite.student.llama_cpp.engine import Engine
from sclite.student.loader import nf4_config
from sclite.student.origin import read_origin
from sclite.student.tokenization import piece_ids, prompt_ids

SHOWN = 5
"""Differing texts that are quoted."""
TOP = 20
"""Most probable tokens of a position whose probabilities show the adapter's share."""
UNQUANTIZED = {"mean_abs_logprob_diff": 0.004, "top1_agreement": 0.99, "adapter_share": 0.05}
"""SmolLM2-135M: 0.0015, 1.0 and 0.0001; merged in bfloat16 0.045, 0.98 and 0.10; one matrix of 210 scaled by 1.05: 0.0043."""
QUANTIZED = {"f32": 0.004, "f16": 0.004, "bf16": 0.15, "q8_0": 0.2, "q6_k": 0.3, "q5": 1.0, "q4": 1.0}
"""Largest mean difference in nats by the beginning of the quantization's name (SmolLM2-135M: q8_0 0.06, q4_k_m 0.24)."""
SMALLEST = 2.0
"""As QUANTIZED, of all others (2 and 3 bits)."""


@dataclass
class Reference:
    """What the trained model says of one sequence: `ids`; log-probabilities of the tokens that follow, the most probable
    tokens, and their log-probabilities with and without the adapter (as [positions, TOP] each)."""

    ids: list[int]
    following: Any
    top: Any
    adapted: Any
    base: Any


def check_tokens(
    tokenizer: Any, gguf: Path, texts: Sequence[str], chats: Sequence[Messages]
) -> dict[str, Any]:
    """Compare how the tokenizer and the GGUF split pieces of training text and whole prompts.

    Returns tokens_compared, tokens_equal and differences (the first few, with both ids).
    """
    with Engine(gguf, gpu_layers=0, parallel=1, context=256, cache_gb=0.1) as engine:
        pairs = [(text, piece_ids(tokenizer, [text])[0], engine.token_ids(text)) for text in texts]
        pairs += [(chat[-1]["content"], prompt_ids(tokenizer, chat), engine.chat_ids(chat)) for chat in chats]
    different = sorted((pair for pair in pairs if pair[1] != pair[2]), key=lambda pair: len(pair[0]))
    return {
        "tokens_compared": len(pairs),
        "tokens_equal": len(pairs) - len(different),
        "differences": [{"text": t, "transformers": a, "gguf": b} for t, a, b in different[:SHOWN]],
    }


def references(base: Path, adapter: Path | None, sequences: Sequence[list[int]]) -> list[Reference]:
    """Run the model as it was trained, in transformers on the CPU in float32: base, NF4 where it was, and adapter."""
    import numpy as np
    import torch

    model = trained_model(base, adapter)
    found = []
    for ids in sequences:

        def log_probabilities(ids: list[int] = ids) -> Any:
            with torch.inference_mode():
                return model(torch.tensor([ids])).logits[0].float().log_softmax(-1).numpy()

        adapted = log_probabilities()
        top = np.argsort(adapted, axis=1)[:, : -TOP - 1 : -1]
        chosen = np.take_along_axis(adapted, top, 1)
        before = chosen
        if adapter is not None:
            with model.disable_adapter():
                before = np.take_along_axis(log_probabilities(), top, 1)
        found.append(Reference(ids, adapted[np.arange(len(ids) - 1), ids[1:]], top, chosen, before))
    return found


def trained_model(base: Path, adapter: Path | None) -> Any:
    """The model in `base` in float32 on the CPU, its weights rounded to NF4 where training held them so, and the adapter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    origin = read_origin(adapter) if adapter else None
    settings: dict[str, Any] = {"trust_remote_code": False, "device_map": {"": "cpu"}, "dtype": torch.float32}
    if origin and origin.nf4:
        settings |= {"dtype": getattr(torch, origin.dtype), "quantization_config": nf4_config()}
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(base, **settings)
    if "quantization_config" in settings or getattr(config, "quantization_config", None):
        model = model.dequantize().float()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def compare(expected: Sequence[Reference], gguf: Path, threads: int | None = None) -> dict[str, Any]:
    """Figures of a GGUF against the trained model.

    positions; top1_agreement: share of positions with the same most probable token; mean_abs_logprob_diff: nats, over the
    tokens that really follow; adapter_effect: nats by which the adapter moves the most probable tokens; adapter_share: how
    much of that is in the file by least squares (1: merged once, 0: not merged, 2: twice; None without an adapter).
    """
    import numpy as np

    same, gaps, moved, found = [], [], [], []
    context = max(len(one.ids) for one in expected) + 1
    with Engine(gguf, gpu_layers=0, parallel=1, context=context, threads=threads, exact=True) as engine:
        for one in expected:
            theirs = engine.log_probabilities(one.ids)
            same.append(one.top[:, 0] == theirs.argmax(1))
            gaps.append(np.abs(one.following - theirs[np.arange(len(one.ids) - 1), one.ids[1:]]))
            moved.append((one.adapted - one.base).ravel())
            found.append((np.take_along_axis(theirs, one.top, 1) - one.base).ravel())
    effect, theirs = np.concatenate(moved), np.concatenate(found)
    return {
        "positions": sum(map(len, same)),
        "top1_agreement": float(np.concatenate(same).mean()),
        "mean_abs_logprob_diff": float(np.concatenate(gaps).mean()),
        "adapter_effect": float(np.abs(effect).mean()),
        "adapter_share": float(effect @ theirs / (effect @ effect)) if effect.any() else None,
    }


def issues(result: dict[str, Any]) -> list[str]:
    """What of the figures in parity.json passes its bound, in words."""
    found = []
    if result["tokens_equal"] < result["tokens_compared"]:
        first, rest = result["differences"][0], result["tokens_compared"] - result["tokens_equal"] - 1
        more = f", and {rest} other texts differently" if rest else ""
        found.append(
            f"it splits {first['text'][:40]!r} into tokens {first['gguf'][:8]}, the tokenizer into {first['transformers'][:8]}{more}"
        )
    whole, shipped = result.get("unquantized"), result.get("quantized")
    if not whole or not shipped:
        return found
    if whole["mean_abs_logprob_diff"] > UNQUANTIZED["mean_abs_logprob_diff"]:
        found.append(_passed("before quantization", whole, UNQUANTIZED["mean_abs_logprob_diff"]))
    if whole["top1_agreement"] < UNQUANTIZED["top1_agreement"]:
        found.append(
            f"before quantization its best token differs at {1 - whole['top1_agreement']:.1%} of positions"
        )
    # the smaller the adapter's effect, the more of the share is noise
    share, noise = whole["adapter_share"], 0.001 / max(whole["adapter_effect"], 1e-9)
    if share is not None and noise < 0.5 and abs(share - 1) > UNQUANTIZED["adapter_share"] + noise:
        found.append(f"{share:.0%} of the adapter's effect is in it")
    if shipped["mean_abs_logprob_diff"] > (bound := bound_of(result["quantization"])):
        found.append(_passed(result["quantization"], shipped, bound))
    return found


def _passed(where: str, figures: dict[str, Any], bound: float) -> str:
    return f"{where} its log-probabilities differ by {figures['mean_abs_logprob_diff']:.4f} nats on average (at most {bound:g})"


def bound_of(quantization: str) -> float:
    """The largest mean difference that a quantization may have, in nats."""
    return next(
        (bound for name, bound in QUANTIZED.items() if quantization.lower().startswith(name)), SMALLEST
    )


def summary(result: dict[str, Any]) -> str:
    """The figures as one line."""
    tokens = f"parity of {result['file']}: tokens {result['tokens_equal']}/{result['tokens_compared']}"
    if result.get("skipped"):
        return f"{tokens}; probabilities not compared: {result['skipped']}"
    whole, shipped = result["unquantized"], result["quantized"]
    share = "" if whole["adapter_share"] is None else f", adapter {whole['adapter_share']:.1%}"
    return (
        f"{tokens}, top-1 {shipped['top1_agreement']:.4f}, mean difference {shipped['mean_abs_logprob_diff']:.4f} nats "
        f"(before quantization {whole['top1_agreement']:.4f}, {whole['mean_abs_logprob_diff']:.4f}{share})"
    )
