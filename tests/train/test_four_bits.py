"""A 4-bit base: small steps move its adapter as far as on a float32 base, so nothing is rounded to bfloat16."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sclite.records import Template
from sclite.run import Run
from sclite.student.adapters import lora_targets
from sclite.student.loader import EMBEDDED_FOLDER, load_student, load_tokenizer, nf4_config
from sclite.student.tokenization import Encoded
from sclite.train.checkpoints import Checkpoints
from sclite.train.sft import solve_rows, supervised_lesson
from sclite.train.trainer import train_adapter
from tests.gpu.models import random_model
from tests.toy import toy_config, write_toy

STEPS, RATE = 100, 5e-6


def distance(folder, path, **settings) -> float:
    """The Euclidean distance that a float32 adapter moves in STEPS steps."""
    from bitsandbytes.nn import Linear4bit

    small = {"warmup_ratio": 0.0, "batch_size": 1, "learning_rate": RATE, "num_train_epochs": STEPS}
    run, config, tokenizer = Run(path), toy_config(folder, sft=small), load_tokenizer(str(folder))
    write_toy(run)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # else a no-grad forward pass repacks the weight in place on some machines
            layer.support_avx512bf16_for_cpu = False
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=lora_targets(model)))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    row = solve_rows(tokenizer, run.read("templates.jsonl", Template), "")[0]
    rows = [Encoded(row.ids[-24:], row.weights[-24:])]  # 4 bits are slow on a CPU; the steps are what counts
    outcome = train_adapter(
        model, supervised_lesson("sft", rows, tokenizer.pad_token_id), config.sft,
        Checkpoints(path / "checkpoints"), path / "metrics.jsonl",
        seed=0, micro_batch=1,
    )  # fmt: skip
    assert outcome.steps == STEPS
    after = {n: p for n, p in model.named_parameters() if p.requires_grad}
    base = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert isinstance(base, Linear4bit) == bool(settings)
    assert {p.dtype for p in after.values()} == {torch.float32}
    return sum(float((after[n] - p).double().square().sum()) for n, p in before.items()) ** 0.5


def test_small_steps_move_a_4_bit_student_as_far_as_a_float32_one(folder, tmp_path):
    quantised = distance(folder, tmp_path / "nf4", quantization_config=nf4_config())
    assert quantised == pytest.approx(distance(folder, tmp_path / "float32"), rel=0.05)


LLAMA = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def quantised(tmp_path):
    """A random checkpoint with 4-bit weights, made as for the GPU tests."""
    quantise = pytest.importorskip("bitsandbytes.functional").quantize_4bit
    try:
        quantise(torch.ones(64, 64, dtype=torch.bfloat16), quant_type="nf4", compress_statistics=True)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes has no 4 bits here: {error}")
    vocabulary = json.loads((EMBEDDED_FOLDER / "config.json").read_text())["vocab_size"]
    return random_model(tmp_path / "student", {**LLAMA, "vocab_size": vocabulary}, "cpu")


def test_a_4_bit_checkpoint_trains_with_the_plain_backend(quantised):
    from bitsandbytes.nn import Linear4bit

    model, tokenizer = load_student(toy_config(quantised), "sft", train=True)
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 2 * 7
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    ids = tokenizer("1 + 1 = 2", return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * 2
    assert {p.dtype for p in trainable} == {torch.float32}
    gradients = [p.grad for p in trainable if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(gradients) == 2 * 7  # those of B; A has none while B is zero
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
