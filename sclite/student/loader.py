"""Loading the student that is trained: through Unsloth on a CUDA card, through plain transformers and peft elsewhere."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from sclite.config import Config, Student, TrainingStage
from sclite.errors import DataError, DeviceError, NetworkError, ScliteError, UsageError
from sclite.student.adapters import add_adapter, check_adapter, load_adapter, new_lora_shape, read_lora_shape
from sclite.student.cuda_memory import is_out_of_memory

EMBEDDED = "embedded"
TAGS = (
    "<Step1>1\n<Key>1</Key>\n<Cause>1</Cause>\n<Correction>1</Correction>\n</Step1>\n"
    "<Generalized>1</Generalized>\n<Answer>1</Answer>"
)
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


def embedded_folder() -> Path:
    """The folder of the embedded student, shipped in the package."""
    return Path(__file__).resolve().parent.parent / "quickstart" / "student"


def model_name(student: Student) -> str:
    """The hub name or folder of the base model; raises UsageFault where none is configured, DataFault where a folder is missing."""
    if not student.model:
        raise UsageError(
            "no student is configured",
            "add a Hub ID or a folder, as in --set student.model=Qwen/Qwen2.5-1.5B-Instruct",
        )
    if student.model == EMBEDDED:
        return str(embedded_folder())
    path = Path(student.model).expanduser()
    if student.model.startswith((".", "/", "~")) and not (path / "config.json").is_file():
        raise DataError(
            f"student.model: {path} holds no config.json",
            "give a folder with a Hugging Face model, or a hub name",
        )
    return str(path) if (path / "config.json").is_file() else student.model


def fetch_base_model(student: Student) -> Path:
    """The base model's folder on this disk; a hub model is fetched into the hub's own cache."""
    return fetch_model(model_name(student))


def fetch_model(name: str) -> Path:
    """The folder of a model by path or Hub ID; as `fetch_base_model`."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise model_error(f"the student {name} cannot be fetched", error) from error


def model_error(what: str, error: BaseException) -> ScliteError:
    """The fault for a model that cannot be had: NetworkFault where the hub is out of reach, else DataFault."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    message, cause, unreached = f"{what}: {str(error).splitlines()[0]}", error, False
    while cause is not None and not unreached:
        unreached = isinstance(cause, (LocalEntryNotFoundError, ConnectionError))
        cause = cause.__cause__ or cause.__context__
    if unreached:
        return NetworkError(
            message, "check the connection, or name a folder that holds the model as student.model"
        )
    return DataError(message, "check student.model")


def select_gpu(gpu: int | None) -> None:
    """Make one card the only visible one, before anything of CUDA is touched; None is the first, where there is one.

    `gpu` counts the cards that CUDA_VISIBLE_DEVICES leaves visible. Raises DeviceFault where there is no such card.
    """
    visible, number = os.environ.get("CUDA_VISIBLE_DEVICES"), gpu or 0
    cards = [card.strip() for card in (visible or "").split(",") if card.strip()]
    if visible is None:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    elif number < len(cards):
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[number]
    elif gpu is not None:
        raise DeviceError(
            f"--gpu {gpu}: CUDA_VISIBLE_DEVICES={visible} shows {len(cards)} cards, counted from 0",
            "unset CUDA_VISIBLE_DEVICES, or leave --gpu out",
        )
    if gpu is None:
        return
    import torch

    if not torch.cuda.is_available():
        build = "" if torch.version.cuda else "; this torch is a CPU build"
        raise DeviceError(
            f"there is no CUDA card {gpu} here{build}",
            "leave --gpu out to train on the CPU, which suits small students only; `sclite doctor` tells more",
        )


def select_backend(student: Student) -> str:
    """unsloth or plain. On a CUDA machine a missing Unsloth is an error, never a silent slow run."""
    import torch

    if student.backend == "plain" or (student.backend == "auto" and not torch.cuda.is_available()):
        return "plain"
    if not torch.cuda.is_available():
        raise DeviceError(
            "student.backend = unsloth needs a CUDA card", "use --set student.backend=plain on a CPU"
        )
    if importlib.util.find_spec("unsloth") is None:
        raise DeviceError(
            "Unsloth is not installed",
            "pip install -e '.[cuda]' in sclite's checkout; or --set student.backend=plain, which is slower",
        )
    return "unsloth"


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model; its pad token is its end token where it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise model_error(f"the student {name} cannot be loaded", error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def read_config(name: str) -> Any:
    """The transformers configuration of a model; raises DataFault where transformers has no such architecture."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise model_error(f"the student {name} cannot be loaded", error) from error


def check_vocabulary(tokenizer: Any, kind: Any, name: str) -> None:
    """Refuse a tokenizer that gives ids for which the model has no embedding.

    A special token that neither our prompts nor padding use may be there: Gemma 3's 1B has one for images. Raises DataFault.
    """
    from sclite import prompts
    from sclite.student.tokenization import prompt_ids

    size = kind.get_text_config().vocab_size
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= size}
    if not beyond:
        return
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    if tokenizer.chat_template:
        used.update(prompt_ids(tokenizer, prompts.solve_messages("1 + 1 = ?")))
        used.update(prompt_ids(tokenizer, prompts.review_messages("1 + 1 = ?", TAGS)))
    if wrong := sorted(i for i in beyond if i not in special or i in used):
        raise DataError(
            f"the tokenizer of {name} has ids up to {max(beyond)} ({beyond[wrong[0]]!r} is {wrong[0]}), the model's "
            f"embedding {size} rows",
            "use the tokenizer that was published with the model; or resize the model once with "
            "model.resize_token_embeddings(len(tokenizer)), save both, and name that folder as student.model",
        )


def load_student(
    config: Config, stage: str, adapter: Path | None = None, train: bool = False
) -> tuple[Any, Any]:
    """(model, tokenizer): the base with `adapter` on it, or with a new LoRA when `train` is set without one.

    Trainable weights are float32 whatever the base is kept in, because AdamW's small steps vanish in bfloat16. The
    tokenizer is the model's own under either backend, so that training, use and export have the same ids. Raises
    DataFault where there is no such model (NetworkFault where the hub is out of reach) or it has fewer positions than
    the stage's `max_length`, DeviceFault where it does not fit on the GPU.
    """
    student, settings, name = config.student, config.stage(stage), model_name(config.student)
    tokenizer, kind, found = load_tokenizer(name), read_config(name), select_backend(student)
    _check_length(kind, settings)
    check_vocabulary(tokenizer, kind, name)
    if adapter is not None:
        check_adapter(adapter)
    disable_cudnn_attention()
    load = load_unsloth if found == "unsloth" else _load_plain
    try:
        shape = new_lora_shape(config.lora, kind) if train and adapter is None else None
        model = load(name, kind, student, settings, adapter, shape, train, config.seed)
    except OSError as error:
        raise model_error(f"the student {name} cannot be loaded", error) from error
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error) or "dispatched on the CPU" in str(error):
            raise DeviceError(
                f"the student {name} does not fit on this card",
                "close what else holds its memory (`sclite train --plan` tells), or choose a smaller student",
            ) from error
        raise
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.padding_free = is_padding_free(model, settings, found)
    return model, tokenizer


def is_padding_free(model: Any, settings: TrainingStage, backend: str) -> bool:
    """Whether rows go through the model one behind the other.

    Not where layers carry a state along the row, as linear attention does: it would leak from one row into the next.
    """
    shape = model.config.get_text_config()
    carries = any(kind not in ATTENTION for kind in getattr(shape, "layer_types", None) or ())
    if carries and settings.padding_free:
        raise DataError(
            f"padding_free = true: layers of {shape.model_type} would mix the rows", "leave padding_free out"
        )
    return not carries and (backend == "unsloth" if settings.padding_free is None else settings.padding_free)


def _load_plain(
    name: str,
    kind: Any,
    student: Student,
    settings: TrainingStage,
    adapter: Path | None,
    shape: dict[str, Any] | None,
    train: bool,
    seed: int,
) -> Any:
    import torch
    from peft import PeftConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    cuda = torch.cuda.is_available()
    arguments: dict[str, Any] = {"dtype": half_dtype() if cuda else torch.float32, "trust_remote_code": False}
    if cuda:
        arguments["device_map"] = {"": 0}
        if student.load_in_4bit and getattr(kind, "quantization_config", None) is None:
            arguments["quantization_config"] = nf4_config()
    model = AutoModelForCausalLM.from_pretrained(name, **arguments)
    if adapter is not None:
        own = PeftConfig.from_pretrained(str(adapter))
        own.inference_mode = not train
        model = get_peft_model(model, own)
        load_adapter(model, adapter)
    elif shape is not None:
        model = add_adapter(model, shape, seed)
    return model


def max_positions(kind: Any) -> int:
    """The positions that a model has."""
    return getattr(kind.get_text_config(), "max_position_embeddings", None) or 1 << 20


def _check_length(kind: Any, settings: TrainingStage) -> None:
    most = max_positions(kind)
    if settings.max_length > most:
        raise DataError(
            f"max_length = {settings.max_length}: the student has {most} positions",
            f"set max_length of [sft], [warmup] and [dpo] to {most} at most",
        )


def disable_cudnn_attention() -> None:
    """Leave cuDNN's attention out, which PyTorch prefers on Hopper and on Blackwell's data-centre cards.

    It plans anew for every length that it has not met, milliseconds of the CPU's time each: with rows of all lengths that
    was a third of a training step on an H200. The flash kernel, which other cards use anyway, plans nothing.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def half_dtype() -> Any:
    """The 16-bit type that this card computes in."""
    import torch

    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def nf4_config() -> Any:
    """NF4 with double quantisation, computing in 16 bits."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half_dtype() if torch.cuda.is_available() else torch.bfloat16,
    )


def load_unsloth(
    name: str,
    kind: Any,
    student: Student,
    settings: TrainingStage,
    adapter: Path | None,
    shape: dict[str, Any] | None,
    train: bool,
    seed: int,
) -> Any:
    """The model through Unsloth's kernels.

    Names are taken as they are, since Unsloth would exchange a base for its own copy of it; an adapter's weights go onto
    a LoRA of its shape, so that its configuration may name a base that lies elsewhere now. Unsloth cuts what is longer
    than its sequence length in silence, hence a length that no prompt reaches.
    """
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        name,
        max_seq_length=min(max_positions(kind), max(settings.max_length, 8192)),
        load_in_4bit=student.load_in_4bit,
        dtype=None,
        device_map={"": 0},
        use_exact_model_name=True,
        offload_embedding=False,
        fix_tokenizer=False,
        trust_remote_code=False,
    )
    if adapter is not None:
        shape = read_lora_shape(adapter)
    if shape is not None:
        model = FastLanguageModel.get_peft_model(
            model,
            **shape,
            bias="none",
            use_gradient_checkpointing="unsloth",
            random_state=seed,
        )
    if adapter is not None:
        load_adapter(model, adapter)
    (FastLanguageModel.for_training if train else FastLanguageModel.for_inference)(model)
    return model
