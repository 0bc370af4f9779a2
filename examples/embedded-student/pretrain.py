"""Makes the embedded student from nothing: tokenizer, pre-training on the synthetic corpus, float16 weights.

    python examples/embedded-student/pretrain.py --part 1 --steps 2000 --save-at 800 --out one

README.md beside this file has the three calls. The problems that the quickstart tests on are kept out of the corpus.
"""

import argparse
import copy
import itertools
import json
import random
import shutil
import time
from pathlib import Path

import corpus
import numpy as np
import torch
from tokenizer import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from sclite import prompts, trace
from sclite.quickstart.arithmetic import generate, solve
from sclite.quickstart.problems import held_out_questions
from sclite.quickstart.tutor import template

LENGTH = 512  # tokens in a training sequence


def vocabulary_texts() -> list[str]:
    """Text for the tokenizer: the corpus, and sclite's own prompts and form so that they need few tokens."""
    texts = list(itertools.islice(corpus.documents(seed=7), 4000))
    for problem in generate(400, seed=8):
        work = trace.render(template(solve(problem.question)))
        review = work.replace(
            "\n</Step1>", "\n<Cause>The units</Cause>\n<Correction>so</Correction>\n</Step1>"
        )
        texts += [prompts.solve_messages(problem.question)[1]["content"], work, review]
    texts += [m["content"] for m in prompts.review_messages("Problem", "Work")] * 40
    return [text.replace("<|im_start|>", "").replace("<|im_end|>", "") for text in texts]


def token_stream(tokenizer, seed: int, avoid: frozenset[str], part: int):
    """Endless blocks of LENGTH token ids, documents one after the other with the end token between them."""
    end = tokenizer.eos_token_id
    buffer: list[int] = []
    documents = corpus.documents(seed, avoid, part)
    while True:
        batch = list(itertools.islice(documents, 512))
        random.Random(seed).shuffle(batch)
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            buffer += [*ids, end]
        while len(buffer) >= LENGTH:
            yield buffer[:LENGTH]
            buffer = buffer[LENGTH:]


def build_model(layers: int, inner: int, vocab_size: int) -> LlamaForCausalLM:
    shape = LlamaConfig(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64, max_position_embeddings=2048,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=2,
        initializer_range=0.04,
    )  # fmt: skip
    return LlamaForCausalLM(shape)


def build_optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int, warm: int = 60) -> float:
    """Learning rate as a share of the highest: warm-up, level, then down to nothing over the last 40 percent."""
    return min(1.0, (step + 1) / warm, max(0.02, (steps - step) / (0.4 * steps)))


def backward(model: LlamaForCausalLM, half: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """One pass in bfloat16 through the copy `half`; the gradients land on the float32 weights of `model`."""
    with torch.no_grad():
        for copied, master in zip(half.parameters(), model.parameters(), strict=True):
            copied.copy_(master)
            copied.grad = None
    loss = half(input_ids=ids, labels=ids).loss
    loss.backward()
    for copied, master in zip(half.parameters(), model.parameters(), strict=True):
        master.grad = copied.grad.float()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from this student")
    parser.add_argument("--part", type=int, choices=(1, 2, 3, 4), default=1, help="of the corpus")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument(
        "--save-at", type=int, nargs="*", default=[], help="also keep these steps, in OUT-STEP"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.start:
        copy_tokenizer(options.start, options.out)
    else:
        write_tokenizer(options.out, vocabulary_texts(), vocab_size=1024)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.out)
    model = build_model(options.layers, options.inner, len(tokenizer))
    if options.start:
        model = LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizers = build_optimizers(model, options.rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, options.steps)) for o in optimizers
    ]
    half = copy.deepcopy(model).bfloat16()
    stream = token_stream(tokenizer, options.part, held_out_questions(), options.part)
    began, losses = time.time(), []
    for step in range(1, options.steps + 1):
        ids = torch.from_numpy(np.array(list(itertools.islice(stream, options.batch))))
        loss = backward(model, half, ids)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss)
        if step % 50 == 0:
            seconds = time.time() - began
            speed = step * options.batch * LENGTH / seconds
            print(
                f"step {step} loss {np.mean(losses[-50:]):.4f} {speed:.0f} tokens/s {seconds:.0f} s",
                flush=True,
            )
        if step in options.save_at:
            save(model, tokenizer, options, Path(f"{options.out}-{step}"))
    save(model, tokenizer, options, options.out)


def copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)


def save(model, tokenizer, options, folder: Path) -> None:
    """Weights as float16; the tokenizer's files beside them, and how they were made."""
    half = copy.deepcopy(model).half()
    half.save_pretrained(folder)
    if folder != options.out:
        copy_tokenizer(options.out, folder)
    made = {
        "script": "examples/embedded-student/pretrain.py",
        "part": options.part,
        "steps": options.steps,
        "batch": options.batch,
    }
    if options.start:
        made["start"] = json.loads((options.start / "made.json").read_text())
    (folder / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
