"""Prints an evaluation: the table of students, and one corrected answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from sclite import console
from sclite.console import format_percent
from sclite.trace import parse, work_of

HEADER = (
    "student",
    "first answer %",
    "after review %",
    "wrong→right",
    "right→wrong",
    "AUC",
    "located",
    "fixed",
    "tokens",
)


def print_results(summary: Mapping[str, Any]) -> None:
    """Print one row per student: shares of the problems in percent, with 95 % intervals."""
    rows = []
    for name, figures in summary["models"].items():
        auc = figures["auc"]
        rows.append(
            (
                name,
                format_percent(figures["acc_t1"], figures["acc_t1_interval"]),
                format_percent(figures["acc_t2"], figures["acc_t2_interval"]),
                format_percent(figures["wrong_to_right"]),
                format_percent(figures["right_to_wrong"]),
                "–" if auc is None else f"{auc:.3f}",
                format_percent(figures["location"]),
                format_percent(figures["correction_rate_given_location"]),
                "–" if figures["tokens"] is None else f"{figures['tokens']:.0f}",
            )
        )
    console.print_table(f"{summary['n']} held-out problems", HEADER, rows)
    unknown = sum(figures["unknown"] for figures in summary["models"].values())
    if unknown:
        console.print(f"{unknown} answers could not be graded and are not counted")
    for note in summary["notes"]:
        console.print(console.escape(note))


def choose_example(examples: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The shortest corrected answer, preferably with a first answer and with its true wrong step accused."""
    corrected = [e for e in examples if e["correct1"] is False and e["correct2"] is True]
    answered = [e for e in corrected if parse(e["first"]).trace.answer] or corrected
    located = [e for e in answered if e["accused"] == e["true_step"]] or answered
    return min(located, key=lambda e: len(e["question"]) + len(e["correction"] or ""), default=None)


def print_example(shown: Mapping[str, Any] | None) -> None:
    """Print a problem, the first answer with its wrong step, cause and correction, and the final answer."""
    if shown is None:
        console.print("No answer was corrected in this evaluation.")
        return
    from rich.markup import escape

    console.print(f"[bold]One self-corrected answer[/]\n\n  {escape(shown['question'])}\n")
    for number, step in enumerate(work_of(shown["first"]).steps, 1):
        wrong = number == shown["accused"]
        console.print(f"  {'[red]✗' if wrong else '[green]✓'} {number}[/] {escape(step.text)}")
        if wrong:
            for label, name in (("[red]why wrong[/]", "cause"), ("[green]corrected[/]", "correction")):
                if shown[name]:
                    console.print(f"      {label}  {escape(shown[name])}")
            break
    second = parse(shown["second"]).trace
    for number, step in enumerate(second.steps[shown["accused"] :], shown["accused"] + 1):
        console.print(f"  [green]✓ {number}[/] {escape(step.text)}")
    first = parse(shown["first"]).trace.answer
    console.print(
        f"\n  answer {escape(first or '–')} → [bold green]{escape(str(second.answer))}[/] (right: {escape(shown['gold'])})"
    )
