"""Load the trainable student: through Unsloth on a CUDA GPU, through plain transformers and PEFT elsewhere."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sclite import prompts
from sclite.config import Config, Student, TrainingStage
from sclite.errors import DataError, DeviceError, NetworkError, UsageError
from sclite.student.adapters import check_adapter, load_adapter, lora_targets, meta_model
from sclite.student.backends import OWN_KERNELS, disable_dropout, load_plain, load_unsloth
from sclite.student.cuda_memory import cuda_failure, has_driver, is_out_of_memory
from sclite.student.tokenization import end_id, is_ignored, prompt_ids

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).resolve().parent.parent / "quickstart" / "student"
"""The folder of the embedded student, shipped in the package."""
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


def model_name(student: Student) -> str:
    """The Hub ID or folder of the base model. Raises UsageError if none is set, DataError if a folder is missing."""
    if not student.model:
        hint = "add a Hub ID or a folder, for example --set student.model=Qwen/Qwen2.5-1.5B-Instruct"
        raise UsageError("no student is configured", hint)
    if student.model == EMBEDDED:
        return str(EMBEDDED_FOLDER)
    path = Path(student.model)
    if (path / "config.json").is_file():
        return str(path)
    if student.model.startswith((".", "/", "~")):
        hint = "use the folder of a Hugging Face model, or a Hub ID"
        raise DataError(f"student.model: {path} has no config.json", hint)
    return student.model


def fetch_model(name: str) -> Path:
    """The local folder of a model by path or Hub ID; a Hub model is downloaded into the Hub's own cache.

    Raises DataError for one without safetensors, before it is trained: it could not be merged.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        copies = ["consolidated*", "original/*"]  # the same weights in their author's format
        with _model_errors(f"the student {name} cannot be downloaded", OSError):
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=copies))
    if not any(folder.glob("*.safetensors")):
        hint = "load it with transformers, call save_pretrained(), and set student.model to that folder"
        raise DataError(f"{name} has no weights as safetensors", hint)
    return folder


@contextmanager
def _model_errors(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds, and the Hub client's, into NetworkError if the Hub is unreachable, else into DataError."""
    import httpx
    from huggingface_hub.errors import LocalEntryNotFoundError

    unreachable = (LocalEntryNotFoundError, ConnectionError, TimeoutError, httpx.RequestError)
    expected: tuple[type[Exception], ...] = (*kinds, httpx.HTTPError)
    try:
        yield
    except expected as error:
        message = f"{what}: {(str(error) or type(error).__name__).splitlines()[0]}"
        for cause in (error, error.__cause__):  # transformers only says that it cannot load a file
            status = getattr(getattr(cause, "response", None), "status_code", 0)
            if isinstance(cause, unreachable) or status == 429 or status >= 500:
                hint = "check the connection, or set student.model to a folder with the model"
                raise NetworkError(message, hint) from error
        terms = "accept its terms on the Hub, then run `hf auth login` or set HF_TOKEN"
        raise DataError(message, terms if "gated repo" in str(error) else "check student.model") from error


def select_gpu(gpu: int | None) -> None:
    """Make one GPU of CUDA_VISIBLE_DEVICES the only visible one, None the first, before CUDA starts (DeviceError)."""
    visible, number = os.environ.get("CUDA_VISIBLE_DEVICES"), gpu or 0
    devices = [device.strip() for device in (visible or "").split(",") if device.strip()]
    if visible is None:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    elif number < len(devices):
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number]
    elif gpu is not None:
        message = f"--gpu {gpu} is out of range for CUDA_VISIBLE_DEVICES={visible} (numbering starts at 0)"
        hint = "unset CUDA_VISIBLE_DEVICES, or omit --gpu"
        raise DeviceError(message, hint)
    if gpu is None:
        return
    import torch

    if not torch.cuda.is_available():
        build = f": {cuda_failure()}" if torch.version.cuda else "; this PyTorch is a CPU build"
        hint = "omit --gpu to train on the first GPU, or on the CPU if there is none (small students only); "
        hint += "run `sclite doctor` for details"
        raise DeviceError(f"CUDA GPU {gpu} not found{build}", hint)


def select_backend(student: Student) -> str:
    """unsloth or plain. On a CUDA machine a missing Unsloth or an old driver is an error, never a silent slow run."""
    import torch

    if student.backend == "auto" and has_driver() and (why := cuda_failure()):
        hint = "update the NVIDIA driver, or install a PyTorch for the CUDA version that `nvidia-smi` shows; "
        raise DeviceError(
            f"CUDA cannot be initialized: {why}", f"{hint}--set student.backend=plain trains on the CPU"
        )
    if student.backend == "plain" or (student.backend == "auto" and not torch.cuda.is_available()):
        return "plain"
    if not torch.cuda.is_available():
        hint = "use --set student.backend=plain on a CPU"
        raise DeviceError("student.backend = unsloth needs a CUDA GPU", hint)
    if importlib.util.find_spec("unsloth") is None:
        hint = "pip install -e '.[cuda]' in sclite's checkout; or, slower, --set student.backend=plain"
        raise DeviceError("Unsloth is not installed", hint)
    return "unsloth"


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model; the pad token defaults to the end token, or else to the end of a turn."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with _model_errors(f"the student {name} cannot be loaded", OSError, ValueError, KeyError):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if is_ignored(tokenizer, name):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        end = tokenizer.eos_token_id
        tokenizer.pad_token_id = end_id(tokenizer) if end is None else end
    tokenizer.padding_side = "left"
    return tokenizer


def read_config(name: str) -> PretrainedConfig:
    """The transformers configuration of a model. Raises DataError if transformers does not know the architecture."""
    from transformers import AutoConfig

    with _model_errors(f"the student {name} cannot be loaded", OSError, ValueError, KeyError):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def check_quantization(quantized: Mapping[str, Any] | None, model: str | Path) -> None:
    """Raise DataError for weights that are stored quantized, except in 4 bits by bitsandbytes: they could not be merged."""
    method = (quantized or {}).get("quant_method")
    if quantized and not (method == "bitsandbytes" and quantized.get("load_in_4bit")):
        hint = "set student.model to the unquantized model"
        raise DataError(f"the weights of {model} are quantized ({method})", hint)


def check_tokenizer(tokenizer: Tokenizer, model_config: PretrainedConfig, name: str) -> None:
    """Raise DataError for a tokenizer with ids for which the model has no embedding.

    A special token that neither our prompts nor padding use may lack one: Gemma 3's 1B has such a token for images.
    """
    used = {tokenizer.eos_token_id, tokenizer.pad_token_id, end_id(tokenizer)}
    used.update(prompt_ids(tokenizer, prompts.solve_messages("1 + 1 = ?")))
    size = model_config.get_text_config().vocab_size
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= size}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if wrong := sorted(i for i in beyond if i not in special or i in used):
        raise DataError(
            f"the tokenizer of {name} has ids up to {max(beyond)} ({beyond[wrong[0]]!r} is {wrong[0]}), but the "
            f"model's embedding has only {size} rows",
            "use the tokenizer that was published with the model; or resize the model once with "
            "model.resize_token_embeddings(len(tokenizer)), save both, and set student.model to that folder",
        )


def load_student(
    config: Config, stage: str, adapter: Path | None = None, train: bool = False
) -> tuple[PreTrainedModel, Tokenizer]:
    """(model, tokenizer): the base with `adapter`, or with a new LoRA.

    Trainable weights are float32 whatever the type of the base, because AdamW's small steps vanish in bfloat16. The
    tokenizer is the model's own under either backend. Raises DataError or NetworkError if the model cannot be loaded or
    has fewer positions than `max_length`, DeviceError if it does not fit on the GPU.
    """
    import torch
    from peft import LoraConfig, PeftConfig

    settings, name = config.stage(stage), model_name(config.student)
    tokenizer, model_config = load_tokenizer(name), read_config(name)
    backend, most = select_backend(config.student), max_positions(model_config)
    if settings.max_length > most:
        hint = f"set max_length of [sft], [warmup] and [dpo] to {most} at most"
        raise DataError(f"max_length = {settings.max_length}: the student supports {most} positions", hint)
    check_quantization(getattr(model_config, "quantization_config", None), name)
    padding_free = is_padding_free(model_config, settings, backend)
    # PyTorch prefers cuDNN attention on Hopper and on data-center Blackwell GPUs. It builds a plan for every new length,
    # milliseconds of CPU time each: a third of a training step on an H200 with rows of all lengths. The flash kernel,
    # which other GPUs use anyway, needs no plan.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # On a CPU oneDNN caches the kernels of 1,024 shapes, and every row length is a shape: SmolLM2-135M grew from 3.1
    # to 5.5 GB in 59 steps.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if adapter is not None:
        check_adapter(adapter)
        lora = cast("LoraConfig", PeftConfig.from_pretrained(str(adapter)))
        lora.inference_mode, lora.lora_dropout = not train, 0.0
    else:
        targets = lora_targets(meta_model(model_config), config.lora.target_modules)
        lora = LoraConfig(
            r=config.lora.r, lora_alpha=config.lora.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"
        )
    try:
        with _model_errors(f"the student {name} cannot be loaded", OSError):
            if backend == "unsloth":
                length = min(most, max(settings.max_length, 8192))
                model = load_unsloth(fetch_model(name), config, model_config, lora, length)
            else:
                model = load_plain(name, config, model_config, lora)
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error) or "dispatched on the CPU" in str(error):
            raise DeviceError(
                f"the student {name} does not fit in GPU memory",
                "close other programs that use the GPU (`sclite train --plan` shows the memory needed), or choose a "
                "smaller student",
            ) from error
        raise
    student = cast("PeftModel", model)
    student.peft_config["default"].base_model_name_or_path = name
    if adapter is not None:
        load_adapter(student, adapter)
    if train:
        disable_dropout(model)
    if backend == "unsloth":
        from unsloth import FastLanguageModel

        (FastLanguageModel.for_training if train else FastLanguageModel.for_inference)(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.padding_free = padding_free  # type: ignore[assignment]  # read by `hidden_states`
    return model, tokenizer


def is_padding_free(model_config: PretrainedConfig, settings: TrainingStage, backend: str) -> bool:
    """Whether the rows of a batch are concatenated instead of padded.

    Not for layers that carry a state along the row, such as linear attention: it would leak into the next row. Nor for
    Unsloth's Gemma 2, whose rows attend to each other without flash attention.
    """
    text_config = model_config.get_text_config()
    stateful = any(kind not in ATTENTION for kind in getattr(text_config, "layer_types", None) or ())
    mixes = stateful or (backend == "unsloth" and text_config.model_type == "gemma2")
    if mixes and settings.padding_free:
        hint = "unset padding_free"
        raise DataError(f"padding_free = true: layers of {text_config.model_type} would mix the rows", hint)
    # without Unsloth's own decoder, concatenated rows need a full attention mask
    default = backend == "unsloth" and text_config.model_type in OWN_KERNELS
    return not mixes and (default if settings.padding_free is None else settings.padding_free)


def max_positions(model_config: PretrainedConfig) -> int:
    """The number of positions that a model supports."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None) or 1 << 20
