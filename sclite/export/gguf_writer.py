"""GGUF from a Llama with a SentencePiece vocabulary, written here: no converter, no download.

Does what llama.cpp's convert_hf_to_gguf.py does for such a folder (a test compares the two); anything else is refused.
"""

from pathlib import Path

from sclite.errors import DataError, UsageError
from sclite.export.tensors import Tensors, read_json

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}


def can_write(folder: Path) -> bool:
    """Is this a plain Llama with tokenizer.model, which `write` knows?"""
    return not _obstacle(folder)


def _obstacle(folder: Path) -> str:
    shape = read_json(folder / "config.json")
    if shape.get("architectures") != ["LlamaForCausalLM"]:
        return f"the architecture is {shape.get('architectures')}"
    if not (folder / "tokenizer.model").is_file():
        return "there is no tokenizer.model"
    if _rope(shape).get("rope_type", _rope(shape).get("type", "default")) != "default":
        return "its rotary embedding is scaled"
    if shape.get("attention_bias") or shape.get("mlp_bias"):
        return "it has biases"
    return ""


def _rope(shape: dict) -> dict:
    """Rotary settings, where transformers 5 (rope_parameters) and 4 (rope_theta, rope_scaling) keep them."""
    old = {"rope_theta": shape.get("rope_theta", 10000.0), **(shape.get("rope_scaling") or {})}
    return shape.get("rope_parameters") or old


def write(folder: Path, out: Path, *, outtype: str = "f16", name: str | None = None) -> Path:
    """Write the model in `folder` to the GGUF `out` (f32, f16 or bf16; norms are always f32). Returns `out`.

    The file appears whole or not at all. Raises DataFault when the folder is not a plain Llama with tokenizer.model,
    UsageFault for another outtype.
    """
    import gguf

    if outtype not in FILE_TYPES:
        raise UsageError(f"outtype is {outtype!r}", f"use one of {', '.join(FILE_TYPES)}")
    obstacle = _obstacle(folder)
    if obstacle:
        raise DataError(
            f"cannot write {folder} directly: {obstacle}", "use llama.cpp's converter (SCLITE_LLAMA_CPP)"
        )
    shape = read_json(folder / "config.json")
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name or folder.resolve().name)
    _add_shape(writer, shape, FILE_TYPES[outtype])
    _add_vocabulary(writer, folder, shape["vocab_size"])
    tensors = Tensors(folder)
    for tensor in tensors:
        _add_tensor(writer, tensor, tensors[tensor], shape, outtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.replace(out)


def _add_shape(writer, shape: dict, file_type: int) -> None:
    import gguf

    heads = shape["num_attention_heads"]
    head = shape.get("head_dim") or shape["hidden_size"] // heads
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shape.get("num_key_value_heads") or heads)
    writer.add_rope_freq_base(_rope(shape)["rope_theta"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_file_type(file_type)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_rope_dimension_count(head)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer, folder: Path, size: int) -> None:
    """Tokens, scores and kinds from tokenizer.model; special ids and the chat template from the files beside it."""
    import gguf
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    kinds = gguf.TokenType
    tokens = [model.id_to_piece(i) if i < model.get_piece_size() else f"[PAD{i}]" for i in range(size)]
    scores = [model.get_score(i) if i < model.get_piece_size() else -10000.0 for i in range(size)]
    types = [_kind(model, i, kinds) if i < model.get_piece_size() else kinds.UNUSED for i in range(size)]
    settings = read_json(folder / "tokenizer_config.json")
    for key, token in settings.get("added_tokens_decoder", {}).items():
        i, text = int(key), token["content"]
        if i < size:
            control = token.get("special") or (text.startswith("<|") and text.endswith("|>"))
            tokens[i] = text if control else text.replace("▁", " ")
            scores[i], types[i] = -1000.0, kinds.CONTROL if control else kinds.USER_DEFINED
    if settings.get("add_prefix_space") is not None:
        writer.add_add_space_prefix(settings["add_prefix_space"])
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    _add_special(writer, settings, {token: i for i, token in enumerate(tokens)})
    template = folder / "chat_template.jinja"
    source = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if source:
        writer.add_chat_template(source)


def _kind(model, token: int, kinds):
    if model.is_unknown(token):
        return kinds.UNKNOWN
    if model.is_control(token):
        return kinds.CONTROL
    if model.is_unused(token):
        return kinds.UNUSED
    return kinds.BYTE if model.is_byte(token) else kinds.NORMAL


def _add_special(writer, settings: dict, ids: dict[str, int]) -> None:
    adders = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for kind, add in adders.items():
        token = settings.get(f"{kind}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token in ids:
            add(ids[token])
    for kind, add in (("bos", writer.add_add_bos_token), ("eos", writer.add_add_eos_token)):
        if settings.get(f"add_{kind}_token") is not None:
            add(settings[f"add_{kind}_token"])


def _add_tensor(writer, name: str, tensor, shape: dict, outtype: str) -> None:
    import gguf
    import torch

    module = name.removesuffix(".weight")
    heads = shape["num_attention_heads"]
    if module in TOP:
        target = TOP[module]
    else:
        layer, _, inner = module.removeprefix("model.layers.").partition(".")
        if inner not in NAMES:
            if inner.endswith("rotary_emb.inv_freq"):
                return
            raise DataError(f"unknown tensor {name}", "use llama.cpp's converter (SCLITE_LLAMA_CPP)")
        target = f"blk.{layer}.{NAMES[inner]}"
    if module.endswith(("q_proj", "k_proj")):
        groups = shape.get("num_key_value_heads") or heads
        tensor = interleave_rotary(tensor, heads if module.endswith("q_proj") else groups)
    data = tensor.to(torch.float32).numpy()
    if data.ndim == 1 or outtype == "f32":
        writer.add_tensor(f"{target}.weight", data)
    elif outtype == "f16":
        writer.add_tensor(f"{target}.weight", data.astype("float16"))
    else:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(f"{target}.weight", gguf.quants.quantize(data, kind), raw_dtype=kind)


def interleave_rotary(tensor, heads: int):
    """Rows of each head from the order of transformers (first halves, second halves) to llama.cpp's (pairs)."""
    rows, columns = tensor.shape
    return (
        tensor.reshape(heads, 2, rows // heads // 2, columns)
        .swapaxes(1, 2)
        .reshape(rows, columns)
        .contiguous()
    )
