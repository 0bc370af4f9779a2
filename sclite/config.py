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
    """What both training stages share."""

    batch: int = Field(16, ge=1, description="rows per optimizer step")
    micro_batch: int | None = Field(
        None, ge=1, description="rows per forward pass; what fits into memory without it"
    )
    max_length: int = Field(2048, ge=64, description="tokens; longer rows are left out and counted")
    warmup: float = Field(0.02, ge=0, lt=1, description="share of the steps with rising learning rate")
    max_grad_norm: float = Field(1.0, gt=0)
    checkpoints: int = Field(
        10, ge=1, description="how many are written in a stage; a broken one goes on from the last"
    )
    eval_share: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="share of the rows kept for the evaluation loss that chooses the best checkpoint",
    )
    padding_free: bool | None = Field(
        None, description="rows of a forward pass end to end instead of padded; through Unsloth without it"
    )
    patience: int = Field(
        0, ge=0, description="evaluations without a better loss before stopping early; 0: never"
    )
    tensorboard: bool = Field(False, description="also write what TensorBoard reads, beside metrics.jsonl")

    def deciding(self, *others: str) -> dict[str, Any]:
        """The settings that decide what comes out; `others` are left out beside those that never do."""
        return self.model_dump(
            mode="json", exclude={"micro_batch", "padding_free", "checkpoints", "tensorboard", *others}
        )


class Sft(Lora):
    """Stage 1: supervised fine-tuning on templates. Its adapter is the one that stage 2 trains on."""

    rank: int = Field(32, ge=1, description="of the LoRA adapter")
    alpha: int = Field(64, ge=1, description="of the LoRA adapter, which is scaled by alpha / rank")
    target_modules: tuple[str, ...] = Field(
        (), description="linear layers that LoRA is put on, by name (default: all but the head)"
    )
    learning_rate: float = Field(1e-4, gt=0)
    epochs: float = Field(3, gt=0, description="passes over the templates")


class Dpo(Lora):
    """Stage 2: the warm-up on reviews, then cross-model DPO with replay."""

    warmup_learning_rate: float = Field(1e-4, gt=0, description="of the supervised warm-up on reviews")
    warmup_epochs: float = Field(1, ge=0, description="passes over the reviews; 0: no warm-up")
    learning_rate: float = Field(1e-5, gt=0)
    epochs: float = Field(1, gt=0, description="passes over the pairs; `train --only sft` leaves DPO out")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with rising learning rate")
    beta: float = Field(0.2, gt=0)
    nll_weight: float = Field(1.0, ge=0, description="of the likelihood of chosen texts")
    replay_weight: float = Field(1.0, ge=0, description="of the likelihood of solved rows")
    replay_share: float = Field(
        1.0,
        ge=0,
        description="solved rows per review row, in warm-up and DPO; half of the warm-up's go on from a correction, "
        "and its wrong attempts, closed like any work, are not among them",
    )
    decision_weight: float = Field(
        1.0,
        ge=0,
        description="of the decisions in the warm-up: to accuse a step in a review, to close it while solving",
    )
    confirmation_share: float = Field(0.5, ge=0, lt=1, description="share of reviews that are of right work")

    def deciding(self, *others: str) -> dict[str, Any]:
        """As `Lora.deciding`. The confirmations are rows already when stage 2 begins: they are signed as such."""
        return super().deciding("confirmation_share", *others)


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
    sft: Sft = Sft()
    dpo: Dpo = Dpo()
    export: Export = Export()
    eval: Eval = Eval()
    review: Review = Review()
    prompts: Prompts = Prompts()


def keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every key of the tree, dotted, with its field: {"sft.epochs": FieldInfo, ..}."""
    found = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= keys(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found
