"""The status of a run, from its files alone: the state, counts, drops and cost of each stage, and the next command.

A stage is done when its manifest matches the files of the run and the current configuration. Only `build-data` reads
the source of the problems and notices that it has changed.
"""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sclite.config import Config
from sclite.data import attempts, corrections, pairs, templates
from sclite.data.problems import split_problems, trainable_problems
from sclite.errors import DataError, ScliteError
from sclite.evaluate.evaluate import summaries
from sclite.evaluate.threshold import FILE as THRESHOLDS
from sclite.evaluate.threshold import FittedThreshold, is_current, threshold_key
from sclite.inspect.rows import require_run
from sclite.records import Drop, Review
from sclite.run import Run
from sclite.settings import FILE as SETTINGS
from sclite.signature import differences
from sclite.student.adapters import STUDENTS, adapter_weights
from sclite.student.ggufs import export_stage, exports_of, gguf_path, inputs_of, source_digest
from sclite.teacher.ledger import FILE as LEDGER
from sclite.teacher.ledger import Ledger
from sclite.train.metrics_logger import read_metrics
from sclite.train.stage import training_inputs

DONE, STALE, HALF_WAY, NOT_BEGUN = "done", "stale", "half_way", "not_begun"
OUTPUTS = {
    "templates": "templates.jsonl",
    "sft": adapter_weights("sft"),
    "attempts": "attempts.jsonl",
    "corrections": "reviews.jsonl",
    "warmup": adapter_weights("warmup"),
    "pairs": "pairs.jsonl",
    "dpo": adapter_weights("dpo"),
}
"""The stages before export, in their order, and the file that each writes."""
TRAINED, EVAL = ("sft", "warmup", "dpo"), "eval"


@dataclass
class Stage:
    """One stage of a run. `rows` of an unfinished file, out of `total` if known."""

    state: str = NOT_BEGUN
    why: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    rows: int | None = None
    total: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None
    cost_usd: float | None = None


class Summary(BaseModel):
    """The part of an evaluation's summary that the status needs."""

    models: dict[str, dict[str, Any]]
    n: int
    folder: str


def read_status(config: Config, run: Run) -> dict[str, Any]:
    """{"run", "stages": {name: fields of Stage}, "dropped", "ledger", "next"}. Never writes.

    "ledger" is None without requests. Raises DataError if the run folder does not exist.
    """
    require_run(run)
    dropped: dict[str, Counter[str]] = {}
    for drop in run.rows("dropped.jsonl", Drop):
        dropped.setdefault(drop.stage, Counter())[drop.reason] += 1
    paid = None
    if run.path(LEDGER).is_file():
        with Ledger.reading(run.path(LEDGER)) as ledger:
            paid = ledger.totals()
    stages, problems = {"problems": Stage()}, trainable_problems(run)
    if problems:
        stages["problems"] = Stage(DONE, counts={"problems": len(problems)})
    split = split_problems(config, problems)
    kept, taught = frozenset(problem.id for problem in split.stage2), [*split.sft, *split.stage2]
    hidden = kept | {problem.id for problem in split.fit}
    tried = [*taught, *split.fit] if config.attempts.source else split.stage2
    learned = (run.manifest("sft") or {"inputs": {}})["inputs"].get("templates.jsonl")
    # templates that SFT has learned do not become stale with another teacher for the corrections
    settled = {"teacher", "prompts", "repairs"} if learned == run.file_digest("templates.jsonl") else set()

    inputs: dict[str, Callable[[], dict[str, Any]]] = {
        "templates": lambda: {
            name: value
            for name, value in templates.templates_inputs(config, taught).items()
            if name not in settled
        },
        "sft": lambda: training_inputs(config, run, "sft", hidden),
        "attempts": lambda: attempts.attempts_inputs(config, run, tried),
        "corrections": lambda: corrections.corrections_inputs(config, run),
        "warmup": lambda: training_inputs(config, run, "warmup", kept),
        "pairs": lambda: pairs.pairs_inputs(config, run),
        "dpo": lambda: training_inputs(config, run, "dpo", kept),
    }
    totals = {"templates": len(taught), "attempts": len(split.stage2) * config.attempts.samples}
    for name, output in OUTPUTS.items():
        stages[name] = _read_stage(run, name, output, inputs[name], totals.get(name))
    reviewed = {row.id for row in run.rows("reviews.jsonl", Review, whole=False)}
    stages |= _read_model_stages(config, run, sum(problem.id not in reviewed for problem in split.fit))

    stale = ""
    for name, stage in stages.items():
        if stale and stage.state == DONE:  # stages after a stale one are stale too
            stage.state, stage.why = STALE, [f"{stale} is stale"]
        stale = stale or (name if stage.state == STALE else "")
        stage.dropped = dict(dropped.get(name, Counter()).most_common())
    return {
        "run": str(run.folder),
        "stages": {name: dict(vars(stage)) for name, stage in stages.items()},
        "dropped": dict(sum(dropped.values(), Counter()).most_common()),
        "ledger": paid,
        "next": next_command(config, stages),
    }


def _read_stage(
    run: Run, name: str, output: str, inputs: Callable[[], dict[str, Any]], total: int | None = None
) -> Stage:
    """Read a stage. With a manifest: done, stale, or half-way if requests went unanswered; else imported, half-way or not begun.

    `total` is the number of rows that it will write.
    """
    path, rows = run.path(output), 0
    if (manifest := run.manifest(name)) is not None:
        stage = Stage(DONE, **{key: manifest[key] for key in ("counts", "seconds", "cost_usd")})
        before = dict(manifest["inputs"])
        if unanswered := before.pop("unanswered", 0):
            stage.state, stage.why = HALF_WAY, [f"{unanswered} requests without a reply"]
        try:
            now = inputs()
            stage.why += differences({key: value for key, value in before.items() if key in now}, now)
        except ScliteError as error:  # such as a missing prompt file, which would stop the stage too
            stage.why.append(error.message)
        stage.why += run.damages(manifest)
        if not path.exists():
            stage.why.append(f"{output} is missing")
        elif (signed := manifest["figures"].get("adapter")) and signed != run.file_digest(output):
            stage.why.append(f"{output} is not the adapter that {name} wrote")
        if stage.why and not unanswered:
            stage.state = STALE
        return stage
    if name in TRAINED:  # the last logged optimizer step
        logged = read_metrics(run.path(f"{name}/metrics.jsonl"))
        rows = max((row["step"] for row in logged if row["phase"] == name), default=0)
    elif path.is_file():
        rows = path.read_bytes().count(b"\n")  # complete lines
    if run.is_imported(name, output) and name not in ("warmup", "dpo"):
        return Stage(DONE, counts={"imported": 1} if name == "sft" else {path.stem: rows, "imported": rows})
    return Stage(HALF_WAY, rows=rows, total=total or None) if rows else Stage()


def _read_model_stages(config: Config, run: Run, fitting: int) -> dict[str, Stage]:
    """The newest student's export and review threshold, if one is needed, and the evaluation.

    A missing fit is only reported for the DPO student. The evaluation is done if it includes the newest student and no
    student has changed.
    """
    found = {"export": Stage()}
    weights = {name: run.path(adapter_weights(name)) for name in STUDENTS}
    trained = [name for name in STUDENTS if weights[name].is_file() or exports_of(run, name)]
    newest = trained[-1] if trained else "base"
    if exports := exports_of(run, newest):
        # of the configured types, else of any
        configured = [each for each in exports if each["inputs"].get("quant") == config.export.quant]
        manifest = (configured or exports)[-1]
        # the options of one export are not saved: compare with those of the existing file
        options = {key: manifest["inputs"].get(key) for key in ("quant", "imatrix", "keep_template")}
        as_exported = config.model_copy(update={"export": config.export.model_copy(update=options)})
        output = f"export/{gguf_path(run, newest, as_exported).name}"
        stage = export_stage(newest, as_exported)
        found["export"] = _read_stage(run, stage, output, lambda: inputs_of(as_exported, run, newest))
        if config.review.needs_fit:
            fits = run.read_json(THRESHOLDS, dict[str, FittedThreshold]) or {}
            digests = [file["sha256"] for file in manifest["figures"]["files"].values()]
            found["threshold"] = Stage()
            try:
                keys = [threshold_key(config, each) for each in digests]
                fitted = next((fits[key] for key in keys if key in fits), None)
            except DataError as error:  # a missing prompt file
                fitted, found["threshold"] = None, Stage(STALE, [error.message])
            if fitted is not None and is_current(fitted, fitting):
                counts = {"problems": fitted.problems, "fitted": int(fitted.threshold is not None)}
                found["threshold"] = Stage(DONE, [fitted.off] if fitted.off else [], counts)
            elif newest != "dpo":
                del found["threshold"]

    found[EVAL] = Stage()
    if evaluated := summaries(run, Summary):
        origins = {name: figures.get("made_from") for name, figures in evaluated[0].models.items()}
        changed = [n for n in STUDENTS if n in origins and origins[n] != source_digest(config, run, n)]
        why = [f"{', '.join(changed)} changed"] if changed else []
        if newest != "base" and not any(newest in each.models for each in evaluated):
            why.append(f"{newest} has not been evaluated")
        counts = {f"problems in {each.folder}": each.n for each in evaluated}
        found[EVAL] = Stage(STALE if why else DONE, why, counts)
    return found


def next_command(config: Config, stages: Mapping[str, Stage]) -> str:
    """The command for the first unfinished stage, or the keys that must be set first."""
    quickstart = config.teacher.embedded and not config.problems.source
    skipped = () if config.eval.source or quickstart else (EVAL,)
    unfinished = (name for name, stage in stages.items() if stage.state != DONE and name not in skipped)
    name, needed = next(unfinished, None), []
    teacher = [] if config.teacher.model else ["teacher.model"]
    # `basis_of` their requests: prompts or teacher, but not the token limit, which keeps the rows
    basis = re.compile(r"prompts changed\Z|teacher\.(?!max_tokens:)")
    rebased = {each for each, stage in stages.items() if any(map(basis.match, stage.why))}
    # corrections by another teacher replace existing ones only with --fresh
    retrained = any(stages[each].state == STALE for each in TRAINED) or "corrections" in rebased
    if name is None:
        fitted = "threshold" in stages and bool(stages["threshold"].counts.get("fitted"))
        words = ["chat", "--self-correct"] if fitted or not config.review.needs_fit else ["chat"]
    elif quickstart:
        words = ["quickstart", "--fresh"] if retrained else ["quickstart"]
    elif name in ("problems", "templates"):
        words = ["build-data", "--fresh"] if "templates" in rebased else ["build-data"]
        source = config.problems.source or stages["problems"].state == DONE
        needed = teacher if source else ["problems.source", *teacher]
    elif name not in OUTPUTS:
        words = ["eval"] if name == EVAL else ["train"]
    else:
        words = ["train", "--fresh"] if retrained else ["train"]
        corrected = stages["corrections"].state == DONE or stages["pairs"].state == DONE
        needed = [*([] if config.student.model else ["student.model"]), *([] if corrected else teacher)]
    if needed == ["student.model"] and not Path(SETTINGS).is_file():
        words, needed = [*words, "--set", "student.model=MODEL"], []
    if needed:
        return f"set {' and '.join(needed)} in {SETTINGS}" if Path(SETTINGS).is_file() else "sclite init"
    named = ["--run", config.run] if config.run != Config.model_fields["run"].default else []
    return shlex.join(["sclite", *words, *named])
