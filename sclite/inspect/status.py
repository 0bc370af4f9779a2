"""The status of a run, from its files alone: the state, counts, drops and cost of each stage, and the next command.

A stage is done when its manifest matches the files of the run and the current configuration. Only `build-data` reads
the source of the problems and notices that it has changed.
"""

import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sclite.config import Config
from sclite.data import attempts, corrections, pairs, templates
from sclite.data.problems import Split, split_problems
from sclite.data.sources import is_local_source
from sclite.errors import DataError, ScliteError
from sclite.evaluate.results import summaries
from sclite.export import model as export
from sclite.inspect.rows import require_run
from sclite.records import Drop, Problem
from sclite.run import Run
from sclite.settings import FILE as SETTINGS
from sclite.signature import differences
from sclite.teacher.ledger import FILE as LEDGER
from sclite.teacher.ledger import Ledger
from sclite.train import dpo, sft, warmup
from sclite.train.metrics_logger import read_metrics

DONE, STALE, HALF_WAY, NOT_BEGUN = "done", "stale", "half_way", "not_begun"
OUTPUTS = {
    "templates": "templates.jsonl",
    "sft": "sft/adapter/adapter_model.safetensors",
    "attempts": "attempts.jsonl",
    "corrections": "reviews.jsonl",
    "warmup": "warmup/adapter/adapter_model.safetensors",
    "pairs": "pairs.jsonl",
    "dpo": "dpo/adapter/adapter_model.safetensors",
}
"""The stages before export, in their order, and the file that each writes."""
TRAINED, IMPORTED, EVAL = ("sft", "warmup", "dpo"), ("templates", "attempts", "corrections", "pairs"), "eval"


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


def read_status(config: Config, run: Run) -> dict[str, Any]:
    """{"run", "busy", "stages": {name: fields of Stage}, "dropped", "ledger", "next"}. Never writes or waits for a lock.

    "ledger" is None without requests, else its totals, and those of each stage under "stages". Raises DataError
    if the run folder does not exist.
    """
    require_run(run)
    dropped: dict[str, Counter[str]] = {}
    for drop in run.rows("dropped.jsonl", Drop):
        dropped.setdefault(drop.stage, Counter())[drop.reason] += 1
    paid = _ledger(run)
    stages = _stages(config, run, paid)
    for name, stage in stages.items():
        stage.dropped = dict(dropped.get(name, Counter()).most_common())
        if stage.dropped and stage.state == NOT_BEGUN:
            stage.state, stage.why = HALF_WAY, ["only dropped rows so far"]
        if paid and name in paid["stages"]:
            stage.cost_usd = paid["stages"][name]["cost_usd"]
    return {
        "run": str(run.folder),
        "busy": run.is_locked(),
        "stages": {name: dict(vars(stage)) for name, stage in stages.items()},
        "dropped": dict(sum(dropped.values(), Counter()).most_common()),
        "ledger": paid,
        "next": next_command(config, stages),
    }


def _ledger(run: Run) -> dict[str, Any] | None:
    if not run.path(LEDGER).is_file():
        return None
    try:
        with Ledger.reading(run.path(LEDGER)) as ledger:
            by_stage = {name: ledger.totals(name) for name in ("templates", "corrections")}
            return {**ledger.totals(), "stages": {name: t for name, t in by_stage.items() if t["requests"]}}
    except DataError as error:
        run.warn(f"{error.message}; {error.hint}")
        return None


# -- stages --------------------------------------------------------------------------------------------------------


def _stages(config: Config, run: Run, paid: Mapping[str, Any] | None) -> dict[str, Stage]:
    problems, first = [], Stage()
    try:
        problems = run.read("problems.jsonl", Problem)
        first = Stage(DONE, counts={"problems": len(problems)}) if problems else Stage()
    except DataError as error:
        first = Stage(STALE, [error.message])
    split, found = split_problems(config, problems), {"problems": first}
    expected = _expected(config, run, split)
    totals = {
        "templates": len(split.sft) + len(split.stage2),
        "attempts": len(split.stage2) * config.attempts.samples,
    }
    for name, output in OUTPUTS.items():
        found[name] = _signed(config, run, name, output, expected[name]) or _unsigned(
            run, name, paid, totals.get(name)
        )
    for name in export.ADAPTERS:
        if (made := run.manifest(f"export-{name}")) is not None:
            # --quant applies to one export: compare with the quantization of the existing file
            quant = config.export.model_copy(update={"quant": str(made["inputs"].get("quant"))})
            own = config.model_copy(update={"export": quant})
            output = f"export/{export.gguf_path(run, name, own).name}"
            inputs = lambda name=name, own=own: export.inputs_of(own, run, name)  # noqa: E731
            found[f"export-{name}"] = _signed(config, run, f"export-{name}", output, inputs)
    if not any(name.startswith("export-") for name in found):
        found["export"] = Stage()
    found[EVAL] = _evaluation(config, run)
    _mark_later_stages(found)
    return found


def _expected(config: Config, run: Run, split: Split) -> dict[str, Callable[[], dict]]:
    """The inputs that each stage has now."""
    kept, taught = frozenset(problem.id for problem in split.stage2), [*split.sft, *split.stage2]
    hidden = kept | {problem.id for problem in split.fit}
    tried = [*taught, *split.fit] if config.attempts.source else split.stage2
    return {
        "templates": lambda: templates.templates_inputs(config, taught),
        "sft": lambda: sft.inputs_of(config, run, hidden),
        "attempts": lambda: attempts.attempts_inputs(config, run, tried),
        "corrections": lambda: corrections.corrections_inputs(config, run),
        "warmup": lambda: warmup.inputs_of(config, run, kept),
        "pairs": lambda: pairs.pairs_inputs(config, run),
        "dpo": lambda: dpo.inputs_of(config, run, kept),
    }


def _signed(config: Config, run: Run, name: str, output: str, expected: Callable[[], dict]) -> Stage | None:
    """A stage with a manifest: done, stale, or half-way if requests went unanswered; None without one."""
    manifest = run.manifest(name)
    if manifest is None:
        return None
    stage = Stage(DONE, counts=manifest["counts"], seconds=manifest["seconds"], cost_usd=manifest["cost_usd"])
    held = dict(manifest["inputs"])
    unanswered = held.pop("unanswered", 0)
    if unanswered:
        stage.state, stage.why = HALF_WAY, [f"{unanswered} requests without a reply"]
    try:
        wanted = expected()
    except ScliteError as error:  # such as a missing prompt file, which would stop the stage too
        stage.why.append(error.message)
    else:
        signed = (held, wanted)
        before, now = ({k: v for k, v in d.items() if k in wanted} for d in signed)
        stage.why += differences(before, now)
    stage.why += run.damages(manifest)
    if not run.path(output).exists():
        stage.why.append(f"{output} is missing")
    if stage.why and not unanswered:
        stage.state = STALE
    return stage


def _unsigned(run: Run, name: str, paid: Mapping[str, Any] | None, total: int | None) -> Stage:
    """A stage without a manifest: imported, half-way, or not begun."""
    begun = run.path(f"{name}.begun.json").is_file()
    if not begun and name == "sft" and run.path(OUTPUTS[name]).is_file():
        return Stage(DONE, counts={"imported": 1})
    if not begun and name in IMPORTED and (rows := _count(run, OUTPUTS[name])):
        return Stage(DONE, counts={Path(OUTPUTS[name]).stem: rows, "imported": rows})
    rows = _rows_so_far(run, name)
    if not rows and name == "corrections" and paid and name in paid["stages"]:
        return Stage(HALF_WAY, [f"{paid['stages'][name]['requests']} replies in the ledger"])
    return Stage(HALF_WAY, rows=rows, total=total or None) if rows else Stage()


def _rows_so_far(run: Run, name: str) -> int:
    """Rows of an unfinished file; for a training stage the last logged optimizer step."""
    if name not in TRAINED:
        return _count(run, OUTPUTS[name])
    rows = read_metrics(run.path(f"{name}/metrics.jsonl"))
    return max((row["step"] for row in rows if row["phase"] == name), default=0)


def _count(run: Run, name: str) -> int:
    """The number of complete lines of a file, 0 if it does not exist."""
    path = run.path(name)
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


class Measured(BaseModel):
    """The part of a student's figures that identifies the GGUF that was evaluated."""

    file: str
    bytes: int
    made_from: str
    threshold: float | None = None


class Summary(BaseModel):
    """The part of an evaluation's summary that the status needs."""

    models: dict[str, Measured]
    n: int
    folder: str


def _evaluation(config: Config, run: Run) -> Stage:
    """Done if each evaluated GGUF is unchanged, judged by its size and what it was made from."""
    found = summaries(run, Summary)
    if not found:
        return Stage()
    others = [
        name
        for name, measured in found[0].models.items()
        if measured.made_from != export.source_digest(config, run, name)
        or not (path := run.path(f"export/{measured.file}")).is_file()
        or path.stat().st_size != measured.bytes
    ]
    why = [f"{', '.join(others)}: the GGUF has changed"] if others else []
    thresholds = sum(measured.threshold is not None for measured in found[0].models.values())
    counts = {f"problems in {each.folder}": each.n for each in found}
    return Stage(STALE if why else DONE, why, {**counts, "thresholds": thresholds})


def _mark_later_stages(stages: dict[str, Stage]) -> None:
    """Mark finished stages after a stale one as stale."""
    before = None
    for name, stage in stages.items():
        if before and stage.state == DONE:
            stage.state, stage.why = STALE, [f"{before} is stale"]
        if stage.state == STALE and before is None:
            before = name


# -- the next command ---------------------------------------------------------------------------------------------


def next_command(config: Config, stages: Mapping[str, Stage]) -> str:
    """The command for the first unfinished stage, or the keys that must be set first."""
    name = next(
        (name for name, stage in stages.items() if stage.state != DONE and _possible(config, name)), None
    )
    words, needed = _command(config, name, stages)
    if needed and not Path(SETTINGS).is_file():
        return "sclite init"
    if needed:
        return f"set {' and '.join(needed)} in {SETTINGS}"
    named = ["--run", config.run] if config.run != Config.model_fields["run"].default else []
    return shlex.join([*words, *named])


def _possible(config: Config, name: str) -> bool:
    """Whether a stage can run: evaluation needs problems."""
    source = config.eval.source
    missing = is_local_source(source) and not Path(source).expanduser().is_file()
    return name != "eval" or config.teacher.embedded or (bool(source) and not missing)


def _command(config: Config, name: str | None, stages: Mapping[str, Stage]) -> tuple[list[str], list[str]]:
    """(the command that runs a stage, the unset keys that it needs)."""
    if name is None:
        reviews = config.review.mode == "free" or config.review.threshold is not None
        fitted = reviews or stages[EVAL].counts.get("thresholds")
        return ["sclite", "chat", *(["--self-correct"] if fitted else [])], []
    if config.teacher.embedded and not config.problems.source:
        return ["sclite", "quickstart"], []
    teacher = [] if config.teacher.model else ["teacher.model"]
    if name in ("problems", "templates"):
        source = config.problems.source or stages["problems"].state == DONE
        again = any("prompts" in why or "teacher" in why for why in stages["templates"].why)
        needed = teacher if source else ["problems.source", *teacher]
        return ["sclite", "build-data", *(["--fresh"] if again else [])], needed
    if name in OUTPUTS and _corrects_others(config, stages):
        return ["sclite", "build-data", "--only", "corrections"], teacher
    if name in OUTPUTS:
        retrained = name in TRAINED and stages[name].state == STALE
        student = [] if config.student.model else ["student.model"]
        corrected = stages["corrections"].state == DONE or stages["pairs"].state == DONE
        fresh = ["--fresh"] if retrained else []
        return ["sclite", "train", *fresh], [*student, *([] if corrected else teacher)]
    return ["sclite", {EVAL: "eval", "export": "train"}.get(name, "export")], []


def _corrects_others(config: Config, stages: Mapping[str, Stage]) -> bool:
    """Whether the attempts are those of another student, whose corrections need no training."""
    others = bool(config.attempts.source or config.attempts.student)
    begun = stages["attempts"].state != NOT_BEGUN and stages["sft"].state == NOT_BEGUN
    last = "corrections" if config.attempts.source else "pairs"
    return others and begun and stages[last].state != DONE
