"""The configuration: one frozen tree. Where its values come from stands in settings.py."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, field_validator


def without_password(address: str) -> str:
    """A URL without the name and password before its host."""
    if "@" not in address:
        return address
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


Address = Annotated[str, PlainSerializer(without_password)]
"""A base URL. It may hold a password, which no dump of the configuration does."""
Price = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Part of the tree: frozen, unknown keys and numbers without end refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(Section):
    """A set of problems, and which of its columns hold what."""

    source: str = Field(
        "", description="a .jsonl, .json, .csv, .tsv (also .gz) or .parquet file, or a Hub dataset"
    )
    subset: str = Field("", description="configuration of a hub data set, for example main")
    split: str = Field("train", description="split of a hub data set")
    question_column: str = Field("", description="column of the question; question or problem without it")
    answer_column: str = Field("", description="column of the gold answer; answer without it")
    solution_column: str = Field("", description="column of the worked solution; solution without it")
    id_column: str = Field("", description="column of the id; id or unique_id without it, else a hash")

    def columns(self) -> dict[str, str]:
        """{"question", "answer", "solution", "id": column} of those that are named."""
        named = {name: getattr(self, f"{name}_column") for name in ("question", "answer", "solution", "id")}
        return {name: column for name, column in named.items() if column}


class Problems(Source):
    """Where the problems come from."""

    limit: int | None = Field(None, ge=1, description="rows to use; all without it")
    correction_share: float = Field(0.5, gt=0, lt=1, description="share kept for stage 2, unseen by SFT")
    avoid: tuple[str, ...] = Field(
        (), description='files with questions that must not be trained on, beside eval.source: ["a.jsonl"]'
    )

    @field_validator("avoid", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) and value else value or ()


class Attempts(Section):
    """How the student's attempts are sampled for stage 2."""

    source: str = Field("", description="attempts brought along: JSONL with question, steps, optional label")
    student: str = Field(
        "", description="who tries: the run's SFT adapter without it; a .gguf file; a LiteLLM model name"
    )
    api_base: Address = Field(
        "", description="base URL, where attempts.student is an OpenAI-compatible endpoint"
    )
    concurrency: int = Field(32, ge=1, le=1024, description="requests in flight at most, at an endpoint")
    price: tuple[Price, Price] | None = Field(
        None, description="of an endpoint, US dollars per million tokens sent and written"
    )
    samples: int = Field(4, ge=1, le=64, description="samples per problem")
    temperature: float = Field(0.8, ge=0, le=2)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(1024, ge=16)
    reviews: int = Field(
        2, ge=1, le=16, description="the student's own corrections sampled per wrong attempt"
    )
    confirmation_share: float = Field(0.5, ge=0, lt=1, description="share of reviews that confirm right work")

    @property
    def kind(self) -> Literal["trained", "gguf", "endpoint"]:
        """What `student` names: the adapter that the run trains, a GGUF file, or a model behind LiteLLM."""
        if not self.student:
            return "trained"
        return "gguf" if self.student.lower().endswith(".gguf") else "endpoint"


class Teacher(Section):
    """The model that writes templates and corrections, reached through LiteLLM."""

    model: str = Field(
        "", description="a LiteLLM model name, for example openai/gpt-4.1 or ollama_chat/qwen3:32b"
    )
    api_base: Address = Field("", description="base URL of an OpenAI-compatible endpoint")
    direct: bool = Field(True, description="ask an OpenAI-compatible api_base without LiteLLM in between")
    concurrency: int = Field(16, ge=1, le=1024, description="requests in flight at most")
    temperature: float | None = Field(None, ge=0, le=2, description="the endpoint's own default without it")
    max_tokens: int = Field(4096, ge=16)
    timeout_seconds: float = Field(120, gt=0, description="per call")
    attempts_per_call: int = Field(6, ge=1, description="tries per request on network faults and rate limits")
    repairs: int = Field(3, ge=0, description="further requests after a reply that fails its check")
    requests_per_minute: float | None = Field(None, gt=0, description="no limit without it")
    tokens_per_minute: float | None = Field(None, gt=0, description="sent and written; no limit without it")
    max_cost: float | None = Field(None, ge=0, description="US dollars that the run may cost in all")
    price: tuple[Price, Price] | None = Field(
        None, description="US dollars per million tokens sent and written; LiteLLM's list without it"
    )
    inspector: str = Field("", description="a second model that judges each reply, a LiteLLM model name")
    inspector_api_base: Address = Field("", description="base URL of its endpoint")

    @property
    def embedded(self) -> bool:
        """Whether this is the quickstart's own tutor."""
        return self.model.startswith("embedded/")


class Student(Section):
    """The model that is trained."""

    model: str = Field("", description="hub name or folder; embedded is the quickstart's own")
    backend: Literal["auto", "unsloth", "plain"] = "auto"
    load_in_4bit: bool = True
    batch: int = Field(64, ge=1, description="sequences generated at once")


class Lora(Section):
    """The LoRA adapter that all training stages train (names as in PEFT's LoraConfig)."""

    r: int = Field(32, ge=1, description="rank")
    lora_alpha: int = Field(64, ge=1, description="the adapter is scaled by lora_alpha / r")
    target_modules: tuple[str, ...] = Field(
        (), description="linear layers to adapt, by name (default: all but the head)"
    )


class TrainingStage(Section):
    """What all training stages share (names as in Hugging Face's TrainingArguments where they have one)."""

    learning_rate: float = Field(1e-4, gt=0)
    num_train_epochs: float = Field(1, gt=0, description="passes over the rows")
    batch_size: int = Field(16, ge=1, description="rows per optimizer step")
    per_device_train_batch_size: int | None = Field(
        None, ge=1, description="micro-batch size, rows per forward pass (default: what fits into GPU memory)"
    )
    max_length: int = Field(2048, ge=64, description="tokens; longer rows are skipped and counted")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of steps with a rising learning rate")
    max_grad_norm: float = Field(1.0, gt=0)
    checkpoints: int = Field(
        10, ge=1, description="checkpoints per stage; training resumes from the last one"
    )
    eval_share: float = Field(
        0.02, ge=0, lt=1, description="share of rows for the evaluation loss that chooses the best checkpoint"
    )
    padding_free: bool | None = Field(
        None, description="concatenate the rows of a forward pass instead of padding (default: with Unsloth)"
    )
    early_stopping_patience: int = Field(
        0, ge=0, description="stop after this many evaluations without a better loss; 0: never"
    )
    tensorboard: bool = Field(False, description="also write TensorBoard files, beside metrics.jsonl")

    def deciding(self) -> dict[str, Any]:
        """The settings that decide what is learned."""
        without = {"per_device_train_batch_size", "padding_free", "checkpoints", "tensorboard"}
        return self.model_dump(mode="json", exclude=without)


class Sft(TrainingStage):
    """Stage 1: supervised fine-tuning on templates."""

    num_train_epochs: float = Field(3, gt=0, description="passes over the templates")
    warmup_ratio: float = Field(0.02, ge=0, lt=1, description="share of steps with a rising learning rate")


class Warmup(TrainingStage):
    """Stage 2, first part: supervised training on whole reviews and on solved rows."""

    num_train_epochs: float = Field(1, ge=0, description="passes over the reviews; 0: no warm-up")
    replay_share: float = Field(
        1.0, ge=0, description="solved rows per review; half of them continue after a corrected step"
    )
    decision_weight: float = Field(
        1.0,
        ge=0,
        description="extra weight of decisions: <Cause> in a review, closing a wrong step while solving",
    )


class Dpo(TrainingStage):
    """Stage 2, second part: cross-model DPO with replay of solved rows."""

    learning_rate: float = Field(1e-5, gt=0)
    num_train_epochs: float = Field(
        1, gt=0, description="passes over the pairs; `train --only sft` skips stage 2"
    )
    beta: float = Field(0.2, gt=0)
    nll_weight: float = Field(1.0, ge=0, description="weight of the likelihood of chosen texts")
    replay_weight: float = Field(1.0, ge=0, description="weight of the likelihood of solved rows")
    replay_share: float = Field(1.0, ge=0, description="solved rows per reviewed attempt")


class Export(Section):
    """The GGUF."""

    quant: str = Field("q4_k_m", description="f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m ..")
    ollama: str = Field("", description="name for `ollama create`")
    num_ctx: int = Field(8192, ge=256, description="context that the Modelfile asks Ollama for")


class Eval(Source):
    """What is measured, and on what."""

    source: str = Field("", description="held-out problems: a file or a hub data set, as problems.source")
    split: str = Field("test", description="split of a hub data set")
    limit: int | None = Field(500, ge=1)
    max_tokens: int = Field(1024, ge=16)
    context: int = Field(4096, ge=256, description="tokens of one conversation at the most")
    fit_share: float = Field(
        0.3, gt=0, lt=1, description="share of the problems that the threshold is fitted on"
    )


class Review(Section):
    """Self-correction."""

    mode: Literal["guided", "free"] = "guided"
    threshold: float | None = Field(
        None, description="on the log-odds of an error; fitted and stored without it"
    )
    rounds: int = Field(1, ge=0, le=8)
    max_harm: float = Field(0.005, ge=0, le=1, description="right-to-wrong share allowed when fitting")


class Prompts(Section):
    """Where prompt files of your own lie."""

    folder: str = ""


class Config(Section):
    """Everything that decides what a run does. `digest` of a part signs what depends on it."""

    run: str = Field("runs/default", description="the run folder")
    seed: int = Field(0, ge=0)
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


def keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every key of the tree, dotted, with its field: {"sft.learning_rate": FieldInfo, ..}."""
    found = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= keys(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found
