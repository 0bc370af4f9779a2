"""The HTML report: a single self-contained page without scripts or external resources."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from sclite.evaluate.metrics import Outcome
from sclite.evaluate.plots import accuracy_plot, as_number, curve_plots
from sclite.run import write_text
from sclite.trace import TAG, parse, tag_name

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    examples: Sequence[tuple[str, Outcome]] = (),
    curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Write the page by rename.

    `summary`: {"models": {name: figures}, "baselines": {label: figures}, "n": number of problems, "notes": [sentence, ..],
    "source": their name}, with figures from `metrics.compute_metrics`. `examples`: (model, outcome). `curves`: {stage:
    rows of its metrics.jsonl}.
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
    measured = [row for row in rows if as_number(row.get("acc_t2")) is not None]
    headline = "No results."  # else the accuracy of the best model, and no more than was measured
    if measured:
        best = max(measured, key=lambda row: row["acc_t2"])
        headline = f"{best['name']} gets {percent(best['acc_t2'])} % right after reviewing its own answers"
        gain, between = as_number(best.get("difference")), best.get("difference_interval")
        if gain:
            doubt = ", which may be chance" if between and between[0] <= 0 <= between[1] else ""
            headline += f", {'up' if gain > 0 else 'down'} from {percent(best['acc_t1'])} %{doubt}"
        headline += ", unchanged." if gain == 0 else "."
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {f.__name__: f for f in (percent, interval, decimal)}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        headline=headline,
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


def example_parts(shown: Outcome, model: str = "") -> dict[str, Any]:
    """An example for the template: the steps up to the accused one, its cause and correction, the new steps.

    "texts" are the first and the second text, split at their tags: [(title, [(tag name or "", piece), ..])].
    """
    first, second = shown.work, parse(shown.second or "").trace
    steps = [
        {"number": k, "text": step.text, "accused": k == shown.accused, "wrong": k == shown.true_step}
        for k, step in enumerate(first.steps, 1)
    ]
    if shown.accused and second.steps:  # review discarded the steps after the accused one
        steps = steps[: shown.accused]
        for number, step in enumerate(second.steps[shown.accused :], shown.accused + 1):
            steps.append({"number": number, "text": step.text, "accused": False, "wrong": False})

    texts = []
    for title, text in (("First text, as written", shown.first), ("Second text, as written", shown.second)):
        if not text:
            continue
        pieces, position = [], 0
        for tag in TAG.finditer(text):
            pieces += [("", text[position : tag.start()]), (tag_name(tag[2]), tag[0])]
            position = tag.end()
        texts.append((title, [*pieces, ("", text[position:])]))

    def answer(text: str | None, correct: bool | None) -> dict[str, str]:
        verdict = "unknown" if correct is None else "right" if correct else "wrong"
        return {"text": text or "no answer", "verdict": verdict}

    return shown.model_dump() | {
        "title": " · ".join(filter(None, (model, shown.id))),
        "steps": steps,
        "texts": texts,
        "before": answer(first.answer, shown.correct1),
        "after": answer(second.answer, shown.correct2) if shown.second else None,
    }
