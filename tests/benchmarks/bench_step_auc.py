"""How well step scores tell wrong steps from right ones: in each quantization, with less of the work in the prompt, and with
each weight of the confidence.

    python tests/benchmarks/bench_step_auc.py EVALUATED.jsonl GGUF [GGUF ..]
    python tests/benchmarks/bench_step_auc.py EVALUATED.jsonl GGUF --prompts
    python tests/benchmarks/bench_step_auc.py EVALUATED.jsonl GGUF --weights

EVALUATED.jsonl is a file of `sclite eval` whose first wrong steps are known (RUN/eval/quickstart/dpo.jsonl), the GGUFs are files
of the same student. The same steps are scored by the review of every file; with `--prompts` by one file whose review prompt
repeats the whole work, only its steps, only its answer, or nothing; with `--weights` by its review and its confidence. Prints
each AUC with a 95 % bootstrap interval over problems, and the interval of its difference to the first one, on the same resamples.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sclite import prompts
from sclite.evaluate.metrics import Outcome, auc
from sclite.student.base import ScoreRequest
from sclite.student.llama_cpp.engine import Engine
from sclite.student.self_correction import run_together
from sclite.student.step_scores import Odds, pool, read_odds
from sclite.trace import Trace, render

RESAMPLES = 1000
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN = {
    "whole work": lambda work: work,
    "its steps": lambda work: replace(work, generalized=None, answer=None),
    "its answer": lambda work: replace(work, steps=(), generalized=None),
    "nothing": lambda work: Trace(),
}


def request_of(outcome: Outcome, shown: str) -> ScoreRequest:
    """The review's score request for an answer, with part of the work in its prompt."""
    request = next(read_odds(outcome.question, outcome.work))
    assert isinstance(request, ScoreRequest)
    messages = prompts.review_messages(outcome.question, render(SHOWN[shown](outcome.work)))
    return replace(request, messages=messages)


def score(engine: Engine, outcomes: Sequence[Outcome], shown: str) -> tuple[list[Odds], float]:
    """The review's log-odds of the steps of each answer, and the mean tokens of a prompt."""
    requests = [request_of(outcome, shown) for outcome in outcomes]
    lengths = [len(engine.chat_ids(request.messages)) for request in requests]
    found = engine.score(requests)
    scores = sorted(found, key=lambda each: each.index)
    return [each.log_odds for each in scores], float(np.mean(lengths))


def measure(outcomes: Sequence[Outcome], sides: Iterable[tuple[str, Sequence[Odds]]]) -> None:
    """Print a line for each side: (name, the log-odds of the steps of each answer)."""
    labels = [outcome.step_labels for outcome in outcomes]
    draws = np.random.default_rng(0).integers(len(outcomes), size=(RESAMPLES, len(outcomes)))
    first: np.ndarray | None = None
    print(f"{len(outcomes)} problems, {sum(map(len, labels))} steps, {sum(map(sum, labels))} of them wrong")
    for name, scores in sides:
        pairs = [list(zip(odds, wrong, strict=False)) for odds, wrong in zip(scores, labels, strict=True)]
        drawn = [[pair for i in draw for pair in pairs[i]] for draw in (range(len(pairs)), *draws)]
        value, *resampled = (auc(*zip(*each, strict=True)) for each in drawn)
        values = np.array(resampled)
        first = values if first is None else first
        low, high = np.quantile(values, (0.025, 0.975))
        below, above = np.quantile(values - first, (0.025, 0.975))
        shown = f"AUC {value:.3f} [{low:.3f}, {high:.3f}], to the first [{below:+.3f}, {above:+.3f}]"
        print(f"{name}: {shown}", flush=True)


def main(evaluated: str, *files: str) -> None:
    """Compare files, or with `--prompts` or `--weights` the ways to score with one file."""
    lines = Path(evaluated).read_text(encoding="utf-8").splitlines()
    outcomes = [outcome for outcome in map(Outcome.model_validate_json, lines) if outcome.step_labels]
    sides = []
    for file in files:
        if file.startswith("--"):
            continue
        with Engine(file, context=2048) as engine:
            if "--weights" in files:
                odds = run_together(engine, [read_odds(each.question, each.work) for each in outcomes])
                sides += [(f"confidence weight {w:g}", [pool(*each, w) for each in odds]) for w in WEIGHTS]
                continue
            for shown in SHOWN if "--prompts" in files else ["whole work"]:
                scores, tokens = score(engine, outcomes, shown)
                sides.append((f"{Path(file).name}, {shown} ({tokens:.0f} tokens)", scores))
    measure(outcomes, sides)


if __name__ == "__main__":
    main(*sys.argv[1:])
