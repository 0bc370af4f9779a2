"""Merging a LoRA adapter, compared with PEFT's own merge."""

import json
import shutil

import pytest

from sclite.errors import DataError
from sclite.export.merge import merge
from tests.toy import tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base"))


def save_random_adapter(base, folder, **settings):
    """Save a random adapter in `folder`; return the tensors after PEFT's own merge."""
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
    from sclite.export.tensors import Tensors

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
        {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **PATTERNS},
        {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=["patterns", "gaussian"],
)
def test_merge_equals_the_merge_of_peft(base, tmp_path, settings):
    wanted = save_random_adapter(base, tmp_path / "adapter", **settings)
    merge(base, tmp_path / "adapter", tmp_path / "merged", outtype="f32")
    found = read(tmp_path / "merged")
    before = read(base)
    assert set(found) == set(before)
    for name, tensor in found.items():
        assert tensor.dtype == before[name].dtype
        assert (tensor - wanted[name]).abs().max() < 1e-6, name
    assert any((found[name] - before[name]).abs().max() > 0.1 for name in found)


def test_transformers_loads_the_merged_folder(base, tmp_path):
    from transformers import AutoModelForCausalLM

    wanted = save_random_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
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


def test_sharded_models_are_read_and_written(base, tmp_path, monkeypatch):
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


def test_bfloat16_base_is_merged_in_float32(base, tmp_path):
    """The adapter changes weights by less than the precision of bfloat16."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    save_random_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    small = {k: v * 0.01 if "lora_B" in k else v for k, v in load_file(path).items()}
    save_file(small, path)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (small[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    before = read(tmp_path / "half")
    wanted = before[f"{name}.weight"].float() + 8 / 4 * (b @ a)
    for outtype, dtype, bound in (("f32", torch.float32, 1e-7), ("f16", torch.float16, 5e-4)):
        found = read(merge(tmp_path / "half", tmp_path / "adapter", tmp_path / outtype, outtype=outtype))
        assert found[f"{name}.weight"].dtype == dtype
        assert ((found[f"{name}.weight"].float() - wanted).abs() <= bound * wanted.abs() + 1e-7).all()
        for unchanged, kept in (
            ("model.norm.weight", torch.bfloat16),
            ("model.embed_tokens.weight", torch.float16),
        ):
            assert found[unchanged].dtype == (torch.bfloat16 if outtype == "f32" else kept)
            assert torch.allclose(found[unchanged].float(), before[unchanged].float(), atol=1e-7, rtol=0)
    assert (wanted.bfloat16().float() - wanted).abs().max() > 5e-4


def test_four_bit_weights_are_dequantized(base, tmp_path):
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


def test_dora_and_gptq_are_rejected_with_a_hint(base, tmp_path):
    save_random_adapter(base, tmp_path / "dora", r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(DataError, match="DoRA") as error:
        merge(base, tmp_path / "dora", tmp_path / "merged")
    assert "merge_and_unload" in error.value.hint

    shutil.copytree(base, tmp_path / "gptq")
    shape = json.loads((base / "config.json").read_text())
    shape["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(shape))
    with pytest.raises(DataError, match="gptq") as error:
        merge(tmp_path / "gptq", None, tmp_path / "merged")
    assert "unquantized" in error.value.hint
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens.weight, which .* ties to its output layer"),
        ({"target_modules": ["v_proj", "embed_tokens"]}, "embed_tokens.weight, which .* ties"),
        ({"target_modules": ["v_proj", "lm_head"]}, "lm_head, which .* ties"),
    ],
    ids=["pissa", "olora", "saved-embedding", "lora-on-embedding", "lora-on-head"],
)
def test_adapter_that_peft_would_reload_differently_is_rejected(base, tmp_path, settings, reason):
    save_random_adapter(base, tmp_path / "adapter", **{"r": 2, "target_modules": ["v_proj"], **settings})
    with pytest.raises(DataError, match=reason) as error:
        merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert "merge_and_unload" in error.value.hint
    assert not (tmp_path / "merged").exists()


def test_saved_head_of_a_tied_model_is_merged_as_peft_reloads_it(base, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save_random_adapter(
        base, tmp_path / "adapter", r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]
    )
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([[1, 300, 301, 302]])
    wanted = PeftModel.from_pretrained(model, tmp_path / "adapter")(ids).logits
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_embedding_of_an_untied_model_equals_the_merge_of_peft(base, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig.from_pretrained(base)
    shape.tie_word_embeddings = False
    torch.manual_seed(3)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "untied")
    wanted = save_random_adapter(
        tmp_path / "untied", tmp_path / "adapter", r=4, target_modules=["v_proj", "embed_tokens"]
    )
    found = read(merge(tmp_path / "untied", tmp_path / "adapter", tmp_path / "merged"))
    assert all((found[name] - wanted[name]).abs().max() < 1e-6 for name in found)


def test_adapter_trained_on_other_weights_is_rejected(base, tmp_path):
    from transformers import AutoModelForCausalLM

    from sclite.student.origin import record_origin

    save_random_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    record_origin(AutoModelForCausalLM.from_pretrained(base), base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "sharded", max_shard_size="2MB")
    shutil.copy(base / "config.json", tmp_path / "sharded")
    merge(tmp_path / "sharded", tmp_path / "adapter", tmp_path / "merged")  # the same weights in other files
    other = tiny_llama(tmp_path / "other", seed=5)
    with pytest.raises(DataError, match="not trained on the weights"):
        merge(other, tmp_path / "adapter", tmp_path / "merged")


def test_damaged_adapter_error_names_the_file(base, tmp_path):
    save_random_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:4], b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"adapter_model\.safetensors is damaged") as error:
            merge(base, tmp_path / "adapter", tmp_path / "merged")
        assert error.value.hint == f"delete {path.parent} and run `sclite train` again"
    path.write_bytes(whole)
    for settings in ("{", "[]", '{"peft_type": "LORA"}', '{"peft_type": "LORA", "lora_alpha": "x"}'):
        (tmp_path / "adapter" / "adapter_config.json").write_text(settings)
        with pytest.raises(DataError, match=r"adapter_config\.json"):
            merge(base, tmp_path / "adapter", tmp_path / "merged")


def test_code_in_a_model_folder_is_not_copied(base, tmp_path):
    folder = tmp_path / "with-code"
    shutil.copytree(base, folder)
    (folder / "tokenization_own.py").write_text("raise SystemExit")
    for name in ("config.json", "tokenizer_config.json"):
        found = json.loads((folder / name).read_text()) | {
            "auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}
        }
        (folder / name).write_text(json.dumps(found))
    merge(folder, None, tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "merged" / name).read_text()) == json.loads((base / name).read_text())


def test_adapter_of_another_base_is_rejected(base, tmp_path):
    save_random_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "other").mkdir()
    renamed = {key.replace("layers.1", "layers.7"): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "other" / "adapter_model.safetensors")
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"layers\.7.*does not have"):
        merge(base, tmp_path / "other", tmp_path / "merged")


def test_folder_with_other_files_is_not_replaced(base, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="not empty"):
        merge(base, None, tmp_path / "mine")
    merge(base, None, tmp_path / "merged")
    merge(base, None, tmp_path / "merged")  # an earlier merge is replaced
    with pytest.raises(DataError, match="has no model"):
        merge(tmp_path / "absent", None, tmp_path / "merged")
