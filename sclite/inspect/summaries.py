"""The closing lines of the commands: what was done, and the next command; with --json one object."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from sclite import console
from sclite.console import escape, format_percent
from sclite.evaluate.results import REPORT
from sclite.run import Report, Run

if TYPE_CHECKING:
    from sclite.context import Context
    from sclite.evaluate.metrics import Outcome

HEADER = (
    *("student", "first answer %", "after review %", "wrong→right", "right→wrong"),
    *("AUC", "located", "fixed", "tokens"),
)


def print_build_data(context: "Context", only: str | None, json: bool) -> None:
    """Print the templates, pairs, cost and drops of build-data, and the next command."""
    run, reports = context.run, {report.stage: report for report in context.reports}
    dropped = sum((Counter(report.dropped) for report in reports.values()), Counter[str]())
    counts = {name: value for report in reports.values() for name, value in report.counts.items()}
    paired, judged = "pairs" in reports, reports.get("feedback")
    costs = [report.cost_usd for report in reports.values()]
    totals: dict[str, Any] = {
        "templates": counts.get("templates", 0),
        "pairs": sum(counts.get(kind, 0) for kind in (("decision", "content") if paired else ("corrected",))),
        "dropped": dict(dropped),
        "cost_usd": None if None in costs else round(sum(filter(None, costs)), 6),
        "seconds": round(sum(report.seconds for report in reports.values()), 3),
    }
    if judged is not None:
        totals["feedback"] = {verdict: judged.counts[verdict] for verdict in ("good", "bad")}
    if json:
        console.print_json(totals)
        return
    if judged is not None:
        console.print("Chat feedback: {good} good, {bad} bad".format(**totals["feedback"]))
    if only != "corrections":
        console.print(f"{totals['templates']} templates in {escape(str(run.path('templates.jsonl')))}")
    if paired:
        console.print(f"{totals['pairs']} pairs in {escape(str(run.path('pairs.jsonl')))}")
    if totals["cost_usd"] is None:
        console.print("Cost: unknown; set the price of the tokens (teacher.price, attempts.price)")
    elif totals["cost_usd"]:
        console.print(f"Cost: ${totals['cost_usd']:.4f}")
    for reason, count in sorted(dropped.items()):
        console.print(f"  {count} dropped: {escape(reason.replace('_', ' '))}")
    if dropped:
        _print_command("Show dropped rows", f"sclite show drops --run {quote(str(run.folder))}")
    _print_next(context)


def print_train(
    context: "Context", only: str | None, json: bool, evaluation: Mapping[str, Any] | None = None
) -> None:
    """Print the results of the evaluation if there was one, the path of the model, and the next command."""
    reports = {report.stage: report for report in context.reports}
    if json:
        found = {stage: {**report.as_dict(), "skipped": report.skipped} for stage, report in reports.items()}
        console.print_json(found if evaluation is None else {**found, "eval": evaluation})
        return
    if evaluation is not None:
        print_results(context.run, evaluation)
    elif only == "sft":
        console.print(f"Adapter: {escape(str(context.run.path('sft/adapter')))}")
    _print_next(context)


def print_export(
    context: "Context",
    report: Report,
    settings: Sequence[str],
    compared: Mapping[str, Any] | None,
    fitted: bool,
    json: bool,
) -> None:
    """Print the GGUF, and the next command.

    `settings` reproduce this export; `compared` is the reply of the model created in Ollama (None without one); `fitted`:
    whether a threshold is known.
    """
    from sclite.export.parity import summarize
    from sclite.student.loader import EMBEDDED

    ollama, figures = context.config.export.ollama, report.figures
    if json:
        console.print_json({**figures, "ollama": ollama or None, "ollama_reply": compared})
        return
    for name, file in figures["files"].items():
        path = context.run.path(f"export/{name}")
        console.print(f"{escape(str(path))}  {file['megabytes']:g} MB")
    parity = escape(summarize(figures["parity"]))
    if figures["parity"]["skipped"]:
        console.note(f"[yellow]{parity}[/]")
    else:
        console.print(parity)
    for warning in figures.get("warnings", []):
        console.note(f"[yellow]warning:[/] {escape(warning)}")
    run = quote(str(context.run.folder))
    if compared is not None:
        console.print(escape(compared["summary"]))
        _print_command("Next", f"ollama run {quote(ollama)}")
    elif fitted:
        _print_command("Next", f"sclite chat --self-correct --run {run}")
    else:
        command = "train" if context.students()[-1] == "dpo" else "eval PROBLEMS"  # train fits DPO's only
        if context.config.student.model == EMBEDDED and context.run.has_own_problems():
            command = "quickstart"  # its problems are split differently, whatever sclite.toml says
        flags = "".join(f" --set {quote(each)}" for each in settings)
        _print_command("Next", f"sclite {command} --run {run}{flags}", " (fits the review threshold)")


def print_files(what: str, report: Report, license: str, json: bool) -> None:
    """Print where the adapter ("lora"), the model ("merged") or the rows ("data") were exported to.

    For an adapter or a model, also print how it compares with the trained model.
    """
    found = report.figures
    path = Path(found["folder" if what == "data" else what])
    if json:
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        megabytes = round(sum(file.stat().st_size for file in files) / 1e6, 1)
        console.print_json({**report.counts, **found, **({} if what == "data" else {"megabytes": megabytes})})
        return
    if what != "data":
        console.print(escape(str(path)))
        where = "on its 16-bit base"
        if what == "merged":
            where = f"{found['chats_equal']} of {found['chats_compared']} chats have the same tokens"
        same = "probabilities not compared: the model does not fit in memory"
        if found.get("kl") is not None:
            same = f"same next token: {found['top1_agreement']:.1%} (KL {found['kl']:.4f})"
        console.print(f"Checked against the trained model: {where}; {same}")
    for name, count in report.counts.items():
        console.print(f"{count} rows in {escape(str(path))}/{name}.jsonl" if count else f"no {name}")
    if what == "data" and not license and "url" not in report.figures:
        console.print("Set export.license before you publish the data.")


def print_results(run: Run, summary: Mapping[str, Any]) -> None:
    """Print one row per student: shares of the problems in percent, with 95 % intervals."""
    rows = []
    for name, figures in (summary["models"] | summary.get("baselines", {})).items():
        tokens = "–" if figures["tokens"] is None else f"{figures['tokens']:.0f}"
        accuracy = format_percent(figures["acc_t1"], figures["acc_t1_interval"])
        if name not in summary["models"]:  # a baseline, which has no review
            rows.append((name, accuracy, *["–"] * (len(HEADER) - 3), tokens))
            continue
        second = format_percent(figures["acc_t2"], figures["acc_t2_interval"])
        changes = [format_percent(figures[each]) for each in ("wrong_to_right", "right_to_wrong")]
        located = [format_percent(figures[each]) for each in ("location", "correction_rate_given_location")]
        rows.append((name, accuracy, second, *changes, format_auc(figures), *located, tokens))
    console.print_table(f"{summary['n']} held-out problems", HEADER, rows)
    if summary.get("labelled"):
        keys = ("location", "acceptance", "location_f1")
        rows = [
            (
                name,
                str(each["n"]),
                *(format_percent(each[key], each[f"{key}_interval"]) for key in keys),
                format_auc(each),
            )
            for name, each in summary["labelled"].items()
        ]
        console.print_table(
            "Labelled solutions", ("student", "solutions", "located %", "accepted %", "F1 %", "AUC"), rows
        )
    for name, figures in summary["models"].items():
        if figures["tokens"]:
            keys = ("tokens", "prefill", *(() if figures["seconds"] is None else ("seconds",)))
            cost = "{:.0f} tokens generated, {:.0f} prompt tokens" + ", {:.2f} s" * (len(keys) - 2)
            first = [figures[f"{key}_first"] for key in keys]
            review = [max(0, figures[key] - spent) for key, spent in zip(keys, first, strict=True)]
            text = f"answer {cost.format(*first)}; review {cost.format(*review)}"
            console.print(f"{escape(name)}, per problem: {text}")
    for name, figures in summary.get("labelled", {}).items():
        if figures["unknown"]:
            console.print(f"{escape(name)}: {figures['unknown']} labelled solutions are too long to review")
    unknown = sum(figures["unknown"] for figures in summary["models"].values())
    if unknown:
        console.print(f"{unknown} answers could not be graded and are not counted")
    for note in summary["notes"]:
        console.print(escape(note))
    console.print(f"Report: {escape(str(run.path(summary['folder']) / REPORT))}", wrap=False)


def format_auc(figures: Mapping[str, Any]) -> str:
    return "–" if figures["auc"] is None else f"{figures['auc']:.3f}"


def print_comparison(other: Path, compared: Mapping[str, Mapping[str, Any]]) -> None:
    """Print how much more often this run's students are right than those of another run."""
    header = (
        "student",
        "problems",
        "this run %",
        "other run %",
        "difference",
        "only this right",
        "only other right",
        "p",
    )
    rows = []
    for label, figures in compared.items():
        shares = [format_percent(figures[each]) for each in ("this", "other")]
        only = [format_percent(figures[f"only_{each}"]) for each in ("this", "other")]
        difference = format_percent(figures["difference"], figures["difference_interval"])
        chance = "–" if figures["mcnemar_p"] is None else f"{figures['mcnemar_p']:.3f}"
        rows.append((label, str(figures["n"]), *shares, difference, *only, chance))
    console.print_table(f"Compared with {other}", header, rows)


def print_example(outcomes: "Iterable[Outcome]") -> None:
    """Print one corrected answer: the problem, the wrong step with its cause and correction, and the final answer.

    The shortest, preferably one with a first answer and with its true wrong step flagged.
    """
    from sclite.evaluate.report import example_parts

    corrected = [o for o in outcomes if o.accused and o.correct1 is False and o.correct2 is True]
    answered = [o for o in corrected if o.work.answer] or corrected
    located = [o for o in answered if o.accused == o.true_step] or answered
    shown = min(located, key=lambda o: len(o.question) + len(o.correction or ""), default=None)
    if shown is None:
        console.print("No answer was corrected in this evaluation.")
        return
    parts = example_parts(shown)
    console.print(f"\n[bold]One self-corrected answer[/]\n\n  {escape(shown.question)}\n")
    for step in parts["steps"]:
        mark = "[red]✗" if step["accused"] else "[green]✓"
        console.print(f"  {mark} {step['number']}[/] {escape(step['text'])}")
        for label, name in (("[red]why wrong[/]", "cause"), ("[green]corrected[/]", "correction")):
            if step["accused"] and parts[name]:
                console.print(f"      {label}  {escape(parts[name])}")
    before = shown.work.answer or "–"
    after = f"[bold green]{escape(parts['after']['text'])}[/] (right: {escape(shown.gold)})"
    console.print(f"\n  answer {escape(before)} → {after}")


def _print_next(context: "Context") -> None:
    from sclite.inspect.status import read_status

    with console.spinner("checking the stages"):
        command = read_status(context.config, context.run)["next"]
    _print_command("Next", command)


def _print_command(label: str, command: str, remark: str = "") -> None:
    console.print(f"{label}: [bold cyan]{escape(command)}[/]{remark}", wrap=False)
