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
            points = [
                tuple(statistics.fmean(column) for column in zip(*group, strict=True)) for group in groups
            ]
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
