"""The HTML report: a single self-contained page without scripts or external resources."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from sclite.evaluate.plots import accuracy_plot, as_number, curve_plots
from sclite.run import write_text
from sclite.trace import first_corrected, parse, work_of

TEMPLATE = Path(__file__).with_name("report.html.jinja")
_TAG = re.compile(r"(</?(?:step|key|cause|correction|generalized|answer)\s*\d*\s*:?\s*>)", re.I)
_NAME = re.compile(r"[a-z]+", re.I)


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]] = (),
    curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Write the page by rename.

    `summary`: {"models": {name: figures}, "n": number of problems, "notes": [sentence, ..], "source": their name}, with
    figures from `metrics.summarize`. `examples`: `Outcome.model_dump()`, optionally with model, cause and correction;
    the last two default to those in the second text. `curves`: {stage: rows of its metrics.jsonl}.
    """
    rows = [{**figures, "name": model} for model, figures in summary["models"].items()]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        f.__name__: f for f in (percent, interval, decimal, bounds, p_value, split_at_tags)
    }
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        headline=headline(rows),
        subject=subject(summary, rows),
        rows=rows,
        accuracy=accuracy_plot(rows),
        curves=curve_plots(curves or {}),
        examples=[example_parts(given) for given in examples],
        notes=[*unknown_notes(rows), *(summary.get("notes") or ())],
    )
    write_text(path, page)


# -- text and numbers ----------------------------------------------------------------------------------------------


def percent(value: float | None, signed: bool = False) -> str:
    """A share in percent with one decimal, without the % sign; a dash if unknown."""
    if as_number(value) is None:
        return "–"
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return text.replace("-0.0", "0.0").replace("+0.0", "0.0").replace("-", "−")


def interval(pair: Sequence[float] | None, signed: bool = False) -> str:
    """`low to high` in percent; empty for None."""
    return " to ".join(percent(bound, signed) for bound in pair) if pair else ""


def decimal(value: float | None, digits: int = 2) -> str:
    """A number with a fixed number of decimals; a dash if unknown."""
    return "–" if as_number(value) is None else f"{value:,.{digits}f}".replace("-", "−")


def bounds(pair: Sequence[float] | None, digits: int = 2) -> str:
    """`low to high` with a fixed number of decimals; empty for None."""
    return " to ".join(decimal(bound, digits) for bound in pair) if pair else ""


def p_value(p: float | None) -> str:
    """A p-value with three decimals, never rounded to zero."""
    return "< 0.001" if as_number(p) is not None and p < 0.001 else decimal(p, 3)


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The result in one sentence: the best model's accuracy after and before review."""
    measured = [row for row in rows if as_number(row.get("acc_t2")) is not None]
    if not measured:
        return "No results."
    best = max(measured, key=lambda row: row["acc_t2"])
    start = f"{best['name']} gets {percent(best['acc_t2'])} % right after reviewing its own answers"
    gain, between = best.get("difference"), best.get("difference_interval")
    if as_number(gain) is None:
        return f"{start}."
    if gain == 0:
        return f"{start}, unchanged."
    doubt = between is not None and between[0] <= 0 <= between[1]
    direction = "up" if gain > 0 else "down"
    return f"{start}, {direction} from {percent(best['acc_t1'])} %{', which may be chance' if doubt else ''}."


def subject(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What was evaluated, in one sentence."""
    *others, last = [row["name"] for row in rows] or ["No model"]
    models = f"{', '.join(others)} and {last}" if others else last
    n = summary.get("n")
    count = "held-out problems" if n is None else f"{n:,} held-out problems"
    source = f" from {summary['source']}" if summary.get("source") else ""
    return f"{models} on {count}{source}: first answer and answer after review."


def unknown_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence per row with unknown outcomes."""
    return [
        f"{row['name']}: {row['unknown']} of {row['unknown'] + row.get('n', 0)} outcomes are unknown (failed call, "
        "timeout or grader error) and excluded."
        for row in rows
        if row.get("unknown")
    ]


# -- examples ------------------------------------------------------------------------------------------------------


def split_at_tags(text: str | None) -> list[tuple[str, str]]:
    """Split a text at its tags into (tag name or "", piece); the pieces join to the text."""
    parts = _TAG.split(text or "")
    return [(_NAME.search(part)[0].lower() if i % 2 else "", part) for i, part in enumerate(parts) if part]


def example_parts(given: Mapping[str, Any]) -> dict[str, Any]:
    """An example for the template: the steps up to the accused one, its cause and correction, the new steps."""
    first, second = work_of(given.get("first") or ""), parse(given.get("second") or "").trace
    at = first_corrected(second)
    marked = second.steps[at - 1] if at else None
    accused = given.get("accused") or at
    replaced = accused is not None and bool(second.steps)  # review discarded the steps after it
    kept = first.steps[:accused] if replaced else first.steps
    steps = [
        {"number": k, "text": step.text, "accused": k == accused, "wrong": k == given.get("true_step")}
        for k, step in enumerate(kept, 1)
    ]
    after = second.steps[accused:] if replaced else ()
    steps += [
        {"number": k, "text": step.text, "accused": False, "wrong": False}
        for k, step in enumerate(after, len(kept) + 1)
    ]
    return {
        "title": " · ".join(str(given[key]) for key in ("model", "id") if given.get(key)),
        "question": given.get("question", ""),
        "gold": given.get("gold"),
        "steps": steps,
        "cause": given.get("cause") or (marked and marked.cause),
        "correction": given.get("correction") or (marked and marked.correction),
        "before": _answer(first.answer, given.get("correct1")),
        "after": _answer(second.answer, given.get("correct2")) if given.get("second") else None,
        "first": given.get("first") or "",
        "second": given.get("second"),
        "note": given.get("note") or "",
    }


def _answer(text: str | None, correct: bool | None) -> dict[str, str]:
    verdict = "unknown" if correct is None else "right" if correct else "wrong"
    return {"text": text or "no answer", "verdict": verdict}
