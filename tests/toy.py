"""Small real things for tests: a random Llama that trains in a second, and toy problems with their rows."""

import json
import os
import random
import resource
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from sclite.config import Config
from sclite.data.pairs import continuation, make_pairs
from sclite.records import Attempt, Drop, Pair, Problem, Review, Template
from sclite.run import Report, Run
from sclite.student.adapters import adapter_weights
from sclite.student.base import Reply, Scores, Student
from sclite.teacher.ledger import Entry, Ledger
from sclite.trace import Step, Trace, parse, render
from sclite.train.dpo import train_dpo
from sclite.train.metrics_logger import read_metrics
from sclite.train.sft import train_sft
from sclite.train.warmup import train_warmup

_EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "examples/embedded-student/tokenizer.py"))
CHATML, write_tokenizer = _EXAMPLE["CHATML"], _EXAMPLE["write_tokenizer"]
"""The chat template and the SentencePiece vocabulary of the embedded student."""


def sample_texts(count: int = 400, seed: int = 0) -> list[str]:
    """Short arithmetic traces in the form of templates."""
    draw = random.Random(seed)
    names = ["Anna", "Ben", "Chen", "Dara", "Emil"]
    texts = []
    for _ in range(count):
        a, b = draw.randint(1, 99), draw.randint(1, 99)
        texts.append(
            f"{draw.choice(names)} has {a} apples and buys {b} more. How many apples are there?\n"
            f"<Step1>Add the apples: {a} + {b} = {a + b}.\n<Key>Carry the ten.</Key>\n</Step1>\n"
            f"<Cause>The sum forgot the carry.</Cause>\n<Correction>It is {a + b}.</Correction>\n"
            f"<Generalized>Add what is bought.</Generalized>\n<Answer>{a + b}</Answer>"
        )
    return texts


def tiny_llama(folder: Path, seed: int = 0) -> Path:
    """A folder with a random float32 LlamaForCausalLM (about 1.4M parameters) and its tokenizer; returns `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder, sample_texts(), vocab_size=512)
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=2, initializer_range=0.08,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).float()
    model.save_pretrained(folder)
    return folder


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_adapter(base, folder: Path, std: float = 0.3, **settings):
    """Save a random LoRA of `base`, a model or its folder, in `folder`; returns it as a PeftModel in float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    if isinstance(base, Path):
        base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=std)
    model.save_pretrained(folder)
    return model


def merged_by_peft(model) -> dict:
    """The tensors of a PeftModel after PEFT's own merge."""
    return {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}


def tiny_gguf(folder: Path, out: Path, *, outtype: str = "f32") -> Path:
    """The model in `folder` as a GGUF; returns `out`."""
    from sclite.export.gguf import write_gguf

    return write_gguf(folder, out, outtype=outtype)


# -- toy problems and their rows --------------------------------------------------------------------------------------


def write_rows(path: Path | str, rows: Iterable[object]) -> Path:
    """Write rows, or lines that are not JSON, to a JSONL file; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


STAGE = {"batch_size": 4, "per_device_train_batch_size": 2, "max_length": 1024, "eval_share": 0}
LONG = {"checkpoints": 6, "per_device_train_batch_size": 1}


def toy_config(folder, **settings) -> Config:
    """A configuration for the tiny student: plain backend, few steps, high rates."""
    tree = {
        "student": {"model": str(folder), "backend": "plain", "batch": 4},
        "lora": {"r": 8, "lora_alpha": 16},
        "sft": {**STAGE, "learning_rate": 3e-3, "num_train_epochs": 4},
        "warmup": {**STAGE, "learning_rate": 3e-3, "num_train_epochs": 4},
        "dpo": {**STAGE, "learning_rate": 1e-3, "num_train_epochs": 3},
    }
    for section, values in settings.items():
        tree.setdefault(section, {}).update(values)
    return Config.model_validate(tree)


def toy_problems(count: int = 6) -> list[Problem]:
    """Two sums each."""
    made = []
    for i in range(count):
        a, b, c = 12 + 7 * i, 31 + i, 5 + 2 * i
        question, answer = f"Anna has {a} apples, buys {b} more and then {c}. How many?", str(a + b + c)
        solution = f"{a} + {b} + {c} = {answer}"
        made.append(Problem(id=f"p{i}", question=question, answer=answer, solution=solution))
    return made


def toy_trace(number: int, wrong: int | None = None) -> Trace:
    """The solution of a toy problem, with a slip in step `wrong`."""
    a, b, c = 12 + 7 * number, 31 + number, 5 + 2 * number
    first = a + b + 10 * (wrong == 1)
    second = first + c + 10 * (wrong == 2)
    steps = (Step(f"{a} + {b} = {first}", "Carry."), Step(f"{first} + {c} = {second}"))
    return Trace(steps, "Add all.", str(second))


def write_toy(run: Run, count: int = 6) -> None:
    """Problems, templates, attempts (two of three wrong) and the teacher's reviews of them."""
    problems = toy_problems(count)
    templates, attempts, reviews = [], [], []
    for i, problem in enumerate(problems):
        wrong = (None, 1, 2)[i % 3]
        work, right = toy_trace(i, wrong), toy_trace(i)
        templates.append(Template(**problem.model_dump(exclude={"solution"}), trace=render(right)))
        own = {"id": problem.id, "sample": 0, "trace": render(work)}
        attempts.append(Attempt(**own, answer=work.answer, correct=wrong is None))
        if wrong is None:
            reviews.append(Review(**own, step=None, requests=0))
            continue
        cause, correction = "The tens slip.", right.steps[wrong - 1].text
        noted = replace(work.steps[wrong - 1], cause=cause, correction=correction)
        steps = (*work.steps[: wrong - 1], noted, *right.steps[wrong:])
        own["trace"] = render(replace(right, steps=steps))
        reviews.append(Review(**own, step=wrong, cause=cause, correction=correction))
    run.replace("problems.jsonl", problems)
    run.replace("templates.jsonl", templates)
    run.replace("attempts.jsonl", attempts)
    run.replace("reviews.jsonl", reviews)


def write_pairs(run: Run) -> None:
    """The pairs of the toy reviews; the student's own corrections are made up."""
    attempts = {a.id: a for a in run.read("attempts.jsonl", Attempt)}
    pairs: list[Pair] = []
    for review in run.read("reviews.jsonl", Review):
        work = parse(attempts[review.id].trace).trace
        own = review.model_copy(update={"cause": "I do not know.", "correction": work.steps[0].text})
        pairs += make_pairs(review, work, [(continuation(own), False)])[0]
    run.replace("pairs.jsonl", pairs)


def make_run(folder) -> Run:
    """A run with templates, attempts, reviews, pairs, drops with two reasons and two paid replies."""
    run = Run(folder)
    write_toy(run)
    write_pairs(run)
    drops = [Drop(stage="templates", id=str(i), reason="wrong_answer") for i in range(3)]
    run.append("dropped.jsonl", [*drops, Drop(stage="pairs", id="p1", reason="chosen_equals_rejected")])
    run.sign("templates", {"prompts": "0123456789abcdef"}, Report("templates"))
    with Ledger(run.path("ledger.sqlite")) as ledger:
        ledger.sent("a", "templates", "openai/large")
        ledger.put("a", Entry("text", "stop", 100, 40, 0.25))
        ledger.sent("b", "templates", "openai/large")
        ledger.put("b", Entry("text", "stop", 10, 4, None))
    return run


def export_config(student: Path, **sections) -> Config:
    """A configuration with private addresses and paths, none of which may be exported."""
    tree = {
        "student": {"model": str(student)},
        "teacher": {"model": "openai/large", "api_base": "http://10.0.0.7:8000/v1"},
        "problems": {"source": "/home/somebody/sums.jsonl"},
    }
    return Config.model_validate({**tree, **sections})


def part_of(run: Run, folder: Path, stage: str) -> Run:
    """A copy of a run up to a stage that is not started."""
    names = [f"{name}.jsonl" for name in ("problems", "templates", "attempts", "reviews", "pairs")]
    for before in list(TRAIN)[: list(TRAIN).index(stage)]:
        names += [f"{before}/adapter/{name}" for name in ("adapter_model.safetensors", "adapter_config.json")]
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(run.path(name).read_bytes())
    return Run(folder)


TRAIN = {"sft": train_sft, "warmup": train_warmup, "dpo": train_dpo}
_CHILD = """
import sys
from sclite.config import Config
from sclite.run import Run
from sclite.train.{stage} import train_{stage}
train_{stage}(Config.model_validate_json(sys.argv[1]), Run(sys.argv[2]))
"""


def train_all(config: Config, run: Run, count: int = 6) -> None:
    """Write the toy rows and train every stage."""
    write_toy(run, count)
    train_sft(config, run)
    train_warmup(config, run)
    write_pairs(run)
    train_dpo(config, run)


def start_training(config: Config, run: Run, stage: str) -> subprocess.Popen:
    """Train one stage in its own process."""
    command = [sys.executable, "-c", _CHILD.format(stage=stage), config.model_dump_json(), str(run.folder)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def raises(kind: type[Exception], match: str, hint: str = "") -> Iterator[pytest.ExceptionInfo]:
    """The block must raise this error, with a hint that has these words."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert caught.value.hint
    assert hint in caught.value.hint


@contextmanager
def file_limit(size: int | None) -> Iterator[None]:
    """A write beyond this size of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or before[0], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Said(list):
    """A progress display that records its warnings."""

    def __call__(self, *_, warning="", **__):
        self.extend([warning] if warning else [])


def adapter(run: Run, stage: str) -> dict:
    from safetensors.torch import load_file

    return load_file(run.path(adapter_weights(stage)))


def largest_change(one: dict, other: dict) -> float:
    """The largest difference of two adapters' weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def metrics_of(run: Run, stage: str) -> list[dict]:
    rows = read_metrics(run.path(f"{stage}/metrics.jsonl"))
    return [row for row in rows if row["phase"] == stage]


def pay(run, stage: str, *costs: float | None) -> None:
    with Ledger(run.path("ledger.sqlite")) as ledger:
        for number, cost in enumerate(costs):
            ledger.sent(f"{stage} {number}", stage, "m")
            ledger.put(f"{stage} {number}", Entry("text", "stop", 100, 20, cost))


class ScriptedStudent(Student):
    """Answers the i-th of some requests with text and finish i, in turn, the last request first; 10 tokens each.

    `odds` are the log-odds of an error in each step; a correction cannot be read.
    """

    def __init__(self, *texts: str, finishes: tuple[str, ...] = ("stop",), odds: float = -5.0):
        self.texts, self.finishes, self.odds, self.requests = texts, finishes, odds, []

    def generate(self, requests):
        self.requests += requests
        for i, request in reversed(list(enumerate(requests))):
            text = "no" if request.pieces else self.texts[i % len(self.texts)]
            yield Reply(i, text, 10, 5, self.finishes[i % len(self.finishes)])

    def score(self, requests):
        for i, request in enumerate(requests):
            yield Scores(i, (self.odds,) * len(request.marks))


class SameVerdict:
    """A grader that grades every answer right, or every answer wrong."""

    def __init__(self, right: bool):
        self.right = right

    def equal_many(self, pairs):
        return [self.right for _ in pairs]
