"""LoRA adapters: which layers get one, for model families with different layer names; damage on disk."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sclite.errors import DataError, UsageError
from sclite.student.adapters import load_adapter, lora_targets, meta_model
from sclite.student.loader import load_student
from sclite.train.sft import train_sft
from tests.toy import LINEAR, adapter, random_adapter, sample_texts, toy_config, write_tokenizer, write_toy

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 512, "max_position_embeddings": 1024,
    "pad_token_id": 2, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
DELTA = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
# layer names as in each family's modeling file in transformers
FAMILIES = {
    "llama": (GROUPED, LINEAR),
    "qwen2": (GROUPED, LINEAR),
    "qwen3": ({**GROUPED, "head_dim": 16}, LINEAR),
    "gemma3_text": ({**GROUPED, "head_dim": 16}, LINEAR),
    "phi3": (GROUPED, ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"]),
    "gpt2": ({**SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}, ["c_attn", "c_proj", "c_fc"]),
    "gpt_neox": (SMALL, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "qwen3_5_text": (
        {**GROUPED, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
         "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
         "linear_value_head_dim": 16},
        [*LINEAR, *DELTA],
    ),
    "mixtral": ({**GROUPED, "num_local_experts": 4}, LINEAR[:4]),
}  # fmt: skip
TRAINED = [name for name in FAMILIES if name != "mixtral"]


def kind_of(name):
    return AutoConfig.for_model(name, **FAMILIES[name][0])


def test_a_student_is_trained_without_dropout(folder, tmp_path):
    """Neither an imported adapter's nor the base's: the DPO reference has none."""
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    random_adapter(base, tmp_path / "adapter", r=4, target_modules=LINEAR, lora_dropout=0.05)
    model, tokenizer = load_student(toy_config(base), "dpo", tmp_path / "adapter", train=True)
    ids = tokenizer("1 + 1 = 2", return_tensors="pt")["input_ids"]
    trained, fixed = (model.train(mode)(input_ids=ids).logits for mode in (True, False))
    assert torch.equal(trained, fixed)


def test_model_without_a_causal_language_model_is_an_error():
    with pytest.raises(DataError, match="no causal language model for mistral3") as error:
        meta_model(AutoConfig.for_model("mistral3"))
    assert "student.model" in error.value.hint


@pytest.mark.parametrize("name", FAMILIES)
def test_default_targets_are_all_linear_layers_except_the_head(name):
    assert sorted(lora_targets(meta_model(kind_of(name)))) == sorted(FAMILIES[name][1])


def test_only_configured_targets_and_no_vision_tower_get_a_lora():
    text = {**GROUPED, "head_dim": 16}
    targets = lora_targets(meta_model(AutoConfig.for_model("gemma3", text_config=text, vision_config=VISION)))
    assert sorted({name.rpartition(".")[2] for name in targets}) == sorted(LINEAR)
    assert not [name for name in targets if "vision" in name or name == "q_proj"]
    assert {"o_proj", "model.language_model.layers.1.self_attn.q_proj"} <= set(targets)
    assert lora_targets(meta_model(kind_of("phi3")), ["qkv_proj"]) == ["qkv_proj"]
    both = [f"transformer.h.{layer}.mlp.c_proj" for layer in range(2)]
    assert lora_targets(meta_model(kind_of("gpt2")), ["mlp.c_proj"]) == both


@pytest.mark.parametrize("name", TRAINED)
def test_every_family_trains_every_target(run, tmp_path, name):
    folder = tmp_path / name
    write_tokenizer(folder, sample_texts())
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(kind_of(name)).save_pretrained(folder)
    write_toy(run)
    report = train_sft(toy_config(folder, sft={"num_train_epochs": 1}), run)
    assert sorted(report.figures["lora"]) == sorted(FAMILIES[name][1])
    weights = adapter(run, "sft").items()
    moved = {key.split(".")[-3] for key, value in weights if ".lora_B." in key and value.any()}
    assert moved == set(FAMILIES[name][1])


@pytest.fixture
def unweighted(folder, tmp_path):
    """The tiny student without its weights."""
    return shutil.copytree(folder, tmp_path / "student", ignore=shutil.ignore_patterns("*.safetensors"))


def test_unknown_target_is_rejected_before_loading_weights(unweighted):
    config = toy_config(unweighted, lora={"target_modules": ["q_proj", "v_porj"]})
    said = r"lora\.target_modules: llama has no linear layer named v_porj$"
    with pytest.raises(UsageError, match=said) as error:
        load_student(config, "sft", train=True)
    assert ", ".join(LINEAR) in error.value.hint


def test_adapter_of_another_shape_is_rejected(folder, tmp_path):
    model, _ = load_student(toy_config(folder), "sft", train=True)
    model.save_pretrained(tmp_path / "whole")
    load_adapter(model, tmp_path / "whole")
    whole = load_file(tmp_path / "whole/adapter_model.safetensors")
    renamed = {name.replace("layers.0", "layers.99"): value for name, value in whole.items()}
    wider = {name: value.repeat(2, 1) for name, value in whole.items()}
    for weights in (dict(list(whole.items())[2:]), renamed, wider):
        shutil.copytree(tmp_path / "whole", tmp_path / "other", dirs_exist_ok=True)
        save_file(weights, tmp_path / "other/adapter_model.safetensors")
        with pytest.raises(DataError, match="does not fit the student"):
            load_adapter(model, tmp_path / "other")


@pytest.mark.parametrize("damage", ["cut", "header", "config", "missing"])
def test_damaged_adapter_is_named_before_loading_weights(unweighted, tmp_path, damage):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"x": torch.zeros(64)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    file = adapter / ("adapter_config.json" if damage == "config" else "adapter_model.safetensors")
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"\xff" * 8 + content[8:] if damage == "header" else content[:-9])
    with pytest.raises(DataError, match=f"the adapter in {adapter} cannot be read") as error:
        load_student(toy_config(unweighted), "sft", adapter)
    assert "--fresh" in error.value.hint
