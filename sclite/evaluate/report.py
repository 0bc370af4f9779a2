"""The HTML report: one page without scripts, fonts or links to anywhere, so that it opens offline and can be sent on."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from sclite.evaluate.plots import accuracy_plot, curve_plots, number
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

    `summary`: {"models": {name: figures}, "n": problems, "notes": [sentence, ..]}, figures as `metrics.summarise`
    gives them. A model's figures may name their "protocol", and hold those of others in "protocols": {name: figures}.
    "source" (what the problems are) and "comparisons": {title: `metrics.compare`'s result} may stand beside the
    models. `examples`: `Outcome.model_dump()` and, where they are known, model, protocol, cause and correction; the
    last two are otherwise read out of the second text. `curves`: {stage: rows of its metrics.jsonl}.
    """
    rows = table_rows(summary)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {f.__name__: f for f in (percent, interval, decimal, bounds, chance, pieces)}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        headline=headline(summary, rows),
        subject=subject(summary, rows),
        rows=rows,
        comparisons=summary.get("comparisons") or {},
        accuracy=accuracy_plot(rows),
        curves=curve_plots(curves or {}),
        examples=[example(given) for given in examples],
        notes=[*unknown_notes(rows), *(summary.get("notes") or ())],
    )
    write_text(path, page)


# -- words and numbers ---------------------------------------------------------------------------------------------


def percent(value: float | None, signed: bool = False) -> str:
    """A share in percent with one decimal, without the sign %; a dash where it is unknown."""
    if number(value) is None:
        return "–"
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return text.replace("-0.0", "0.0").replace("+0.0", "0.0").replace("-", "−")


def interval(pair: Sequence[float] | None, signed: bool = False) -> str:
    """`low to high` in percent; empty where there is none."""
    return " to ".join(percent(bound, signed) for bound in pair) if pair else ""


def decimal(value: float | None, digits: int = 2) -> str:
    """A number with a fixed count of decimals; a dash where it is unknown."""
    return "–" if number(value) is None else f"{value:,.{digits}f}".replace("-", "−")


def bounds(pair: Sequence[float] | None, digits: int = 2) -> str:
    """`low to high` with a fixed count of decimals; empty where there is none."""
    return " to ".join(decimal(bound, digits) for bound in pair) if pair else ""


def chance(p: float | None) -> str:
    """A p-value with three decimals, never rounded to nothing."""
    return "< 0.001" if number(p) is not None and p < 0.001 else decimal(p, 3)


def table_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table's rows in the order given: each model's own figures, then its other protocols'."""
    rows = []
    for model, figures in summary["models"].items():
        protocols = figures.get("protocols") or {}
        named = {figures.get("protocol", ""): figures, **protocols} if "acc_t1" in figures else protocols
        for protocol, values in named.items():
            name = f"{model}, {protocol}" if protocol else model
            rows.append({**values, "model": model, "protocol": protocol, "name": name})
    return rows


def headline(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What was found, in one sentence: the best model's accuracy after review, and before."""
    own: dict[str, Mapping[str, Any]] = {}  # the first row of each model; those below it are for comparison
    for row in rows:
        own.setdefault(row["model"], row)
    measured = [row for row in own.values() if number(row.get("acc_t2")) is not None]
    if not measured:
        return "Nothing was measured."
    best = max(measured, key=lambda row: row["acc_t2"])
    start = f"{best['model']} answers {percent(best['acc_t2'])} % right after reviewing its own work"
    gain, between = best.get("difference"), best.get("difference_interval")
    if number(gain) is None:
        return f"{start}."
    if gain == 0:
        return f"{start}, as before it."
    doubt = between is not None and between[0] <= 0 <= between[1]
    direction = "up" if gain > 0 else "down"
    return f"{start}, {direction} from {percent(best['acc_t1'])} %{', which may be chance' if doubt else ''}."


def subject(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What was measured, in one sentence."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    n = summary.get("n")
    count = "held-out problems" if n is None else f"{n:,} held-out problems"
    source = f" from {summary['source']}" if summary.get("source") else ""
    return f"{_listed(models)} on {count}{source}: the first answer, and the answer after review."


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:]))) or "No model"


def unknown_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence per row that has unknown outcomes."""
    return [
        f"{row['name']}: {row['unknown']} of {row['unknown'] + row.get('n', 0)} outcomes are unknown (failed call, "
        "time-out or grader fault) and left out."
        for row in rows
        if row.get("unknown")
    ]


# -- examples ------------------------------------------------------------------------------------------------------


def pieces(text: str | None) -> list[tuple[str, str]]:
    """A text cut at its tags: (name of the tag or "", text), which joined give the text again."""
    parts = _TAG.split(text or "")
    return [(_NAME.search(part)[0].lower() if i % 2 else "", part) for i, part in enumerate(parts) if part]


def example(given: Mapping[str, Any]) -> dict[str, Any]:
    """One example as the template shows it: the steps up to the accused one, its cause and correction, the new steps."""
    first, second = work_of(given.get("first") or ""), parse(given.get("second") or "").trace
    at = first_corrected(second)
    marked = second.steps[at - 1] if at else None
    accused = given.get("accused") or at
    replaced = accused is not None and bool(second.steps)  # what the first answer said after it was discarded
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
        "title": " · ".join(str(given[key]) for key in ("model", "protocol", "id") if given.get(key)),
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
