"""Result folders of an evaluation: one per dataset and limit in the run."""

import re
from collections.abc import Sequence
from typing import Any

from sclite.run import Run
from sclite.signature import digest

SUMMARY, REPORT = "summary.json", "report.html"


def result_folder(run: Run, dataset: str, names: Sequence[str], limit: int, default: int) -> str:
    """eval/<names>, -limit-<N> unless it is the `default`, and a hash if another `dataset` (path or Hub ID) has that name."""
    parts = [*filter(None, names), *([] if limit == default else [f"limit-{limit}"])]
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join(parts)).strip("-.")[:100] or "problems"
    existing = run.read_json(f"eval/{name}/{SUMMARY}", dict[str, Any])
    taken = existing is not None and existing.get("dataset") != dataset
    return f"eval/{name}-{digest(dataset)[:6]}" if taken else f"eval/{name}"


def summaries(run: Run, shape: Any = dict[str, Any]) -> list[Any]:
    """The summaries of all results of a run as `shape`, newest first."""
    paths = sorted(run.folder.glob(f"eval/*/{SUMMARY}"), key=lambda path: -path.stat().st_mtime_ns)
    found = (run.read_json(str(path.relative_to(run.folder)), shape) for path in paths)
    return [summary for summary in found if summary is not None]
