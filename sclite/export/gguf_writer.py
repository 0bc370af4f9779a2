"""Write a Llama with a SentencePiece vocabulary as a GGUF, without llama.cpp's converter and without a download.

The result equals that of convert_hf_to_gguf.py, as a test checks. Other models are not supported.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.errors import DataError
from sclite.export.tensors import Tensors, read_json

if TYPE_CHECKING:
    import gguf


def is_plain_llama(folder: Path) -> bool:
    """Whether `write_gguf` can write this model: a Llama with tokenizer.model, no scaled rotary embedding and no biases."""
    config = read_json(folder / "config.json")
    if config.get("architectures") != ["LlamaForCausalLM"] or not (folder / "tokenizer.model").is_file():
        return False
    rope = _rope(config)
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return not (scaled or config.get("attention_bias") or config.get("mlp_bias"))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings of transformers 5 (rope_parameters) or 4 (rope_theta, rope_scaling)."""
    old = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    return config.get("rope_parameters") or old


def write_gguf(folder: Path, out: Path, *, outtype: str = "f16", title: str = "") -> Path:
    """Write a plain Llama to the GGUF `out` (f32 or f16; norms are always f32). Returns `out`, which is complete or absent.

    `title`: the model's name in it (default: the folder's). Raises DataError for a tensor that Llamas do not have.
    """
    import gguf

    config, half = read_json(folder / "config.json"), outtype == "f16"
    part = out.with_name(out.name + ".part")
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(title or folder.resolve().name)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, folder, config["vocab_size"])
    tensors, names = Tensors(folder), gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name in tensors:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if (target := names.get_name(name, try_suffixes=(".weight",))) is None:
            raise DataError(f"unknown tensor {name}", "use llama.cpp's converter (SCLITE_LLAMA_CPP)")
        tensor = tensors[name]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # each head's rows from transformers' layout (two halves) to llama.cpp's (pairs)
            halves = tensor.unflatten(0, (heads if name.endswith("q_proj.weight") else kv_heads, 2, -1))
            tensor = halves.swapaxes(1, 2).flatten(0, 2)
        writer.add_tensor(target, (tensor.half() if half and tensor.ndim > 1 else tensor.float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.replace(out)


def _add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Tokens, scores and types from tokenizer.model; special ids and the chat template from the files next to it."""
    import gguf
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens, scores = [f"[PAD{i}]" for i in range(size)], [-10000.0] * size
    types = [gguf.TokenType.UNUSED] * size
    checks = {"UNKNOWN": model.is_unknown, "CONTROL": model.is_control, "UNUSED": model.is_unused}
    checks["BYTE"] = model.is_byte
    for i in range(min(size, model.get_piece_size())):
        tokens[i], scores[i] = model.id_to_piece(i), model.get_score(i)
        types[i] = gguf.TokenType[next((name for name, check in checks.items() if check(i)), "NORMAL")]
    settings = read_json(folder / "tokenizer_config.json")
    for key, token in settings.get("added_tokens_decoder", {}).items():
        i, text = int(key), token["content"]
        if i < size:
            control = token.get("special") or (text.startswith("<|") and text.endswith("|>"))
            tokens[i] = text if control else text.replace("▁", " ")
            scores[i] = -1000.0
            types[i] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    if settings.get("add_prefix_space") is not None:
        writer.add_add_space_prefix(settings["add_prefix_space"])
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, n_vocab=size)
    special.add_to_gguf(writer, quiet=True)
