"""The shape of every recipe's model, as in its config.json."""

import functools

LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "num_attention_heads": 32}
QWEN3["num_key_value_heads"] = 8
QWEN_MATH_7B = {
    "model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
RECIPES = {
    "qwen2.5-math-7b": QWEN_MATH_7B,
    "llama-3.1-8b": {
        **LLAMA, "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    },
    "deepseek-math-7b": {
        **LLAMA, "vocab_size": 102_400, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 30,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    },
    "qwen3-4b": {
        **QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "max_position_embeddings": 262_144, "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **QWEN3, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
        "max_position_embeddings": 40_960, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""By recipe name in examples/recipes."""

SMALL = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512,
}  # fmt: skip
OTHERS = {
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, **SMALL},
    "gemma2": {"model_type": "gemma2", "final_logit_softcapping": 30.0, **SMALL},
    "gemma3_text": {"model_type": "gemma3_text", **SMALL},
    "llama with biases": {
        "model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, **SMALL,
    },
    "qwen3_5": {
        "model_type": "qwen3_5_text", "tie_word_embeddings": False, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32, **SMALL,
    },
}  # fmt: skip
"""Small models of the other families that the memory model supports."""


def config_of(shape: dict):
    """The transformers configuration of a config.json."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**shape)


@functools.cache
def recipe_architecture(name: str):
    """The architecture of a recipe's model, as the memory estimate reads it."""
    from sclite.train.memory import architecture

    return architecture(config_of(RECIPES[name]))
