"""The closing lines of the commands: what was done, and the next command; with --json one object."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from sclite import console
from sclite.console import escape, format_percent
from sclite.evaluate.evaluate import REPORT
from sclite.run import Report, Run

if TYPE_CHECKING:
    from sclite.context import Context

HEADER = ("student", "first answer %", "after review %", "wrong→right", "right→wrong", "AUC", "located", "fixed", "tokens")  # fmt: skip


def print_build_data(context: "Context", only: str | None, json: bool) -> None:
    """Print the templates, pairs, cost and drops of build-data, and the next command."""
    run, reports = context.run, {report.stage: report for report in context.reports}
    counts = {name: value for report in reports.values() for name, value in report.counts.items()}
    dropped = sum((Counter(report.dropped) for report in reports.values()), Counter[str]())
    costs = [report.cost_usd for report in reports.values()]
    pair_kinds = ("decision", "content") if "pairs" in reports else ("corrected",)
    totals: dict[str, Any] = {
        "templates": counts.get("templates", 0),
        "pairs": sum(counts.get(kind, 0) for kind in pair_kinds),
        "dropped": dict(dropped),
        "cost_usd": None if None in costs else round(sum(filter(None, costs)), 6),
        "seconds": round(sum(report.seconds for report in reports.values()), 3),
    }
    if judged := reports.get("feedback"):
        totals["feedback"] = {verdict: judged.counts[verdict] for verdict in ("good", "bad")}
    if json:
        console.print_json(totals)
        return
    if only != "corrections":
        console.print(f"{totals['templates']} templates in {escape(str(run.path('templates.jsonl')))}")
    if "pairs" in reports:
        console.print(f"{totals['pairs']} pairs in {escape(str(run.path('pairs.jsonl')))}")
    if totals["cost_usd"] is None:
        console.print("Cost: unknown; set the price of the tokens (teacher.price, attempts.price)")
    elif totals["cost_usd"]:
        console.print(f"Cost: ${totals['cost_usd']:.4f}")
    if dropped:
        command = escape(f"sclite show drops --run {quote(str(run.folder))}")
        console.print(f"{dropped.total()} rows dropped: [bold cyan]{command}[/]", wrap=False)
    _print_next(context)


def print_train(context: "Context", json: bool, evaluation: Mapping[str, Any] | None = None) -> None:
    """Print the results of the evaluation, if there was one, and the next command."""
    reports = {report.stage: report for report in context.reports}
    if json:
        found = {stage: {**report.as_dict(), "skipped": report.skipped} for stage, report in reports.items()}
        console.print_json(found if evaluation is None else {**found, "eval": evaluation})
        return
    if evaluation is not None:
        print_results(context.run, evaluation)
    _print_next(context)


def print_export(context: "Context", report: Report, compared: Mapping[str, Any] | None, json: bool) -> None:
    """Print the GGUFs and the next command; `compared` is the reply of the model created in Ollama, if one was."""
    from sclite.export.parity import summarize

    ollama, figures = context.config.export.ollama, report.figures
    if json:
        console.print_json({**figures, "ollama": ollama or None, "ollama_reply": compared})
        return
    for name, file in figures["files"].items():
        path = context.run.path(f"export/{name}")
        console.print(f"{escape(str(path))}  {file['megabytes']:g} MB")
    color = "yellow" if figures["parity"]["skipped"] else "default"
    console.print(f"[{color}]{escape(summarize(figures['parity']))}[/]")
    for warning in figures.get("warnings", []):
        console.note(f"[yellow]warning:[/] {escape(warning)}")
    command = f"sclite chat --run {quote(str(context.run.folder))}"
    if compared is not None:
        console.print(escape(compared["summary"]))
        command = f"ollama run {quote(ollama)}"
    console.print(f"Next: [bold cyan]{escape(command)}[/]", wrap=False)


def print_files(what: str, report: Report, license: str, json: bool) -> None:
    """Print where the adapter ("lora"), the model ("merged") or the rows ("data") were exported to.

    For an adapter or a model, also print how it compares with the trained model.
    """
    found = report.figures
    path = Path(found["folder" if what == "data" else what])
    if json:
        console.print_json({**report.counts, **found})
        return
    if what != "data":
        same = "probabilities not compared: transformers has other names for its weights than its files"
        if found.get("kl") is not None:
            same = f"same next token: {found['top1_agreement']:.1%} (KL {found['kl']:.4f})"
        if what == "merged":
            same = f"{found['chats_equal']} of {found['chats_compared']} chats have the same tokens; {same}"
        console.print(f"{escape(str(path))}\nChecked against the trained model: {same}")
    for name, count in report.counts.items():
        console.print(f"{count} rows in {escape(str(path))}/{name}.jsonl" if count else f"no {name}")
    if what == "data" and not license and "url" not in report.figures:
        console.print("Set export.license before you publish the data.")


def print_results(run: Run, summary: Mapping[str, Any], other: Path | None = None) -> None:
    """Print one row per student: shares of the problems in percent, with 95 % intervals.

    With the folder of another run, also print how much more often this run's students are right than those of that one.
    """
    rows = []
    for name, figures in (summary["models"] | summary.get("baselines", {})).items():
        accuracy = [
            format_percent(figures.get(key), figures.get(f"{key}_interval")) for key in ("acc_t1", "acc_t2")
        ]
        changes = [format_percent(figures.get(key)) for key in ("wrong_to_right", "right_to_wrong")]
        steps = [format_percent(figures.get(key)) for key in ("location", "correction_rate_given_location")]
        auc, tokens = format_number(figures.get("auc"), 3), format_number(figures["tokens"], 0)
        rows.append((name, *accuracy, *changes, auc, *steps, tokens))
    console.print_table(f"{summary['n']} held-out problems", HEADER, rows)
    rows = []
    for name, figures in (labelled := summary.get("labelled") or {}).items():
        keys = ("location", "acceptance", "location_f1")
        shares = [format_percent(figures[key], figures[f"{key}_interval"]) for key in keys]
        rows.append((name, str(figures["n"]), *shares, format_number(figures["auc"], 3)))
    if rows:
        header = ("student", "solutions", "located %", "accepted %", "F1 %", "AUC")
        console.print_table("Labelled solutions", header, rows)
    for name, figures in summary["models"].items():
        if figures["tokens"]:
            keys = ("tokens", "prefill", *(() if figures["seconds"] is None else ("seconds",)))
            cost = "{:.0f} tokens generated, {:.0f} prompt tokens" + ", {:.2f} s" * (len(keys) - 2)
            first = [figures[f"{key}_first"] for key in keys]
            review = [max(0, figures[key] - spent) for key, spent in zip(keys, first, strict=True)]
            text = f"answer {cost.format(*first)}; review {cost.format(*review)}"
            console.print(f"{escape(name)}, per problem: {text}")
    unknown = {"answers could not be graded": summary["models"], "labelled solutions are too long": labelled}
    for what, students in unknown.items():
        if count := sum(figures["unknown"] for figures in students.values()):
            console.print(f"{count} {what} and are not counted")
    for note in summary["notes"]:
        console.print(escape(note))
    console.print(f"Report: {escape(str(run.path(summary['folder']) / REPORT))}", wrap=False)
    if other is not None:
        columns = (
            "student", "problems", "this run %", "other run %", "difference", "only this right", "only other right", "p",
        )  # fmt: skip
        compared = []
        for label, figures in summary["compared"].items():
            shares = [format_percent(figures[each]) for each in ("this", "other")]
            only = [format_percent(figures[f"only_{each}"]) for each in ("this", "other")]
            difference = format_percent(figures["difference"], figures["difference_interval"])
            chance = format_number(figures["mcnemar_p"], 3)
            compared.append((label, str(figures["n"]), *shares, difference, *only, chance))
        console.print_table(f"Compared with {other}", columns, compared)


def format_number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _print_next(context: "Context") -> None:
    from sclite.inspect.status import read_status

    with console.spinner("checking the stages"):
        command = read_status(context.config, context.run)["next"]
    console.print(f"Next: [bold cyan]{escape(command)}[/]", wrap=False)
