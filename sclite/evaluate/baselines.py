"""Baselines for self-correction: the base model with its own prompt, and a majority vote of the tuned student."""

from itertools import product
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.evaluate.answers import grade
from sclite.evaluate.evaluate import HeldOut
from sclite.evaluate.metrics import Outcome, compute_metrics
from sclite.grading.extract import answer_of
from sclite.grading.grader import Grader
from sclite.run import Run
from sclite.signature import digest
from sclite.student.base import Reply, Request, Student
from sclite.trace import parse


def measure_baseline(
    config: Config, run: Run, name: str, student: Student, held_out: HeldOut, identity: str, grader: Grader
) -> dict[str, dict[str, Any]]:
    """{label: figures} of the baseline of one student; `identity` is the digest of its GGUF.

    The base model answers greedily, without a system prompt. A tuned student answers `eval.votes` times at the
    temperature of the attempts, and the most common answer counts, in a tie the earliest one. The figures are those of
    `compute_metrics` without a review: acc_t1 with its interval, and tokens per problem (of all samples). They and the
    outcomes are stored in the results folder, and reused if nothing has changed.
    """
    if name == "base":
        votes, prompt, temperature, top_p = 1, "baseline_solve", 0.0, 1.0
        label, file = "base, own prompt", f"{held_out.folder}/base-own-prompt"
    else:
        votes, prompt = config.eval.votes, "student_solve"
        temperature, top_p = config.attempts.temperature, config.attempts.top_p
        label, file = f"{name}, majority of {votes}", f"{held_out.folder}/{name}-majority"
    requests = []
    for problem, sample in product(held_out.problems, range(votes)):
        messages = prompts.solve_messages(problem.question, config.prompts.folder, prompt)
        seed = int(digest([config.seed, "vote", problem.id, sample]), 16) % 2**31
        sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
        requests.append(Request(messages, max_tokens=config.eval.max_tokens, seed=seed, **sampling))
    problem_rows = [p.model_dump() for p in held_out.problems]
    signature = digest([identity, config.seed, config.eval.context, requests, problem_rows])
    stored = run.read_json(f"{file}.json", dict[str, Any])
    if stored and stored.get("signature") == signature:
        return {label: stored}
    replies = sorted(student.generate(requests), key=lambda reply: reply.index)
    ballots = [replies[start : start + votes] for start in range(0, len(replies), votes)]
    elected: list[tuple[Reply, str | None]] = []  # the most common answer, and the first reply that gives it
    for ballot in ballots:
        groups: dict[str, list[Reply]] = {}  # replies without an answer do not vote
        for reply in ballot:
            if (answer := answer_of(parse(reply.text))) is not None:
                equal = grader.equal_many((answer, other) for other in groups)
                known = (other for other, same in zip(groups, equal, strict=True) if same)
                groups.setdefault(next(known, answer), []).append(reply)
        winner, voters = max(groups.items(), key=lambda group: len(group[1]), default=(None, ballot))
        elected.append((voters[0], winner))
    verdicts = grade(grader, [answer for _, answer in elected], held_out.problems)
    rows = []
    judged = zip(held_out.problems, elected, ballots, verdicts, strict=True)
    for problem, (reply, _), ballot, verdict in judged:
        correct = None if any(each.finish == "error" for each in ballot) else verdict
        outcome = Outcome(
            id=problem.id,
            question=problem.question,
            gold=problem.answer,
            first=reply.text,
            second=None,
            correct1=correct,
            correct2=correct,
            format_ok=True,
            cut=reply.finish == "length",
            tokens1=sum(each.tokens for each in ballot),
        )
        rows.append(outcome)
    figures = compute_metrics(rows, seed=config.seed) | {"signature": signature}
    run.replace(f"{file}.jsonl", rows)
    run.write_json(f"{file}.json", figures)
    return {label: figures}
