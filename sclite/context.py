"""What a command works with: configuration, run folder, progress, and the teacher and student that its stages use."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sclite.config import Attempts, Config, Teacher
from sclite.data.problems import Split
from sclite.errors import DataError, NetworkError
from sclite.export.model import write_sampling_gguf
from sclite.isolation import run_isolated
from sclite.progress import Progress, ProgressDisplay, no_progress
from sclite.run import Report, Run
from sclite.signature import digest
from sclite.student import loader
from sclite.student.adapters import STUDENTS, adapter_weights
from sclite.student.base import Student
from sclite.student.cuda_memory import free_memory
from sclite.student.endpoint import Endpoint
from sclite.student.hf_model import HFModel
from sclite.student.llama_cpp.engine import Engine, check_gguf, llama
from sclite.student.ollama_api import PREFIX, find_model, ollama_url
from sclite.teacher import client, ledger
from sclite.train.stage import quiet_libraries


@dataclass
class Context:
    """What a command works with. `prepare` registers a custom teacher with LiteLLM before the first call."""

    config: Config
    run: Run
    display: ProgressDisplay
    prepare: Callable[[], None] | None = None
    problems: Split | None = None  # of the quickstart; else from problems.jsonl
    ask_before_paying: bool = False
    dry: bool = False  # write nothing, send nothing
    isolated: bool = False  # each stage that needs the GPU runs in its own process
    reports: list[Report] = field(default_factory=list)

    def students(self) -> list[str]:
        """The students in the run, the base model first, in the order of training."""
        return [name for name in STUDENTS if name == "base" or self.run.path(adapter_weights(name)).is_file()]

    def isolate(
        self, work: Callable[..., Report], config: Config, *arguments: Any, progress: Progress
    ) -> Report:
        """`work(config, run, *arguments, progress=..)`, in its own process if the context is `isolated`."""
        inputs = (config, self.run, *arguments)
        if not self.isolated:
            return work(*inputs, progress=progress)
        return run_isolated(work, *inputs, progress=progress, log=self.run.path("libraries.log"))

    def on_gpu(self, work: Callable[..., Report], *arguments: Any, progress: Progress) -> Report:
        """Like `isolate`, but a student behind an endpoint needs neither a GPU nor a process."""
        if self.config.attempts.kind == "endpoint":
            return work(self.config, self.run, *arguments, progress=progress, context=self)
        return self.isolate(work, self.config, *arguments, progress=progress)

    @contextmanager
    def teacher(self, settings: Teacher | None = None) -> Iterator[client.Teacher]:
        """The teacher's client over the run's ledger (`settings`: those of another model)."""
        path = self.run.path(ledger.FILE)
        with ExitStack() as stack:
            reading = self.dry and path.is_file()
            if self.dry and not reading:
                path = Path(stack.enter_context(TemporaryDirectory())) / ledger.FILE
            paid = stack.enter_context(ledger.Ledger.reading(path) if reading else ledger.Ledger(path))
            confirm = self.confirm if self.ask_before_paying else None
            chosen = settings or self.config.teacher
            yield stack.enter_context(client.Teacher(chosen, paid, self.prepare, confirm))

    def confirm(self, done: int, spent_usd: float | None, left: int, cost_usd: float | None) -> bool:
        """Show what the rest will cost and ask whether to continue; True without a terminal."""
        cost = "an unknown amount" if cost_usd is None else f"about ${cost_usd:.2f}"
        spent = "" if spent_usd is None else f" for ${spent_usd:.4f}"
        return self.display.confirm(
            f"{done} rows done{spent}. The remaining {left} will cost {cost}. Continue?"
        )

    def student(
        self, adapter: str, stage: str, progress: Progress = no_progress
    ) -> AbstractContextManager[Student]:
        """The student of stage 2: `attempts.student`, else the base with an adapter; `stage` is for the ledger."""
        settings = self.config.attempts
        if settings.kind == "trained":
            return self.sampler(adapter, progress)
        if settings.kind == "endpoint":
            return self.endpoint(settings, stage)
        return Engine(self.student_gguf(), context=self.config.eval.context)

    def student_gguf(self) -> Path:
        """The GGUF file in `attempts.student`. Raises DataError if it is missing, or llama.cpp cannot read it."""
        path = Path(self.config.attempts.student)
        if not path.is_file():
            hint = "give the path of a GGUF file, or a LiteLLM model name"
            raise DataError(f"attempts.student: {path} does not exist", hint)
        check_gguf(path)
        return path

    @contextmanager
    def endpoint(self, settings: Attempts, stage: str) -> Iterator[Endpoint]:
        """The model behind an API that `settings.student` names; ollama/NAME is served by Ollama's OpenAI-compatible endpoint.

        Raises TeacherError if Ollama is not running or has no such model.
        """
        model, address, price, version = settings.student, settings.api_base, settings.price, 0
        if model.startswith(PREFIX):
            url = address.rstrip("/").removesuffix("/v1") or ollama_url()
            version = int(digest(find_model(url, model.removeprefix(PREFIX)))[:8], 16)
            # not openai/: Ollama needs no key, and must not get OpenAI's
            model, address = f"hosted_vllm/{model.removeprefix(PREFIX)}", f"{url}/v1"
            price = price or (0.0, 0.0)
        changes = {"model": model, "api_base": address, "concurrency": settings.concurrency, "price": price}
        changes |= {"temperature": None, "repairs": 0, "inspector": "", "extra": {}}
        with self.teacher(self.config.teacher.model_copy(update=changes)) as teacher:  # its timeout, retries
            yield Endpoint(teacher, stage, settings.student, version)

    @contextmanager
    def sampler(self, adapter: str, progress: Progress = no_progress) -> Iterator[Student]:
        """The student with an adapter of the run, in the fastest form available.

        That is a GGUF in llama.cpp, several times faster than batches in transformers. Transformers is used on a GPU
        that this build of llama.cpp cannot use and, with a warning, if the converter cannot be downloaded.
        """
        import torch

        quiet_libraries(self.config.student)
        on_gpu, work, path = torch.cuda.is_available(), self.run.path("export/sampling"), None
        try:
            if not on_gpu or llama().llama_supports_gpu_offload():
                try:
                    path = write_sampling_gguf(self.config, self.run.path(adapter), work, small=on_gpu)
                except NetworkError as error:
                    progress(0, 0, warning=f"{error.message}: sampling with transformers, which is slower")
            if path is not None:
                settings, attempt = self.config.eval, self.config.attempts.max_tokens
                # an attempt and its correction; shorter caches leave room for more sequences
                context = min(settings.context, 2 * attempt + 512) if on_gpu else settings.context
                with Engine(path, context=context, cache_gb=8 if on_gpu else 4) as student:
                    yield student
                return
        finally:
            shutil.rmtree(work, ignore_errors=True)
        model, tokenizer = loader.load_student(self.config, "sft", self.run.path(adapter))
        try:
            yield HFModel(model, tokenizer, self.config.student.batch)
        finally:
            del model
            free_memory()

    def add(self, report: Report, text: str) -> Report:
        self.reports.append(report)
        self.display.done(report.stage, text, report.skipped)
        return report
