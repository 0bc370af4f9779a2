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
    for name, figures in (summary["models"] | summary.get("baselines", {})).items():
        tokens = "–" if figures["tokens"] is None else f"{figures['tokens']:.0f}"
        accuracy = format_percent(figures["acc_t1"], figures["acc_t1_interval"])
        if name not in summary["models"]:  # a baseline, which has no review
            rows.append((name, accuracy, *["–"] * (len(HEADER) - 3), tokens))
            continue
        second = format_percent(figures["acc_t2"], figures["acc_t2_interval"])
        changes = [format_percent(figures[each]) for each in ("wrong_to_right", "right_to_wrong")]
        located = [format_percent(figures[each]) for each in ("location", "correction_rate_given_location")]
        auc = "–" if figures["auc"] is None else f"{figures['auc']:.3f}"
        rows.append((name, accuracy, second, *changes, auc, *located, tokens))
    console.print_table(f"{summary['n']} held-out problems", HEADER, rows)
    for name, figures in summary["models"].items():
        if figures["tokens"]:
            cost = "{:.0f} tokens written, {:.0f} fed, {:.2f} s"
            keys = ("tokens", "fed", "seconds")
            first = [figures[f"{key}_first"] for key in keys]
            review = [max(0, figures[key] - spent) for key, spent in zip(keys, first, strict=True)]
            text = f"answer {cost.format(*first)}; review {cost.format(*review)}"
            console.print(f"{escape(name)}, per problem: {text}")
    unknown = sum(figures["unknown"] for figures in summary["models"].values())
    if unknown:
        console.print(f"{unknown} answers could not be graded and are not counted")
    for note in summary["notes"]:
        console.print(escape(note))


def print_example(outcomes: Iterable[Outcome]) -> None:
    """Print one corrected answer: the problem, the wrong step with its cause and correction, and the final answer.

    The shortest, preferably one with a first answer and with its true wrong step accused.
    """
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
