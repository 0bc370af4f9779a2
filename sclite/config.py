"""The configuration: one frozen tree of sections. `settings.load` fills it."""

import json
import math
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator
from pydantic.fields import FieldInfo


def without_password(address: str) -> str:
    """The URL without user name and password."""
    if "@" not in address:
        return address
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def parse_object(value: Any) -> Any:
    """A dict, which may be given as JSON."""
    try:
        value = json.loads(value or "{}") if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"this is not a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise ValueError('this is not an object such as {"name": "value"}')
    return value


Address = Annotated[str, PlainSerializer(without_password)]
"""A base URL. A password in it never appears in a dump of the configuration."""
Object = Annotated[dict[str, Any], BeforeValidator(parse_object)]
Price = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A section of the tree: frozen; rejects unknown keys, infinity and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(Section):
    """A set of problems and the names of its columns."""

    source: str = Field(
        "", description="a .jsonl, .json, .csv, .tsv (also .gz) or .parquet file, or a Hub ID"
    )
    subset: str = Field("", description="subset of a Hub dataset, for example main")
    split: str = Field("train", description="split of a Hub dataset")
    question_column: str = Field("", description="column of the question (default: question, problem, query)")
    answer_column: str = Field(
        "", description="column of the gold answer (default: answer, final_answer or expected_answer)"
    )
    solution_column: str = Field(
        "",
        description="column of the worked solution (default: solution, response, r1_solution_1 or generated_solution)",
    )
    id_column: str = Field("", description="column of the ID (default: id or unique_id, else a hash)")

    def columns(self) -> dict[str, str]:
        """The configured columns, by role: question, answer, solution, id."""
        named = {name: getattr(self, f"{name}_column") for name in ("question", "answer", "solution", "id")}
        return {name: column for name, column in named.items() if column}


class Problems(Source):
    """The problems to build data from."""

    limit: int | None = Field(None, ge=1, description="number of rows to use (default: all)")
    correction_share: float = Field(
        0.5, gt=0, lt=1, description="share of problems for stage 2, unseen by SFT"
    )
    fit_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of problems kept out of training to fit the review threshold, at least 50 problems "
        "if the run has 200; 0: none",
    )
    avoid: tuple[str, ...] = Field(
        (),
        description='files with questions to keep out of training, besides eval.source, for example ["a.jsonl"]',
    )

    @field_validator("avoid", mode="before")
    @classmethod
    def _wrap_single_file(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) and value else value or ()


class Attempts(Section):
    """Sampling of the student's attempts for stage 2."""

    source: str = Field("", description="imported attempts: a JSONL file with question and steps")
    student: str = Field(
        "",
        description="model to sample from: a .gguf file, ollama/NAME or a LiteLLM model (default: the SFT adapter)",
    )
    api_base: Address = Field("", description="base URL of attempts.student, if it is an endpoint")
    concurrency: int = Field(32, ge=1, le=1024, description="maximum number of concurrent requests")
    price: tuple[Price, Price] | None = Field(
        None,
        description="US dollars per million input and output tokens (default: LiteLLM's list)",
    )
    samples: int = Field(4, ge=1, le=64, description="samples per problem")
    temperature: float = Field(0.8, ge=0, le=2, description="sampling temperature")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus sampling: probability of the tokens kept")
    max_tokens: int = Field(1024, ge=16, description="maximum number of tokens per attempt")
    reviews: int = Field(2, ge=1, le=16, description="corrections by the student per wrong attempt")
    confirmation_share: float = Field(0.5, ge=0, lt=1, description="share of reviews that confirm an attempt")

    @property
    def kind(self) -> Literal["trained", "gguf", "endpoint"]:
        """What `student` names: the adapter that this run trains, a GGUF file, or an endpoint behind LiteLLM."""
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

    model: str = Field("", description="LiteLLM model, such as openai/gpt-5.4-mini or ollama_chat/qwen3:32b")
    api_base: Address = Field("", description="base URL of an OpenAI-compatible endpoint")
    direct: bool = Field(True, description="call an OpenAI-compatible api_base without LiteLLM")
    concurrency: int = Field(16, ge=1, le=1024, description="maximum number of concurrent requests")
    temperature: float | None = Field(None, ge=0, le=2, description="temperature (default: the endpoint's)")
    max_tokens: int = Field(4096, ge=16, description="maximum number of tokens per reply")
    timeout_seconds: float = Field(120, gt=0, description="timeout per call, in seconds")
    attempts_per_call: int = Field(6, ge=1, description="attempts per request: network errors, rate limits")
    repairs: int = Field(3, ge=0, description="additional requests after a reply that fails its check")
    requests_per_minute: float | None = Field(None, gt=0, description="rate limit (default: unlimited)")
    tokens_per_minute: float | None = Field(None, gt=0, description="rate limit (default: unlimited)")
    max_cost: float | None = Field(
        None, ge=0, description="spending limit of the run in US dollars (default: none)"
    )
    price: tuple[Price, Price] | None = Field(
        None, description="US dollars per million input and output tokens (default: LiteLLM's list)"
    )
    extra: Object = Field(
        {}, description='further parameters of a request (a TOML table or JSON): {"reasoning_effort": "low"}'
    )
    inspector: str = Field("", description="LiteLLM model name of a second model that checks each reply")
    inspector_api_base: Address = Field("", description="base URL of the inspector's endpoint")

    @field_validator("extra")
    @classmethod
    def _check_extra(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Refuse what sclite sets itself, secrets, and null, which TOML cannot hold."""
        value = {name: setting for name, setting in value.items() if setting != ""}
        body = value.get("extra_body", {})
        for name in [*value, *(body if isinstance(body, dict) else ())]:
            if name in OWN_PARAMETERS:
                instead = f", use {OWN_PARAMETERS[name]}" if OWN_PARAMETERS[name] else ""
                raise ValueError(f"sclite sets {name} itself{instead}")
            if SECRET_PARAMETER.search(name):
                raise ValueError(f"{name} looks like a secret, which belongs in an environment variable")
        pending: list[Any] = [value]
        for item in pending:  # the inner ones are appended
            pending += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            if item is None or item in (math.inf, -math.inf) or item != item:
                raise ValueError("null, NaN and Infinity are not allowed")
        return value

    @property
    def embedded(self) -> bool:
        """Whether this is the quickstart's tutor."""
        return self.model.startswith("embedded/")


class Student(Section):
    """The model to train."""

    model: str = Field(
        "",
        description="Hub ID, local folder, or embedded: a toy that can learn the quickstart's problems only",
    )
    backend: Literal["auto", "unsloth", "plain"] = Field(
        "auto", description="auto: Unsloth on CUDA, else plain transformers"
    )
    load_in_4bit: bool = Field(True, description="load the base model in 4 bits (QLoRA)")
    batch: int = Field(64, ge=1, description="batch size for sampling, in sequences")


class Lora(Section):
    """The LoRA adapter, shared by all training stages (names as in PEFT's LoraConfig)."""

    r: int = Field(32, ge=1, description="rank of the adapter")
    lora_alpha: int = Field(64, ge=1, description="the adapter's output is multiplied by lora_alpha / r")
    target_modules: tuple[str, ...] = Field(
        (), description="linear layers to adapt (default: all but the head)"
    )


class TrainingStage(Section):
    """Settings of every training stage (names as in Hugging Face's TrainingArguments where one exists)."""

    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    num_train_epochs: float = Field(1, gt=0, description="epochs over the rows")
    batch_size: int = Field(16, ge=1, description="rows per optimizer step")
    per_device_train_batch_size: int | None = Field(
        None, ge=1, description="micro-batch size: rows per forward pass (default: by free memory)"
    )
    max_length: int = Field(2048, ge=64, description="maximum row length in tokens; longer rows are skipped")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of steps with a rising learning rate")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping: maximum norm")
    checkpoints: int = Field(10, ge=1, description="checkpoints per stage; training resumes from the latest")
    eval_share: float = Field(
        0.02, ge=0, lt=1, description="share of rows held out to select the best checkpoint"
    )
    padding_free: bool | None = Field(
        None, description="concatenate rows instead of padding them (default: with Unsloth)"
    )
    early_stopping_patience: int = Field(
        0, ge=0, description="stop after this many evaluations without progress; 0: never"
    )
    tensorboard: bool = Field(False, description="write TensorBoard files in addition to metrics.jsonl")

    def signed_settings(self) -> dict[str, Any]:
        """The settings that affect what is learned."""
        neutral = {"per_device_train_batch_size", "padding_free", "checkpoints", "tensorboard"}
        return self.model_dump(mode="json", exclude=neutral)


class Sft(TrainingStage):
    """Stage 1: supervised fine-tuning on templates."""

    num_train_epochs: float = Field(3, gt=0, description="epochs over the templates")
    warmup_ratio: float = Field(0.02, ge=0, lt=1, description="share of steps with a rising learning rate")


class Warmup(TrainingStage):
    """Stage 2, first part: supervised training on reviews, with replay of solved rows."""

    num_train_epochs: float = Field(1, ge=0, description="epochs over the reviews; 0: no warm-up")
    replay_share: float = Field(
        1.0, ge=0, description="solved rows per review; half continue from a corrected step"
    )
    decision_weight: float = Field(
        1.0, ge=0, description="extra loss weight of decisions: to accuse a step, or to close it"
    )


class Dpo(TrainingStage):
    """Stage 2, second part: cross-model DPO with replay of solved rows."""

    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate")
    num_train_epochs: float = Field(
        1, gt=0, description="epochs over the pairs; `train --only sft` skips stage 2"
    )
    beta: float = Field(0.2, gt=0, description="DPO's beta: strength of the pull towards the reference model")
    nll_weight: float = Field(1.0, ge=0, description="weight of the NLL loss on chosen texts")
    replay_weight: float = Field(1.0, ge=0, description="weight of the NLL loss on replayed solved rows")
    replay_share: float = Field(1.0, ge=0, description="solved rows per reviewed attempt")


MAX_KL = {"f32": 1e-3, "f16": 1e-3, "bf16": 0.02, "q8": 0.03, "q6": 0.08, "q5": 0.2, "q4": 0.5, "": 1.5}
"""SmolLM2-135M: q8_0 0.006, q4_k_m 0.05, iq4_xs 0.15."""


class Export(Section):
    """The exported GGUF."""

    quant: str = Field(
        "q4_k_m",
        description="quantization: f32, f16, bf16, q8_0, q6_k, q4_k_m ..; several: q4_k_m,q8_0",
    )
    imatrix: bool | None = Field(None, description="use an importance matrix (default: below 5 bits)")
    max_kl: Annotated[dict[str, float], BeforeValidator(parse_object)] = Field(
        MAX_KL,
        description="largest KL divergence from the trained model in nats, by the start of a type's name",
    )
    ollama: str = Field("", description="model name for `ollama create`")
    push: str = Field("", description="repository on the Hub, OWNER/NAME, for the files and their card")
    private: bool = Field(True, description="create the repository as private")
    license: str = Field("", description="license on the model card, as the Hub names it: apache-2.0 ..")
    num_ctx: int = Field(8192, ge=256, description="context length in Ollama, in tokens (in the Modelfile)")
    keep_template: bool = Field(False, description="export the model's own chat template as it is")

    @field_validator("max_kl")
    @classmethod
    def _keep_other_bounds(cls, value: dict[str, float]) -> dict[str, float]:
        return {**MAX_KL, **value}

    @property
    def types(self) -> list[str]:
        """The quantization types, each once, in lower case."""
        return list(dict.fromkeys(part.strip().lower() for part in self.quant.split(",")))


class Eval(Source):
    """The evaluation."""

    source: str = Field("", description="held-out problems: a file or a Hub ID, as problems.source")
    split: str = Field("test", description="split of a Hub dataset")
    limit: int | None = Field(500, ge=1, description="number of problems to evaluate")
    max_tokens: int = Field(1024, ge=16, description="maximum number of tokens per answer")
    context: int = Field(4096, ge=256, description="maximum length of a conversation in tokens")
    baselines: bool = Field(
        False,
        description="measure the base model under its own prompt, and a majority vote of the last student",
    )
    votes: int = Field(3, ge=2, description="samples per problem in the majority vote")
    fit_share: float = Field(
        0.3, gt=0, lt=1, description="share of problems for the threshold, if training has not kept as many"
    )


class Review(Section):
    """Self-correction."""

    mode: Literal["guided", "free"] = Field(
        "guided",
        description="guided: the threshold decides where a correction begins; free: the model decides",
    )
    threshold: float | None = Field(
        None,
        description="log-odds of an error from which a step is corrected (default: fitted by train and eval)",
    )
    rounds: int = Field(1, ge=0, le=8, description="maximum number of review rounds per answer")
    max_harm: float = Field(
        0.005, ge=0, le=1, description="share of answers that a fitted threshold may spoil (test at 5 %)"
    )


class Prompts(Section):
    """Your own prompts."""

    folder: str = Field("", description="folder of prompt files that replace those of the same name")


class Config(Section):
    """The whole configuration of a run."""

    run: str = Field("runs/default", description="run folder")
    seed: int = Field(0, ge=0, description="random seed of sampling, splits and training")
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
        """The section of a training stage: sft, warmup or dpo."""
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
