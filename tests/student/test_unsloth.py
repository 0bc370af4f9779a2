"""Unsloth's kernels against transformers, without a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from sclite.config import Student
from sclite.student.adapters import lora_targets
from sclite.train.stage import quiet_libraries
from tests.student.unsloth_on_cpu import ENVIRONMENT, measure
from tests.toy import random_adapter, sample_texts, write_tokenizer

pytestmark = pytest.mark.slow
SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
FAMILIES = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma"), SHAPE),
    "mistral": {**SHAPE, "sliding_window": None},
    "gemma2": {**SHAPE, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "granite": {**SHAPE, "logits_scaling": 8.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.3},
    "qwen3_5": {
        "text_config": {
            **SHAPE, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        },
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
        },
    },
}  # fmt: skip
"""Families that Unsloth has kernels for, and two that it compiles, one of them with a vision tower."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """{family: (figures of the plain backend, figures of Unsloth)}."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("Unsloth is not installed: pip install -e '.[cuda]'")
    quiet_libraries(Student(backend="plain"))
    folders = [tmp_path_factory.mktemp("models") / family for family in FAMILIES]
    for folder in folders:
        torch.manual_seed(0)
        config = AutoConfig.for_model(folder.name, **FAMILIES[folder.name])
        model_class = AutoModelForImageTextToText if folder.name == "qwen3_5" else AutoModelForCausalLM
        model = model_class.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 or name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.6 if "embed" in name else 0.15)
        model.save_pretrained(folder)
        write_tokenizer(folder, sample_texts(), vocab_size=512)
        model = AutoModelForCausalLM.from_pretrained(folder)
        targets = lora_targets(model, ("q_proj", "v_proj"))
        random_adapter(model, folder / "adapter", std=0.1, r=8, lora_alpha=16, target_modules=targets)
    out = folders[0].parent / "figures.pt"
    command = [sys.executable, "-m", "tests.student.unsloth_on_cpu", str(out), *map(str, folders)]
    cache = {"UNSLOTH_COMPILE_LOCATION": str(out.with_name("compiled"))}
    env = {**os.environ, **ENVIRONMENT, **cache, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(out)
    return {folder.name: (measure(folder, "plain"), found[str(folder)]) for folder in folders}


@pytest.mark.parametrize("family", FAMILIES)
def test_unsloth_computes_the_log_probs_and_gradients_of_transformers(family, measured):
    plain, ours = measured[family]
    # rows of Gemma 2 would see those before them; of others than Unsloth's own, packed rows cost more than padding
    assert ours["padding_free"] == (family not in ("gemma2", "granite", "qwen3_5"))
    nats, share = (0.05, 0.03) if family == "qwen3_5" else (1e-3, 0.01)
    assert torch.allclose(ours["log_probs"], plain["log_probs"], atol=nats)
    assert ours["gradients"].keys() == plain["gradients"].keys()
    for name, wanted in plain["gradients"].items():
        assert (ours["gradients"][name] - wanted).norm() < share * wanted.norm(), name
