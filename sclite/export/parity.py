"""Compare the exported GGUF with the trained model: token ids, probabilities, and the effect of the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.student.base import Messages
from sclite.student.llama_cpp.engine import Engine
from sclite.student.loader import nf4_config
from sclite.student.origin import read_origin
from sclite.student.tokenization import piece_ids, prompt_ids

if TYPE_CHECKING:
    import numpy as np
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 5
"""The number of texts with different tokens that parity.json lists."""
TOP = 20
"""The most probable tokens of a position, over which the effect of the adapter is measured."""
UNQUANTIZED = {"mean_abs_logprob_diff": 0.004, "top1_agreement": 0.99, "adapter_share": 0.05}
"""SmolLM2-135M: 0.0015, 1.0 and 0.0001; merged in bfloat16 0.045, 0.98 and 0.10; one matrix of 210 scaled by 1.05: 0.0043."""
QUANTIZED = {"f32": 0.004, "f16": 0.004, "bf16": 0.15, "q8_0": 0.2, "q6_k": 0.3, "q5": 1.0, "q4": 1.0}
"""Largest mean difference in nats, by prefix of the quantization type (SmolLM2-135M: q8_0 0.06, q4_k_m 0.24)."""
OTHER_QUANTIZED = 2.0
"""The same for all other types (2 and 3 bits)."""


@dataclass
class Reference:
    """The trained model's output on one sequence of `ids`: the log-probabilities of the tokens that follow, the most
    probable tokens, and their log-probabilities with and without the adapter (the last three are [positions, TOP])."""

    ids: list[int]
    following: np.ndarray
    top: np.ndarray
    adapted: np.ndarray
    base: np.ndarray


def compare_tokens(
    tokenizer: PreTrainedTokenizerBase, gguf: Path, texts: Sequence[str], chats: Sequence[Messages]
) -> dict[str, Any]:
    """Compare the token ids of the tokenizer and of the GGUF, for pieces of training text and for whole prompts.

    Returns tokens_compared, tokens_equal and differences (the first few, with both ids).
    """
    with Engine(gguf, gpu_layers=0, parallel=1, context=256, cache_gb=0.1) as engine:
        rows = [(text, piece_ids(tokenizer, [text])[0], engine.token_ids(text)) for text in texts]
        rows += [(chat[-1]["content"], prompt_ids(tokenizer, chat), engine.chat_ids(chat)) for chat in chats]
    different = sorted((row for row in rows if row[1] != row[2]), key=lambda row: len(row[0]))
    return {
        "tokens_compared": len(rows),
        "tokens_equal": len(rows) - len(different),
        "differences": [{"text": t, "transformers": a, "gguf": b} for t, a, b in different[:SHOWN]],
    }


def compute_references(base: Path, adapter: Path | None, sequences: Sequence[list[int]]) -> list[Reference]:
    """Run the trained model in transformers on the CPU in float32."""
    import numpy as np
    import torch

    model, references = load_trained_model(base, adapter), []

    def log_probabilities(ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].float().log_softmax(-1).numpy()

    for ids in sequences:
        all_adapted = log_probabilities(ids)
        top = np.argsort(all_adapted, axis=1)[:, : -TOP - 1 : -1]
        adapted = unadapted = np.take_along_axis(all_adapted, top, 1)
        if adapter is not None:
            with model.disable_adapter():
                unadapted = np.take_along_axis(log_probabilities(ids), top, 1)
        following = all_adapted[np.arange(len(ids) - 1), ids[1:]]
        references.append(Reference(ids, following, top, adapted, unadapted))
    return references


def load_trained_model(base: Path, adapter: Path | None) -> PreTrainedModel | PeftModel:
    """Base and adapter in float32 on the CPU; base weights that training held in NF4 are rounded to NF4."""
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


def compare_probabilities(references: Sequence[Reference], gguf: Path) -> dict[str, Any]:
    """Compare a GGUF with the trained model.

    positions; top1_agreement: share of positions with the same most probable token; mean_abs_logprob_diff: nats, over the
    tokens that actually follow; adapter_effect: nats by which the adapter moves the most probable tokens; adapter_share: how
    much of that is in the GGUF, by least squares (1: merged once, 0: not merged, 2: merged twice; None without an adapter).
    """
    import numpy as np

    agreement, differences, effects, shifts = [], [], [], []
    context = max(len(reference.ids) for reference in references) + 1
    with Engine(gguf, gpu_layers=0, parallel=1, context=context, exact=True) as engine:
        for reference in references:
            ids, found = reference.ids, engine.log_probabilities(reference.ids)
            agreement.append(reference.top[:, 0] == found.argmax(1))
            differences.append(np.abs(reference.following - found[np.arange(len(ids) - 1), ids[1:]]))
            effects.append((reference.adapted - reference.base).ravel())
            shifts.append((np.take_along_axis(found, reference.top, 1) - reference.base).ravel())
    effect, shift = np.concatenate(effects), np.concatenate(shifts)
    return {
        "positions": sum(map(len, agreement)),
        "top1_agreement": float(np.concatenate(agreement).mean()),
        "mean_abs_logprob_diff": float(np.concatenate(differences).mean()),
        "adapter_effect": float(np.abs(effect).mean()),
        "adapter_share": float(effect @ shift / (effect @ effect)) if effect.any() else None,
    }


def find_violations(result: dict[str, Any]) -> list[str]:
    """The figures of parity.json that exceed their bounds, as messages."""
    found = []
    if result["tokens_equal"] < result["tokens_compared"]:
        first, rest = result["differences"][0], result["tokens_compared"] - result["tokens_equal"] - 1
        more = f"; {rest} other texts differ" if rest else ""
        found.append(
            f"the GGUF splits {first['text'][:40]!r} into tokens {first['gguf'][:8]}, the tokenizer into "
            f"{first['transformers'][:8]}{more}"
        )
    full, quantized = result.get("unquantized"), result.get("quantized")
    if not full or not quantized:
        return found
    bounds = {
        "before quantization": (full, UNQUANTIZED["mean_abs_logprob_diff"]),
        result["quantization"]: (quantized, max_difference(result["quantization"])),
    }
    for where, (figures, bound) in bounds.items():
        if (difference := figures["mean_abs_logprob_diff"]) > bound:
            found.append(
                f"{where} log-probabilities differ by {difference:.4f} nats on average (at most {bound:g})"
            )
    if full["top1_agreement"] < UNQUANTIZED["top1_agreement"]:
        different = 1 - full["top1_agreement"]
        found.append(f"before quantization the most probable token differs at {different:.1%} of positions")
    # the smaller the adapter's effect, the more of the share is noise
    share, noise = full["adapter_share"], 0.001 / max(full["adapter_effect"], 1e-9)
    if share is not None and noise < 0.5 and abs(share - 1) > UNQUANTIZED["adapter_share"] + noise:
        found.append(f"the GGUF has {share:.0%} of the adapter's effect")
    return found


def max_difference(quantization: str) -> float:
    """The largest mean difference allowed for a quantization type, in nats."""
    bounds = (bound for prefix, bound in QUANTIZED.items() if quantization.lower().startswith(prefix))
    return next(bounds, OTHER_QUANTIZED)


def summarize(result: dict[str, Any]) -> str:
    """The figures on one line."""
    tokens = f"parity of {result['file']}: tokens {result['tokens_equal']}/{result['tokens_compared']}"
    if result.get("skipped"):
        return f"{tokens}; probabilities not compared: {result['skipped']}"
    full, quantized = result["unquantized"], result["quantized"]
    share = "" if full["adapter_share"] is None else f", adapter {full['adapter_share']:.1%}"
    return (
        f"{tokens}, top-1 {quantized['top1_agreement']:.4f}, "
        f"mean difference {quantized['mean_abs_logprob_diff']:.4f} nats "
        f"(before quantization {full['top1_agreement']:.4f}, {full['mean_abs_logprob_diff']:.4f}{share})"
    )
