"""Coordinates of the report's plots, in percent of width and height; the template draws them as SVG."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

POINTS = 240  # at most per curve; longer ones are averaged in groups
NOT_CURVES = set(
    ["step", "epoch", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_gb", "margin_max"]
)
NAMES = {"loss": "loss", "dpo_loss": "DPO loss", "margin": "margin, chosen minus rejected"}
LEVELS = {"dpo_loss": math.log(2), "margin": 0.0}  # where DPO starts if its reference model is right


def as_number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if real else None


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round tick values, 1, 2, 2.5 or 5 times a power of ten apart, that enclose `low` and `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if m * power >= span / count * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, max(last, first + 1) + 1)]


def format_tick(value: float) -> str:
    """A number without trailing zeros, with a typographic minus sign."""
    return f"{value:.6g}".replace("-", "−")


class Scale:
    """Maps values to percent of an axis between round ticks."""

    def __init__(self, values: Iterable[float], count: int = 4):
        values = list(values)
        self.values = ticks(min(values), max(values), count)

    def __call__(self, value: float) -> float:
        low, high = self.values[0], self.values[-1]
        return round(100 * (value - low) / (high - low), 3)

    def marks(self) -> list[dict[str, Any]]:
        return [{"at": self(value), "text": format_tick(value)} for value in self.values]


def accuracy_plot(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Positions of the dots and intervals of each row {name, acc_t1, acc_t2, intervals}; None without rows."""
    shown = [row for row in rows if as_number(row.get("acc_t1")) is not None]
    if not shown:
        return None
    dots = [[_dot(row, name) for name in ("acc_t1", "acc_t2")] for row in shown]
    scale = Scale(
        [100 * v for pair in dots for dot in pair if dot for v in (dot["low"], dot["at"], dot["high"])]
    )
    for pair in dots:
        for dot in filter(None, pair):
            dot |= {key: scale(100 * dot[key]) for key in ("low", "at", "high")}
    lines = [
        {"name": row["name"], "first": first, "second": second}
        for row, (first, second) in zip(shown, dots, strict=True)
    ]
    return {"rows": lines, "marks": scale.marks()}


def _dot(row: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    value = as_number(row.get(name))
    if value is None:
        return None
    low, high = row.get(f"{name}_interval") or (value, value)
    return {"at": value, "low": low, "high": high, "text": f"{100 * value:.1f} %"}


def curve_plots(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One plot per stage and metric, with loss, DPO loss and margin first."""
    plots = []
    for stage, rows in curves.items():
        rows = _without_partial_batch(rows)
        present = {key for row in rows for key, value in row.items() if as_number(value) is not None}
        for key in sorted(present - NOT_CURVES, key=lambda k: ([*NAMES, k].index(k), k)):
            plots.append(_curve(stage, key, rows))
    return [plot for plot in plots if plot]


def _without_partial_batch(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The rows without a last optimizer step of fewer than half the median tokens, which is noise."""
    tokens = [row["tokens"] for row in rows if as_number(row.get("tokens")) is not None]
    if len(tokens) < 3 or tokens[-1] >= statistics.median(tokens) / 2:
        return rows
    last = next(i for i in reversed(range(len(rows))) if as_number(rows[i].get("tokens")) is not None)
    return [*rows[:last], *rows[last + 1 :]]


def _curve(stage: str, key: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    pairs = ((as_number(row.get("step")), as_number(row.get(key))) for row in rows)
    known = {step: value for step, value in pairs if step is not None and value is not None}
    if len(known) < 2:
        return None
    points, level = sorted(known.items()), LEVELS.get(key)  # after a resume, the later row of a step wins
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
        "last": format_tick(float(f"{last:.3g}")),
    }


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]
