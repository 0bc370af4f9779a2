"""The configuration: one frozen tree of sections. `settings.load` fills it."""

import json
import os
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo


def is_loopback(url: str) -> bool:
    """Whether a URL points to this machine, so that no proxy is needed."""
    return urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")


def without_password(text: str) -> str:
    """The text with user name and password removed from its URL, even if the password contains an unescaped # or bracket."""
    return re.sub(r"(\w+://)[^/@:]*(:(?!\d+/).*)?@", r"\1", text)


def parse_object(value: Any) -> Any:
    """Parse a dict that may be given as JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"this is not a JSON object: {error}") from None


Address = Annotated[str, PlainSerializer(without_password)]
"""A base URL. A password in it never appears in a dump of the configuration."""
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path (a leading ~ is expanded), or the name of a model or dataset."""
Object = Annotated[dict[str, Any], BeforeValidator(parse_object)]
Bounds = Annotated[dict[str, float], BeforeValidator(parse_object)]
Price = Annotated[float, Field(ge=0)]
Prices = tuple[Price, Price] | None
"""US dollars per million input and output tokens."""


def setting(default: Any, meaning: str, **limits: Any) -> Any:
    """A key: its default, its meaning, and the limits of its value in pydantic's terms."""
    return Field(default, description=meaning, **limits)


class Section(BaseModel):
    """A section of the tree: frozen; rejects unknown keys, infinity and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(Section):
    """A set of problems and the names of its columns."""

    source: Place = setting("", "a .jsonl, .json, .csv, .tsv (also .gz) or .parquet file, or a Hub ID")
    subset: str = setting("", "subset of a Hub dataset, for example main")
    split: str = setting("train", "split of a Hub dataset")
    question_column: str = setting("", "question column (default: question, problem or query)")
    answer_column: str = setting("", "answer column (default: answer, final_answer or expected_answer)")
    solution_column: str = setting(
        "", "solution column (default: solution, response, r1_solution_1 or generated_solution)"
    )
    id_column: str = setting("", "ID column (default: id or unique_id, else a hash)")

    def columns(self) -> dict[str, str]:
        """The configured columns, by role: question, answer, solution, id."""
        named = {name: getattr(self, f"{name}_column") for name in ("question", "answer", "solution", "id")}
        return {name: column for name, column in named.items() if column}


class Problems(Source):
    """The problems to build data from."""

    limit: int | None = setting(None, "number of usable problems to read (default: all)", ge=1)
    correction_share: float = setting(0.5, "share of problems for stage 2, unseen by SFT", gt=0, lt=1)
    fit_share: float = setting(
        0.1, "share kept for the review threshold: at least 50 of 200; 0: none", ge=0, lt=1
    )
    avoid: tuple[Place, ...] = setting((), 'more files with questions to keep out of training: ["a.jsonl"]')


class Attempts(Section):
    """Sampling of the student's attempts for stage 2."""

    source: Place = setting("", "imported attempts: a JSONL file with question and steps")
    student: Place = setting("", "a .gguf file, ollama/NAME or a LiteLLM model (default: the SFT adapter)")
    api_base: Address = setting("", "base URL of attempts.student, if it is an endpoint")
    concurrency: int = setting(32, "maximum number of concurrent requests", ge=1, le=1024)
    price: Prices = setting(None, "US dollars per million input and output tokens (default: LiteLLM's)")
    samples: int = setting(4, "samples per problem", ge=1, le=64)
    temperature: float = setting(0.8, "sampling temperature", ge=0, le=2)
    top_p: float = setting(0.95, "nucleus sampling: probability of the tokens kept", gt=0, le=1)
    max_tokens: int = setting(1024, "maximum number of tokens per attempt", ge=16)
    reviews: int = setting(2, "corrections by the student per wrong attempt", ge=1, le=16)
    confirmation_share: float = setting(0.5, "share of reviews that confirm an attempt", ge=0, lt=1)

    @property
    def kind(self) -> Literal["trained", "gguf", "endpoint"]:
        """The kind of `student`: the adapter that this run trains, a GGUF file, or an endpoint behind LiteLLM."""
        if not self.student:
            return "trained"
        return "gguf" if self.student.lower().endswith(".gguf") else "endpoint"


OWN_PARAMETERS = {
    "model": "teacher.model", "api_base": "teacher.api_base", "base_url": "teacher.api_base",
    "temperature": "teacher.temperature", "max_tokens": "teacher.max_tokens",
    "max_completion_tokens": "teacher.max_tokens", "timeout": "teacher.timeout_seconds",
    "max_retries": "teacher.attempts_per_call", "num_retries": "teacher.attempts_per_call",
    **dict.fromkeys(("messages", "n", "stream", "seed", "extra_headers", "extra_query", "headers", "fallbacks"), ""),
}  # fmt: skip
"""Parameters of a request that sclite sets itself, and the setting for each that has one."""
SECRET_PARAMETER = re.compile(r"api_key|access_key|secret|password|credentials|(^|_)token$", re.I)


class Teacher(Section):
    """The model that writes templates and corrections, called through LiteLLM."""

    model: str = setting("", "LiteLLM model, such as openai/gpt-5.4-mini or ollama_chat/qwen3:32b")
    api_base: Address = setting("", "base URL of an OpenAI-compatible endpoint")
    direct: bool = setting(True, "call an OpenAI-compatible api_base without LiteLLM")
    concurrency: int = setting(16, "maximum number of concurrent requests", ge=1, le=1024)
    temperature: float | None = setting(None, "temperature (default: the endpoint's)", ge=0, le=2)
    max_tokens: int = setting(4096, "maximum number of tokens per reply", ge=16)
    timeout_seconds: float = setting(120, "timeout per call, in seconds", gt=0)
    attempts_per_call: int = setting(6, "attempts per request: network errors, rate limits", ge=1)
    repairs: int = setting(3, "additional requests after a reply that fails its checks", ge=0)
    requests_per_minute: float | None = setting(None, "rate limit (default: unlimited)", gt=0)
    tokens_per_minute: float | None = setting(None, "rate limit (default: unlimited)", gt=0)
    max_cost: float | None = setting(
        None, "spending limit of the whole run in US dollars (default: none)", ge=0
    )
    price: Prices = setting(None, "US dollars per million input and output tokens (default: LiteLLM's)")
    extra: Object = setting({}, 'more request parameters (a TOML table or JSON): {"reasoning_effort": "low"}')
    inspector: str = setting("", "LiteLLM name of a second model that checks each reply")
    inspector_api_base: Address = setting("", "base URL of the inspector's endpoint")
    inspector_price: Prices = setting(None, "like price, for the inspector")

    @field_validator("extra")
    @classmethod
    def _check_extra(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Reject what sclite sets itself, secrets, and null, which TOML cannot represent."""
        value = {name: setting for name, setting in value.items() if setting != ""}
        body = value.get("extra_body", {})
        for name in [*value, *(body if isinstance(body, dict) else ())]:
            if name in OWN_PARAMETERS:
                instead = f", use {OWN_PARAMETERS[name]}" if OWN_PARAMETERS[name] else ""
                raise ValueError(f"sclite sets {name} itself{instead}")
            if SECRET_PARAMETER.search(name):
                raise ValueError(f"{name} looks like a secret, which belongs in an environment variable")
        unquoted = re.sub(r'"(?:\\.|[^"\\])*"', "", json.dumps(value, default=str))
        if re.search("null|NaN|Infinity", unquoted):
            raise ValueError("null, NaN and Infinity are not allowed")
        return value

    @property
    def embedded(self) -> bool:
        """Whether this is the quickstart's tutor."""
        return self.model.startswith("embedded/")


class Student(Section):
    """The model to train."""

    model: Place = setting("", "Hub ID, folder, or embedded: a toy for the quickstart's problems only")
    backend: Literal["auto", "unsloth", "plain"] = setting(
        "auto", "auto: Unsloth on CUDA, else plain transformers"
    )
    load_in_4bit: bool = setting(True, "on a GPU, load the base model in 4 bits (QLoRA)")
    batch: int = setting(64, "batch size for sampling, in sequences", ge=1)


class Lora(Section):
    """The LoRA adapter, shared by all training stages (names as in PEFT's LoraConfig)."""

    r: int = setting(32, "rank of the adapter", ge=1)
    lora_alpha: int = setting(64, "the adapter's output is multiplied by lora_alpha / r", ge=1)
    target_modules: tuple[str, ...] = setting((), "linear layers to adapt (default: all but the head)")


class TrainingStage(Section):
    """Settings of every training stage (names as in Hugging Face's TrainingArguments where one exists)."""

    learning_rate: float = setting(1e-4, "peak learning rate", gt=0)
    num_train_epochs: float = setting(1, "epochs over the rows", gt=0)
    batch_size: int = setting(16, "rows per optimizer step", ge=1)
    per_device_train_batch_size: int | None = setting(
        None, "micro-batch size: rows per forward pass (default: by free memory)", ge=1
    )
    max_length: int = setting(2048, "maximum row length in tokens; longer rows are skipped", ge=64)
    warmup_ratio: float = setting(0.05, "share of steps with a rising learning rate", ge=0, lt=1)
    max_grad_norm: float = setting(1.0, "gradient clipping: maximum norm", gt=0)
    checkpoints: int = setting(10, "checkpoints and evaluations per stage; resumes from the latest", ge=1)
    eval_share: float = setting(0.02, "share of rows held out to select the best checkpoint", ge=0, lt=1)
    padding_free: bool | None = setting(
        None, "concatenate rows instead of padding them (default: only if Unsloth has its own decoder)"
    )
    early_stopping_patience: int = setting(0, "stop after N evaluations without improvement; 0: never", ge=0)
    tensorboard: bool = setting(False, "write TensorBoard files in addition to metrics.jsonl")


class Sft(TrainingStage):
    """Stage 1: supervised fine-tuning on templates."""

    num_train_epochs: float = setting(3, "epochs over the templates", gt=0)
    warmup_ratio: float = setting(0.02, "share of steps with a rising learning rate", ge=0, lt=1)


class Warmup(TrainingStage):
    """Stage 2, first part: supervised training on reviews, with replay of solved rows."""

    num_train_epochs: float = setting(1, "epochs over the reviews; 0: no warm-up", ge=0)
    replay_share: float = setting(1.0, "solved rows per review; half continue from a corrected step", ge=0)
    decision_weight: float = setting(1.0, "extra loss weight on the decision to flag a step", ge=0)


class Dpo(TrainingStage):
    """Stage 2, second part: cross-model DPO with replay of solved rows."""

    learning_rate: float = setting(1e-5, "peak learning rate", gt=0)
    num_train_epochs: float = setting(1, "epochs over the pairs; `train --only sft` skips stage 2", gt=0)
    beta: float = setting(0.2, "DPO's beta: strength of the pull towards the reference model", gt=0)
    nll_weight: float = setting(1.0, "weight of the NLL loss on chosen texts", ge=0)
    replay_weight: float = setting(1.0, "weight of the NLL loss on replayed solved rows", ge=0)
    replay_share: float = setting(1.0, "solved rows per reviewed attempt", ge=0, le=1)


MAX_KL = {
    "f32": 1e-3, "f16": 1e-3, "bf16": 0.02, "q8": 0.03, "q6": 0.08, "q5": 0.2, "q4": 0.5, "iq4": 0.5, "": 1.5,
}  # fmt: skip
"""SmolLM2-135M: q8_0 0.006, q4_k_m 0.05, iq4_xs 0.15."""
MIN_TOP1 = {
    "f32": 0.995, "f16": 0.995, "bf16": 0.99, "q8": 0.98, "q6": 0.95, "q5": 0.85, "q4": 0.7, "iq4": 0.7, "": 0.4,
}  # fmt: skip
"""The quickstart's student: q8_0 1.000, q4_k_m 0.998, q3_k_m 0.993; SmolLM2 after thirty steps: q8_0 0.998, q4_k_m
0.945, iq4_xs 0.906; a tiny model of random weights: q8_0 1.00, q4_k_m 0.83, q3_k_m 0.55."""


class Export(Section):
    """The exported GGUF."""

    quant: str = setting("q4_k_m", "quantization: f32, f16, bf16, q8_0, q4_k_m, ...; several: q4_k_m,q8_0")
    imatrix: bool | None = setting(None, "use an importance matrix (default: below 5 bits)")
    max_kl: Bounds = setting(MAX_KL, "maximum KL divergence from the trained model in nats, by type prefix")
    min_top1: Bounds = setting(
        MIN_TOP1, "minimum share of positions with the same top token or a near tie, by type prefix"
    )
    ollama: str = setting("", "model name for `ollama create`")
    push: str = setting("", "Hub repository to upload the files and a card to: OWNER/NAME")
    private: bool = setting(True, "create the repository as private, and refuse an existing public one")
    license: str = setting("", "license on the model card, as a Hub identifier such as apache-2.0")
    num_ctx: int = setting(8192, "context length in Ollama, in tokens (in the Modelfile)", ge=256)
    keep_template: bool = setting(False, "export the model's own chat template unchanged")

    @field_validator("max_kl", "min_top1")
    @classmethod
    def _keep_other_bounds(cls, value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        return {**cls.model_fields[str(info.field_name)].default, **value}

    @property
    def types(self) -> list[str]:
        """The quantization types, each once, in lower case."""
        return list(dict.fromkeys(part.strip().lower() for part in self.quant.split(",")))


class Eval(Source):
    """The evaluation."""

    source: Place = setting("", "held-out problems: a file or a Hub ID, like problems.source")
    split: str = setting("test", "split of a Hub dataset")
    limit: int = setting(500, "number of problems to evaluate", ge=1)
    max_tokens: int = setting(1024, "maximum number of tokens per answer", ge=16)
    context: int = setting(4096, "maximum length of a conversation in tokens", ge=256)
    baselines: bool = setting(False, "compare with the native prompt, votes and the best of several samples")
    labelled: Place = setting("", "JSONL file of solutions with a labelled first wrong step")
    votes: int = setting(3, "samples per problem for the votes and the best sample", ge=2)
    fit_share: float = setting(0.3, "share for fitting the threshold, if training left fewer", gt=0, lt=1)


class Review(Section):
    """Self-correction."""

    mode: Literal["guided", "free"] = setting(
        "guided", "guided: the threshold decides where a correction begins; free: the model decides"
    )
    threshold: float | None = setting(None, "log-odds above which a step is corrected (default: fitted)")
    confidence_weight: float | None = setting(
        None, "weight of the confidence in a step's score (default: chosen with the threshold)", ge=0, le=1
    )
    rounds: int = setting(1, "maximum number of guided review rounds per answer", ge=0, le=8)
    max_harm: float = setting(0.005, "maximum share of answers a fitted threshold may spoil", ge=0, le=1)

    @property
    def needs_fit(self) -> bool:
        """Whether reviews need a fitted threshold: they are guided, and none is set."""
        return self.mode == "guided" and self.threshold is None


class Prompts(Section):
    """Your own prompts."""

    folder: Place = setting("", "folder of prompt files that override those of the same name")


class Config(Section):
    """The whole configuration of a run."""

    run: Place = setting("runs/default", "run folder")
    seed: int = setting(0, "random seed for sampling, splits and training", ge=0)
    problems: Problems = Problems()
    attempts: Attempts = Attempts()
    teacher: Teacher = Teacher()
    student: Student = Student()
    lora: Lora = Lora()
    sft: Sft = Sft()
    warmup: Warmup = Warmup()
    dpo: Dpo = Dpo()
    export: Export = Export()
    eval: Eval = Eval()
    review: Review = Review()
    prompts: Prompts = Prompts()

    def stage(self, name: str) -> TrainingStage:
        return getattr(self, name)


def keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """All dotted keys with their fields: {"sft.learning_rate": FieldInfo, ..}."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= keys(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found
