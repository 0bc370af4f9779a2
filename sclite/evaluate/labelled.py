"""What review finds in work whose first wrong step people have labelled (ProcessBench, arXiv 2412.06559)."""

from collections.abc import Sequence
from typing import Any

from sclite.config import Config
from sclite.evaluate.metrics import Outcome, compute_metrics
from sclite.student.base import Student
from sclite.student.self_correction import NEVER, run_together
from sclite.student.step_scores import Cutoff, pool, read_odds
from sclite.trace import Trace, render

SHARES = ("location", "acceptance", "location_f1", "auc")


def measure_labelled(
    config: Config, student: Student, works: Sequence[tuple[str, Trace, int]], cutoff: Cutoff
) -> dict[str, Any]:
    """The `compute_metrics` figures SHARES, with intervals, of a guided review of (question, work, first wrong step or 0).

    `unknown` counts works that are too long to review, `n` the others. Without a threshold, all but the AUC is None.
    """
    weight = cutoff.confidence_weight
    scripts = [read_odds(question, work, config.prompts.folder, (weight,)) for question, work, _ in works]
    rows: list[Outcome] = []
    for (question, work, step), odds in zip(works, run_together(student, scripts), strict=True):
        scores = pool(*odds, weight)
        right = step == 0 if scores else None
        row = Outcome(
            id=str(len(rows)),
            question=question,
            gold="",
            first=render(work),
            second=None,
            correct1=right,
            correct2=right,
            accused=next((n for n, score in enumerate(scores, 1) if score > cutoff.threshold), None),
            true_step=step or None,
            true_known=True,
            step_scores=scores,
            step_labels=tuple(n == step for n in range(1, (step or len(work.steps)) + 1)),
            format_ok=True,
        )
        rows.append(row)
    figures = compute_metrics(rows, seed=config.seed)
    names = ["n", "unknown", *SHARES, *(f"{name}_interval" for name in SHARES)]
    known = ("n", "unknown", "auc", "auc_interval") if cutoff.threshold == NEVER else names
    return {name: figures[name] if name in known else None for name in names}
