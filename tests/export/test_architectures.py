"""Merge and GGUF of tiny random models of each supported architecture, compared with PEFT and transformers."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sclite.config import Config
from sclite.errors import DataError
from sclite.export import gguf as conversion
from sclite.export import model as export
from sclite.export import parity, reference
from sclite.export.merge import merge
from sclite.export.reference import Trained
from sclite.export.weights import BaseWeights
from sclite.student.llama_cpp.engine import Engine
from tests.toy import merged_by_peft, raises, random_adapter, sample_texts, write_tokenizer

SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "initializer_range": 0.12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "head_dim": 32,
}  # fmt: skip
WINDOW = {"sliding_window": 32, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
FAMILIES = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama-rope-scaling": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "qwen3.5": ("Qwen3_5", LINEAR_ATTENTION),
    "mistral": ("Mistral", {"sliding_window": None}),
    "gemma2": ("Gemma2", WINDOW | {"attn_logit_softcapping": 0.5}),
    "gemma3": ("Gemma3", WINDOW | {"num_hidden_layers": 6}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
}
"""Name -> transformers' class prefix and what differs from SHAPE. llama.cpp knows the kinds of layers of Gemma 3 and SmolLM3
by their numbers: every sixth has full attention, every fourth no rotary embedding."""
ADAPTERS = {
    "plain": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 9, "lora_alpha": 12, "use_rslora": True},
    "modules_to_save": {"r": 4, "modules_to_save": ["norm", "lm_head"]},
    "tied": {"r": 4, "lora_alpha": 8},
    "sharded": {"r": 4, "lora_alpha": 8},
}


@pytest.fixture(scope="module")
def patched(converter, tmp_path_factory):
    """llama.cpp's converter, except that it treats the tests' byte-level BPE as a known one."""
    folder = tmp_path_factory.mktemp("llama.cpp") / "source"
    shutil.copytree(converter, folder, ignore=shutil.ignore_patterns("__pycache__"))
    base = folder / "conversion/base.py"
    source = base.read_text(encoding="utf-8")
    message = "BPE pre-tokenizer was not recognized - update get_vocab_base_pre()"
    unknown = f'raise NotImplementedError("{message}")'
    assert unknown in source
    base.write_text(source.replace(unknown, 'return "gpt-2"'), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, sample_texts(), vocab_size=512)
    return folder


def make_base(folder, tokenizer, family, variant):
    """A random model in `folder` and its adapter beside it; the variant decides ties and shards."""
    prefix, own = FAMILIES[family]
    text_config = getattr(transformers, f"{prefix}TextConfig", None)
    config_class = text_config or getattr(transformers, f"{prefix}Config")
    shape = config_class(**SHAPE | own | ({"tie_word_embeddings": True} if variant == "tied" else {}))
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(shape).float()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases are 0 or 1 at first
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    shutil.copytree(tokenizer, folder)
    if family == "qwen3.5":
        write_byte_level_tokenizer(folder)
    model.save_pretrained(folder, max_shard_size="100KB" if variant == "sharded" else "1GB")
    settings = {"target_modules": "all-linear", **ADAPTERS[variant]}
    return folder, random_adapter(folder, folder.with_name("adapter"), std=0.1, **settings)


def write_byte_level_tokenizer(folder):
    """llama.cpp's converter has no other kind for Qwen3.5."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    fast.train_from_iterator(sample_texts(), trainer)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()


def combinations(*diagonals):
    """Every family with every variant; only those on these diagonals are not slow."""
    return [
        pytest.param(family, variant, marks=() if (f - v) % len(ADAPTERS) in diagonals else pytest.mark.slow)
        for f, family in enumerate(FAMILIES)
        for v, variant in enumerate(ADAPTERS)
    ]


@pytest.mark.parametrize(("family", "variant"), combinations(1, 2))
def test_merged_tensors_equal_those_of_peft(family, variant, tokenizer, tmp_path):
    base, trained = make_base(tmp_path / "base", tokenizer, family, variant)
    wanted = merged_by_peft(trained)
    merged = BaseWeights(merge(base, tmp_path / "adapter", tmp_path / "merged"))
    tied = {"lm_head.weight"} - set(merged)
    assert set(merged) == set(wanted) - tied
    for name in merged:
        assert (merged[name] - wanted[name]).abs().max() < 1e-6, name


@pytest.mark.parametrize(("family", "variant"), combinations(0))
def test_f16_gguf_equals_transformers(family, variant, tokenizer, patched, tmp_path):
    if (family, variant) == ("gemma2", "modules_to_save"):
        pytest.skip("the converter ignores the head of Gemma 2")
    base, trained = make_base(tmp_path / "base", tokenizer, family, variant)
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged", outtype="f16")
    gguf = tmp_path / "f16.gguf"
    conversion.run_converter(patched, merged, gguf)
    draw = np.random.default_rng(0)
    shapes = ((60, 9), (120, 1), (200, 1))
    sequences = [(draw.integers(4, 512, size).tolist(), start) for size, start in shapes]
    references = reference.compute_references(base, tmp_path / "adapter", sequences)
    trained.get_base_model().set_attn_implementation("eager")  # the default ignores Gemma 2's soft cap
    for found in references:
        with torch.inference_mode():
            wanted = trained.eval()(torch.tensor([found.ids])).logits[0, found.start - 1 :].log_softmax(-1)
        assert np.abs(found.trained - wanted.numpy()).max() < 1e-4
    found = parity.compare_probabilities(references, gguf)
    print(f"{family}, {variant}: {found}")
    assert found["top1_agreement"] >= 0.99
    assert found["kl"] <= 1e-3
    assert found["adapter_share"] == pytest.approx(1, abs=0.02)
    assert found["adapter_effect"] > 0.05


def test_a_model_with_factors_for_long_contexts_has_a_short_context(tokenizer, patched, tmp_path):
    """llama.cpp would use the long ones for short rows, too."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "partial_rotary_factor": 1.0}
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256}
    shape = transformers.Phi3Config(
        **SHAPE | {"sliding_window": None, "max_position_embeddings": 1024},
        original_max_position_embeddings=256,
        rope_parameters=longrope | factors,
    )
    torch.manual_seed(0)
    base = shutil.copytree(tokenizer, tmp_path / "base")
    transformers.Phi3ForCausalLM(shape).float().save_pretrained(base)
    gguf = tmp_path / "f32.gguf"
    conversion.run_converter(patched, base, gguf, outtype="f32")
    with Engine(gguf, context=1024) as engine:
        assert engine.context == 256
    ids = np.random.default_rng(0).integers(4, 512, 60).tolist()
    references = reference.compute_references(base, None, [(ids, 1)])
    assert parity.compare_probabilities(references, gguf)["kl"] < 1e-4


def test_importance_is_the_mean_square_of_the_inputs_of_a_layer(tokenizer, patched, tmp_path):
    base, trained = make_base(tmp_path / "base", tokenizer, "qwen2", "plain")
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged", outtype="f16")
    gguf, ids, inputs = tmp_path / "f16.gguf", [[300, 301, 50], [302, 60]], []
    conversion.run_converter(patched, merged, gguf)
    found = reference.measure_importance(Trained(base, tmp_path / "adapter", None), gguf, ids)
    layer = trained.get_base_model().model.layers[1]
    layer.mlp.up_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.inference_mode():
        for row in ids:
            trained.eval()(torch.tensor([row]))
    wanted = torch.cat(inputs).square().mean(0).numpy()
    assert np.allclose(found["blk.1.ffn_up.weight"], wanted, rtol=1e-4)
    parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    assert {f"blk.{n}.{part}.weight" for n in (0, 1) for part in parts} <= set(found)


def test_experts_that_transformers_stores_otherwise_are_neither_run_nor_measured(
    tokenizer, converter, tmp_path
):
    own = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "sliding_window": None}
    shape = transformers.MixtralConfig(**SHAPE | own, num_local_experts=8, num_experts_per_tok=2)
    base, gguf = shutil.copytree(tokenizer, tmp_path / "base"), tmp_path / "f32.gguf"
    transformers.MixtralForCausalLM(shape).float().save_pretrained(base)
    conversion.run_converter(converter, base, gguf, outtype="f32")
    assert reference.compute_references(base, None, [([300, 301, 50], 1)]) == []
    assert reference.measure_importance(Trained(base, None, None), gguf, [[300, 301, 50]]) == {}


@pytest.mark.parametrize(
    ("family", "reason"),
    [("qwen3.5", "BPE pre-tokenizer was not recognized"), ("phi3", "OtherForCausalLM is not supported")],
)
def test_what_the_converter_cannot_do_is_an_error(family, reason, tokenizer, converter, run, tmp_path):
    base, _ = make_base(tmp_path / "base", tokenizer, family, "plain")
    shutil.copytree(tmp_path / "adapter", run.path("sft/adapter"))
    if family == "phi3":
        config = base / "config.json"
        config.write_text(config.read_text().replace("Phi3ForCausalLM", "OtherForCausalLM"))
    with raises(DataError, reason, hint="--format merged"):
        export.export_model(Config.model_validate({"student": {"model": str(base)}}), run, "sft")
    assert not list(run.path("export").iterdir())
