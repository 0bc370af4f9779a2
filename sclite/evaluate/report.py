"""The HTML report: a single self-contained page without scripts or external resources."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from sclite.evaluate.metrics import Outcome
from sclite.run import write_text
from sclite.trace import TAG, parse, tag_name

TEMPLATE = Path(__file__).with_name("report.html.jinja")
POINTS = 240  # at most per curve; longer ones are averaged in groups
NOT_CURVES = set(
    ["step", "epoch", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_gb", "margin_max"]
)
NAMES = {"loss": "loss", "dpo_loss": "DPO loss", "margin": "margin, chosen minus rejected"}
LEVELS = {"dpo_loss": math.log(2), "margin": 0.0}  # where DPO starts if its reference model is correct


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    examples: Sequence[tuple[str, Outcome]],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Write the page atomically.

    `summary`: {"models": {name: figures}, "baselines": {label: figures}, "n": number of problems, "notes": [sentence, ..],
    "source": their name}, with figures from `metrics.compute_metrics`. `examples`: (model, outcome). `curves`: {stage:
    rows of its metrics.jsonl}.
    """
    rows = [{**figures, "name": model} for model, figures in summary["models"].items()]
    baselines = [{"name": label} | figures for label, figures in summary["baselines"].items()]
    unknown = [
        f"{row['name']}: {row['unknown']} of {row['unknown'] + row['n']} outcomes are unknown (failed call, timeout or "
        "grader error) and excluded."
        for row in rows
        if row.get("unknown")
    ]
    *names, last = summary["models"]
    models = f"{', '.join(names)} and {last}" if names else last
    problems = f"{summary['n']:,} held-out problems from {summary['source']}"
    measured = [row for row in rows if row.get("acc_t2") is not None]
    headline = "No results."  # else the accuracy of the best model, and no claim beyond the measurement
    if measured:
        best = max(measured, key=lambda row: row["acc_t2"])
        headline = f"{best['name']} gets {percent(best['acc_t2'])} % right after reviewing its own answers"
        gain, between = best["difference"], best["difference_interval"]
        if gain:
            doubt = ", which may be chance" if between[0] <= 0 <= between[1] else ""
            headline += f", {'up' if gain > 0 else 'down'} from {percent(best['acc_t1'])} %{doubt}"
        headline += ", unchanged." if gain == 0 else "."
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {f.__name__: f for f in (percent, interval, decimal)}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        headline=headline,
        subject=f"{models} on {problems}: first answer and answer after review.",
        rows=rows,
        baselines=baselines,
        accuracy=accuracy_plot(rows),
        curves=curve_plots(curves),
        examples=[example_parts(outcome, model) for model, outcome in examples],
        notes=[*unknown, *summary["notes"]],
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
    """An example for the template: the steps up to the flagged one, its cause and correction, the new steps.

    "texts" are the first and the second text, split at their tags: [(title, [(tag name or "", piece), ..])].
    """
    first, second = shown.work, parse(shown.second or "").trace
    steps = [
        {"number": k, "text": step.text, "accused": k == shown.accused, "wrong": k == shown.true_step}
        for k, step in enumerate(first.steps, 1)
    ]
    if shown.accused and second.steps:  # review discarded the steps after the flagged one
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


# -- plots: coordinates in percent of width and height, which the template draws as SVG ------------------------------


def as_number(value: object) -> float | None:
    """A finite number as a float; None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def format_tick(value: float) -> str:
    """A number without trailing zeros, with a typographic minus sign."""
    return f"{value:.6g}".replace("-", "−")


class Axis:
    """Maps values to percent of an axis between round `ticks`, which are 1, 2, 2.5 or 5 times a power of ten apart."""

    def __init__(self, values: Iterable[float], count: int = 4):
        values = list(values)
        low, high = min(values), max(values)
        span = (high - low) or abs(high) or 1.0
        power = 10.0 ** math.floor(math.log10(span / count))
        step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if m * power >= span / count * 0.999)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        self.ticks = [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]

    def __call__(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return round(100 * (value - low) / (high - low), 3)

    def marks(self) -> list[dict[str, Any]]:
        return [{"at": self(value), "text": format_tick(value)} for value in self.ticks]


def accuracy_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Positions of the dots and intervals of each row {name, acc_t1, acc_t2, intervals}; None without rows."""
    lines = []
    for row in rows:
        dots = {}
        for name, figure in (("first", "acc_t1"), ("second", "acc_t2")):
            value = as_number(row.get(figure))
            low, high = row.get(f"{figure}_interval") or (value, value)
            dots[name] = None if value is None else {"at": value, "low": low, "high": high}
        if dots["first"]:
            lines.append({"name": row["name"], **dots})
    shown = [dot for line in lines for dot in (line["first"], line["second"]) if dot]
    if not shown:
        return None
    axis = Axis([100 * value for dot in shown for value in dot.values()])
    for dot in shown:
        text = f"{100 * dot['at']:.1f} %"
        dot |= {key: axis(100 * value) for key, value in dot.items()} | {"text": text}
    return {"rows": lines, "marks": axis.marks()}


def curve_plots(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One plot per stage and metric that has two values, with loss, DPO loss and margin first.

    A last optimizer step of fewer than half the median tokens is skipped: it is noise.
    """
    plots = []
    for stage, rows in curves.items():
        sized = [(i, row["tokens"]) for i, row in enumerate(rows) if as_number(row.get("tokens")) is not None]
        partial = len(sized) > 2 and sized[-1][1] < statistics.median(tokens for _, tokens in sized) / 2
        rows = [row for i, row in enumerate(rows) if not partial or i != sized[-1][0]]
        present = {key for row in rows for key, value in row.items() if as_number(value) is not None}
        for key in sorted(present - NOT_CURVES, key=lambda k: ([*NAMES, k].index(k), k)):
            pairs = ((as_number(row.get("step")), as_number(row.get(key))) for row in rows)
            # after a resume, the later row of a step wins
            known = sorted({x: y for x, y in pairs if x is not None and y is not None}.items())
            if len(known) < 2:
                continue
            size, level = math.ceil(len(known) / POINTS), LEVELS.get(key)
            groups = [known[i : i + size] for i in range(0, len(known), size)]
            points = [tuple(map(statistics.fmean, zip(*group, strict=True))) for group in groups]
            across = Axis([x for x, _ in points], 3)
            up = Axis([y for _, y in points] + ([] if level is None else [level]), 3)
            plots.append(
                {
                    "stage": stage,
                    "name": NAMES.get(key, key.replace("_", " ")),
                    "points": " ".join(f"{across(x):g},{100 - up(y):g}" for x, y in points),
                    "across": across.marks(),
                    "up": [{"at": 100 - mark["at"], "text": mark["text"]} for mark in up.marks()],
                    "level": None if level is None else 100 - up(level),
                    "last": format_tick(float(f"{known[-1][1]:.3g}")),
                }
            )
    return plots
