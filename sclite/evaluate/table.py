"""Prints an evaluation: the table of students, and one corrected answer."""

from collections.abc import Iterable, Mapping
from typing import Any

from sclite import console
from sclite.console import escape, format_percent
from sclite.evaluate.metrics import Outcome
from sclite.evaluate.report import example_parts

HEADER = (
    *("student", "first answer %", "after review %", "wrong→right", "right→wrong"),
    *("AUC", "located", "fixed", "tokens"),
)


def print_results(summary: Mapping[str, Any]) -> None:
    """Print one row per student: shares of the problems in percent, with 95 % intervals."""
    rows = []
    for name, figures in summary["models"].items():
        auc, tokens = figures["auc"], figures["tokens"]
        accuracies = [
            format_percent(figures[each], figures[f"{each}_interval"]) for each in ("acc_t1", "acc_t2")
        ]
        changes = [format_percent(figures[each]) for each in ("wrong_to_right", "right_to_wrong")]
        located = [format_percent(figures[each]) for each in ("location", "correction_rate_given_location")]
        shown = ["–" if auc is None else f"{auc:.3f}", *located, "–" if tokens is None else f"{tokens:.0f}"]
        rows.append((name, *accuracies, *changes, *shown))
    for name, figures in summary.get("baselines", {}).items():
        tokens = "–" if figures["tokens"] is None else f"{figures['tokens']:.0f}"
        accuracy = format_percent(figures["acc_t1"], figures["acc_t1_interval"])
        rows.append((name, accuracy, *["–"] * (len(HEADER) - 3), tokens))
    console.print_table(f"{summary['n']} held-out problems", HEADER, rows)
    for name, figures in summary["models"].items():
        if figures["tokens"]:
            first = figures["tokens_first"], figures["fed_first"], figures["seconds_first"]
            every = figures["tokens"], figures["fed"], figures["seconds"]
            parts = [
                f"{tokens:.0f} tokens written, {fed:.0f} fed, {seconds:.2f} s"
                for tokens, fed, seconds in (
                    first,
                    [max(0, b - a) for a, b in zip(first, every, strict=True)],
                )
            ]
            console.print(f"{escape(name)}, per problem: answer {parts[0]}; review {parts[1]}")
    unknown = sum(figures["unknown"] for figures in summary["models"].values())
    if unknown:
        console.print(f"{unknown} answers could not be graded and are not counted")
    for note in summary["notes"]:
        console.print(escape(note))


def choose_example(outcomes: Iterable[Outcome]) -> Outcome | None:
    """The shortest corrected answer, preferably with a first answer and with its true wrong step accused."""
    corrected = [o for o in outcomes if o.accused and o.correct1 is False and o.correct2 is True]
    answered = [o for o in corrected if o.work.answer] or corrected
    located = [o for o in answered if o.accused == o.true_step] or answered
    return min(located, key=lambda o: len(o.question) + len(o.correction or ""), default=None)


def print_example(shown: Outcome | None) -> None:
    """Print a problem, the first answer with its wrong step, cause and correction, and the final answer."""
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
