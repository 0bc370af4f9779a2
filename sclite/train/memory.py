"""Memory of one training step, estimated from the model's architecture and the settings.

Weights, LoRA and optimizer states are exact. Activations follow the code: with gradient checkpointing it keeps the input
of every layer plus one whole layer at a time, and logits only for tokens with loss (student/log_probs.py). The peak is
the larger of two moments: the backward pass through the head, and the one through the last layer. On an H100 and an H200
the estimate was within 6 % of PyTorch's peak at thirteen settings: 7B and 8B models, SFT and DPO, one to four rows of
2,048 and 4,096 tokens, one row of 76,032 and of 55,232, with Unsloth (-6 to +1 %) and without (-2 to +6 %).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from sclite.errors import DataError
from sclite.student.adapters import lora_targets, meta_model
from sclite.student.backends import cpu_training_dtype
from sclite.student.log_probs import head_chunk_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Forward = tuple[int, int]
"""(tokens, tokens with loss) of one forward pass."""
Shape = tuple[int, int]
"""(features out, features in) of a linear layer."""

NF4_BLOCK, NESTED_BLOCK = 64, 256
NF4_TABLES = 4 * (16 + 256 + 1)  # bytes per weight: code tables of 16 and 256 float32, and an offset
MIN_8BIT, STATE_BLOCK, STATE_TABLES = 4096, 256, 2 * 256 * 4
"""bitsandbytes: smaller tensors keep 32-bit states; weights per absmax; bytes of two tables for all tensors."""
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
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class Copies:
    """16-bit values alive per token while a layer runs backward, in its widths; `buffers`: of the largest weight."""

    hidden: int
    query: int
    keys: int
    intermediate: int
    buffers: int
    outside: int  # in hidden widths, per forward pass: input and output of the final norm


COPIES = {
    # Unsloth: output of the first norm, sum after attention, output of the layer and its gradient; q, k, v and the
    # attention's output; of the MLP gate, up and the gradient that replaces them
    "unsloth": Copies(hidden=4, query=2, keys=2, intermediate=3, buffers=2, outside=2),
    # PyTorch and PEFT under autocast, measured on a CPU by tests/train/test_memory.py; k and v are counted in `query`,
    # repeated to all heads
    "plain": Copies(hidden=5, query=5, keys=0, intermediate=6, buffers=1, outside=3),
}

# -- the model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model, counted on the meta device. `linears` counts the (out, in) shapes of all linear layers but the
    head, `adapted` those of the layers with LoRA."""

    hidden: int
    query: int
    keys: int
    intermediate: int
    layers: int
    vocabulary: int
    max_positions: int | None
    parameters: int
    linears: Counter[Shape]
    adapted: Counter[Shape]
    query_key_norms: bool
    logit_cap: bool
    scored_heads: int  # whose attention scores are kept in whole
    bf16_on_cpu: bool
    rough: str  # why the estimate is rough; empty if it is not

    def lora_tensors(self, rank: int) -> list[int]:
        """Sizes of all LoRA factors, A [rank, in] and B [out, rank]."""
        shapes = self.adapted.elements()
        return [size for out, into in shapes for size in (rank * into, out * rank)]


def architecture(config: PretrainedConfig, targets: Sequence[str] = ()) -> Architecture:
    """The sizes of a configuration's model, with LoRA on `targets` (default: all). DataError for mixtures of experts."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    text = config.get_text_config()
    if experts := next((key for key in EXPERTS if getattr(text, key, None)), None):
        raise DataError(
            f"{text.model_type}: the memory of a mixture of experts ({experts} = {getattr(text, experts)}) cannot be estimated",
            "use a dense student, or `sclite build-data` and `sclite train` without --plan",
        )
    model = meta_model(config)
    endings = tuple(f".{target}" for target in lora_targets(model, targets))
    linears: Counter[Shape] = Counter()
    adapted: Counter[Shape] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, Linear | Conv1D) and module is not model.get_output_embeddings():
            out, into = module.weight.shape if isinstance(module, Linear) else reversed(module.weight.shape)
            linears[out, into] += 1
            adapted[out, into] += f".{name}".endswith(endings)
    quantization = getattr(config, "quantization_config", None) or {}
    kept = [m for m in quantization.get("llm_int8_skip_modules") or () if "layers." in m]
    rough = f"{len(kept)} parts of this checkpoint are kept in 16 bits" if kept else ""
    if text.model_type not in KNOWN:
        rough = f"activations of {text.model_type} are estimated as if it were Llama"
    if "linear_attention" in (getattr(text, "layer_types", None) or ()):
        rough = "the working set of linear attention is a guess"
    layers = getattr(text, "per_layer_config", None) or [text]  # those of Gemma 4 differ
    query, keys, intermediate = (max(each) for each in zip(*map(_layer_widths, layers), strict=True))
    return Architecture(
        hidden=text.hidden_size,
        query=query,
        keys=keys,
        intermediate=intermediate,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        max_positions=getattr(text, "max_position_embeddings", None),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linears=linears,
        adapted=adapted,
        query_key_norms=any(name.endswith(".q_norm") for name, _ in model.named_modules()),
        logit_cap=bool(getattr(text, "final_logit_softcapping", None)),
        scored_heads=text.num_attention_heads if _keeps_scores(text) else 0,
        bf16_on_cpu=cpu_training_dtype(config).itemsize == 2,
        rough=rough,
    )


def _keeps_scores(text: PretrainedConfig) -> bool:
    """Whether attention scores are kept in whole: for Gemma 2's soft cap, and for Gemma 3 on a GeForce.

    There, flex attention at a head size of 256, which Unsloth uses, does not fit in shared memory and is not fused.
    """
    import torch

    if getattr(text, "attn_logit_softcapping", None):
        return True
    if not text.model_type.startswith("gemma3") or not torch.cuda.is_initialized():
        return False
    return getattr(torch.cuda.get_device_properties(0), "shared_memory_per_block_optin", 0) < 152_000


def _layer_widths(layer: PretrainedConfig) -> tuple[int, int, int]:
    """(query, keys, intermediate) of one layer's configuration; Mamba has no heads, Gemma 3n a list of MLP widths."""
    heads = getattr(layer, "num_attention_heads", None) or 1
    width = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    middle = getattr(layer, "intermediate_size", None) or 4 * layer.hidden_size
    keys = (getattr(layer, "num_key_value_heads", None) or heads) * width
    return heads * width, keys, max(middle) if isinstance(middle, list) else middle


# -- one step ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One training stage: "sft", "warmup" or "dpo". `micro_batch` counts rows of a forward pass (DPO: bundles).

    With `replay` a DPO step has a solved row for each bundle.
    """

    stage: str
    micro_batch: int
    length: int
    rank: int
    replay: bool = True
    four_bit: bool = True
    backend: str = "unsloth"

    def forwards(self) -> list[Forward]:
        """The forward passes of one step in order, all rows at full length."""
        tokens = self.micro_batch * self.length
        carried = round(LOSS_SHARE[self.stage] * tokens)
        if self.stage != "dpo":
            return [(tokens, carried)]
        solved = [(tokens, round(LOSS_SHARE["sft"] * tokens))] if self.replay else []
        return [(tokens, carried + DECISIONS * self.micro_batch), (tokens, carried), *solved]


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a step, by part; `host` is pinned host RAM. All but the `allowance` are PyTorch's own."""

    parts: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def nf4_bytes(weights: int) -> int:
    """Bytes of one weight in NF4 with double quantization, as bitsandbytes stores it."""
    blocks = ceil(weights / NF4_BLOCK)
    return ceil(weights / 2) + blocks + 4 * ceil(blocks / NESTED_BLOCK) + NF4_TABLES


def optimizer_bytes(tensors: Iterable[int], bits: int) -> int:
    """Bytes of AdamW's two states for tensors of these sizes: in float32, or in blocks of 8 bits with their absmax."""
    sizes = list(tensors)
    large = [size for size in sizes if size >= MIN_8BIT and bits == 8]
    blocked = sum(2 * size + 8 * ceil(size / STATE_BLOCK) for size in large)
    return 8 * (sum(sizes) - sum(large)) + blocked + STATE_TABLES * bool(large)


def peak(model: Architecture, setting: Setting, forwards: Sequence[Forward]) -> tuple[dict[str, int], int]:
    """({"activations", "logits", "layer"} in bytes at the peak of a step, bytes of host RAM).

    The backward passes run in reverse order; each frees what it kept while earlier ones still wait. Unsloth moves the
    layers' inputs to host RAM and reloads them through two buffers that all passes of a step share
    (unsloth_zoo.gradient_checkpointing); the last layer's input stays on the GPU.
    """
    offloads, copies = setting.backend == "unsloth", COPIES[setting.backend]
    one = 2 * model.hidden  # bytes of a hidden state, per token
    each = one * (copies.outside + (0 if offloads else model.layers))
    saved = [each * tokens for tokens, _ in forwards]
    longest = max(tokens for tokens, _ in forwards)
    returning = min(3, model.layers) * one * longest if offloads else 0
    widths = copies.hidden * model.hidden + copies.query * model.query + copies.keys * model.keys
    widths += copies.intermediate * model.intermediate
    if model.query_key_norms:  # their inputs, in float32 without Unsloth
        widths += (1 if offloads else 2) * (model.query + model.keys)
    largest = max(out * into for out, into in model.linears)
    unpacked = 2 * copies.buffers * largest + 4 * ceil(largest / NF4_BLOCK) if setting.four_bit else 0
    chunk = head_chunk_size(model.vocabulary)
    table = (2 if model.logit_cap else 1) * model.vocabulary
    logits = [table * min(carried, chunk) for _, carried in forwards]
    kept = [KEPT * size * (carried <= chunk) for size, (_, carried) in zip(logits, forwards, strict=True)]
    moments = []
    for last, (tokens, _) in enumerate(forwards):
        activations, waiting = sum(saved[: last + 1]) + returning, sum(kept[:last])
        at_head = waiting + (KEPT + BACKWARD) * logits[last]
        layer = 2 * tokens * (widths + SCORES * model.scored_heads * setting.length) + unpacked
        moments.append({"activations": activations, "logits": at_head, "layer": 0})
        moments.append({"activations": activations, "logits": waiting, "layer": layer})
    host = one * model.layers * sum(tokens for tokens, _ in forwards) if offloads else 0
    return max(moments, key=lambda moment: sum(moment.values())), host


def estimate(model: Architecture, setting: Setting) -> Estimate:
    """The GPU memory of one step of a stage."""
    tensors = model.lora_tensors(setting.rank)
    changing, host = peak(model, setting, setting.forwards())
    largest = 2 * setting.micro_batch * setting.length * model.intermediate
    # linear layers in NF4 or 16 bits, everything else in 16 bits
    saved = sum((2 * out * into - nf4_bytes(out * into)) * n for (out, into), n in model.linears.items())
    parts = {
        "weights": 2 * model.parameters - saved * setting.four_bit,
        "adapter": 4 * sum(tensors),
        "gradients": 4 * sum(tensors),
        "optimizer": optimizer_bytes(tensors, 8),
        **changing,
        "allowance": CONTEXT + max(CACHED, largest),
    }
    return Estimate(parts, host)


def estimate_on_cpu(model: Architecture, setting: Setting) -> Estimate:
    """A rough estimate of RAM without a GPU: every layer is kept.

    For each layer, autograd saves the inputs and outputs of the norms; q, k, v and the attention's output; gate, up, their
    product and its factor; and the output of every LoRA's A. In bfloat16 the norms still have float32 inputs.
    """
    parts, tensors = estimate(model, setting).parts, model.lora_tensors(setting.rank)
    element = 2 if model.bf16_on_cpu else 4  # bytes
    hidden = (6 if model.bf16_on_cpu else 4) * model.hidden
    kept = model.layers * (hidden + 4 * (model.query + model.intermediate))
    kept += model.adapted.total() * setting.rank + 3 * model.layers * model.scored_heads * setting.length
    activations = round(HEAP * element * kept * sum(tokens for tokens, _ in setting.forwards()))
    changed = {"weights": element * model.parameters, "optimizer": optimizer_bytes(tensors, 32)}
    return Estimate(parts | changed | {"activations": activations, "layer": 0, "allowance": LIBRARIES})
