"""Whether a training step fits on the card: its bytes, part by part, from the student's geometry and the settings alone.

Weights, LoRA and optimizer are exact. Activations are counted from what the code keeps: under gradient checkpointing the
input of every layer, and one layer at a time in full; of the vocabulary only the positions that carry loss
(sclite/student/forward.py). The peak is the larger of two moments, of the backward pass through the head and of that
through the last layer. On an H100 and an H200 the sum came within 6 % of torch's peak at thirteen settings: 7B and 8B
geometry, SFT and DPO, one to four rows of 2,048 and 4,096 tokens and one row of 76,032 and 55,232, with Unsloth (-6 to 1 %) and
without (-2 to 6 %).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sclite.student.forward import chunk_of
from sclite.train.geometry import Geometry

Forward = tuple[int, int]
"""(tokens, tokens that carry loss) of one forward pass of a step."""

NF4_BLOCK, NESTED_BLOCK = 64, 256
NF4_TABLES = 4 * (16 + 256 + 1)
"""Bytes of each quantised weight's code tables (16 and 256 float32) and its offset (one)."""
MIN_8BIT, STATE_BLOCK, STATE_TABLES = 4096, 256, 2 * 256 * 4
"""bitsandbytes: smaller tensors keep 32-bit states; weights per absmax; bytes of the two tables that all share."""

LOSS_SHARE = {"sft": 0.9, "warm": 0.5, "dpo": 0.15}
"""Of the tokens of a row at its longest: a solution after a short prompt; a review after the attempt that it is about; a
cause with its correction after both. Means over a run's rows would say too little, for memory is asked by the longest."""
DECISIONS = 8  # per attempt, in DPO

KEPT, BACKWARD = 4, 8
"""Bytes per position with loss and vocabulary entry: the float32 log-probabilities that wait for the backward pass; there,
their gradient and that of the logits beside them. A cap on the logits keeps its tanh as well. Where the positions go
through the head in chunks, nothing waits and one chunk at a time is whole."""

CONTEXT = 700_000_000
"""Bytes of the CUDA context, the loaded kernels and cuBLAS's workspace: reckoned from what several processes took together."""
CACHED = 800_000_000
"""Bytes that the allocator holds beyond what is in use, at least: 0.3 to 0.84 GB at those settings, more with neither rows
nor size. With rows so long that they fill a card it is the largest tensor of a layer, for which no freed block is large
enough: a row of 83,392 tokens, reckoned to fit into 24 GB with CACHED alone, did not; at 76,032 the allocator held 1.87 GB
more than was in use, of 2.18 GB reckoned so."""


@dataclass(frozen=True)
class Copies:
    """16-bit numbers alive per token while one layer goes backward, in widths of its parts.

    `buffers` are 16-bit copies of the largest weight, made when its 4 bits are unpacked.
    """

    hidden: int
    query: int
    keys: int
    middle: int
    buffers: int
    outside: int  # in hidden widths, per forward pass: the final norm's input and output


COPIES = {
    # Unsloth's kernels: the first norm's output, the sum after the attention, the layer's output and its gradient (the
    # second norm's output has been overwritten by then: rows that fill a card showed four); q, k, v and the attention's
    # output; of the MLP gate, up and the gradient that takes their place
    "unsloth": Copies(hidden=4, query=2, keys=2, middle=3, buffers=2, outside=2),
    # PyTorch and peft under autocast: what they keep was measured on a CPU by tests/train/test_memory.py, which holds
    # the sum to 5 %; k and v are counted in `query`, repeated to all heads
    "plain": Copies(hidden=12, query=5, keys=0, middle=7, buffers=1, outside=3),
}


@dataclass(frozen=True)
class Setting:
    """One training stage: "sft", "warm" or "dpo". `micro_batch` counts rows of a forward pass, in DPO bundles.

    A `loss_share` of None is the stage's usual one. With `replay` a DPO step has a solved row beside each bundle.
    """

    stage: str
    micro_batch: int
    length: int
    rank: int
    loss_share: float | None = None
    replay: bool = True
    four_bit: bool = True
    backend: str = "unsloth"
    optimizer_bits: int = 8

    def forwards(self) -> list[Forward]:
        """The forward passes of one step, in their order; all rows at full length."""
        share = LOSS_SHARE[self.stage] if self.loss_share is None else self.loss_share
        tokens = self.micro_batch * self.length
        carried = round(share * tokens)
        if self.stage != "dpo":
            return [(tokens, carried)]
        solved = [(tokens, round(LOSS_SHARE["sft"] * tokens))] if self.replay else []
        return [(tokens, carried + DECISIONS * self.micro_batch), (tokens, carried), *solved]


@dataclass(frozen=True)
class Estimate:
    """Bytes on the card at the peak of a step, by part; `host` are those of page-locked memory beside it."""

    parts: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` should say: without the allowance."""
        return self.total - self.parts["allowance"]


# -- what does not change during a step ----------------------------------------------------------------------------


def nf4_bytes(weights: int) -> int:
    """Of one weight in NF4 with double quantisation, as bitsandbytes stores it."""
    blocks = _blocks(weights, NF4_BLOCK)
    return _blocks(weights, 2) + blocks + 4 * _blocks(blocks, NESTED_BLOCK) + NF4_TABLES


def weight_bytes(geometry: Geometry, four_bit: bool) -> int:
    """Of the base model: linear layers in NF4 or in 16 bits, everything else in 16 bits."""
    other = geometry.parameters - geometry.linear_weights
    if not four_bit:
        return 2 * geometry.parameters
    return 2 * other + sum(nf4_bytes(linear.weights) * linear.count for linear in geometry.linears)


def adapter_bytes(geometry: Geometry, rank: int) -> int:
    """Of the LoRA factors in float32; as many again for their gradients."""
    return 4 * sum(geometry.lora_tensors(rank))


def optimizer_bytes(tensors: Iterable[int], bits: int) -> int:
    """Of AdamW's two states for tensors of these sizes: in float32, or in blocks of 8 bits with their absmax."""
    if bits == 32:
        return 8 * sum(tensors)
    sizes = list(tensors)
    small = sum(8 * size for size in sizes if size < MIN_8BIT)
    large = [size for size in sizes if size >= MIN_8BIT]
    return (
        small + sum(2 * size + 8 * _blocks(size, STATE_BLOCK) for size in large) + STATE_TABLES * bool(large)
    )


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


# -- what does -----------------------------------------------------------------------------------------------------


def layer_bytes(geometry: Geometry, tokens: int, four_bit: bool, backend: str) -> int:
    """Of one layer's backward pass after its recomputation, for so many tokens."""
    copies = COPIES[backend]
    query, keys = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    widths = copies.hidden * geometry.hidden + copies.query * query + copies.keys * keys
    widths += copies.middle * geometry.intermediate
    if geometry.query_key_norms:
        widths += (2 if backend == "plain" else 1) * (
            query + keys
        )  # their inputs, in float32 on the plain path
    largest = max(linear.weights for linear in geometry.linears)
    unpacked = copies.buffers * 2 * largest + 4 * _blocks(largest, NF4_BLOCK) if four_bit else 0
    return 2 * tokens * widths + unpacked


def saved_bytes(geometry: Geometry, tokens: int, backend: str) -> tuple[int, int]:
    """(on the card, in the host's memory) of what a forward pass keeps for its backward pass, without the head.

    Unsloth moves the layers' inputs to the host; what it needs to bring them back is `returning_bytes`.
    """
    one = 2 * tokens * geometry.hidden
    outside = COPIES[backend].outside * one
    if backend == "unsloth":
        return outside, geometry.layers * one
    return outside + geometry.layers * one, 0


def returning_bytes(geometry: Geometry, tokens: int, backend: str) -> int:
    """Of the layers' inputs on the card in a backward pass through Unsloth: the last one, which stays there, and two buffers.

    They serve all forward passes of a step and are as large as the longest asks (unsloth_zoo.gradient_checkpointing).
    """
    return min(3, geometry.layers) * 2 * tokens * geometry.hidden if backend == "unsloth" else 0


def peak(
    geometry: Geometry, forwards: Sequence[Forward], four_bit: bool, backend: str
) -> tuple[dict[str, int], int]:
    """({"activations", "logits", "layer"} in bytes at the peak of a step, bytes in the host's memory).

    The passes go backward in reverse order, each freeing what it kept, while those before it still wait.
    """
    capped = 2 if geometry.logit_cap else 1
    saved = [saved_bytes(geometry, tokens, backend) for tokens, _ in forwards]
    returning = returning_bytes(geometry, max(tokens for tokens, _ in forwards), backend)
    chunk = chunk_of(geometry.vocabulary)
    heads = [capped * geometry.vocabulary * min(carried, chunk) for _, carried in forwards]
    kept = [KEPT * head * (carried <= chunk) for head, (_, carried) in zip(heads, forwards, strict=True)]
    moments = []
    for last, (tokens, _) in enumerate(forwards):
        activations = sum(card for card, _ in saved[: last + 1]) + returning
        waiting = sum(kept[:last])
        layer = layer_bytes(geometry, tokens, four_bit, backend)
        at_head = waiting + (KEPT + BACKWARD) * heads[last]
        moments.append({"activations": activations, "logits": at_head, "layer": 0})
        moments.append({"activations": activations, "logits": waiting, "layer": layer})
    return max(moments, key=lambda moment: sum(moment.values())), sum(host for _, host in saved)


def largest_tensor(geometry: Geometry, setting: Setting) -> int:
    """Bytes of the largest that a layer makes: the middle of its MLP, for all tokens of a forward pass."""
    return 2 * setting.micro_batch * setting.length * geometry.intermediate


def estimate(geometry: Geometry, setting: Setting) -> Estimate:
    """What one step of a stage takes."""
    tensors = geometry.lora_tensors(setting.rank)
    adapter = adapter_bytes(geometry, setting.rank)
    changing, host = peak(geometry, setting.forwards(), setting.four_bit, setting.backend)
    parts = {
        "weights": weight_bytes(geometry, setting.four_bit),
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": optimizer_bytes(tensors, setting.optimizer_bits),
        **changing,
        "allowance": CONTEXT + max(CACHED, largest_tensor(geometry, setting)),
    }
    return Estimate(parts, host)


# -- what fits -----------------------------------------------------------------------------------------------------

SHORTEST, STEP = 256, 64
"""Tokens: below the first nothing worth training fits into a row; lengths are told in multiples of the second."""


@dataclass(frozen=True)
class Choice:
    """A setting for the free memory. `fits` None: the free memory is unknown, and the wanted setting stands.

    `fits` False: this is the largest setting that would fit; where `setting` is None, none does.
    """

    fits: bool | None
    setting: Setting | None
    accumulation: int
    verdict: str


def largest_length(geometry: Geometry, setting: Setting, free_bytes: int) -> int | None:
    """The most tokens per row that fit, a multiple of STEP, at most the model's positions; None where SHORTEST do not."""
    low, high = SHORTEST // STEP, (geometry.max_positions or 1 << 20) // STEP
    if high < low or not _fits(geometry, replace(setting, length=SHORTEST), free_bytes):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if _fits(geometry, replace(setting, length=middle * STEP), free_bytes):
            low = middle
        else:
            high = middle - 1
    return low * STEP


def largest_rank(geometry: Geometry, setting: Setting, free_bytes: int) -> int | None:
    """The rank, halved until it fits; None where rank 1 does not."""
    rank = setting.rank
    while rank and not _fits(geometry, replace(setting, rank=rank), free_bytes):
        rank //= 2
    return rank or None


def choose(geometry: Geometry, wanted: Setting, batch: int, free_bytes: int | None) -> Choice:
    """The largest micro-batch up to the wanted one that fits, as a power of two that divides the batch.

    Where one row does not fit, the longest rows that do; where none do, the highest rank at which short ones would.
    """
    sizes = [
        1 << k for k in range(batch.bit_length()) if batch % (1 << k) == 0 and 1 << k <= wanted.micro_batch
    ]
    if free_bytes is None:
        return Choice(None, replace(wanted, micro_batch=sizes[-1]), batch // sizes[-1], "no card to fit on")
    for size in reversed(sizes):
        setting = replace(wanted, micro_batch=size)
        if _fits(geometry, setting, free_bytes):
            return Choice(True, setting, batch // size, "fits")
    one = replace(wanted, micro_batch=1)
    if length := largest_length(geometry, one, free_bytes):
        return Choice(
            False, replace(one, length=length), batch, f"{length} tokens would fit, {wanted.length} do not"
        )
    short = replace(one, length=SHORTEST)
    if rank := largest_rank(geometry, short, free_bytes):
        told = f"rank {rank} with {SHORTEST} tokens would fit, rank {wanted.rank} does not"
        return Choice(False, replace(short, rank=rank), batch, told)
    needed = estimate(geometry, replace(short, rank=1)).total
    return Choice(
        False,
        None,
        batch,
        f"nothing fits: {needed / 1e9:.1f} GB at the least, {free_bytes / 1e9:.1f} GB are free",
    )


def _fits(geometry: Geometry, setting: Setting, free_bytes: int) -> bool:
    return estimate(geometry, setting).total <= free_bytes
