"""The report of a stage, and the manifest that it leaves in done/<stage>.json."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel


class Output(BaseModel):
    """A file listed in a manifest; `rows` is None for a file without rows."""

    digest: str
    rows: int | None


class Manifest(BaseModel):
    """A finished stage: its report, its inputs and its outputs."""

    stage: str
    sclite: str
    versions: dict[str, str] = {}
    inputs: dict[str, Any]
    counts: dict[str, int]
    dropped: dict[str, int]
    seconds: float
    cost_usd: float | None
    figures: dict[str, Any]
    outputs: dict[str, Output] = {}


@dataclass
class Report:
    """The result of a stage: counts, drops by reason, seconds, cost (None: unknown); `figures` holds stage-specific values."""

    stage: str
    counts: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cost_usd: float | None = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: bool = False

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Report":
        """The report of a stage that was already done, from its manifest."""
        names = ("stage", "counts", "dropped", "seconds", "cost_usd", "figures")
        return cls(**{name: manifest[name] for name in names}, skipped=True)

    def warn(self, progress: Callable[..., None], text: str) -> None:
        self.figures.setdefault("warnings", []).append(text)
        progress(0, 0, warning=text)

    def as_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("counts", "dropped", "seconds", "cost_usd", "figures")}


@contextmanager
def timed(report: Report) -> Iterator[None]:
    """Add the duration of the block to the report."""
    began = time.monotonic()
    try:
        yield
    finally:
        report.seconds = round(report.seconds + time.monotonic() - began, 3)
