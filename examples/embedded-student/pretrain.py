"""Train the embedded student from scratch: tokenizer, pre-training on the synthetic corpus, float16 weights.

    python examples/embedded-student/pretrain.py --part 1 --steps 2000 --save-at 800 --out one

README.md in this folder lists all calls. The corpus avoids the test and threshold problems of the quickstart.
"""

import argparse
import copy
import itertools
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import corpus
import numpy as np
import torch
from tokenizer import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from sclite import prompts, trace
from sclite.evaluate.metrics import auc
from sclite.quickstart.grammar import solve
from sclite.quickstart.stories import HELD_OUT, generate, problem_set
from sclite.quickstart.tutor import template

LENGTH = 512  # tokens in a training sequence
# of the one token in forty that judges a line: at weight 1 the model does not learn to check
JUDGEMENT_WEIGHT = 10.0


def vocabulary_texts() -> list[str]:
    """Text for the tokenizer: the corpus, and sclite's prompts and format, so that they need few tokens."""
    texts = list(itertools.islice(corpus.documents(seed=7), 4000))
    for problem in generate(400, seed=8):
        work = trace.render(template(solve(problem.question)))
        review = work.replace(
            "\n</Step1>", "\n<Cause>The units</Cause>\n<Correction>so</Correction>\n</Step1>"
        )
        texts += [prompts.solve_messages(problem.question)[1]["content"], work, review]
    texts += [m["content"] for m in prompts.review_messages("Problem", "Work")] * 40
    unseen = ("<|im_start|>", "<|im_end|>", corpus.RIGHT_HERE, corpus.WRONG_HERE)
    for mark in unseen:
        texts = [text.replace(mark, "") for text in texts]
    return texts


def marked_tokens(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """(token IDs, labels): 0 or 1 for a token that judges a line right or wrong, else -1."""
    plain, marks = [], {}
    for character in text:
        if character in (corpus.RIGHT_HERE, corpus.WRONG_HERE):
            marks[len(plain)] = int(character == corpus.WRONG_HERE)
        else:
            plain.append(character)
    coded = tokenizer("".join(plain), add_special_tokens=False, return_offsets_mapping=True)
    judged = [
        marks.get(start, -1) if end > start and tokenizer.convert_ids_to_tokens(i) != "▁" else -1
        for i, (start, end) in zip(coded["input_ids"], coded["offset_mapping"], strict=True)
    ]
    return coded["input_ids"], judged


def token_stream(tokenizer, seed: int, avoid: frozenset[str], part: int):
    """Endless blocks of LENGTH (token ID, label) pairs: concatenated documents, separated by end tokens."""
    buffer: list[tuple[int, int]] = []
    for text in corpus.documents(seed, avoid, part):
        buffer += [*zip(*marked_tokens(tokenizer, text), strict=True), (tokenizer.eos_token_id, -1)]
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
    """Learning rate relative to the peak: warm-up, constant, then linear decay over the last 40 percent."""
    return min(1.0, (step + 1) / warm, max(0.02, (steps - step) / (0.4 * steps)))


def grow(model: LlamaForCausalLM, layers: int) -> LlamaForCausalLM:
    """Add layers on top that change nothing yet: their output to the residual stream starts at zero."""
    shape = copy.deepcopy(model.config)
    shape.num_hidden_layers = layers
    shape.layer_types = None
    grown = LlamaForCausalLM(shape)
    grown.load_state_dict(model.state_dict(), strict=False)
    for layer in grown.model.layers[model.config.num_hidden_layers :]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return grown


@dataclass
class MetricsLogger:
    """Metrics since the last log line: losses, and how well lines are judged."""

    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    wrong: list[int] = field(default_factory=list)

    def line(self, step: int, began: float) -> str:
        found = auc(self.scores, self.wrong) if len(set(self.wrong)) == 2 else None
        checks = "" if found is None else f" AUC of judgements {found:.3f} (n {len(self.wrong)})"
        return f"step {step} loss {np.mean(self.losses):.4f}{checks} {time.time() - began:.0f} s"


def backward(model, half, block, tags: tuple[int, int], logger: MetricsLogger) -> None:
    """One pass in bfloat16 through the copy `half`; the gradients land on the float32 weights of `model`.

    `block` is (rows, LENGTH, 2): token ids and judgements. `tags` are the tokens of an opening and of a closing tag.
    """
    with torch.no_grad():
        for copied, master in zip(half.parameters(), model.parameters(), strict=True):
            copied.copy_(master)
            copied.grad = None
    ids, judged = block[..., 0], block[:, 1:, 1]
    logits = half(input_ids=ids).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = 1 + (JUDGEMENT_WEIGHT - 1) * (judged >= 0).flatten()
    ((nll * weights).sum() / weights.sum()).backward()
    for copied, master in zip(half.parameters(), model.parameters(), strict=True):
        master.grad = copied.grad.float()
    with torch.no_grad():
        logger.losses.append(nll.mean().item())
        logger.scores += (logits[..., tags[0]] - logits[..., tags[1]])[judged >= 0].tolist()
        logger.wrong += judged[judged >= 0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="continue from this student")
    parser.add_argument("--part", type=int, choices=(1, 2, 3, 4, 5, 6, 7), default=1, help="of the corpus")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument(
        "--save-at", type=int, nargs="*", default=[], help="also save these steps, in OUT-STEP"
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
        model = grow(model, options.layers) if options.layers > model.config.num_hidden_layers else model
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizers = build_optimizers(model, options.rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, options.steps)) for o in optimizers
    ]
    half = copy.deepcopy(model).bfloat16()
    held_out = [*problem_set("test", HELD_OUT), *problem_set("threshold", HELD_OUT)]
    avoid = frozenset(problem.question for problem in held_out)
    stream = token_stream(tokenizer, options.part, avoid, options.part)
    tags = tuple(tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("<Row", "</Row"))
    began, logger = time.time(), MetricsLogger()
    for step in range(1, options.steps + 1):
        block = torch.from_numpy(np.array(list(itertools.islice(stream, options.batch))))
        backward(model, half, block, tags, logger)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad(set_to_none=True)
        if step % 25 == 0:
            print(logger.line(step, began), flush=True)
            logger = MetricsLogger()
        if step in options.save_at:
            save(model, tokenizer, options, Path(f"{options.out}-{step}"))
    save(model, tokenizer, options, options.out)


def copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)


def save(model, tokenizer, options, folder: Path) -> None:
    """Save float16 weights, the tokenizer files, and the training settings."""
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
