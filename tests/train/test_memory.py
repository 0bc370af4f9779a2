"""The memory estimate: exact parts against torch, PEFT and bitsandbytes, peaks against real steps."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.optim import AdamW8bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sclite.errors import DataError
from sclite.student.adapters import lora_targets
from sclite.student.backends import attention_of
from sclite.student.log_probs import PaddedBatch, hidden_states, token_log_probs, vocabulary_log_probs
from sclite.train import memory
from sclite.train.memory import Setting, architecture, estimate, nf4_bytes, optimizer_bytes, peak
from sclite.train.micro_batch import choose, largest_length
from tests.train.architectures import OTHERS, RECIPES, SMALL, config_of, recipe_architecture

ALL, GB = {**RECIPES, **OTHERS}, 1_000_000_000
QWEN, LLAMA = "qwen2.5-math-7b", "llama-3.1-8b"


def built(shape: dict, device: str = "meta"):
    """The model itself; on the meta device without memory for its weights."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rank", [8, 32])
def test_lora_sizes_match_peft(name, rank):
    with torch.device("meta"):
        model = built(ALL[name])
        shape = LoraConfig(r=rank, target_modules=lora_targets(model), task_type="CAUSAL_LM")
        factors = [p for p in get_peft_model(model, shape).parameters() if p.requires_grad]
    found = architecture(config_of(ALL[name]))
    assert sorted(found.lora_tensors(rank)) == sorted(p.numel() for p in factors)
    parts = estimate(found, Setting("sft", 1, 512, rank)).parts
    assert parts["adapter"] == parts["gradients"] == sum(4 * p.numel() for p in factors)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [(QWEN, 7_615_616_512), (LLAMA, 8_030_261_248), ("qwen3-8b", 8_190_735_360), ("qwen3-4b", 4_022_468_096)],
)
def test_parameter_counts_match_the_model_cards(name, parameters):
    assert recipe_architecture(name).parameters == parameters


@pytest.mark.parametrize("name", RECIPES)
def test_all_linear_layers_but_the_head_are_counted_in_four_bits(name):
    model = built(RECIPES[name])
    linear = [key for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    sizes = {key.removesuffix(".weight"): p.numel() for key, p in model.named_parameters()}
    sixteen = sum(2 * size for key, size in sizes.items() if key not in linear or key == "lm_head")
    four = sum(nf4_bytes(sizes[key]) for key in linear if key != "lm_head")
    found = estimate(recipe_architecture(name), Setting("sft", 1, 512, 8, four_bit=True))
    assert found.parts["weights"] == sixteen + four


@pytest.mark.parametrize("shape", [(64, 64), (96, 48), (320, 128), (33, 65)])
def test_nf4_bytes_match_bitsandbytes(shape):
    packed, state = quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=True)
    held = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert (state.blocksize, state.state2.blocksize) == (64, 256)
    assert sum(t.nbytes for t in held[2:4] + held[5:]) == memory.NF4_TABLES
    assert nf4_bytes(shape[0] * shape[1]) == sum(t.nbytes for t in held)


def small_lora(rank: int):
    model = torch.nn.Sequential(torch.nn.Linear(640, 96), torch.nn.Linear(96, 1001))
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=["0", "1"]))
    return adapted, [p for p in adapted.parameters() if p.requires_grad]


def test_optimizer_state_bytes_match_torch_and_bitsandbytes():
    model, factors = small_lora(8)
    optimizer = torch.optim.AdamW(factors, lr=1e-3)
    model(torch.randn(4, 640)).sum().backward()
    optimizer.step()
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert optimizer_bytes([p.numel() for p in factors], 32) == sum(4 * value.numel() for value in states)
    _, factors = small_lora(8)
    optimizer = AdamW8bit(factors, lr=1e-3)
    for number, factor in enumerate(factors):
        optimizer.init_state(optimizer.param_groups[0], factor, 0, number)
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = {value.data_ptr(): value.nbytes for value in states if isinstance(value, torch.Tensor)}
    sizes = [p.numel() for p in factors]
    assert min(sizes) < 4096 < max(sizes)
    assert optimizer_bytes(sizes, 8) == sum(held.values())
    assert memory.STATE_TABLES == 2048


class PeakTracker(TorchDispatchMode):
    """Peak bytes of the tensors created inside, without those in `before`."""

    def __init__(self, before=()):
        super().__init__()
        self.alive = self.most = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in before)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self.gone, size)

    def gone(self, size: int) -> None:
        self.alive -= size


def test_bytes_per_logit_match_what_torch_keeps():
    """The backward pass through our loss, for a head next to which everything else is small."""
    shape = {**SMALL, "num_hidden_layers": 1, "vocab_size": 32768}
    model = LlamaForCausalLM(LlamaConfig(**shape)).bfloat16().requires_grad_(False)
    hidden = torch.randn(96, 128, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, 32768, (96, 1))
    with PeakTracker([*model.parameters(), hidden]) as tracker:
        log_probs = vocabulary_log_probs(model, hidden).gather(1, target)
        kept = tracker.alive
        (-log_probs.mean()).backward()
    entries = 96 * 32768
    assert kept / entries == pytest.approx(memory.KEPT, rel=0.02)
    assert tracker.most / entries == pytest.approx(memory.KEPT + memory.BACKWARD, rel=0.02)


@pytest.mark.parametrize(("family", "length"), [("llama", 256), ("qwen3", 256), ("gemma2", 512)])
@pytest.mark.parametrize("middle", [704, 1024, 1408])
def test_the_peak_of_a_plain_step_matches_the_estimate(family, length, middle):
    """Base in 16 bits, LoRA in float32, layers checkpointed: the peak of our own forward and backward pass."""
    shape = {"model_type": family, "tie_word_embeddings": False, **SMALL, "hidden_size": 256}
    shape |= {"intermediate_size": middle, "num_hidden_layers": 3}
    config = config_of(shape)
    found = architecture(config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **attention_of(config))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model)))
    for factor in model.parameters():
        if factor.requires_grad:
            factor.data = factor.data.float()
    for module in model.modules():  # as load_student does
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    ids = torch.randint(0, 512, (2, length))
    mask, weights = torch.ones_like(ids), torch.zeros(2, length)
    mask[0, -9:], weights[:, 200:204] = 0, 1.0
    batch = PaddedBatch(ids, mask, weights)
    before = [*model.parameters(), *model.buffers(), ids, mask, weights]
    with PeakTracker(before) as tracker, torch.autocast("cpu", torch.bfloat16):
        log_probs, _ = token_log_probs(model, hidden_states(model, batch), batch)
        (-log_probs.mean()).backward()
    setting = Setting("sft", 2, length, 2, four_bit=False, backend="plain")
    estimated, _ = peak(found, setting, [(2 * length, 8)])
    made = 4 * sum(found.lora_tensors(2))  # the gradients
    assert tracker.most == pytest.approx(sum(estimated.values()) + made, rel=0.05)


def test_chunks_change_neither_log_probabilities_nor_gradients(monkeypatch):
    shape = {"model_type": "llama", **SMALL, "num_hidden_layers": 2}
    model = built(shape, "cpu").float().requires_grad_(False)
    ids = torch.randint(3, 500, (2, 90), generator=torch.Generator().manual_seed(0))
    batch = PaddedBatch(ids, torch.ones(2, 90, dtype=torch.long), torch.ones(2, 90))
    carried = torch.rand(178, generator=torch.Generator().manual_seed(1))
    factor = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    found = []
    for size in (10**6, 64):
        monkeypatch.setattr("sclite.student.log_probs.head_chunk_size", lambda _, size=size: size)
        model.zero_grad()
        values, rows = token_log_probs(model, hidden_states(model, batch), batch)
        (values * carried).sum().backward()
        with torch.no_grad():
            assert torch.equal(values, token_log_probs(model, hidden_states(model, batch), batch)[0])
        found.append((values.detach(), rows, factor.grad.clone()))
    (one, rows, gradient), (other, other_rows, other_gradient) = found
    assert len(one) == 178
    assert torch.allclose(one, other, atol=1e-5)
    assert torch.equal(rows, other_rows)
    assert torch.allclose(gradient, other_gradient, atol=1e-5)


def test_an_unchecked_architecture_or_mixed_bits_is_rough_and_experts_refused():
    shape = {"model_type": "phi3", "pad_token_id": 0, **SMALL}
    assert "as if it were Llama" in architecture(config_of(shape)).rough
    assert not any(recipe_architecture(name).rough for name in RECIPES)
    config = config_of({"model_type": "llama", **SMALL})
    config.quantization_config = {"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]}
    assert "1 parts" in architecture(config).rough
    config.quantization_config = {"llm_int8_skip_modules": ["lm_head"]}
    assert not architecture(config).rough
    with pytest.raises(DataError, match="num_experts = 128") as error:
        architecture(config_of({"model_type": "qwen3_moe", "num_experts": 128, **SMALL}))
    assert error.value.hint


FULL = {"layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": 512}


@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        # twice the hidden size, and no heads
        ({"model_type": "falcon_mamba", "hidden_size": 128, "num_hidden_layers": 2}, (128, 128, 256)),
        (
            {
                "model_type": "gemma3n_text", **SMALL, **FULL, "num_hidden_layers": 2, "num_kv_shared_layers": 0,
                "intermediate_size": [320, 640], "activation_sparsity_pattern": [0.0, 0.0],
            },
            (4 * 64, 2 * 64, 640),
        ),
        (
            {
                "model_type": "gemma4_text", **SMALL, **FULL, "num_hidden_layers": 2, "num_kv_shared_layers": 0,
                "global_head_dim": 96, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
            },
            (4 * 96, 2 * 64, 320),
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_layers_without_heads_or_of_different_widths_are_estimated(shape, widths):
    found = architecture(config_of(shape))
    assert (found.query, found.keys, found.intermediate) == widths
    assert found.rough


@pytest.mark.parametrize("stage", ["sft", "warmup", "dpo"])
@pytest.mark.parametrize("backend", ["unsloth", "plain"])
def test_larger_settings_need_more_memory_and_7b_at_2048_tokens_fits(stage, backend):
    found, small = recipe_architecture(QWEN), Setting(stage, 1, 1024, 16, backend=backend)
    for change in ({"micro_batch": 2}, {"length": 2048}, {"rank": 32}, {"four_bit": False}):
        assert estimate(found, replace(small, **change)).total > estimate(found, small).total, change
    for name in (QWEN, "deepseek-math-7b"):
        most = 12 if stage == "sft" else 20
        assert estimate(recipe_architecture(name), Setting(stage, 1, 2048, 32)).total < most * GB


def test_unsloth_offloads_layer_inputs_and_shares_its_reload_buffers():
    found = recipe_architecture(QWEN)
    ours, plain = (estimate(found, Setting("sft", 1, 2048, 32, backend=b)) for b in ("unsloth", "plain"))
    assert ours.host == 28 * 2048 * 3584 * 2
    assert plain.host == 0
    assert ours.parts["activations"] < plain.parts["activations"]
    found, one = recipe_architecture(LLAMA), 2 * 32_768 * 4096
    sft, dpo = (estimate(found, Setting(stage, 1, 32_768, 32)) for stage in ("sft", "dpo"))
    assert sft.parts["activations"] == (2 + 3) * one
    assert dpo.parts["activations"] == (3 * 2 + 3) * one  # chosen, rejected and the solved row
    short, long = (estimate(found, Setting("sft", 1, length, 32)) for length in (2048, 65_536))
    assert short.parts["allowance"] == memory.CONTEXT + memory.CACHED
    assert long.parts["allowance"] == memory.CONTEXT + 2 * 65_536 * 14_336


MEASURED = [
    (QWEN, "sft", 1, 2048, 7.51), (QWEN, "sft", 4, 2048, 8.31), (QWEN, "sft", 1, 4096, 7.69),
    (QWEN, "dpo", 1, 2048, 8.07), (QWEN, "dpo", 2, 2048, 7.89),
    (LLAMA, "sft", 2, 2048, 7.88), (LLAMA, "dpo", 2, 2048, 8.10), (LLAMA, "dpo", 1, 4096, 8.08),
    (LLAMA, "sft", 1, 76_032, 20.29), (LLAMA, "dpo", 1, 55_232, 18.47),
]  # fmt: skip
"""Peaks in GB measured by tests/benchmarks/bench_train.py on an H200, the last two on an H100: Unsloth, rank 32, full rows."""


@pytest.mark.parametrize(("name", "stage", "rows", "length", "peak_gb"), MEASURED)
def test_the_estimate_is_within_6_percent_of_measured_peaks(name, stage, rows, length, peak_gb):
    found = estimate(recipe_architecture(name), Setting(stage, rows, length, 32))
    assert (found.total - found.parts["allowance"]) / 1e9 == pytest.approx(peak_gb, rel=0.06)


def test_the_largest_micro_batch_that_fits_is_chosen():
    found, wanted = recipe_architecture(QWEN), Setting("sft", 16, 2048, 32)
    before = 0
    for free in range(6, 81):
        chosen = choose(found, wanted, 16, free * GB)
        if not chosen.fits:
            continue
        size = chosen.setting.micro_batch
        assert 16 % size == 0
        assert size >= before
        assert estimate(found, chosen.setting).total <= free * GB
        if size < 16:
            assert estimate(found, replace(wanted, micro_batch=2 * size)).total > free * GB
        before = size
    assert before == 16


def test_the_micro_batch_also_fits_into_the_host_memory_that_offloading_takes():
    """By hand: 3,584 values of 2 bytes for each of 28 layers and 2,048 tokens are 0.41 GB a row, with a reserve 0.62."""
    found, wanted = recipe_architecture(QWEN), Setting("sft", 16, 2048, 32)
    rows = [choose(found, wanted, 16, 80 * GB, ram).setting.micro_batch for ram in (11 * GB, 6 * GB, GB // 2)]
    assert rows == [16, 8, 1]


@pytest.mark.parametrize(("shared", "heads"), [(101_376, 8), (232_448, 0)], ids=["RTX 4090", "H100"])
def test_scores_of_gemma_3_are_kept_where_its_attention_cannot_be_fused(monkeypatch, shared, heads):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    device = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "head_dim": 8}
    config = AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=1, intermediate_size=64, vocab_size=64, **shape
    )
    assert architecture(config).scored_heads == heads


def test_if_no_row_fits_the_largest_length_within_the_positions_is_suggested():
    found, wanted = recipe_architecture(QWEN), Setting("sft", 2, 4096, 32)
    free = estimate(found, replace(wanted, micro_batch=1, length=1024)).total
    chosen = choose(found, wanted, 16, free)
    assert chosen.fits is False
    assert chosen.setting.length == 1024 == largest_length(found, replace(wanted, micro_batch=1), free)
    assert "1024 tokens would fit, 4096 do not" in chosen.verdict
    assert largest_length(found, replace(wanted, micro_batch=1, length=2048), 500 * GB) == 4096


@pytest.mark.parametrize(
    ("free", "fits", "verdict"), [(4 * GB, False, "nothing fits: at least "), (None, None, "no GPU found")]
)
def test_the_verdict_says_why_there_is_no_setting(free, fits, verdict):
    chosen = choose(recipe_architecture(QWEN), Setting("sft", 2, 2048, 64), 16, free)
    assert (chosen.fits, chosen.setting is None) == (fits, fits is False)
    assert chosen.verdict.startswith(verdict)
