"""The stages in their order: builds the world that each of them is given (teacher, student, grader) and calls it.

Commands and the quickstart are thin over this module; each function here is what one command does.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sclite import prompts
from sclite.errors import DataFault, UsageFault
from sclite.records import Problem
from sclite.run import Report, Run
from sclite.world import World

NAMES = ("base", "sft", "dpo")


def sides(world: World) -> tuple[list[Problem], list[Problem]]:
    """(problems for SFT, problems kept for stage 2); also writes problems.jsonl."""
    if world.problems is None:
        from sclite.data.problems import gather_problems, split_for_stages

        found = gather_problems(world.config, world.run)
        world.problems = split_for_stages(found, world.config.problems.correction_share, world.config.seed)
    else:
        world.run.replace("problems.jsonl", [*world.problems[0], *world.problems[1]])
    return world.problems


def unseen(world: World) -> frozenset[str]:
    """The ids of the problems that are kept for stage 2."""
    if world.problems is None and not (
        world.config.problems.source or world.run.path("problems.jsonl").is_file()
    ):
        return frozenset()  # templates were brought along, without problems
    return frozenset(problem.id for problem in sides(world)[1])


# -- build-data ----------------------------------------------------------------------------------------------------


def build_templates(world: World) -> Report:
    """Templates for all problems: SFT learns those of its side, stage 2 replays the others."""
    from sclite.data.templates import build_templates as stage
    from sclite.grader import Grader

    problems = [problem for side in sides(world) for problem in side]
    with (
        world.screen.stage("templates", "templates: the teacher writes thought traces") as progress,
        Grader() as grader,
        world.teacher() as teacher,
    ):
        report = stage(
            world.config, world.run, teacher=teacher, grader=grader, problems=problems, progress=progress
        )
    return world.add(report, f"templates: {report.counts.get('templates', 0)} kept{_drops(report)}")


def build_corrections(world: World) -> Report:
    """Attempts of the SFT student at the problems of stage 2, and the teacher's corrections of them."""
    from sclite.data.attempts import sample_attempts
    from sclite.data.corrections import build_corrections as stage
    from sclite.grader import Grader

    _, kept = sides(world)
    if not kept:
        raise DataFault(
            "no problems are kept for stage 2", "raise problems.correction_share or problems.limit"
        )
    with Grader() as grader:
        _sample(world, kept, grader, sample_attempts)
        with (
            world.screen.stage(
                "corrections", "corrections: the teacher finds the first wrong step and mends it"
            ) as progress,
            world.teacher() as teacher,
        ):
            report = stage(world.config, world.run, teacher=teacher, grader=grader, progress=progress)
    counts = report.counts
    text = f"corrections: {counts.get('corrected', 0)} corrected, {counts.get('confirmed', 0)} confirmed{_drops(report)}"
    return world.add(report, text)


def _sample(world: World, problems: Sequence[Problem], grader: Any, stage: Callable[..., Report]) -> None:
    from sclite.data.attempts import inputs_of

    arguments = {"problems": problems, "grader": grader}
    with world.screen.stage(
        "attempts", f"attempts: the student tries {len(problems)} unseen problems"
    ) as progress:
        if world.config.attempts.source or world.run.done(
            "attempts", inputs_of(world.config, world.run, problems)
        ):
            report = stage(world.config, world.run, student=None, progress=progress, **arguments)
        else:
            _require_sft(world)
            with world.sampler("sft/adapter") as student:
                report = stage(world.config, world.run, student=student, progress=progress, **arguments)
    world.add(
        report, f"attempts: {report.counts.get('right', 0)} right, {report.counts.get('wrong', 0)} wrong"
    )


def _require_sft(world: World) -> None:
    if not world.run.path("sft/adapter/adapter_model.safetensors").is_file():
        raise DataFault(f"{world.run.path('sft/adapter')} is missing", "run `sclite train --only sft` first")


def _drops(report: Report) -> str:
    return "".join(
        f", {count} {reason.replace('_', ' ')}" for reason, count in sorted(report.dropped.items())
    )


# -- train ---------------------------------------------------------------------------------------------------------


def train(world: World, only: str | None = None) -> list[Report]:
    """SFT, then the student's mistakes and their corrections, then warm-up, pairs and DPO."""
    if only not in (None, "sft", "dpo"):
        raise UsageFault(f"--only {only}: no such stage", "use --only sft or --only dpo")
    if only != "dpo":
        train_sft(world)
    if only != "sft":
        _require_sft(world)
        build_corrections(world)
        train_warm(world)
        build_pairs(world)
        train_dpo(world)
    return world.reports


def train_sft(world: World) -> Report:
    from sclite.train.sft import train_sft as stage

    with world.screen.stage("sft", "sft: the student learns the templates") as progress:
        report = stage(world.config, world.run, unseen=unseen(world), progress=progress)
    return world.add(
        report, f"sft: {report.counts.get('rows', 0)} rows, {report.counts.get('steps', 0)} steps"
    )


def train_warm(world: World) -> Report:
    from sclite.train.warm import train_warm as stage

    with world.screen.stage("warm", "warm-up: the student learns what a review looks like") as progress:
        report = stage(world.config, world.run, unseen=unseen(world), progress=progress)
    return world.add(
        report, f"warm-up: {report.counts.get('rows', 0)} rows, {report.counts.get('steps', 0)} steps"
    )


def build_pairs(world: World) -> Report:
    from sclite.data.pairs import build_pairs as stage
    from sclite.data.pairs import inputs_of
    from sclite.grader import Grader

    with (
        world.screen.stage("pairs", "pairs: the student's own corrections against right ones") as progress,
        Grader() as grader,
    ):
        if world.run.done("pairs", inputs_of(world.config, world.run)):
            report = stage(world.config, world.run, student=None, grader=grader)
        else:
            with world.sampler("dpo/warm") as student:
                report = stage(world.config, world.run, student=student, grader=grader, progress=progress)
    counts = report.counts
    return world.add(
        report,
        f"pairs: {counts.get('decision', 0)} decisions, {counts.get('content', 0)} contents{_drops(report)}",
    )


def train_dpo(world: World) -> Report:
    from sclite.train.dpo import train_dpo as stage

    with world.screen.stage("dpo", "dpo: the student prefers right reviews") as progress:
        report = stage(world.config, world.run, unseen=unseen(world), progress=progress)
    return world.add(
        report, f"dpo: {report.counts.get('pairs', 0)} pairs, {report.counts.get('steps', 0)} steps"
    )


# -- export and evaluation -----------------------------------------------------------------------------------------


def trained_name(world: World) -> str:
    """The furthest student that the run holds: dpo, else sft, else base."""
    for name in ("dpo", "sft"):
        if world.run.path(f"{name}/adapter/adapter_model.safetensors").is_file():
            return name
    return "base"


def export(world: World, names: Sequence[str] = (), compare: bool = True) -> list[Report]:
    """GGUF files of the named students; of the furthest trained one without names."""
    from sclite.export.stage import export_model
    from sclite.train.common import quiet

    quiet()
    made = []
    with world.screen.stage("export", "export: merged, written as GGUF, quantised") as progress:
        chosen = list(names) or [trained_name(world)]
        for number, name in enumerate(chosen, 1):
            made.append(export_model(world.config, world.run, name, compare=compare and name == chosen[-1]))
            progress(number, len(chosen))
    sizes = ", ".join(f"{report.figures['megabytes']:g} MB" for report in made)
    world.screen.done("export", f"export: {len(made)} GGUF ({sizes})", all(r.skipped for r in made))
    return made


def held_out(world: World) -> tuple[list[Problem], list[Problem]]:
    """(test problems, problems for the threshold) from eval.source, without those that the run trains on."""
    from sclite.data.problems import load_problems

    source = world.config.eval
    if not source.source:
        raise UsageFault("eval.source is not set", "give a file or hub data set: `sclite eval PROBLEMS`")
    trained = {" ".join(p.question.split()) for p in world.run.read("problems.jsonl", Problem)}
    found = load_problems(source.source, source.subset, source.split, source.limit)
    fresh = [p for p in found if " ".join(p.question.split()) not in trained]
    if len(fresh) < 10:
        raise DataFault(
            f"{source.source}: only {len(fresh)} of {len(found)} problems were not trained on",
            "evaluate on others",
        )
    fitted = round(len(fresh) * source.fit_share)
    return fresh[fitted:], fresh[:fitted]


def evaluate(
    world: World,
    names: Sequence[str],
    problems: Sequence[Problem],
    fitting: Sequence[Problem],
    judge: Callable[..., int | None] | None = None,
    source: str = "",
) -> dict[str, Any]:
    """Measure the exported students; writes eval/summary.json and eval/report.html, and the threshold beside the GGUF."""
    from sclite.evaluate.evaluate import evaluate_model
    from sclite.export.stage import gguf_path
    from sclite.grader import Grader
    from sclite.student.team import open_student

    figures: dict[str, Any] = {}
    with (
        world.screen.stage(
            "eval", f"eval: {len(problems)} held-out problems, solved and reviewed"
        ) as progress,
        Grader() as grader,
    ):
        for number, name in enumerate(names):
            progress(number, len(names))
            path = gguf_path(world.run, name, world.config)
            with open_student(path, parallel=32, context=world.config.eval.context) as student:
                figures[name] = evaluate_model(
                    world.config,
                    world.run,
                    name,
                    student,
                    problems=problems,
                    fitting=fitting,
                    grader=grader,
                    judge=judge,
                    identity=world.run.file_digest(str(path.relative_to(world.run.folder))),
                )
        progress(len(names), len(names))
    world.screen.done("eval", f"eval: {', '.join(names)}")
    summary = {"models": figures, "n": len(problems), "notes": [], "source": source}
    write_summary(world, summary)
    return summary


def write_summary(world: World, summary: dict[str, Any]) -> None:
    """eval/summary.json, the report, and the threshold that belongs to the last model's GGUF."""
    import json

    from sclite.evaluate.report import write_report

    world.run.write_json("eval/summary.json", summary)
    examples = []
    for name in summary["models"]:
        shown = world.run.read_json(f"eval/{name}.reviews.json") or []
        examples += [{**example, "model": name} for example in shown[:3]]
    curves = {}
    for stage in ("sft", "dpo"):
        path = world.run.path(f"{stage}/metrics.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        for phase in dict.fromkeys(row["phase"] for row in rows):
            curves[phase] = [
                {k: v for k, v in row.items() if k != "phase"} for row in rows if row["phase"] == phase
            ]
    write_report(world.run.path("eval/report.html"), summary, examples, curves)
    last = list(summary["models"])[-1]
    threshold = summary["models"][last].get("threshold")
    if threshold is not None:
        world.run.write_json(
            "export/review.json", {"model": last, "threshold": threshold, "prompts": _review_digest(world)}
        )


def _review_digest(world: World) -> str:
    return prompts.digest(
        "student_system", "student_solve", "student_review", folder=world.config.prompts.folder
    )


def stored_threshold(run: Run) -> float | None:
    """The threshold that was fitted on the run's GGUF."""
    kept = run.read_json("export/review.json")
    return kept["threshold"] if kept else None


def find_gguf(world: World, model: Path | None) -> Path:
    """The GGUF to talk to: the one given, else the run's own furthest one."""
    if model is not None:
        if not model.is_file():
            raise DataFault(f"{model} does not exist", "give the path of a GGUF file")
        return model
    from sclite.export.stage import gguf_path

    for name in ("dpo", "sft", "base"):
        path = gguf_path(world.run, name, world.config)
        if path.is_file():
            return path
    raise DataFault(f"{world.run.path('export')} holds no GGUF", "run `sclite export` first")
