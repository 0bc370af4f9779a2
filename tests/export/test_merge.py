"""Merging a LoRA adapter, compared with PEFT's own merge."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from sclite.errors import DataError
from sclite.export import merge as module
from sclite.export.merge import merge
from sclite.export.weights import BaseWeights
from sclite.student.adapters import ORIGIN_FILE, Origin, record_origin
from tests.toy import LINEAR, merged_by_peft, raises, random_adapter, tiny_llama

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256}
VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
RANKS, ALPHAS = {"q_proj": 2, "layers.1.mlp.up_proj": 3}, {"layers.0.self_attn.v_proj": 40}


def read(folder):
    tensors = BaseWeights(folder)
    return {name: tensors[name] for name in tensors}


@pytest.fixture
def adapter(student, tmp_path):
    """A random adapter of the tiny student."""
    random_adapter(student, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    return tmp_path / "adapter"


@pytest.fixture
def copy_of(student, tmp_path):
    """Copies the student's folder under a name, with changes to its configuration."""

    def copy(name, **changes):
        shutil.copytree(student, tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / name

    return copy


@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"lora_alpha": 8, "target_modules": LINEAR, "rank_pattern": RANKS, "alpha_pattern": ALPHAS}, True),
        ({"lora_alpha": 8, "target_modules": ["v_proj"], "init_lora_weights": "gaussian"}, True),
        ({"target_modules": ["v_proj", "embed_tokens"]}, False),
    ],
    ids=["patterns", "gaussian", "embedding"],
)
def test_merge_equals_the_merge_of_peft(student, tmp_path, settings, tied):
    base = student
    if not tied:
        base, shape = tmp_path / "untied", LlamaConfig.from_pretrained(student)
        shape.tie_word_embeddings = False
        LlamaForCausalLM(shape).save_pretrained(base)
    wanted = merged_by_peft(random_adapter(base, tmp_path / "adapter", r=4, **settings))
    found, before = read(merge(base, tmp_path / "adapter", tmp_path / "merged")), read(base)
    assert set(found) == set(before)
    for name, tensor in found.items():
        assert tensor.dtype == before[name].dtype
        assert (tensor - wanted[name]).abs().max() < 1e-6, name
    assert any((found[name] - before[name]).abs().max() > 0.1 for name in found)
    if base == student:
        for path in student.iterdir():
            other = tmp_path / "merged" / path.name
            if path.suffix == ".json":
                assert json.loads(other.read_text()) == json.loads(path.read_text())
            elif path.suffix in (".model", ".jinja"):
                assert other.read_bytes() == path.read_bytes()


def test_sharded_models_are_read_and_written(student, tmp_path, monkeypatch):
    AutoModelForCausalLM.from_pretrained(student).save_pretrained(tmp_path / "sharded", max_shard_size="2MB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    monkeypatch.setattr(module, "SHARD_BYTES", 2_000_000)
    merge(tmp_path / "sharded", None, tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(student).state_dict().items():
        assert tensor.equal(again[name])


def test_bfloat16_base_is_merged_in_float32(student, adapter, tmp_path):
    """The adapter changes weights by less than the precision of bfloat16."""
    path = adapter / "adapter_model.safetensors"
    small = {k: v * 0.01 if "lora_B" in k else v for k, v in load_file(path).items()}
    save_file(small, path)
    AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (small[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    before = read(tmp_path / "half")
    wanted = before[f"{name}.weight"].float() + 8 / 4 * (b @ a)
    for outtype, dtype, bound in (("f32", torch.float32, 1e-7), ("f16", torch.float16, 5e-4)):
        found = read(merge(tmp_path / "half", adapter, tmp_path / outtype, outtype=outtype))
        assert found[f"{name}.weight"].dtype == dtype
        assert ((found[f"{name}.weight"].float() - wanted).abs() <= bound * wanted.abs() + 1e-7).all()
        kept = torch.bfloat16 if outtype == "f32" else torch.float16
        for unchanged, kind in (("model.norm.weight", torch.bfloat16), ("model.embed_tokens.weight", kept)):
            assert found[unchanged].dtype == kind
            assert torch.allclose(found[unchanged].float(), before[unchanged].float(), atol=1e-7, rtol=0)
    assert (wanted.bfloat16().float() - wanted).abs().max() > 5e-4


def test_four_bit_weights_are_dequantized(student, copy_of, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    four_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = copy_of("four-bit", quantization_config=four_bits)
    tensors, name = load_file(student / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    packed, state = bnb.functional.quantize_4bit(tensors[name], quant_type="nf4", compress_statistics=True)
    wanted = bnb.functional.dequantize_4bit(packed, state)
    tensors[name] = packed
    tensors.update({f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()})
    save_file(tensors, folder / "model.safetensors")
    merge(folder, None, tmp_path / "merged")
    found, before = read(tmp_path / "merged"), read(student)
    assert found[name].equal(wanted)
    assert set(found) == set(before)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert torch.corrcoef(torch.stack([found[name].flatten(), before[name].flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens.weight, which .* ties to its output layer"),
        ({"target_modules": ["v_proj", "embed_tokens"]}, "embed_tokens.weight, which .* ties"),
        ({"target_modules": ["v_proj", "lm_head"]}, "embed_tokens.weight, which .* ties"),
    ],
    ids=["dora", "pissa", "olora", "saved-embedding", "lora-on-embedding", "lora-on-head"],
)
def test_adapter_that_peft_would_reload_differently_is_rejected(student, tmp_path, settings, reason):
    random_adapter(student, tmp_path / "adapter", **{"r": 2, "target_modules": ["v_proj"], **settings})
    with raises(DataError, reason, hint="merge_and_unload"):
        merge(student, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_gptq_weights_are_rejected(copy_of, tmp_path):
    gptq = copy_of("gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    with raises(DataError, "gptq", hint="unquantized"):
        merge(gptq, None, tmp_path / "merged")


def test_saved_head_of_a_tied_model_is_merged_as_peft_reloads_it(student, tmp_path):
    adapter, ids = tmp_path / "adapter", torch.tensor([[1, 300, 301, 302]])
    random_adapter(student, adapter, r=2, target_modules=["v_proj"], modules_to_save=["lm_head"])
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), adapter)(ids).logits
    merged = merge(student, adapter, tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_adapter_of_other_weights_or_another_base_is_rejected(student, adapter, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(student)
    record_origin(model, student, adapter)
    merge(student, adapter, tmp_path / "merged")
    with pytest.raises(DataError, match="not trained on the weights"):
        merge(tiny_llama(tmp_path / "other", seed=5), adapter, tmp_path / "merged")
    path = adapter / "adapter_model.safetensors"
    save_file({key.replace("layers.1", "layers.7"): each for key, each in load_file(path).items()}, path)
    with pytest.raises(DataError, match=r"does not fit .*layers\..* is in only one"):
        merge(student, adapter, tmp_path / "merged")


def test_prefixed_weights_are_found_among_those_of_multi_token_prediction(student, tmp_path):
    """As in Qwen3.5, whose text model has no prefix in training."""
    shutil.copytree(student, tmp_path / "base")
    path, layer = tmp_path / "base/model.safetensors", "layers.0.mlp.gate_proj.weight"
    prefix = lambda name: name.replace("model.", "model.language_model.", 1)  # noqa: E731
    prefixed = {prefix(name): each for name, each in load_file(path).items()}
    save_file({**prefixed, f"mtp.{layer}": prefixed[prefix(f"model.{layer}")].clone()}, path)
    assert BaseWeights(tmp_path / "base").find(f"model.{layer}") == prefix(f"model.{layer}")


def test_weights_of_a_vision_tower_are_not_recorded(tmp_path):
    pytest.importorskip("bitsandbytes")
    text = {**SHAPE, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    in_nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    settings = {"quantization_config": in_nf4, "dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
    in_4_bits = [name for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"]
    assert any("vision" in name for name in in_4_bits)
    record_origin(model, tmp_path, tmp_path)
    modules = Origin.model_validate_json((tmp_path / ORIGIN_FILE).read_bytes()).nf4
    assert len(modules) == 7
    assert not [name for name in modules if "vision" in name]


def test_damaged_adapter_error_names_the_file(student, adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\xff" * 64):
        path.write_bytes(damaged)
        with raises(DataError, "the adapter in .* cannot be read", hint="--fresh"):
            merge(student, adapter, tmp_path / "merged")
    path.write_bytes(whole)
    for settings in ("{", "[]", '{"peft_type": "IA3"}'):
        (adapter / "adapter_config.json").write_text(settings)
        with pytest.raises(DataError, match=r"the adapter in .* cannot be read"):
            merge(student, adapter, tmp_path / "merged")


def test_code_in_a_model_folder_is_not_copied(student, copy_of, tmp_path):
    code = {"auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}}
    folder = copy_of("with-code", **code)
    (folder / "tokenization_own.py").write_text("raise SystemExit")
    settings = json.loads((student / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | code))
    merge(folder, None, tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        found, before = ((path / name).read_text() for path in (tmp_path / "merged", student))
        assert json.loads(found) == json.loads(before)
