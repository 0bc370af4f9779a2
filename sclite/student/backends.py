"""The base model with a LoRA, from plain transformers and PEFT or from Unsloth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sclite.config import Config

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PretrainedConfig, PreTrainedModel

OWN_KERNELS = ("llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3")
"""Families for which Unsloth has its own decoder; it compiles the layers of others."""


def load_plain(
    name: str, config: Config, model_config: PretrainedConfig, lora: LoraConfig
) -> PreTrainedModel:
    """The model with a LoRA, from transformers and PEFT, on the GPU if there is one."""
    import torch
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    trained = not lora.inference_mode
    arguments: dict[str, Any] = {"dtype": cpu_training_dtype(model_config) if trained else torch.float32}
    if torch.cuda.is_available():
        arguments = {"dtype": half_dtype(), "device_map": {"": 0}}
        if config.student.load_in_4bit and getattr(model_config, "quantization_config", None) is None:
            arguments["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=half_dtype(),
            )
    arguments |= attention_of(model_config)
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **arguments)
    torch.manual_seed(config.seed)
    student = get_peft_model(model, lora)
    for module in student.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # at the first forward without gradients, bitsandbytes would repack the weight and break its backward pass
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    if trained and (torch.cuda.is_available() or next(model.parameters()).dtype.itemsize == 2):
        # The trainer autocasts inputs to 16 bits. PEFT would convert each to float32 first.
        for module in student.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False
    return cast("PreTrainedModel", student)


def load_unsloth(
    folder: Path, config: Config, model_config: PretrainedConfig, lora: LoraConfig, length: int
) -> PreTrainedModel:
    """The model with a LoRA, from Unsloth, which silently truncates rows of more than `length` tokens."""
    from transformers import AutoModelForCausalLM
    from unsloth import FastLanguageModel

    has_kernels = model_config.model_type in OWN_KERNELS
    model, _ = FastLanguageModel.from_pretrained(
        str(folder.resolve()),  # a Hub ID that ends in -bf16 would be loaded in 16 bits
        max_seq_length=length,
        load_in_4bit=config.student.load_in_4bit,
        dtype=None,
        device_map={"": 0},
        use_exact_model_name=True,  # otherwise Unsloth replaces a base with its own copy
        offload_embedding=False,
        fix_tokenizer=False,
        trust_remote_code=False,
        **({} if has_kernels else {"auto_model": AutoModelForCausalLM}),  # else not the export's class
    )
    targets = lora.target_modules or []
    if not isinstance(targets, str):
        # from a list, Unsloth drops full paths and unknown names, except for its own decoders
        targets = sorted(targets) if has_kernels else rf"(.*\.)?({'|'.join(map(re.escape, sorted(targets)))})"
    return FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=targets,
        target_parameters=[],  # the default includes those of experts, which cannot be merged
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=config.seed,
    )


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout of a model to 0: DPO's reference and the evaluation use none either (as in TRL)."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # 0.1 in Granite
            setattr(module, "attention_dropout", 0.0)  # noqa: B010


def attention_of(model_config: PretrainedConfig) -> dict[str, str]:
    """Which attention a model must be loaded with: PyTorch's fused one, the default, ignores the soft cap of Gemma 2."""
    capped = getattr(model_config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}


def half_dtype() -> torch.dtype:
    """The 16-bit type for computing on this GPU."""
    import torch

    # before Ampere it is emulated, without tensor cores
    able = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if able else torch.float16


def cpu_training_dtype(model_config: PretrainedConfig) -> torch.dtype:
    """The type of frozen weights when training on a CPU: bfloat16 if the checkpoint has it and the CPU multiplies it, else float32.

    SmolLM2-135M trains twice as fast with them and in two thirds of the memory (docs/training.md).
    """
    import torch

    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = able.get("avx512_bf16") or able.get("amx_bf16")
    return torch.bfloat16 if native and model_config.dtype == torch.bfloat16 else torch.float32
