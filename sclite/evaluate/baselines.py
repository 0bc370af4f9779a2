"""What self-correction is compared with: a student's native prompt, and other uses of a few samples (METHOD, section 6)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.evaluate.answers import solve_problems
from sclite.evaluate.evaluate import HeldOut, cutoff_of
from sclite.evaluate.metrics import Outcome, compute_metrics
from sclite.grading.extract import answer_of
from sclite.grading.grader import Grader
from sclite.records import Problem
from sclite.run import Run
from sclite.signature import digest
from sclite.student.base import Request, Student
from sclite.student.self_correction import NO_REPLY, run_together
from sclite.student.step_scores import Odds, pool, read_odds
from sclite.trace import Trace, parse

SHOWN = ("acc_t1", "acc_t1_interval", "tokens", "n", "unknown")
"""The figures of a baseline, as in `compute_metrics`; tokens are those of all answers that it needs."""


def measure_baselines(
    config: Config,
    run: Run,
    name: str,
    student: Student,
    held_out: HeldOut,
    figures: Mapping[str, Any],
    grader: Grader,
) -> dict[str, dict[str, Any]]:
    """{label: figures} of the baselines of a student that was evaluated with these `figures`; outcomes are kept.

    The native prompt has no system prompt and no form of the steps ("put the answer in \\boxed{}"). Of a tuned student
    also what else `eval.votes` samples per problem could do, drawn at the temperature of the attempts: the majority vote
    takes the most frequent answer; the weighted vote weighs each sample by the probability that its worst step is right,
    scored as in the review; the best sample has the highest one. Ties go to the earliest. A second attempt replaces the
    first answer by a sample: everywhere, or where the review flagged a step.
    """
    problems, votes, sampling = held_out.problems, config.eval.votes, config.attempts
    file, identity, limit = f"{held_out.folder}/{name}", figures["gguf"], config.eval.max_tokens
    folder = config.prompts.folder
    requests = [
        Request(prompts.solve_messages(problem.question, folder, "baseline_solve"), max_tokens=limit)
        for problem in problems
    ]
    native = _answer(config, run, f"{file}-native", student, problems, requests, identity, grader)
    used = {"native prompt": [(row, [row]) for row in native]}  # (answer, all that it needs) per problem
    if name != "base":
        drawn = [problem for problem in problems for _ in range(votes)]
        requests = [
            Request(
                prompts.solve_messages(problem.question, folder),
                max_tokens=limit,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=int(digest([config.seed, "vote", problem.id, number % votes]), 16) % 2**31,
            )
            for number, problem in enumerate(drawn)
        ]
        weight = cutoff_of(config, figures).confidence_weight
        rows = _answer(config, run, f"{file}-samples", student, drawn, requests, identity, grader, weight)
        ballots = [rows[start : start + votes] for start in range(0, len(rows), votes)]
        groups = [_equal_answers(ballot, grader) for ballot in ballots]
        chosen = {
            f"majority of {votes}": [max(each, key=len)[0] for each in groups],
            f"weighted vote of {votes}": [max(each, key=lambda g: sum(map(_trust, g)))[0] for each in groups],
            f"best of {votes}": [max(ballot, key=_trust) for ballot in ballots],
        }
        used |= {label: list(zip(samples, ballots, strict=True)) for label, samples in chosen.items()}
        outcomes = run.read(figures["rows"], Outcome)
        used["second attempt"] = [(b[0], [o, b[0]]) for o, b in zip(outcomes, ballots, strict=True)]
        if config.review.mode == "free":  # a flag is written
            outcomes = [o.model_copy(update={"tokens1": o.tokens1 + o.tokens2}) for o in outcomes]
        used["flagged resampled"] = [
            (b[0], [o, b[0]]) if o.accused else (o, [o]) for o, b in zip(outcomes, ballots, strict=True)
        ]
    return {f"{name}, {label}": _figures(config, pairs) for label, pairs in used.items()}


def _answer(
    config: Config,
    run: Run,
    file: str,
    student: Student,
    problems: Sequence[Problem],
    requests: Sequence[Request],
    identity: str,
    grader: Grader,
    weight: float | None = None,
) -> list[Outcome]:
    """The graded replies to the requests, with step scores if there is a weight; stored ones if nothing has changed."""
    asked = [problem.model_dump() for problem in problems]
    signature = digest([identity, config.eval.context, requests, asked, weight])
    if (run.read_json(f"{file}.json", dict[str, Any]) or {}).get("signature") == signature:
        return run.read(f"{file}.jsonl", Outcome)
    answers = solve_problems(student, problems, config, grader, requests)
    scores: list[Odds] = [()] * len(answers)
    if weight is not None:
        traces = [each.parsed.trace if answer_of(each.parsed) is not None else Trace() for each in answers]
        scripts = [
            read_odds(problem.question, trace, config.prompts.folder, (weight,))
            for problem, trace in zip(problems, traces, strict=True)
        ]
        scores = [pool(*odds, weight) for odds in run_together(student, scripts)]
    rows = [
        answer.outcome(
            step_scores=tuple(round(value, 4) for value in odds),
            note=NO_REPLY if answer.reply.finish == "error" else "",
        )
        for answer, odds in zip(answers, scores, strict=True)
    ]
    run.replace(f"{file}.jsonl", rows)
    run.write_json(f"{file}.json", {"signature": signature})
    return rows


def _equal_answers(ballot: Sequence[Outcome], grader: Grader) -> list[list[Outcome]]:
    """The samples in groups of equal answers; one without an answer does not vote, unless all are."""
    groups: dict[str, list[Outcome]] = {}
    for sample in ballot:
        if (answer := answer_of(parse(sample.first))) is not None:
            equal = grader.equal_many((answer, other) for other in groups)
            same = (other for other, verdict in zip(groups, equal, strict=True) if verdict)
            groups.setdefault(next(same, answer), []).append(sample)
    return list(groups.values()) or [list(ballot)]


def _trust(sample: Outcome) -> float:
    """The probability that the worst step is right; 0 without scores."""
    return (1 - math.tanh(max(sample.step_scores) / 2)) / 2 if sample.step_scores else 0.0


def _figures(config: Config, pairs: Sequence[tuple[Outcome, Sequence[Outcome]]]) -> dict[str, Any]:
    """The figures of (answer, all answers needed for it), one per problem; unknown if one of them failed."""
    rows = []
    for answer, needed in pairs:
        correct = None if any(each.note == NO_REPLY for each in needed) else answer.correct1
        spent = sum(each.tokens1 for each in needed)
        given = {"correct1": correct, "correct2": correct, "tokens1": spent, "tokens2": 0}
        rows.append(answer.model_copy(update=given))
    figures = compute_metrics(rows, seed=config.seed)
    return {key: figures[key] for key in SHOWN}
