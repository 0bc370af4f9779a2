"""A 4-bit base: small steps move its adapter as far as that of a float32 base, so nothing is rounded to bfloat16."""

import pytest

from sclite.records import Template
from sclite.run import Run
from sclite.student.load import four_bits, load_tokenizer, with_new_adapter
from sclite.train.checkpoints import Checkpoints
from sclite.train.sft import solve_rows, supervised
from sclite.train.trainer import train_adapter
from tests.tiny import tiny_llama
from tests.train.test_sft import config_of, write_toy

STEPS, RATE = 100, 5e-6


def moved(folder, path, settings: dict) -> tuple[float, set]:
    """How far the adapter has gone in all those steps (the Euclidean norm), and the types of its weights."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    run, config = Run(path), config_of(folder, sft={"warmup": 0.0})
    write_toy(run)
    tokenizer = load_tokenizer(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, **settings)
    for layer in model.modules():
        if isinstance(
            layer, Linear4bit
        ):  # else a no-grad forward pass repacks the weight in place on some machines
            layer.support_avx512bf16_for_cpu = False
    model = with_new_adapter(model, config.sft, seed=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    rows = solve_rows(tokenizer, run.read("templates.jsonl", Template), "")[:4]
    epochs = STEPS * config.sft.batch / len(rows)
    outcome = train_adapter(
        model, tokenizer, supervised("sft", rows, tokenizer.pad_token_id, 0, 0), config.sft,
        Checkpoints(path / "checkpoints"), path / "metrics.jsonl",
        rate=RATE, epochs=epochs, seed=0, micro_batch=4,
    )  # fmt: skip
    assert outcome.steps == STEPS
    after = {n: p for n, p in model.named_parameters() if p.requires_grad}
    distance = sum(float((after[n] - p).double().square().sum()) for n, p in before.items()) ** 0.5
    assert isinstance(model.get_base_model().model.layers[0].mlp.up_proj.base_layer, Linear4bit) == bool(
        settings.get("quantization_config")
    )
    return distance, {p.dtype for p in after.values()} - {torch.float32}


def test_in_small_steps_the_adapter_of_a_4_bit_base_goes_as_far_as_that_of_a_float32_one(tmp_path):
    import torch

    folder = tiny_llama(tmp_path / "student")
    whole, others = moved(folder, tmp_path / "float32", {"dtype": torch.float32})
    assert others == set()
    settings = {"dtype": torch.float32, "quantization_config": four_bits()}
    quantised, others = moved(folder, tmp_path / "nf4", settings)
    assert others == set()
    assert quantised == pytest.approx(whole, rel=0.05)
