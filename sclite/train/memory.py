"""Memory of one training step, estimated from the model's architecture and the settings, and the micro-batch size that fits.

Weights and LoRA are exact. Activations follow the code: with gradient checkpointing it keeps the input of every layer plus
one whole layer at a time, and logits only for tokens with loss (student/log_probs.py). The peak is the larger of two
moments: the backward pass through the head, and the one through the last layer. On an H100 and an H200 the estimate was
within 6 % of PyTorch's peak at thirteen settings: 7B and 8B models, SFT and DPO, one to four rows of 2,048 and 4,096
tokens, one row of 76,032 and of 55,232, with Unsloth (-6 to +1 %) and without (-2 to +6 %).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sclite.config import Config
from sclite.student.adapters import lora_targets, meta_model
from sclite.student.backends import cpu_training_dtype
from sclite.student.cuda_memory import available_ram
from sclite.student.loader import model_name, read_config, select_backend
from sclite.student.log_probs import head_chunk_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight in NF4 with double quantization: half a byte, a byte per 64 weights, a float32 per 256 of these."""
ADAM_8BIT, ADAM_32BIT = 2 + 2 * 4 / 256, 2 * 4
"""Bytes of the optimizer's two states per weight: one byte each with a float32 per 256 weights, or float32."""
LOSS_SHARE = {"sft": 0.9, "warmup": 0.5, "dpo": 0.15}
"""Share of tokens with loss in the longest rows: a solution after a short prompt; a review after the attempt; a cause and
correction after both."""
DECISIONS = 8  # per attempt, in DPO
KEPT, BACKWARD = 4, 8
"""Bytes per logit: float32 log-probabilities kept for the backward pass; their gradient and that of the logits in it.
Above `head_chunk_size` positions the head runs in chunks, keeps nothing, and has one chunk in memory at a time."""
CONTEXT, CACHED = 700_000_000, 800_000_000
"""Bytes of the CUDA context, loaded kernels and cuBLAS workspace; bytes the allocator caches beyond those in use, at least
(0.3 to 0.84 GB measured). With rows that fill the GPU that is the largest tensor of a layer: 1.87 GB at 76,032 tokens."""
LIBRARIES, HEAP = 600_000_000, 1.8
"""Bytes of a CPU process without a model; bytes of process memory per byte of activations (1.1 to 1.8 measured)."""
SCORES = 5
"""16-bit values alive per attention score of a layer with a soft cap while it runs backward (measured on a CPU)."""
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
"""Architectures whose activations the estimate was checked on; others are estimated as if they were Llama."""
SHORTEST, STEP = 256, 64
"""Tokens: shorter rows are not worth training; lengths are reported in multiples of STEP."""
CPU_ROWS, CPU_BYTES = 4, 4_000_000_000
"""Without a GPU: maximum rows per forward pass, and maximum bytes of the process for more than one row. More rows are no
faster there (docs/training.md), and a process that uses up all memory is killed."""


# -- the model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model, counted on the meta device; linear layers without the head."""

    hidden: int
    query: int
    keys: int
    intermediate: int
    layers: int
    vocabulary: int
    max_positions: int | None
    parameters: int
    linear_weights: int
    largest_linear: int
    adapted_layers: int
    adapted_features: int  # in and out, of all layers with LoRA
    query_key_norms: bool
    logit_cap: bool
    scored_heads: int  # whose attention scores are kept in whole, for Gemma 2's soft cap
    bf16_on_cpu: bool
    rough: str  # why the estimate is rough; empty if it is not

    def lora_weights(self, rank: int) -> int:
        """The weights of all LoRA factors, A [rank, in] and B [out, rank]."""
        return rank * self.adapted_features


def architecture(config: PretrainedConfig, targets: Sequence[str] = ()) -> Architecture:
    """The sizes of a configuration's model, with LoRA on `targets` (default: all linear layers)."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    text, model = config.get_text_config(), meta_model(config)
    endings = tuple(f".{target}" for target in lora_targets(model, targets))
    linears = {
        f".{name}": module.weight
        for name, module in model.named_modules()
        if isinstance(module, Linear | Conv1D) and module is not model.get_output_embeddings()
    }
    adapted = [sum(weight.shape) for name, weight in linears.items() if name.endswith(endings)]
    heads = getattr(text, "num_attention_heads", None) or 1
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    middle = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    known = text.model_type in KNOWN
    return Architecture(
        hidden=text.hidden_size,
        query=heads * width,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * width,
        intermediate=max(middle) if isinstance(middle, list) else middle,  # Gemma 3n: one for each layer
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        max_positions=getattr(text, "max_position_embeddings", None),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear_weights=sum(weight.numel() for weight in linears.values()),
        largest_linear=max(weight.numel() for weight in linears.values()),
        adapted_layers=len(adapted),
        adapted_features=sum(adapted),
        query_key_norms=any(name.endswith(".q_norm") for name, _ in model.named_modules()),
        logit_cap=bool(getattr(text, "final_logit_softcapping", None)),
        scored_heads=heads if getattr(text, "attn_logit_softcapping", None) else 0,
        bf16_on_cpu=cpu_training_dtype(config).itemsize == 2,
        rough="" if known else f"activations of {text.model_type} are estimated as if it were Llama",
    )


# -- one step ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One training stage: "sft", "warmup" or "dpo". `micro_batch` counts rows of a forward pass (DPO: bundles)."""

    stage: str
    micro_batch: int
    length: int
    rank: int
    four_bit: bool = True
    backend: str = "unsloth"

    @property
    def tokens(self) -> int:
        """The tokens of a forward pass, all rows at full length."""
        return self.micro_batch * self.length

    def tokens_with_loss(self) -> list[int]:
        """Those of each forward pass of a step, in order; DPO has one for the reviews, rejected texts and solved rows each."""
        carried, solved = (round(LOSS_SHARE[stage] * self.tokens) for stage in (self.stage, "sft"))
        return [carried] if self.stage != "dpo" else [carried + DECISIONS * self.micro_batch, carried, solved]


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a step, by part; `host` is pinned host RAM. All but the `allowance` are PyTorch's own."""

    parts: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(model: Architecture, setting: Setting) -> Estimate:
    """The GPU memory of one step of a stage.

    The backward passes run in reverse order; each frees what it kept while earlier ones still wait. Unsloth moves the
    layers' inputs to host RAM and reloads them through two buffers that all passes of a step share
    (unsloth_zoo.gradient_checkpointing); the last layer's input stays on the GPU.
    """
    offloads, tokens = setting.backend == "unsloth", setting.tokens
    # 16-bit values alive per token while a layer runs backward, and, in hidden widths, those kept outside the layers:
    # input and output of the final norm
    if offloads:
        # output of the first norm, sum after attention, output of the layer and its gradient; q, k, v and the attention's
        # output; of the MLP gate, up and the gradient that replaces them
        widths = 4 * model.hidden + 2 * model.query + 2 * model.keys + 3 * model.intermediate
        norms, buffers, outside, reloaded = 1, 2, 2, min(3, model.layers)
    else:
        # PyTorch and PEFT under autocast, measured on a CPU by tests/train/test_memory.py; k and v are repeated to all heads
        widths = 5 * model.hidden + 5 * model.query + 6 * model.intermediate
        norms, buffers, outside, reloaded = 2, 1, 3 + model.layers, 0  # the norms' inputs are in float32
    if model.query_key_norms:
        widths += norms * (model.query + model.keys)
    layer = 2 * tokens * (widths + SCORES * model.scored_heads * setting.length)
    if setting.four_bit:  # the unpacked weights
        layer += round((2 * buffers + 4 / 64) * model.largest_linear)
    state, chunk = 2 * model.hidden * tokens, head_chunk_size(model.vocabulary)
    moments, waiting = [], 0
    for number, carried in enumerate(setting.tokens_with_loss(), 1):
        activations = (number * outside + reloaded) * state
        logits = (2 if model.logit_cap else 1) * model.vocabulary * min(carried, chunk)
        at_head = {"activations": activations, "logits": waiting + (KEPT + BACKWARD) * logits, "layer": 0}
        moments += [at_head, {"activations": activations, "logits": waiting, "layer": layer}]
        waiting += KEPT * logits * (carried <= chunk)
    lora = model.lora_weights(setting.rank)
    packed = (2 - NF4) * model.linear_weights if setting.four_bit else 0
    parts = {
        "weights": 2 * model.parameters - round(packed),  # all but linear layers in 16 bits
        "adapter": 4 * lora,
        "gradients": 4 * lora,
        "optimizer": round(ADAM_8BIT * lora),
        **max(moments, key=lambda moment: sum(moment.values())),
        "allowance": CONTEXT + max(CACHED, 2 * tokens * model.intermediate),
    }
    return Estimate(parts, host=state * model.layers * len(setting.tokens_with_loss()) if offloads else 0)


def estimate_on_cpu(model: Architecture, setting: Setting) -> Estimate:
    """A rough estimate of RAM without a GPU: every layer is kept.

    For each layer, autograd saves the inputs and outputs of the norms; q, k, v and the attention's output; gate, up, their
    product and its factor; and the output of every LoRA's A. In bfloat16 the norms still have float32 inputs.
    """
    element = 2 if model.bf16_on_cpu else 4  # bytes
    hidden = (6 if model.bf16_on_cpu else 4) * model.hidden
    kept = model.layers * (hidden + 4 * (model.query + model.intermediate))
    kept += model.adapted_layers * setting.rank + 3 * model.layers * model.scored_heads * setting.length
    parts = estimate(model, setting).parts | {
        "weights": element * model.parameters,
        "optimizer": ADAM_32BIT * model.lora_weights(setting.rank),
        "activations": round(HEAP * element * kept * setting.tokens * len(setting.tokens_with_loss())),
        "layer": 0,
        "allowance": LIBRARIES,
    }
    return Estimate(parts)


# -- what fits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The setting for the free memory; the wanted one if that is unknown (`fits` None).

    If `fits` is False, `setting` is the largest one that would fit, None if none does.
    """

    fits: bool | None
    setting: Setting | None
    verdict: str


def wanted_setting(config: Config, stage: str, backend: str = "unsloth") -> Setting:
    """A stage's setting as configured: the micro-batch size if it is set, else the whole batch in one forward pass."""
    settings = config.stage(stage)
    return Setting(
        stage=stage,
        micro_batch=min(settings.per_device_train_batch_size or settings.batch_size, settings.batch_size),
        length=settings.max_length,
        rank=config.lora.r,
        four_bit=config.student.load_in_4bit,
        backend=backend,
    )


def largest_divisor(batch: int, most: int) -> int:
    """The largest divisor of a batch size that is at most `most`."""
    return next(size for size in range(min(batch, most), 0, -1) if batch % size == 0)


def largest_length(model: Architecture, setting: Setting, free: int) -> int | None:
    """The maximum tokens per row that fit into `free` bytes, a multiple of STEP; None if SHORTEST do not."""
    lengths = range(SHORTEST, (model.max_positions or 1 << 20) + 1, STEP)
    fitting = bisect_right(lengths, free, key=lambda n: estimate(model, replace(setting, length=n)).total)
    return lengths[fitting - 1] if fitting else None


def choose(
    model: Architecture, wanted: Setting, batch: int, free: int | None, ram: int | None = None
) -> Choice:
    """The largest micro-batch, up to the wanted one, that fits into `free` bytes and divides the batch.

    Its host memory must fit into `ram`, with half as much again: blocks of pinned memory are rounded up to powers of two.
    If one row does not fit, it is one row of the largest length that does.
    """
    sizes = [size for size in range(wanted.micro_batch, 0, -1) if batch % size == 0]
    if free is None:
        return Choice(None, replace(wanted, micro_batch=sizes[0]), "no GPU found")
    for size in sizes:
        found = estimate(model, setting := replace(wanted, micro_batch=size))
        if found.total <= free and (ram is None or size == 1 or 1.5 * found.host <= ram):
            return Choice(True, setting, "fits")
    one = replace(wanted, micro_batch=1)
    if length := largest_length(model, one, free):
        verdict = f"{length} tokens would fit, {wanted.length} do not"
        return Choice(False, replace(one, length=length), verdict)
    needed = estimate(model, replace(one, length=SHORTEST)).total
    verdict = f"nothing fits: at least {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
    return Choice(False, None, verdict)


def choose_on_gpu(config: Config, stage: str) -> Choice | None:
    """The choice for a stage in the GPU memory that is free now; None without a GPU."""
    if (free := free_bytes()) is None:
        return None
    model = architecture(read_config(model_name(config.student)), config.lora.target_modules)
    wanted = wanted_setting(config, stage, select_backend(config.student))
    return choose(model, wanted, config.stage(stage).batch_size, free, available_ram())


def free_bytes() -> int | None:
    """GPU memory that this process can still allocate; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    allowed = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    return int(min(free, allowed))


def cpu_micro_batch(model: Architecture, wanted: Setting, batch: int) -> int:
    """The largest divisor of the batch size, up to CPU_ROWS, for which CPU_BYTES and the RAM suffice; at least 1."""
    most = min(CPU_BYTES, available_ram() or CPU_BYTES)
    for size in (largest_divisor(batch, rows) for rows in range(min(CPU_ROWS, wanted.micro_batch), 1, -1)):
        if estimate_on_cpu(model, replace(wanted, micro_batch=size)).total <= most:
            return size
    return 1


def choose_micro_batch(config: Config, stage: str, longest: int) -> int:
    """The micro-batch size of a stage, a divisor of its batch size, for rows of at most `longest` tokens.

    Call it before loading the model. If even one row should not fit, it is 1: the GPU decides.
    """
    settings = config.stage(stage)
    if settings.per_device_train_batch_size:
        return largest_divisor(settings.batch_size, settings.per_device_train_batch_size)
    if choice := choose_on_gpu(config, stage):
        return choice.setting.micro_batch if choice.fits and choice.setting else 1
    model = architecture(read_config(model_name(config.student)), config.lora.target_modules)
    wanted = replace(wanted_setting(config, stage, "plain"), length=longest)
    return cpu_micro_batch(model, wanted, settings.batch_size)
