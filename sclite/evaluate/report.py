"""The HTML report: a single self-contained page without scripts or external resources."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from sclite.console import format_percent
from sclite.evaluate.metrics import Outcome
from sclite.run import write_text

TEMPLATE = Path(__file__).with_name("report.html.jinja")
NOT_CURVES = (
    "phase",
    "step",
    "epoch",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "memory_gb",
)


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    examples: Sequence[tuple[str, Outcome]],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Write the page atomically.

    `summary`: {"models": {name: figures}, "baselines": {label: figures}, "n": number of problems, "notes": [sentence, ..],
    "source": their name}, with figures from `metrics.compute_metrics`. `examples`: (model, outcome). `curves`: {stage:
    rows of its metrics.jsonl}; there is a plot of each metric that has two values.
    """
    plots = []
    for stage, rows in curves.items():
        for name in dict.fromkeys(key for row in rows for key in row if key not in NOT_CURVES):
            known = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
            if len(known) < 2:
                continue
            steps, values = zip(*known, strict=True)
            low, high, begin = min(values), max(values), steps[0]
            width, height = (steps[-1] - begin) or 1, (high - low) or 1.0
            # in percent of width and height
            points = (f"{100 * (x - begin) / width:.2f},{100 * (high - y) / height:.2f}" for x, y in known)
            plot = {"stage": stage, "name": name.replace("_", " "), "points": " ".join(points)}
            plots.append(plot | {"low": low, "high": high, "steps": steps, "last": values[-1]})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["percent"] = format_percent
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        subject=f"{', '.join(summary['models'])} on {summary['n']:,} held-out problems from {summary['source']}",
        models=summary["models"],
        rows=summary["models"] | summary["baselines"],
        curves=plots,
        examples=examples,
        notes=summary["notes"],
    )
    write_text(path, page)
