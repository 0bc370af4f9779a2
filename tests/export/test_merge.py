"""Merging a LoRA adapter, against peft's own merge."""

import json
import shutil

import pytest

from sclite.errors import DataFault
from sclite.export.merge import merge
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base"))


def train(base, folder, **settings):
    """A random adapter in `folder`, and the tensors after peft's own merge."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}


def read(folder):
    from sclite.export.weights import Tensors

    tensors = Tensors(folder)
    return {name: tensors[name] for name in tensors}


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
    "alpha_pattern": {"layers.0.self_attn.v_proj": 40},
}


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 12, "target_modules": LINEAR},
        {"r": 9, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **PATTERNS},
        {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "modules_to_save": ["norm"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "embed_tokens"]},
    ],
    ids=["all-linear", "rank-stabilised", "patterns", "modules-to-save", "embeddings"],
)
def test_the_merge_equals_that_of_peft(base, tmp_path, settings):
    wanted = train(base, tmp_path / "adapter", **settings)
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    found = read(tmp_path / "merged")
    before = read(base)
    assert set(found) == set(before)
    for name, tensor in found.items():
        assert tensor.dtype == before[name].dtype
        assert (tensor - wanted[name]).abs().max() < 1e-6, name
    assert any((found[name] - before[name]).abs().max() > 0.1 for name in found)


def test_transformers_loads_the_merged_folder_with_the_same_tokenizer_bytes(base, tmp_path):
    from transformers import AutoModelForCausalLM

    wanted = train(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (model.state_dict()[name] - wanted[name]).abs().max() < 1e-6
    for file in (
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "config.json",
    ):
        assert (tmp_path / "merged" / file).read_bytes() == (base / file).read_bytes()


def test_shards_are_read_and_written_with_an_index(base, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    import sclite.export.merge as module

    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "sharded", max_shard_size="2MB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    monkeypatch.setattr(module, "SHARD_BYTES", 2_000_000)
    merge(tmp_path / "sharded", None, tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(base).state_dict().items():
        assert tensor.equal(again[name])


def test_half_precision_stays_half_precision_and_is_rounded_once(base, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    wanted = train(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    merge(tmp_path / "half", tmp_path / "adapter", tmp_path / "merged")
    found = read(tmp_path / "merged")["model.layers.0.self_attn.q_proj.weight"]
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted["model.layers.0.self_attn.q_proj.weight"]).abs().max() < 0.05


def test_four_bit_weights_are_dequantised(base, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "four-bit"
    shutil.copytree(base, folder)
    tensors, name = load_file(base / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    packed, state = bnb.functional.quantize_4bit(tensors[name], quant_type="nf4", compress_statistics=True)
    wanted = bnb.functional.dequantize_4bit(packed, state)
    tensors[name] = packed
    tensors.update({f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()})
    save_file(tensors, folder / "model.safetensors")
    shape = json.loads((folder / "config.json").read_text())
    shape["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(shape))
    merge(folder, None, tmp_path / "merged")
    found = read(tmp_path / "merged")
    assert found[name].equal(wanted)
    assert set(found) == set(read(base))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert torch.corrcoef(torch.stack([found[name].flatten(), read(base)[name].flatten()]))[0, 1] > 0.99


def test_what_cannot_be_merged_is_refused_with_a_remedy(base, tmp_path):
    train(base, tmp_path / "dora", r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(DataFault, match="DoRA") as fault:
        merge(base, tmp_path / "dora", tmp_path / "merged")
    assert "merge_and_unload" in fault.value.hint

    shutil.copytree(base, tmp_path / "gptq")
    shape = json.loads((base / "config.json").read_text())
    shape["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(shape))
    with pytest.raises(DataFault, match="gptq") as fault:
        merge(tmp_path / "gptq", None, tmp_path / "merged")
    assert "unquantised" in fault.value.hint
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    train(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "other").mkdir()
    renamed = {key.replace("layers.1", "layers.7"): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "other" / "adapter_model.safetensors")
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataFault, match=r"layers\.7.*does not have"):
        merge(base, tmp_path / "other", tmp_path / "merged")


def test_a_folder_with_something_else_in_it_is_left_alone(base, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataFault, match="not empty"):
        merge(base, None, tmp_path / "mine")
    merge(base, None, tmp_path / "merged")
    merge(base, None, tmp_path / "merged")  # an earlier merge is replaced
    with pytest.raises(DataFault, match="has no model"):
        merge(tmp_path / "absent", None, tmp_path / "merged")
