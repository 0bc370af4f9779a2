"""How well step scores tell wrong steps from right ones: in each quantization, and with less of the work in the prompt.

    python tests/benchmarks/bench_step_auc.py EVALUATED.jsonl GGUF [GGUF ..]
    python tests/benchmarks/bench_step_auc.py EVALUATED.jsonl GGUF --prompts

EVALUATED.jsonl is a file of `sclite eval` whose first wrong steps are known (RUN/eval/quickstart/dpo.jsonl), the GGUFs are files
of the same student. The same steps are scored by every file, or with `--prompts` by one file whose review prompt repeats the
whole work, only its steps, only its answer, or nothing. Prints each AUC with a 95 % bootstrap interval over problems, the
interval of its difference to the first one, on the same resamples, and the prompt tokens of a problem.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sclite import prompts
from sclite.evaluate.metrics import Outcome, auc
from sclite.student.base import ScoreRequest
from sclite.student.llama_cpp.engine import Engine
from sclite.student.self_correction import review_odds
from sclite.trace import Trace, render

RESAMPLES = 1000
SHOWN = {
    "whole work": lambda work: work,
    "its steps": lambda work: replace(work, generalized=None, answer=None),
    "its answer": lambda work: replace(work, steps=(), generalized=None),
    "nothing": lambda work: Trace(),
}


def request_of(outcome: Outcome, shown: str) -> ScoreRequest:
    """What a review asks for the scores of an answer, with a part of the work in its prompt."""
    request = next(review_odds(outcome.question, outcome.work))
    assert isinstance(request, ScoreRequest)
    messages = prompts.review_messages(outcome.question, render(SHOWN[shown](outcome.work)))
    return replace(request, messages=messages)


def measure(outcomes: Sequence[Outcome], sides: Sequence[tuple[str, str, str]]) -> None:
    """Print a line for each side: (name, GGUF, what its review prompt shows)."""
    labels = [outcome.step_labels for outcome in outcomes]
    draws = np.random.default_rng(0).integers(len(outcomes), size=(RESAMPLES, len(outcomes)))
    first: np.ndarray | None = None
    print(f"{len(outcomes)} problems, {sum(map(len, labels))} steps, {sum(map(sum, labels))} of them wrong")
    for name, file, shown in sides:
        with Engine(file, context=2048) as engine:
            found = engine.score([request_of(outcome, shown) for outcome in outcomes])
            scores = sorted(found, key=lambda each: each.index)
        pairs = [list(zip(s.log_odds, wrong, strict=False)) for s, wrong in zip(scores, labels, strict=True)]
        value, *resampled = (
            auc(*zip(*(pair for i in draw for pair in pairs[i]), strict=True))
            for draw in (range(len(pairs)), *draws)
        )
        values = np.array(resampled)
        first = values if first is None else first
        low, high = np.quantile(values, (0.025, 0.975))
        below, above = np.quantile(values - first, (0.025, 0.975))
        tokens = np.mean([each.prompt_tokens for each in scores])
        print(
            f"{name}: AUC {value:.3f} [{low:.3f}, {high:.3f}], to the first [{below:+.3f}, {above:+.3f}], {tokens:.0f} tokens"
        )


def main(evaluated: str, *files: str) -> None:
    """Compare files, or with `--prompts` the prompts of one file."""
    lines = Path(evaluated).read_text(encoding="utf-8").splitlines()
    outcomes = [outcome for outcome in map(Outcome.model_validate_json, lines) if outcome.step_labels]
    if "--prompts" in files:
        sides = [(shown, files[0], shown) for shown in SHOWN]
    else:
        sides = [(Path(file).name, file, "whole work") for file in files]
    measure(outcomes, sides)


if __name__ == "__main__":
    main(*sys.argv[1:])
