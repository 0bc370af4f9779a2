"""A 4-bit base: its adapter is in float32 and gets gradients."""

import json

import pytest
import torch

from sclite.student.loader import EMBEDDED_FOLDER, load_student
from sclite.student.log_probs import autocast, check_log_probs
from tests.gpu.models import random_model
from tests.toy import toy_config

LLAMA = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def quantized(tmp_path):
    """A random checkpoint with 4-bit weights, created as in the GPU tests."""
    quantize = pytest.importorskip("bitsandbytes.functional").quantize_4bit
    try:
        quantize(torch.ones(64, 64, dtype=torch.bfloat16), quant_type="nf4", compress_statistics=True)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes has no 4 bits here: {error}")
    vocabulary = json.loads((EMBEDDED_FOLDER / "config.json").read_text())["vocab_size"]
    return random_model(tmp_path / "student", {**LLAMA, "vocab_size": vocabulary}, "cpu")


def test_a_4_bit_checkpoint_trains_with_the_plain_backend(quantized):
    from bitsandbytes.nn import Linear4bit

    model, tokenizer = load_student(toy_config(quantized), "sft", train=True)
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 2 * 7
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    ids = tokenizer("1 + 1 = 2", return_tensors="pt")["input_ids"]
    check_log_probs(model, ids[0].tolist())  # as every training; it may repack weights
    model.train()
    with autocast(model):  # as the trainer does
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(layer.weight.shape[1] == 1 for layer in layers)  # bitsandbytes' own layout
    assert len(trainable) == 2 * 7 * 2
    assert {p.dtype for p in trainable} == {torch.float32}
    gradients = [p.grad for p in trainable if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(gradients) == 2 * 7  # those of B; A has none while B is zero
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
