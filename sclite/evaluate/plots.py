"""The geometry of the report's plots, in percent of the plot's width and height; the template draws it as SVG."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

POINTS = 240  # of a curve at most; longer ones show the mean of each stretch
NOT_CURVES = {
    "step",
    "epoch",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "memory_gb",
    "margin_max",
}
NAMES = {"loss": "loss", "dpo_loss": "DPO loss", "margin": "margin, chosen less rejected"}
LEVELS = {"dpo_loss": math.log(2), "margin": 0.0}  # where DPO starts when its reference is the right one


def number(value: Any) -> float | None:
    """A finite number as a float, anything else as None."""
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if real else None


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) that reach from `low` or below to `high` or above."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if m * power >= span / count * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def label(value: float) -> str:
    """A tick's text: no needless zeros, a real minus sign."""
    return f"{value:.6g}".replace("-", "−")


class Scale:
    """From values to percent along an axis that spans round ticks."""

    def __init__(self, values: Iterable[float], count: int = 4):
        values = list(values)
        self.values = ticks(min(values), max(values), count)

    def __call__(self, value: float) -> float:
        low, high = self.values[0], self.values[-1]
        return round(100 * (value - low) / (high - low), 3)

    def marks(self) -> list[dict[str, Any]]:
        return [{"at": self(value), "text": label(value)} for value in self.values]


def accuracy_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One line per row {name, acc_t1, acc_t2, and their intervals}: where each dot and interval lies; None for no rows."""
    shown = [row for row in rows if number(row.get("acc_t1")) is not None]
    if not shown:
        return None
    dots = [[_dot(row, name) for name in ("acc_t1", "acc_t2")] for row in shown]
    scale = Scale(
        [100 * v for pair in dots for dot in pair if dot for v in (dot["low"], dot["at"], dot["high"])]
    )
    for pair in dots:
        for dot in filter(None, pair):
            dot |= {key: scale(100 * dot[key]) for key in ("low", "at", "high")}
    rows_shown = [
        {"name": row["name"], "first": first, "second": second}
        for row, (first, second) in zip(shown, dots, strict=True)
    ]
    return {"rows": rows_shown, "marks": scale.marks()}


def _dot(row: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    value = number(row.get(name))
    if value is None:
        return None
    low, high = row.get(f"{name}_interval") or (value, value)
    return {"at": value, "low": low, "high": high, "text": f"{100 * value:.1f} %"}


def curve_plots(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A plot for each stage and each figure that its metrics rows hold, loss, DPO loss and margin first."""
    plots = []
    for stage, rows in curves.items():
        rows = _without_partial_batch(rows)
        present = {key for row in rows for key, value in row.items() if number(value) is not None}
        for key in sorted(present - NOT_CURVES, key=lambda k: ([*NAMES, k].index(k), k)):
            plots.append(_curve(stage, key, rows))
    return [plot for plot in plots if plot]


def _without_partial_batch(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The rows without the figures of a last optimizer step that held fewer than half the usual tokens: they are noise."""
    tokens = [row["tokens"] for row in rows if number(row.get("tokens")) is not None]
    if len(tokens) < 3 or tokens[-1] >= statistics.median(tokens) / 2:
        return rows
    last = next(i for i in reversed(range(len(rows))) if number(rows[i].get("tokens")) is not None)
    return [*rows[:last], *rows[last + 1 :]]


def _curve(stage: str, key: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    pairs = ((number(row.get("step")), number(row.get(key))) for row in rows)
    known = {step: value for step, value in pairs if step is not None and value is not None}
    if len(known) < 2:
        return None
    points, level = sorted(known.items()), LEVELS.get(key)  # after a resume the later row of a step counts
    last, points = points[-1][1], _thin(points)
    across = Scale([step for step, _ in points], 3)
    up = Scale([value for _, value in points] + ([] if level is None else [level]), 3)
    return {
        "stage": stage,
        "name": NAMES.get(key, key.replace("_", " ")),
        "points": " ".join(f"{across(x):g},{100 - up(y):g}" for x, y in points),
        "across": across.marks(),
        "up": [{"at": 100 - mark["at"], "text": mark["text"]} for mark in up.marks()],
        "level": None if level is None else 100 - up(level),
        "last": label(float(f"{last:.3g}")),
    }


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]
