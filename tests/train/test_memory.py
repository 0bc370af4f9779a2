"""The memory estimate: exact parts against torch, PEFT and bitsandbytes, peaks against real steps."""

import weakref
from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.optim import AdamW8bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sclite.student.adapters import lora_targets
from sclite.student.backends import attention_of
from sclite.student.log_probs import PaddedBatch, hidden_states, token_log_probs, vocabulary_log_probs
from sclite.train import memory
from sclite.train.memory import Setting, architecture, choose, estimate, largest_length
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
    assert found.lora_weights(rank) == sum(p.numel() for p in factors)
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
    four = sum(sizes[key] for key in linear if key != "lm_head") * memory.NF4
    found = estimate(recipe_architecture(name), Setting("sft", 1, 512, 8, four_bit=True))
    assert found.parts["weights"] == pytest.approx(sixteen + four, abs=1)


def test_bytes_per_weight_match_bitsandbytes():
    """In NF4 with double quantization, and in the optimizer's two states; the tables of a few kilobytes are not counted."""
    packed, state = quantize_4bit(torch.randn(512, 512), quant_type="nf4", compress_statistics=True)
    assert (state.blocksize, state.state2.blocksize) == (64, 256)
    held = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert held == memory.NF4 * 512 * 512
    weight = torch.nn.Parameter(torch.randn(512, 512))
    optimizer = AdamW8bit([weight], lr=1e-3)
    optimizer.init_state(optimizer.param_groups[0], weight, 0, 0)
    names = ("state1", "state2", "absmax1", "absmax2")
    assert sum(optimizer.state[weight][name].nbytes for name in names) == memory.ADAM_8BIT * 512 * 512
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    weight.sum().backward()
    optimizer.step()
    held = sum(optimizer.state[weight][name].nbytes for name in ("exp_avg", "exp_avg_sq"))
    assert held == memory.ADAM_32BIT * 512 * 512


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
def test_the_peak_of_a_plain_step_matches_the_estimate(family, length, middle, monkeypatch):
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
    monkeypatch.setitem(memory.LOSS_SHARE, "sft", 8 / (2 * length))
    parts = estimate(found, setting).parts
    expected = sum(parts[name] for name in ("activations", "logits", "layer", "gradients"))
    assert tracker.most == pytest.approx(expected, rel=0.05)


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


@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ({"model_type": "phi3", "pad_token_id": 0, **SMALL}, (4 * 64, 2 * 64, 320)),
        # without attention heads
        ({"model_type": "falcon_mamba", "hidden_size": 128, "num_hidden_layers": 2}, (128, 128, 256)),
    ],
)
def test_other_architectures_are_estimated_roughly(shape, widths):
    found = architecture(config_of(shape))
    assert (found.query, found.keys, found.intermediate) == widths
    assert "as if it were Llama" in found.rough
    assert not any(recipe_architecture(name).rough for name in RECIPES)


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
