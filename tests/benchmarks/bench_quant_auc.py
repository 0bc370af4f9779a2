"""How well the step scores of each quantization tell wrong steps from right ones.

    python tests/benchmarks/bench_quant_auc.py EVALUATED.jsonl GGUF [GGUF ..]

EVALUATED.jsonl is a file of `sclite eval` whose first wrong steps are known (RUN/eval/quickstart/dpo.jsonl), the GGUFs are files
of the same student. Every file scores the same steps. Prints each file's AUC with a 95 % bootstrap interval over problems,
and the interval of its difference to the first file, on the same resamples.
"""

import sys
from pathlib import Path

import numpy as np

from sclite.evaluate.metrics import Outcome, auc
from sclite.student.llama_cpp.engine import Engine
from sclite.student.self_correction import run_together, score_steps

RESAMPLES = 1000


def main(evaluated: str, *files: str) -> None:
    lines = Path(evaluated).read_text(encoding="utf-8").splitlines()
    outcomes = [outcome for outcome in map(Outcome.model_validate_json, lines) if outcome.step_labels]
    labels = [outcome.step_labels for outcome in outcomes]
    draws = np.random.default_rng(0).integers(len(outcomes), size=(RESAMPLES, len(outcomes)))
    first: np.ndarray | None = None
    print(f"{len(outcomes)} problems, {sum(map(len, labels))} steps, {sum(map(sum, labels))} of them wrong")
    for file in files:
        with Engine(file, context=2048) as engine:
            scores = run_together(engine, [score_steps(one.question, one.work) for one in outcomes])
        pairs = [list(zip(s, wrong, strict=False)) for s, wrong in zip(scores, labels, strict=True)]
        value, *resampled = (
            auc(*zip(*(pair for i in draw for pair in pairs[i]), strict=True))
            for draw in (range(len(pairs)), *draws)
        )
        values = np.array(resampled)
        first = values if first is None else first
        low, high = np.quantile(values, (0.025, 0.975))
        below, above = np.quantile(values - first, (0.025, 0.975))
        print(
            f"{Path(file).name}: AUC {value:.3f} [{low:.3f}, {high:.3f}], to the first [{below:+.3f}, {above:+.3f}]"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
