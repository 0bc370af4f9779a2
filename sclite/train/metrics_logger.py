"""The reports of a training: metrics.jsonl, the progress line and warnings with advice; and a Ctrl-C that saves first."""

from __future__ import annotations

import json
import math
import resource
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclite.progress import Progress, no_progress
from sclite.run import write_text

if TYPE_CHECKING:
    from torch import Tensor

FLAT = (
    "the margin stays at 0 and dpo_loss at 0.693: the model learns nothing; raise dpo.learning_rate, or check "
    "`sclite show pairs` for pairs with similar sides"
)
FALLING = (
    "chosen texts become less likely, not only rejected ones: raise dpo.nll_weight or lower dpo.learning_rate"
)
EXPLODING = (
    "the gradient norm is more than ten times its median: lower the learning rate, or raise warmup_ratio"
)
OTHER_REFERENCE = (
    "dpo_loss does not begin at 0.693, so the reference is not the adapter that is trained: restart with --fresh; if it "
    "happens again, please report it with the model's name"
)
NOT_A_NUMBER = (
    "the loss or the gradient is NaN or infinite: lower the learning rate and restart this stage with --fresh"
)
PATIENCE = 20  # steps before the first warning
LN2 = math.log(2)
"""Where DPO's loss starts: the policy is its reference (METHOD, section 4)."""
ON_THE_LINE = {
    "loss": "loss {:.3f}",
    "margin": "margin {:.2f}",
    "accuracy": "accuracy {:.0%}",
    "eval_loss": "evaluation loss {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "memory_gb": "{:.1f} GB",
}
"""The figures of a step on the progress line: loss 0.412, margin 0.31, accuracy 74 %, 3,204 tokens/s, 9.8 GB."""


class MetricsLogger:
    """Logs one training: call `add` after each micro-batch and `log_step` after each optimizer step.

    Rows after step `resumed_from` are removed from metrics.jsonl first.
    """

    def __init__(self, path: Path, phase: str, progress: Progress = no_progress, resumed_from: int = 0):
        self.path, self.phase, self.progress = path, phase, progress
        self.warnings: list[str] = []
        self.interrupted = False
        self._sums: dict[str, Any] = {}
        self._tokens, self._began = 0, time.monotonic()
        self.rows = [row for row in read_metrics(path) if row["step"] <= resumed_from]
        write_text(path, (json.dumps(row) + "\n" for row in self.rows))

    def add(self, figures: Mapping[str, Tensor], tokens: int) -> None:
        """Add the figures of a micro-batch, its share of the step's means, and its tokens."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._tokens += tokens

    def log_step(self, logs: Mapping[str, Any], step: int, total: int) -> dict[str, float]:
        """Append what the trainer logs at a step, with our figures, to metrics.jsonl; return both for other loggers."""
        import torch

        found = {k: float(v) for k, v in logs.items() if isinstance(v, int | float)}
        if "loss" in logs:
            seconds = max(time.monotonic() - self._began, 1e-9)
            found |= {name: float(value) for name, value in self._sums.items()}
            found |= {"tokens": self._tokens, "tokens_per_second": self._tokens / seconds}
            # the peak since the last step; without a GPU, the process's peak RAM so far
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            else:
                peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found["memory_gb"] = peak / 1e9
            self._sums, self._tokens, self._began = {}, 0, time.monotonic()
        if "loss" in logs or "eval_loss" in logs:
            row = {"phase": self.phase, "step": step} | {k: float(f"{v:.7g}") for k, v in found.items()}
            self.rows.append(row)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            for advice in diagnose(self.rows):
                if advice not in self.warnings:
                    self.warnings.append(advice)
                    self.progress(0, 0, warning=f"step {step}: {advice}")
            texts = [text.format(row[name]) for name, text in ON_THE_LINE.items() if name in row]
            self.progress(step, total, note=", ".join(texts).replace("%", " %"))
        return found

    @contextmanager
    def handle_interrupts(self) -> Iterator[None]:
        """The first Ctrl-C saves a checkpoint and stops; the second stops at once."""

        def interrupt(*_: object) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, before)
            text = "Ctrl-C: saving a checkpoint after this step; press it again to stop at once"
            self.progress(0, 0, warning=text)

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, none if it does not exist; skips invalid lines, such as a half-written one."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def diagnose(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with a training so far, with advice; `rows` are those of its metrics.jsonl, in order."""
    steps = [row for row in rows if "loss" in row]
    if not steps:
        return []
    found, last = [], steps[-1]
    if not all(math.isfinite(last.get(name, 0.0)) for name in ("loss", "grad_norm")):
        found.append(NOT_A_NUMBER)
    if steps[0]["step"] == 1 and abs(steps[0].get("dpo_loss", LN2) - LN2) > 0.02:
        found.append(OTHER_REFERENCE)
    if len(steps) <= PATIENCE:
        return found
    norms = [row["grad_norm"] for row in steps if "grad_norm" in row]
    if len(norms) > PATIENCE and norms[-1] > 10 * statistics.median(norms[:-1]) > 0:
        found.append(EXPLODING)
    recent = steps[-PATIENCE:]
    if "margin" in last:
        if all(abs(row["margin"]) < 1e-3 and abs(row["dpo_loss"] - LN2) < 1e-3 for row in recent):
            found.append(FLAT)
        if statistics.fmean(row["chosen_shift"] for row in recent) < -2.0:
            found.append(FALLING)
    return found
