"""What is seen of a training: metrics.jsonl, the live line, warnings that say what to do, and a Ctrl-C that saves first."""

import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sclite.run import write_text

Progress = Callable[..., None]
"""progress(done, total, note=figures as text, warning=text or None)."""

FLAT, FALLING, EXPLODING, NOT_A_NUMBER = "margin_flat", "chosen_falling", "gradient_exploding", "not_a_number"
ADVICE = {
    FLAT: "the margin stays at 0 and dpo_loss at 0.693: nothing is learned; raise dpo.learning_rate, or look at "
    "`sclite show pairs` for pairs whose two sides are alike",
    FALLING: "chosen texts become less likely, not only the rejected ones: raise dpo.nll_weight or lower "
    "dpo.learning_rate",
    EXPLODING: "the gradient's norm is more than ten times what it was: lower the learning rate, or raise warmup_ratio",
    NOT_A_NUMBER: "the loss is not a number: lower the learning rate, and start this stage again with --fresh",
}
PATIENCE = 20  # steps before anything is said


class MetricsLogger:
    """The figures of one training. `add` after each micro-batch, `row` after each optimizer step."""

    def __init__(self, path: Path, phase: str, progress: Progress | None = None):
        self.path, self.phase, self.progress = path, phase, progress
        self.warnings: list[str] = []
        self.interrupted = False
        self.rows: list[dict[str, Any]] = []
        self._sums: dict[str, Any] = {}
        self._tokens, self._began = 0, time.monotonic()

    # -- metrics.jsonl ---------------------------------------------------------------------------------------------

    def resume(self, step: int) -> None:
        """Take out of metrics.jsonl what this phase has written after `step`; 0 takes out all of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = read_metrics(self.path)
        if (lost := _lines(self.path) - len(found)) > 0:
            self.warn(
                f"{self.path}: {lost} damaged line{'s' * (lost > 1)} removed; the curves lack those steps"
            )
        kept = [row for row in found if row["phase"] != self.phase or row["step"] <= step]
        self.rows = [row for row in kept if row["phase"] == self.phase]
        write_text(self.path, (json.dumps(row) + "\n" for row in kept))

    def add(self, figures: Mapping[str, Any], tokens: int) -> None:
        """The figures of a micro-batch: shares of the step's means are added up, lists hold maxima."""
        for name, value in figures.items():
            if isinstance(value, list):
                value = [*self._sums.get(name, []), *value]
            elif name in self._sums:
                value = self._sums[name] + value
            self._sums[name] = value
        self._tokens += tokens

    def row(self, logs: Mapping[str, Any], step: int, total: int) -> dict[str, Any]:
        """Write down what the trainer logs at a step; returns it, with our figures, for whoever else listens."""
        figures = {k: float(max(v) if isinstance(v, list) else v) for k, v in self._sums.items()}
        found = {k: float(v) for k, v in logs.items() if isinstance(v, int | float)}
        if "loss" in logs:
            seconds = time.monotonic() - self._began
            found |= figures | {
                "tokens": self._tokens,
                "tokens_per_second": self._tokens / max(seconds, 1e-9),
            }
            if memory := _peak_gb():
                found["memory_gb"] = memory
            self._sums, self._tokens, self._began = {}, 0, time.monotonic()
        if "loss" in logs or "eval_loss" in logs:
            row = {"phase": self.phase, "step": step} | {k: round(v, 6) for k, v in found.items()}
            self.rows.append(row)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self._tell(row, step, total)
        return found

    def _tell(self, row: Mapping[str, Any], step: int, total: int) -> None:
        for kind in trouble(self.rows):
            if ADVICE[kind] not in self.warnings:
                self.warn(f"step {step}: {ADVICE[kind]}", ADVICE[kind])
        if self.progress is not None:
            self.progress(step, total, note=live_line(row))

    def warn(self, text: str, key: str = "") -> None:
        """Say something now and in the report."""
        self.warnings.append(key or text)
        if self.progress is not None:
            self.progress(0, 0, warning=text)

    # -- Ctrl-C ----------------------------------------------------------------------------------------------------

    @contextmanager
    def interruptions(self) -> Iterator[None]:
        """The first Ctrl-C only asks the training to save and stop; a second one stops it at once."""

        def asked(*_: Any) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, before)
            self.warn("Ctrl-C: a checkpoint is saved after this step; once more stops at once")

        try:
            before = signal.signal(signal.SIGINT, asked)
        except ValueError:  # not in the main thread: then Ctrl-C comes to somebody else
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none where it is absent. Lines that are no row, such as a half-written one, are skipped."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        numbers = isinstance(row, dict) and all(
            isinstance(value, str if name == "phase" else int | float) for name, value in row.items()
        )
        if numbers and {"phase", "step"} <= row.keys():
            rows.append(row)
    return rows


def _lines(path: Path) -> int:
    """The lines of a file that end, 0 where it is absent: the last one may be half-written."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def live_line(row: Mapping[str, Any]) -> str:
    """What the terminal shows of a step: loss 0.412, margin 0.31, accuracy 74 %, 3,204 tokens/s, 9.8 GB."""
    told = []
    if "loss" in row:
        told.append(f"loss {row['loss']:.3f}")
    if "margin" in row:
        told.append(f"margin {row['margin']:.2f}")
    if "accuracy" in row:
        told.append(f"accuracy {100 * row['accuracy']:.0f} %")
    if "eval_loss" in row:
        told.append(f"evaluation loss {row['eval_loss']:.3f}")
    if "tokens_per_second" in row:
        told.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "memory_gb" in row:
        told.append(f"{row['memory_gb']:.1f} GB")
    return ", ".join(told)


def trouble(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with a training so far, by name; `rows` are those of its metrics.jsonl, in order."""
    steps = [row for row in rows if "loss" in row]
    if not steps:
        return []
    found, last = [], steps[-1]
    if not all(math.isfinite(last.get(name, 0.0)) for name in ("loss", "grad_norm")):
        found.append(NOT_A_NUMBER)
    if len(steps) <= PATIENCE:
        return found
    norms = [row["grad_norm"] for row in steps if "grad_norm" in row]
    if len(norms) > PATIENCE and norms[-1] > 10 * statistics.median(norms[:-1]) > 0:
        found.append(EXPLODING)
    recent = steps[-PATIENCE:]
    if "margin" in last:
        if all(abs(row["margin"]) < 1e-3 and abs(row["dpo_loss"] - math.log(2)) < 1e-3 for row in recent):
            found.append(FLAT)
        if statistics.fmean(row["chosen_shift"] for row in recent) < -2.0:
            found.append(FALLING)
    return found


def _peak_gb() -> float | None:
    """The most that torch has held on the card since the last call; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak
