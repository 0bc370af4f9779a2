"""Where the results of an evaluation go: each dataset and each limit has a folder of its own in the run."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sclite.run import Run
from sclite.signature import digest

SUMMARY, REPORT = "summary.json", "report.html"


def result_folder(run: Run, dataset: str, names: Sequence[str], limit: int | None, usual: int | None) -> str:
    """eval/<names>, with -limit-<N> where the limit is not the `usual` one.

    A `dataset` (its path or Hub ID) whose name another has taken gets a hash behind its own.
    """
    parts = [*filter(None, names), *([] if limit == usual else [f"limit-{limit or 'none'}"])]
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", "-".join(parts)).strip("-.")[:100] or "problems"
    before = run.read_json(f"eval/{name}/{SUMMARY}", dict[str, Any])
    taken = before is not None and before.get("dataset") != dataset
    return f"eval/{name}-{digest(dataset)[:6]}" if taken else f"eval/{name}"


def summaries(run: Run, shape: Any = dict[str, Any]) -> list[Any]:
    """The summaries of all results of a run as `shape`, the newest first."""
    paths = sorted(run.folder.glob(f"eval/*/{SUMMARY}"), key=lambda path: -path.stat().st_mtime_ns)
    found = (run.read_json(str(path.relative_to(run.folder)), shape) for path in paths)
    return [summary for summary in found if summary is not None]


def dataset_of(source: str, local: bool) -> tuple[str, str]:
    """(path or Hub ID, its short name) of a source of problems."""
    name = source.rstrip("/").rpartition("/")[2]
    return (str(Path(source).expanduser().resolve()), name.partition(".")[0]) if local else (source, name)
