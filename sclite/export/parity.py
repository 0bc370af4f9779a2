"""Compare exported GGUFs with the trained model: token ids, the end of a turn, probabilities, and the adapter's effect."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.config import Export
from sclite.errors import DataError, ScliteError
from sclite.export.reference import Reference, Sample, Trained, compute_references
from sclite.student.base import Messages, Request
from sclite.student.llama_cpp.engine import Engine, last_errors
from sclite.student.llama_cpp.sequence import TokenSequence
from sclite.student.tokenization import TRICKY, end_id, piece_ids, prompt_ids
from sclite.trace import parse

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

GREEDY, GREEDY_TOKENS = 4, 48
"""Greedy answers of the unquantized GGUF that the trained model scores, and their length in tokens."""
ANSWER_TOKENS = 512  # within which a greedy answer of an exported file must end
NEAR_TIE = 0.5
"""Nats between two next tokens, between which quantization may decide: an unsure student has many such positions."""
ROWS = 256  # rows of a quantized tensor to compare with the unquantized ones
BLOCK = 256  # K-quants and most IQ types need row lengths divisible by this
UNQUANTIZED = {
    "mean_abs_logprob_diff": 0.004,
    "top1_agreement": 0.99,
    "adapter_share": 0.05,
    "greedy_gap": 0.05,
}
"""SmolLM2-135M: 0.0015, 1.0 and 0.0001; merged in bfloat16 0.045, 0.98 and 0.10; one matrix of 210 scaled by 1.05: 0.0043."""


def compare_export(
    student: Trained, full: Path, made: Mapping[str, Path], samples: list[Sample], chats: Sequence[Messages]
) -> dict[str, Any]:
    """The content of parity.json: the GGUF `full` and its quantizations, by type, against the trained model.

    `chats` ask the first of `made` for solutions: how many were `asked`, `ended` by an end of turn, and are `readable` as well.
    """
    held_out = student.held_out(samples)
    tokens = [compare_tokens(student.tokenizer, path, samples) for path in made.values()]
    # they differ only if one is damaged
    result = min(tokens, key=lambda each: (each["end_of_turn"] is not None, each["tokens_equal"]))
    with Engine(next(iter(made.values())), parallel=len(chats), context=2048) as engine:
        replies = engine.generate([Request(chat, max_tokens=ANSWER_TOKENS) for chat in chats])
        ended = [reply.text for reply in replies if reply.finish == "stop"]
    readable = sum(not parse(text).issues for text in ended)
    result["answers"] = {"asked": len(chats), "ended": len(ended), "readable": readable}
    files = {path.name: compare_tensors(full, path, quant) for quant, path in made.items()}
    result |= {"files": files, "skipped": None}

    prompts = [ids[:start] for ids, start in held_out[:GREEDY]]
    context, request = max(map(len, prompts)) + GREEDY_TOKENS, Request((), max_tokens=GREEDY_TOKENS)
    with Engine(full, gpu_layers=0, parallel=len(prompts), context=context, exact=True) as engine:
        asked = [TokenSequence(ids.copy(), request=request, limit=GREEDY_TOKENS) for ids in prompts]
        answers = [(each.ids, len(each.prompt)) for each in engine.scheduler.run(asked) if not each.error]
    if not (references := compute_references(student.base, student.adapter, [*answers, *held_out])):
        return result | {"skipped": "transformers has other names for its weights than its files"}
    unquantized = compare_probabilities(references, full)
    for path in made.values():
        files[path.name] |= compare_probabilities(references, path)

    # how many answers the trained model would have given itself, and by how many nats it prefers another token in the
    # rest: they differ at near ties, which rounding decides
    gaps = []
    for answer in references[: len(answers)]:
        rows = answer.trained[:-1]
        written = rows[range(len(rows)), answer.ids[answer.start :]]
        gaps.append(float((rows.max(1) - written).max(initial=0.0)))
    greedy = {"answers": len(gaps), "equal": gaps.count(0.0), "largest_gap": max(gaps, default=0.0)}
    return result | {"unquantized": unquantized, "greedy": greedy}


def compare_tokens(
    tokenizer: PreTrainedTokenizerBase, gguf: Path, samples: Sequence[Sample]
) -> dict[str, Any]:
    """Compare the token ids of the tokenizer and of the GGUF, for pieces of training text and for whole prompts.

    Returns the file's name as tokens_of, tokens_compared, tokens_equal, differences (the first few, with both ids), and
    end_of_turn: the token that ends a turn in training, None if the GGUF does not end on it.
    """
    texts = list(dict.fromkeys([*TRICKY, *(piece for sample in samples for piece in sample.pieces)]))
    end = end_id(tokenizer)
    with Engine(gguf, gpu_layers=0, parallel=1, context=256, cache_gb=0.1) as engine:
        pieces = zip(texts, piece_ids(tokenizer, texts), strict=True)
        rows = [(text, ids, engine.vocabulary.ids(text)) for text, ids in pieces]
        for chat, _ in samples:
            rows.append((chat[-1]["content"], prompt_ids(tokenizer, chat), engine.chat_ids(chat)))
        name = engine.vocabulary.name(end) if end in engine.vocabulary.ends else None
    different = sorted((row for row in rows if row[1] != row[2]), key=lambda row: len(row[0]))
    return {
        "tokens_of": gguf.name,
        "tokens_compared": len(rows),
        "tokens_equal": len(rows) - len(different),
        "differences": [{"text": t, "transformers": a, "gguf": b} for t, a, b in different[:5]],
        "end_of_turn": name,
    }


def compare_probabilities(
    references: Sequence[Reference], gguf: Path, lora: Path | None = None
) -> dict[str, Any]:
    """`measure_difference` of a GGUF, or of a base model's GGUF with the adapter `lora`."""
    longest = max(len(reference.ids) for reference in references)
    with Engine(gguf, gpu_layers=0, parallel=1, context=longest + 1, exact=True) as engine:
        if lora:
            api, context = engine.scheduler.api, engine.scheduler.context
            adapter = api.llama_adapter_lora_init(api.llama_get_model(context), os.fsencode(lora))
            if not adapter:
                hint = "use `sclite export --format gguf`, which merges the adapter"
                raise DataError(f"llama.cpp cannot load {lora}: {last_errors()}", hint)
            adapters = (api.llama_adapter_lora_p_ctypes * 1)(adapter)
            api.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
        exported = (engine.log_probabilities(each.ids)[each.start - 1 :] for each in references)
        return measure_difference(references, exported)


def measure_difference(references: Sequence[Reference], exported: Iterable[np.ndarray]) -> dict[str, Any]:
    """How the log-probabilities of an exported model differ from those of the trained one, the references.

    positions; top1_agreement: share of positions with the same most probable token; top1_up_to_ties: the same, where a token
    that the trained model finds less probable by up to NEAR_TIE also counts; kl: from the trained model, in nats;
    mean_abs_logprob_diff: nats, over the tokens that actually follow; adapter_effect: nats by which the adapter moves the
    most probable tokens; adapter_share: how much of that was exported, by least squares (1: merged once, 0: not merged, 2:
    merged twice; None without an adapter).
    """
    import numpy as np

    gaps, divergence, differences, effects, shifts = [], [], [], [], []
    for reference, found in zip(references, exported, strict=True):
        ids, trained = reference.ids[reference.start :], reference.trained
        gaps.append(trained.max(1) - trained[range(len(trained)), found.argmax(1)])
        divergence.append((np.exp(trained) * (trained - found)).sum(1))
        following = np.arange(len(ids)), ids
        differences.append(np.abs(trained[following] - found[following]))
        effects.append((np.take_along_axis(trained, reference.top, 1) - reference.base).ravel())
        shifts.append((np.take_along_axis(found, reference.top, 1) - reference.base).ravel())
    effect, shift, gap = np.concatenate(effects), np.concatenate(shifts), np.concatenate(gaps)
    return {
        "positions": len(gap),
        "top1_agreement": float((gap == 0).mean()),
        "top1_up_to_ties": float((gap <= NEAR_TIE).mean()),
        "kl": float(np.concatenate(divergence).mean()),
        "mean_abs_logprob_diff": float(np.concatenate(differences).mean()),
        "adapter_effect": float(np.abs(effect).mean()),
        "adapter_share": float(effect @ shift / (effect @ effect)) if effect.any() else None,
    }


def compare_tensors(full: Path, quantized: Path, quant: str) -> dict[str, Any]:
    """The tensors of a GGUF, whose type is called `quant`, against the unquantized ones.

    Returns `quantization`, the type; `changed`, a tensor that is not a rounding of the unquantized one, judged by up to ROWS
    rows of each (None: every one is); `fallback`, how many tensors K-quants cannot store, and their types ("": none).
    Rounding to at least 4 bits changes the scale of a tensor by less than 1 % (q4_1), to 2 or 3 bits by 7 % (q2_k).
    """
    from gguf import GGUFReader, quants

    changed, others = None, list[str]()
    sources = {tensor.name: tensor for tensor in GGUFReader(full).tensors}
    for tensor in GGUFReader(quantized).tensors:
        pair = []
        for each in (tensor, sources[tensor.name]):
            rows = each.data.reshape(-1, each.data.shape[-1])
            pair.append(quants.dequantize(rows[:: -(-len(rows) // ROWS)], each.tensor_type).astype("float64"))
        found, wanted = pair
        size, bits = float((found * found).sum()), 8 * tensor.n_bytes / tensor.n_elements
        bound = 0.025 if bits >= 4 else 0.15 if bits > 2.2 else 1e9
        if not abs(float((found * wanted).sum()) - size) <= bound * size:  # also true for NaN
            changed = tensor.name
        stored = tensor.tensor_type.name.lower()
        if len(tensor.shape) > 1 and tensor.shape[0] % BLOCK and stored != quant:  # iq4_nl has blocks of 32
            others.append(stored)
    fallback = ""
    if others and re.search("_k|iq|tq", quant):
        fallback = f"{len(others)} tensors have rows not divisible by {BLOCK} and are stored as {', '.join(sorted(set(others)))}"
    return {"quantization": quant, "changed": changed, "fallback": fallback}


def check_bounds(result: Mapping[str, Any], settings: Export) -> None:
    """Raise ScliteError if figures of parity.json exceed their bounds.

    NaN is never within a bound, so each comparison asks whether a figure is within it.
    """
    found, name = [], result["tokens_of"]
    if more := result["tokens_compared"] - result["tokens_equal"]:
        text, ours, theirs = (result["differences"][0][key] for key in ("text", "gguf", "transformers"))
        found.append(
            f"{name} splits {text[:40]!r} into tokens {ours[:8]}, the tokenizer into {theirs[:8]} ({more} texts differ)"
        )
    if result["end_of_turn"] is None:
        found.append(f"the token that ends a turn in training does not end one in {name}")
    for name, figures in result["files"].items():
        if figures["changed"]:
            found.append(f"{figures['changed']} of {name} differs from the unquantized tensor")
    if not result["skipped"]:
        found += find_inexact(result["unquantized"])
        if not (gap := result["greedy"]["largest_gap"]) <= UNQUANTIZED["greedy_gap"]:
            found.append(f"in a greedy answer the trained model prefers another token by {gap:.2f} nats")
        for name, figures in result["files"].items():
            excesses = find_excesses(figures, figures["quantization"], settings)
            found += [f"{name} has {excess}" for excess in excesses]
    if found:
        raise ScliteError(
            f"{', '.join(result['files'])} does not match the trained model: {'; '.join(found)}",
            "see export/parity.json in the run. Try another type (export.quant). If tokens differ, use another base model, or "
            "add its extra tokens with special=False",
        )


def find_excesses(figures: Mapping[str, Any], quant: str, settings: Export) -> list[str]:
    """The figures of a model in the type `quant` that exceed their bounds, as parts of messages."""
    found, bounds = [], (settings.max_kl, settings.min_top1)
    most, least = (each[max(filter(quant.startswith, each), key=len)] for each in bounds)
    if not (kl := figures["kl"]) <= most:
        found.append(f"a KL divergence of {kl:.4f} nats (at most {most:g})")
    if not (same := figures["top1_up_to_ties"]) >= least:
        share = f"{1 - same:.1%} of positions, near ties aside (at most {1 - least:.1%})"
        found.append(f"another next token at {share}")
    return found


def find_inexact(full: Mapping[str, Any]) -> list[str]:
    """The figures of an unquantized GGUF that exceed their bounds, as messages."""
    found = []
    if not (difference := full["mean_abs_logprob_diff"]) <= (bound := UNQUANTIZED["mean_abs_logprob_diff"]):
        mean = f"{difference:.4f} nats on average (at most {bound:g})"
        found.append(f"before quantization log-probabilities differ by {mean}")
    if not (same := full["top1_agreement"]) >= UNQUANTIZED["top1_agreement"]:
        found.append(f"before quantization the most probable token differs at {1 - same:.1%} of positions")
    # the smaller the adapter's effect, the more of the share is noise
    share, noise = full["adapter_share"], 0.001 / max(full["adapter_effect"], 1e-9)
    if share is not None and noise < 0.5 and not abs(share - 1) <= UNQUANTIZED["adapter_share"] + noise:
        found.append(f"the GGUF has {share:.0%} of the adapter's effect")
    return found


def summarize(result: Mapping[str, Any]) -> str:
    """The figures on one line: the share of positions with the same most likely next token, and the KL divergence."""
    answers = result["answers"]
    tokens = (
        f"Checked against the trained model: {result['tokens_equal']} of {result['tokens_compared']} texts have the same "
        f"tokens; {answers['readable']} of {answers['asked']} answers are complete and readable"
    )
    if result["skipped"]:
        return f"{tokens}; probabilities not compared: {result['skipped']}"
    full, greedy = result["unquantized"], result["greedy"]
    share = "" if full["adapter_share"] is None else f", {full['adapter_share']:.1%} of the adapter's effect"
    compared = [(each["quantization"], each) for each in result["files"].values()] + [("unquantized", full)]
    same = ", ".join(f"{name} {each['top1_agreement']:.1%} (KL {each['kl']:.4f})" for name, each in compared)
    return f"{tokens}; same next token: {same}; {greedy['equal']} of {greedy['answers']} greedy texts equal{share}"
