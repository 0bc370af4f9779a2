"""The HTML report: a single self-contained page without scripts or external resources."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from sclite.evaluate.metrics import Outcome
from sclite.evaluate.plots import accuracy_plot, as_number, curve_plots
from sclite.run import write_text
from sclite.trace import parse

TEMPLATE = Path(__file__).with_name("report.html.jinja")
_TAG = re.compile(r"(</?(?:step|key|cause|correction|generalized|answer)\s*\d*\s*:?\s*>)", re.I)


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    examples: Sequence[tuple[str, Outcome]] = (),
    curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Write the page by rename.

    `summary`: {"models": {name: figures}, "baselines": {label: figures}, "n": number of problems, "notes": [sentence, ..], "source": their name}, with
    figures from `metrics.compute_metrics`. `examples`: (model, outcome). `curves`: {stage: rows of its metrics.jsonl}.
    """
    rows = [{**figures, "name": model} for model, figures in summary["models"].items()]
    shown = ("acc_t1", "acc_t1_interval", "tokens", "n", "unknown")
    baselines = [
        {"name": label} | {key: figures[key] for key in shown}
        for label, figures in (summary.get("baselines") or {}).items()
    ]
    unknown = [
        f"{row['name']}: {row['unknown']} of {row['unknown'] + row['n']} outcomes are unknown (failed call, timeout or "
        "grader error) and excluded."
        for row in rows
        if row.get("unknown")
    ]
    *others, last = [row["name"] for row in rows] or ["No model"]
    models = f"{', '.join(others)} and {last}" if others else last
    count = "held-out problems" if summary.get("n") is None else f"{summary['n']:,} held-out problems"
    source = f" from {summary['source']}" if summary.get("source") else ""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {f.__name__: f for f in (percent, interval, decimal, p_value, split_at_tags)}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        headline=headline(rows),
        subject=f"{models} on {count}{source}: first answer and answer after review.",
        rows=rows,
        baselines=baselines,
        accuracy=accuracy_plot(rows),
        curves=curve_plots(curves or {}),
        examples=[example_parts(outcome, model) for model, outcome in examples],
        notes=[*unknown, *(summary.get("notes") or ())],
    )
    write_text(path, page)


def percent(value: float | None, signed: bool = False) -> str:
    """A share in percent with one decimal, without the % sign; a dash if unknown."""
    number = as_number(value)
    if number is None:
        return "–"
    text = f"{100 * number:+.1f}" if signed else f"{100 * number:.1f}"
    return text.replace("-0.0", "0.0").replace("+0.0", "0.0").replace("-", "−")


def decimal(value: float | None, digits: int = 2) -> str:
    """A number with a fixed number of decimals; a dash if unknown."""
    number = as_number(value)
    return "–" if number is None else f"{number:,.{digits}f}".replace("-", "−")


def interval(pair: Sequence[float] | None, signed: bool = False, digits: int | None = None) -> str:
    """`low to high`, in percent or with so many decimals; empty for None."""
    if not pair:
        return ""
    return " to ".join(percent(bound, signed) if digits is None else decimal(bound, digits) for bound in pair)


def p_value(p: float | None) -> str:
    """A p-value with three decimals, never rounded to zero."""
    return "< 0.001" if p is not None and p < 0.001 else decimal(p, 3)


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The result in one sentence: the best model's accuracy after and before review."""
    measured = [row for row in rows if as_number(row.get("acc_t2")) is not None]
    if not measured:
        return "No results."
    best = max(measured, key=lambda row: row["acc_t2"])
    start = f"{best['name']} gets {percent(best['acc_t2'])} % right after reviewing its own answers"
    gain, between = as_number(best.get("difference")), best.get("difference_interval")
    if not gain:
        return f"{start}." if gain is None else f"{start}, unchanged."
    doubt = between is not None and between[0] <= 0 <= between[1]
    direction = "up" if gain > 0 else "down"
    return f"{start}, {direction} from {percent(best['acc_t1'])} %{', which may be chance' if doubt else ''}."


def split_at_tags(text: str) -> list[tuple[str, str]]:
    """Split a text at its tags into (tag name or "", piece); the pieces join to the text."""
    parts = _TAG.split(text)
    return [
        ("".join(filter(str.isalpha, part)).lower() if i % 2 else "", part)
        for i, part in enumerate(parts)
        if part
    ]


def example_parts(shown: Outcome, model: str = "") -> dict[str, Any]:
    """An example for the template: the steps up to the accused one, its cause and correction, the new steps."""
    first, second = shown.work, parse(shown.second or "").trace
    steps = [
        {"number": k, "text": step.text, "accused": k == shown.accused, "wrong": k == shown.true_step}
        for k, step in enumerate(first.steps, 1)
    ]
    if shown.accused and second.steps:  # review discarded the steps after the accused one
        steps = steps[: shown.accused]
        for number, step in enumerate(second.steps[shown.accused :], shown.accused + 1):
            steps.append({"number": number, "text": step.text, "accused": False, "wrong": False})

    def answer(text: str | None, correct: bool | None) -> dict[str, str]:
        verdict = "unknown" if correct is None else "right" if correct else "wrong"
        return {"text": text or "no answer", "verdict": verdict}

    return shown.model_dump() | {
        "title": " · ".join(filter(None, (model, shown.id))),
        "steps": steps,
        "before": answer(first.answer, shown.correct1),
        "after": answer(second.answer, shown.correct2) if shown.second else None,
    }
