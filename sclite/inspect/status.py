"""The status of a run, from its files alone: the state, counts, drops and cost of each stage, and the next command.

A stage is done when its manifest matches the files of the run and the current configuration. Only `build-data` reads
the source of the problems and notices that it has changed.
"""

import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sclite.config import Config
from sclite.data import attempts, corrections, pairs, templates
from sclite.data.problems import split_problems, trainable_problems
from sclite.data.sources import is_local_source
from sclite.errors import DataError, ScliteError
from sclite.evaluate.results import summaries
from sclite.evaluate.threshold import FILE as THRESHOLDS
from sclite.evaluate.threshold import FittedThreshold, find_threshold, is_current
from sclite.inspect.rows import require_run
from sclite.records import Drop, Problem, Review
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


class MeasuredModel(BaseModel):
    """The part of a student's figures that identifies the GGUF that was evaluated."""

    file: str
    bytes: int
    made_from: str


class Summary(BaseModel):
    """The part of an evaluation's summary that the status needs."""

    models: dict[str, MeasuredModel]
    n: int
    folder: str


def read_status(config: Config, run: Run) -> dict[str, Any]:
    """{"run", "busy", "stages": {name: fields of Stage}, "dropped", "ledger", "next"}. Never writes.

    "ledger" is None without requests, else its totals, and those of each stage under "stages". Raises DataError
    if the run folder does not exist.
    """
    require_run(run)
    dropped: dict[str, Counter[str]] = {}
    for drop in run.rows("dropped.jsonl", Drop):
        dropped.setdefault(drop.stage, Counter())[drop.reason] += 1
    paid: dict[str, Any] | None = None
    if run.path(LEDGER).is_file():
        try:
            with Ledger.reading(run.path(LEDGER)) as ledger:
                by_stage = {name: ledger.totals(name) for name in ("templates", "corrections")}
                paid = {**ledger.totals(), "stages": {n: t for n, t in by_stage.items() if t["requests"]}}
        except DataError as error:
            run.warn(f"{error.message}; {error.hint}")
    asked = paid["stages"] if paid else {}

    stages, problems = {"problems": Stage()}, list[Problem]()
    try:
        if problems := trainable_problems(run):
            stages["problems"] = Stage(DONE, counts={"problems": len(problems)})
    except DataError as error:
        stages["problems"] = Stage(STALE, [error.message])
    split = split_problems(config, problems)
    kept, taught = frozenset(problem.id for problem in split.stage2), [*split.sft, *split.stage2]
    hidden = kept | {problem.id for problem in split.fit}
    tried = [*taught, *split.fit] if config.attempts.source else split.stage2
    learned = (run.manifest("sft") or {"inputs": {}})["inputs"].get("templates.jsonl")
    # templates that SFT has learned do not become stale with another teacher for the corrections
    settled = {"teacher", "prompts", "repairs"} if learned == run.file_digest("templates.jsonl") else set()

    def templates_inputs() -> dict[str, Any]:
        found = templates.templates_inputs(config, taught)
        return {name: value for name, value in found.items() if name not in settled}

    inputs: dict[str, Callable[[], dict[str, Any]]] = {
        "templates": templates_inputs,
        "sft": lambda: training_inputs(config, run, "sft", hidden),
        "attempts": lambda: attempts.attempts_inputs(config, run, tried),
        "corrections": lambda: corrections.corrections_inputs(config, run),
        "warmup": lambda: training_inputs(config, run, "warmup", kept),
        "pairs": lambda: pairs.pairs_inputs(config, run),
        "dpo": lambda: training_inputs(config, run, "dpo", kept),
    }
    totals = {"templates": len(taught), "attempts": len(split.stage2) * config.attempts.samples}
    for name, output in OUTPUTS.items():
        stages[name] = _read_stage(run, name, output, inputs[name], asked.get(name), totals.get(name))
    reviewed = {row.id for row in run.rows("reviews.jsonl", Review, whole=False)}
    stages |= _read_model_stages(config, run, sum(problem.id not in reviewed for problem in split.fit))

    stale, older = "", _older_exports(stages)
    for name, stage in stages.items():
        if stale and stage.state == DONE:  # stages after a stale one are stale too
            stage.state, stage.why = STALE, [f"{stale} is stale"]
        stale = stale or (name if stage.state == STALE and name not in older else "")
        stage.dropped = dict(dropped.get(name, Counter()).most_common())
        if stage.dropped and stage.state == NOT_BEGUN:
            stage.state, stage.why = HALF_WAY, ["only dropped rows so far"]
        if name in asked:
            stage.cost_usd = None if asked[name]["unpriced"] else asked[name]["cost_usd"]
    return {
        "run": str(run.folder),
        "busy": run.is_locked(),
        "stages": {name: dict(vars(stage)) for name, stage in stages.items()},
        "dropped": dict(sum(dropped.values(), Counter()).most_common()),
        "ledger": paid,
        "next": next_command(config, stages),
    }


def _read_stage(
    run: Run,
    name: str,
    output: str,
    inputs: Callable[[], dict[str, Any]],
    paid: Mapping[str, Any] | None = None,
    total: int | None = None,
) -> Stage:
    """Read a stage. With a manifest: done, stale, or half-way if requests went unanswered; else imported, half-way or not begun.

    `paid` has the ledger's totals if it has sent requests, `total` is the number of rows that it will write.
    """
    path, rows = run.path(output), 0
    if (manifest := run.manifest(name)) is not None:
        counts, seconds, cost_usd = manifest["counts"], manifest["seconds"], manifest["cost_usd"]
        stage = Stage(DONE, counts=counts, seconds=seconds, cost_usd=cost_usd)
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
        with open(path, "rb") as file:  # the number of complete lines
            rows = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    if run.is_imported(name, output) and name not in ("warmup", "dpo"):
        return Stage(DONE, counts={"imported": 1} if name == "sft" else {path.stem: rows, "imported": rows})
    if not rows and paid:  # killed before its first row
        return Stage(HALF_WAY, [f"{paid['requests']} replies in the ledger"])
    return Stage(HALF_WAY, rows=rows, total=total or None) if rows else Stage()


def _read_model_stages(config: Config, run: Run, fitting: int) -> dict[str, Stage]:
    """The exports of the students, the fits of their review thresholds, and the evaluation.

    "export" is present if the newest student has none. "threshold" is the newest student's, "threshold-sft", ... are those
    of others; there are none if no threshold is needed, and a missing fit is only reported for the DPO student. The
    evaluation is done if it includes the newest student and no GGUF has changed, judged by its size and origin.
    """
    found: dict[str, Stage] = {}
    made = {name: exports for name in STUDENTS if (exports := exports_of(run, name))}
    trained = [name for name in STUDENTS if name in made or run.path(adapter_weights(name)).is_file()]
    newest = trained[-1] if trained else "base"
    newest_of: dict[str, dict[str, Any]] = {}  # of the configured types, else of any
    for name, exports in made.items():
        configured = [each for each in exports if each["inputs"].get("quant") == config.export.quant]
        newest_of[name] = (configured or exports)[-1]
        chosen = newest_of[name]["inputs"]
        # the options of one export are not saved: compare with those of the existing file
        options = {key: chosen.get(key) for key in ("quant", "imatrix", "keep_template")}
        as_exported = config.model_copy(update={"export": config.export.model_copy(update=options)})
        output = f"export/{gguf_path(run, name, as_exported).name}"
        inputs = partial(inputs_of, as_exported, run, name)
        found[f"export-{name}"] = _read_stage(run, export_stage(name, as_exported), output, inputs)
    if newest not in made:
        found["export"] = Stage()

    if config.review.needs_fit:
        fits = run.read_json(THRESHOLDS, dict[str, FittedThreshold]) or {}
        for name, manifest in newest_of.items():
            digests = [file["sha256"] for file in manifest["figures"]["files"].values()]
            stage = "threshold" if name == newest else f"threshold-{name}"
            try:
                fitted = next(filter(None, (find_threshold(fits, each, config) for each in digests)), None)
            except DataError as error:  # a missing prompt file
                found[stage] = Stage(STALE, [error.message])
                continue
            if fitted is not None and is_current(config, fitted, fitting):
                counts = {"problems": fitted.problems, "fitted": int(fitted.threshold is not None)}
                found[stage] = Stage(DONE, [fitted.off] if fitted.off else [], counts)
            elif name == "dpo":
                found[stage] = Stage()

    found[EVAL] = Stage()
    if evaluated := summaries(run, Summary):
        others = [
            name
            for name, measured in evaluated[0].models.items()
            if name in STUDENTS  # not behind an API
            and (
                measured.made_from != source_digest(config, run, name)
                or not (path := run.path(f"export/{measured.file}")).is_file()
                or path.stat().st_size != measured.bytes
            )
        ]
        why = [f"{', '.join(others)}: the GGUF has changed"] if others else []
        if newest != "base" and not any(newest in each.models for each in evaluated):
            why.append(f"{newest} has not been evaluated")
        counts = {f"problems in {each.folder}": each.n for each in evaluated}
        found[EVAL] = Stage(STALE if why else DONE, why, counts)
    return found


def _older_exports(stages: Mapping[str, Stage]) -> list[str]:
    """The exports of all students but the newest: `sclite eval` recreates them."""
    return [name for name in stages if name.startswith("export")][:-1]


def _has_another_basis(stage: Stage) -> bool:
    """Whether `basis_of` its requests has changed: prompts or teacher, but not the token limit, which keeps the rows."""
    changed = (why for why in stage.why if not why.startswith("teacher.max_tokens:"))
    return any(why == "prompts changed" or why.startswith("teacher.") for why in changed)


def next_command(config: Config, stages: Mapping[str, Stage]) -> str:
    """The command for the first unfinished stage, or the keys that must be set first."""
    held_out = config.eval.source
    testable = bool(held_out) and (not is_local_source(held_out) or Path(held_out).is_file())
    quickstart = config.teacher.embedded and not config.problems.source
    skipped = [*_older_exports(stages), *(() if testable or quickstart else (EVAL,))]
    unfinished = (name for name, stage in stages.items() if stage.state != DONE and name not in skipped)
    name, needed = next(unfinished, None), []
    teacher = [] if config.teacher.model else ["teacher.model"]
    # attempts of a student that this run does not train: their corrections need no training
    others = bool(config.attempts.source or config.attempts.student)
    others = others and stages["attempts"].state != NOT_BEGUN and stages["sft"].state == NOT_BEGUN
    retrained = any(stages[each].state == STALE for each in TRAINED)
    # corrections by another teacher replace existing ones only with --fresh
    retrained = retrained or _has_another_basis(stages["corrections"])
    if name is None:
        fitted = "threshold" in stages and bool(stages["threshold"].counts.get("fitted"))
        words = ["chat", "--self-correct"] if fitted or not config.review.needs_fit else ["chat"]
    elif quickstart:
        words = ["quickstart", "--fresh"] if retrained else ["quickstart"]
    elif name in ("problems", "templates"):
        words = ["build-data", "--fresh"] if _has_another_basis(stages["templates"]) else ["build-data"]
        source = config.problems.source or stages["problems"].state == DONE
        needed = teacher if source else ["problems.source", *teacher]
    elif name not in OUTPUTS:
        words = ["export"] if name.startswith("export-") else ["eval"] if name == EVAL else ["train"]
    elif others and stages["corrections" if config.attempts.source else "pairs"].state != DONE:
        words, needed = ["build-data", "--only", "corrections"], teacher
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
