"""What SFT, warm-up and DPO have in common: a `TrainingJob` trains, saves and signs one adapter."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sclite import prompts
from sclite.config import Config, Student
from sclite.errors import DataError, UsageError
from sclite.progress import Progress, no_progress
from sclite.records import Drop
from sclite.run import Report, Run, timed
from sclite.signature import differences, digest
from sclite.student.adapters import adapter_weights, record_origin
from sclite.student.loader import (
    EMBEDDED,
    check_tokenizer,
    fetch_model,
    load_student,
    load_tokenizer,
    model_name,
    read_config,
    select_backend,
)
from sclite.student.log_probs import check_log_probs
from sclite.student.tokenization import piece_ids
from sclite.train.memory import choose_micro_batch
from sclite.train.trainer import Checkpoints, TrainingTask, sync_folder, train_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

BuildTask = Callable[["PeftModel", int], TrainingTask]
"""From the loaded model and the micro-batch size to the task."""
ROWS = {
    "sft": ("templates.jsonl",),
    "warmup": ("reviews.jsonl", "attempts.jsonl", "templates.jsonl"),
    "dpo": ("pairs.jsonl", "templates.jsonl"),
}
"""The files that each stage trains on."""
START = {"warmup": "sft", "dpo": "warmup"}
"""The stage whose adapter another starts from."""


def training_inputs(
    config: Config, run: Run, stage: str, unseen: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Everything that decides the result of a training stage; the embedded student is the same on every machine."""
    used = ("student_system", "student_solve", *(["student_review"] if stage != "sft" else ()))
    start: dict[str, Any] = {"lora": config.lora.model_dump(mode="json")}
    if before := START.get(stage):
        start = {f"{before}/adapter": run.file_digest(adapter_weights(before))}
    # `checkpoints` only decides how often to look for the best step
    without_effect = {"per_device_train_batch_size", "padding_free", "checkpoints", "tensorboard"}
    return {
        "problems kept for stage 2": digest(sorted(unseen)),
        **{name: run.file_digest(name) for name in ROWS[stage]},
        **start,
        stage: config.stage(stage).model_dump(mode="json", exclude=without_effect),
        "student.model": EMBEDDED if config.student.model == EMBEDDED else model_name(config.student),
        "student.load_in_4bit": config.student.load_in_4bit,
        "prompts": prompts.digest_prompts(*used, folder=config.prompts.folder),
        "seed": config.seed,
    }


@dataclass
class TrainingJob:
    """One training stage of a run. `unseen` are the ids of the problems reserved for stage 2."""

    stage: str
    config: Config
    run: Run
    unseen: frozenset[str] = frozenset()
    fresh: bool = False
    progress: Progress = no_progress
    longest: int = 0  # tokens of the longest row that is trained

    def __post_init__(self) -> None:
        self.report, self.settings = Report(self.stage), self.config.stage(self.stage)
        self.inputs = training_inputs(self.config, self.run, self.stage, self.unseen)

    def drop_long_rows(
        self, lengths: Sequence[int], keys: Sequence[tuple[str, int | None]] = (), what: str = "rows"
    ) -> list[int]:
        """Numbers of the rows that fit in max_length; nothing is ever truncated. `lengths` are in tokens.

        A warning counts the others; if they have `keys` (id, sample), dropped.jsonl lists them and the report counts them.
        """
        limit, reason = self.settings.max_length, "longer_than_max_length"
        fitting = [number for number, tokens in enumerate(lengths) if tokens <= limit]
        if long := len(lengths) - len(fitting):
            skipped = f"{long} of {len(lengths)} {what} have more than {limit} tokens and are skipped"
            remedy = f"(the longest has {max(lengths)}): raise {self.stage}.max_length"
            self.progress(0, 0, warning=f"{skipped} {remedy}")
        drops = [
            Drop(
                stage=self.stage,
                id=id,
                sample=sample,
                reason=reason,
                detail=f"{n} tokens, the limit is {limit}",
            )
            for (id, sample), n in zip(keys, lengths, strict=False)
            if n > limit
        ]
        if keys:
            self.run.replace_drops(self.stage, drops)
        if drops:
            self.report.dropped[reason] = len(drops)
        self.longest = max([self.longest, *(lengths[number] for number in fitting)])
        return fitting

    def train(self, prepare: Callable[[TrainingJob, Tokenizer], BuildTask]) -> Report:
        """Train the stage and save its adapter as STAGE/adapter; resume if it was interrupted, skip if it is finished.

        `prepare` tokenizes and checks the rows before the weights are loaded, which takes a minute. With 0 epochs the
        adapter to start from is copied. Training takes hours, so its results are never thrown away without `fresh`:
        raises UsageError if the stage was trained with other inputs, DataError if its adapter was replaced.
        """
        config, run, stage, report, inputs = self.config, self.run, self.stage, self.report, self.inputs
        checkpoints, weights = Checkpoints(run.path(f"{stage}/checkpoints")), adapter_weights(stage)
        adapter = run.path(f"{START[stage]}/adapter") if stage in START else None
        manifest = run.done(stage, inputs, weights)
        if manifest and manifest["figures"].get("adapter") in (None, run.file_digest(weights)):
            return Report.of(manifest)
        started = checkpoints.recorded_inputs()
        trained = run.manifest(stage)
        copied = trained is not None and not started and not trained["inputs"][stage]["num_train_epochs"]
        if not (self.fresh or copied):
            if manifest:
                raise DataError(
                    f"{run.path(weights)} is not the adapter that {stage} wrote: it is damaged or was replaced",
                    "restore it from a backup, or add --fresh to train it again",
                )
            before = trained["inputs"] if trained else started
            # equal if the training was begun with --fresh, then interrupted
            if started != inputs and before not in (None, inputs):
                what = "trained" if trained else "started"
                raise UsageError(
                    f"{stage} was {what} with other inputs: {'; '.join(differences(before, inputs))}",
                    f"restore them to keep the results, or add --fresh to train {stage} again",
                )
        with timed(report):
            if adapter is not None and self.settings.num_train_epochs == 0:
                with _new_folder(run.path(f"{stage}/adapter")) as folder:
                    shutil.copytree(adapter, folder)
            else:
                quiet_libraries(config.student)
                checkpoints.prepare(inputs)
                name = model_name(config.student)
                if not Path(name).is_dir():
                    self.progress(0, 0, note=f"loading {name} (downloads it unless it is cached)")
                tokenizer = load_tokenizer(name)
                check_tokenizer(tokenizer, read_config(name), name)
                build_task = prepare(self, tokenizer)
                micro_batch = choose_micro_batch(config, stage, self.longest)
                base = fetch_model(name)  # before training, since the network may be gone afterwards
                model = cast("PeftModel", load_student(config, stage, adapter, train=True)[0])
                (ids,) = piece_ids(tokenizer, ["1 + 1 = 2. How much is 2 + 3?"])
                check_log_probs(model, ids, self.settings.padding_free)
                task, metrics = build_task(model, micro_batch), run.path(f"{stage}/metrics.jsonl")
                steps = train_adapter(model, task, checkpoints, metrics, micro_batch, self.progress)
                report.counts["steps"] = steps
                # save it, after removing the manifest of an older adapter
                run.mark_started(stage)
                run.path(f"done/{stage}.json").unlink(missing_ok=True)
                with _new_folder(run.path(f"{stage}/adapter")) as folder:
                    model.save_pretrained(str(folder))
                    record_origin(model, base, folder)
                if adapter is None:
                    layers = (name.rpartition(".")[2] for name in model.targeted_module_names)
                    report.figures["lora"] = list(dict.fromkeys(layers))
        report.figures["adapter"] = run.file_digest(weights)
        run.sign(stage, inputs, report)
        checkpoints.delete()
        return report


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write to, then rename it to `folder`, which is never half-written."""
    temporary = folder.with_name(".adapter")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    sync_folder(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_folder(folder)


def quiet_libraries(student: Student | None = None) -> None:
    """Silence the progress bars and notices of the training libraries; import Unsloth first if it trains `student`."""
    if student is not None and select_backend(student) == "unsloth":
        # its telemetry contacts a server, and shortens every later timeout
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path.home() / ".cache/sclite/unsloth"))
        os.environ.setdefault("HF_HUB_ENABLE_HF_TRANSFER", "0")
        # it patches transformers and peft, so it has to be imported before them
        importlib.import_module("unsloth")
    for name in ("accelerate", "peft", "torch.distributed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module="(peft|transformers|torch).*")
