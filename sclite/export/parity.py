"""Does the GGUF say what the trained model says? Token ids, and probabilities."""

from collections.abc import Sequence
from pathlib import Path

from sclite.student.base import Messages
from sclite.student.encode import prompt_ids
from sclite.student.engine import Engine

SHOWN = 5
"""Differing texts that are quoted."""


def check(
    hf_folder: Path,
    gguf_path: Path,
    texts: Sequence[str],
    chats: Sequence[Messages] = (),
    *,
    weights: bool = True,
    threads: int | None = None,
) -> dict:
    """Compare a model folder with the GGUF made from it, for parity.json.

    `texts` are pieces as training cuts them; `chats` are rendered and tokenised by both sides. With `weights` each chat,
    and each text after the first chat, also goes through transformers (float32, CPU) and through llama.cpp.

    Returns tokens_equal of tokens_compared (texts and chats with the same ids), differences (the first few, with both
    ids), positions, top1_agreement (share of positions with the same most probable token) and mean_abs_logprob_diff (nats,
    over the tokens that really follow); the last three are None without `weights`.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    context = 64 + max((len(tokenizer(text).input_ids) for text in texts), default=0)
    context += max((len(prompt_ids(tokenizer, chat)) for chat in chats), default=0)
    with Engine(gguf_path, gpu_layers=0, parallel=1, context=context, threads=threads, exact=True) as engine:
        pairs = [
            (text, tokenizer(text, add_special_tokens=False).input_ids, engine.token_ids(text))
            for text in texts
        ]
        for chat in chats:
            pairs.append((chat[-1]["content"], prompt_ids(tokenizer, chat), engine.chat_ids(chat)))
        different = [(text, ours, theirs) for text, ours, theirs in pairs if ours != theirs]
        result = {
            "tokens_equal": len(pairs) - len(different),
            "tokens_compared": len(pairs),
            "differences": [{"text": t, "transformers": a, "gguf": b} for t, a, b in different[:SHOWN]],
            "positions": None,
            "top1_agreement": None,
            "mean_abs_logprob_diff": None,
        }
        if weights:
            prompts = [ids for _, ids, _ in pairs[len(texts) :]]
            start = prompts[0] if prompts else []
            prompts += [start + ids for _, ids, _ in pairs[: len(texts)]]
            result.update(_compare_weights(hf_folder, engine, [ids for ids in prompts if len(ids) > 1]))
    return result


def _compare_weights(hf_folder: Path, engine: Engine, prompts: list[list[int]]) -> dict:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32).eval()
    same, gaps = [], []
    for ids in prompts:
        with torch.inference_mode():
            ours = model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()
        theirs = engine.log_probabilities(ids)
        same.append(ours[:, : theirs.shape[1]].argmax(1) == theirs.argmax(1))
        at = np.arange(len(ids) - 1), np.array(ids[1:])
        gaps.append(np.abs(ours[at] - theirs[at]))
    if not gaps:
        return {}
    agreement, gap = np.concatenate(same), np.concatenate(gaps)
    return {
        "positions": len(agreement),
        "top1_agreement": float(agreement.mean()),
        "mean_abs_logprob_diff": float(gap.mean()),
    }
