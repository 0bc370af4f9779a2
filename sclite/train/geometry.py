"""The shape of a student, read from its config.json alone: every linear layer, and what else holds parameters.

Exact for the families in FAMILIES, as the tests compare with `torch`. An unknown family with the usual keys is taken for
a Llama and says so in `rough`; one with experts is refused, for its memory follows other rules.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sclite.config import Student
from sclite.errors import DataFault
from sclite.student.load import model_name, no_model


@dataclass(frozen=True)
class Linear:
    """`count` linear layers of one shape. LoRA is put on all of them."""

    name: str
    rows: int  # features out
    columns: int  # features in
    count: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Weights of one of them, without its bias."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Geometry:
    """What the memory model needs to know of a decoder. Counts are of parameters, lengths of tokens."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    query_key_norms: bool
    max_positions: int | None
    linears: tuple[Linear, ...]
    norms: int  # weights of all norms, and the small tensors of linear attention
    logit_cap: bool = False
    rough: str = ""  # why an estimate from this is rough; empty where it is not

    @property
    def linear_weights(self) -> int:
        """The weights that QLoRA keeps in 4 bits."""
        return sum(linear.weights * linear.count for linear in self.linears)

    @property
    def biases(self) -> int:
        return sum(linear.rows * linear.count for linear in self.linears if linear.bias)

    @property
    def embeddings(self) -> int:
        """The embedding, and the head where it is another matrix."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.linear_weights + self.biases + self.embeddings + self.norms

    def lora_tensors(self, rank: int) -> list[int]:
        """The sizes of all LoRA factors at this rank: A [rank, columns] and B [rows, rank] of each layer."""
        return [
            size
            for linear in self.linears
            for size in (rank * linear.columns, linear.rows * rank) * linear.count
        ]


@dataclass(frozen=True)
class Family:
    """What a family's layers have that its config.json may not say."""

    attention_bias: str = "attention_bias"  # "qkv": always there; else the key that says so for q, k, v and o
    query_key_norms: bool = False
    norms_per_layer: int = 2
    tied: bool = False  # where the configuration does not say


FAMILIES = {
    "llama": Family(),
    "mistral": Family(attention_bias=""),
    "qwen2": Family(attention_bias="qkv"),
    "qwen3": Family(query_key_norms=True),
    "qwen3_5_text": Family(query_key_norms=True),
    "gemma2": Family(norms_per_layer=4, tied=True),
    "gemma3_text": Family(query_key_norms=True, norms_per_layer=4, tied=True),
}
_OTHER_NAMES = {"qwen3_5": "qwen3_5_text", "gemma3": "gemma3_text"}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def geometry(config: Mapping[str, Any]) -> Geometry:
    """The geometry that a config.json describes.

    Raises DataFault where it lacks a size that every decoder has, or has experts.
    """
    text = {**config, **config["text_config"]} if config.get("text_config") else dict(config)
    name = text.get("model_type") or config.get("model_type") or "unknown"
    name = _OTHER_NAMES.get(name, name)
    if experts := next((key for key in _EXPERTS if text.get(key)), None):
        raise DataFault(
            f"{name}: a mixture of experts ({experts} = {text[experts]}) is not in the memory model",
            "choose a dense student, or train without --plan",
        )
    if missing := [key for key in _NEEDED if not text.get(key)]:
        raise DataFault(
            f"the configuration of this {name} model names no {', '.join(missing)}",
            "its memory cannot be reckoned: choose another student, or train without --plan",
        )
    family = FAMILIES.get(name, Family())
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    kv_heads = text.get("num_key_value_heads") or heads
    linear_layers = _linear_attention_layers(text, name)
    tied = text.get("tie_word_embeddings")
    return Geometry(
        family=name,
        hidden=text["hidden_size"],
        intermediate=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=text["vocab_size"],
        tied=family.tied if tied is None else bool(tied),
        query_key_norms=family.query_key_norms,
        max_positions=text.get("max_position_embeddings"),
        linears=_linears(text, family, linear_layers, heads * head_dim, kv_heads * head_dim),
        norms=_norms(text, family, linear_layers, head_dim),
        logit_cap=bool(text.get("final_logit_softcapping")),
        rough=_why_rough(config, name, linear_layers),
    )


def _linear_attention_layers(text: Mapping[str, Any], name: str) -> int:
    """How many layers have linear attention (Qwen3.5: all but every fourth)."""
    if name != "qwen3_5_text":
        return 0
    layers = text["num_hidden_layers"]
    if text.get("layer_types"):
        return sum(kind != "full_attention" for kind in text["layer_types"])
    return layers - layers // (text.get("full_attention_interval") or 4)


def _linears(
    text: Mapping[str, Any], family: Family, linear_layers: int, query: int, keys: int
) -> tuple[Linear, ...]:
    """The linear layers by shape."""
    hidden, middle, layers = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    full = layers - linear_layers
    of_all = family.attention_bias not in ("", "qkv") and bool(text.get(family.attention_bias))
    inner = family.attention_bias == "qkv" or of_all
    in_mlp = bool(text.get("mlp_bias"))
    gated = 2 if linear_layers else 1  # Qwen3.5: q_proj also gives the gate of the attention's output
    shapes = [
        ("q_proj", gated * query, hidden, full, inner),
        ("k_proj", keys, hidden, full, inner),
        ("v_proj", keys, hidden, full, inner),
        ("o_proj", hidden, query, full, of_all),
        ("gate_proj", middle, hidden, layers, in_mlp),
        ("up_proj", middle, hidden, layers, in_mlp),
        ("down_proj", hidden, middle, layers, in_mlp),
    ]
    if linear_layers:
        key_dim, value_dim, value_heads = _delta_net(text)
        shapes += [
            ("in_proj_qkv", 2 * key_dim + value_dim, hidden, linear_layers, False),
            ("in_proj_z", value_dim, hidden, linear_layers, False),
            ("in_proj_b", value_heads, hidden, linear_layers, False),
            ("in_proj_a", value_heads, hidden, linear_layers, False),
            ("out_proj", hidden, value_dim, linear_layers, False),
        ]
    return tuple(Linear(*shape) for shape in shapes)


def _delta_net(text: Mapping[str, Any]) -> tuple[int, int, int]:
    """(width of the keys, of the values, number of value heads) of Qwen3.5's linear attention."""
    value_heads = text.get("linear_num_value_heads", 32)
    keys = text.get("linear_num_key_heads", 16) * text.get("linear_key_head_dim", 128)
    return keys, value_heads * text.get("linear_value_head_dim", 128), value_heads


def _norms(text: Mapping[str, Any], family: Family, linear_layers: int, head_dim: int) -> int:
    """Weights of all norms; with linear attention also its convolution, its decay and its own norm."""
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    found = hidden + layers * family.norms_per_layer * hidden
    if family.query_key_norms:
        found += (layers - linear_layers) * 2 * head_dim
    if linear_layers:
        keys, values, heads = _delta_net(text)
        convolution = (2 * keys + values) * text.get("linear_conv_kernel_dim", 4)
        found += linear_layers * (convolution + 2 * heads + text.get("linear_value_head_dim", 128))
    return found


def _why_rough(config: Mapping[str, Any], name: str, linear_layers: int) -> str:
    if name not in FAMILIES:
        return f"{name} is unknown to the memory model and taken for a Llama"
    if linear_layers:
        return f"the working set of {linear_layers} layers of linear attention is a guess"
    if name == "gemma3_text" and config.get("text_config"):
        return "the image part of the model, which is loaded too, is not counted"
    quantisation = config.get("quantization_config") or {}
    kept = [m for m in quantisation.get("llm_int8_skip_modules") or () if "layers." in m]
    return f"{len(kept)} parts of this checkpoint are kept in 16 bits" if kept else ""


def read_geometry(student: Student) -> Geometry:
    """The geometry of the configured student; of a hub model its config.json alone is fetched, into the hub's cache.

    Raises UsageFault where no student is configured, DataFault where its configuration cannot be had, NetworkFault where
    the hub is out of reach.
    """
    name = model_name(student)
    path = Path(name) / "config.json"
    path = path if path.is_file() else _fetch(name)
    try:
        return geometry(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataFault(f"{path}: {error}", "check student.model") from error


def _fetch(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # the last of its retries is told as a fault
    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise no_model(f"the configuration of {name} cannot be fetched", error) from error
    finally:
        logger.setLevel(before)
