"""How long a training will be: rows, tokens, steps and hours of a stage, from the run's own rows and timed steps."""

import statistics
from collections.abc import Callable, Iterator
from math import ceil
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.records import Attempt, Pair, Problem, Review, Template
from sclite.run import Run
from sclite.teacher.forecast import CHARACTERS_PER_TOKEN
from sclite.trace import corrected, parse, render, step_pieces, work_of
from sclite.train.mixture import mix
from sclite.train.order import training_order
from sclite.train.trainer import held_out_rows
from sclite.train.watch import read_metrics

Length = tuple[int, int]
"""(tokens, tokens that carry loss) of one sequence."""
Measure = Callable[[str], int]


def measure_of(tokenizer: Any) -> Measure:
    """Tokens of a text; the few that a chat template adds are not counted."""
    if tokenizer is None:
        return lambda text: ceil(len(text) / CHARACTERS_PER_TOKEN)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def lengths(
    config: Config, run: Run, stage: str, measure: Measure, unseen: frozenset[str]
) -> list[list[Length]] | None:
    """The sequences of every row of a stage, in DPO three or one to a row; None where its files are not there yet."""
    found = {"sft": _sft_rows, "warm": _warm_rows, "dpo": _dpo_rows}[stage](config, run, measure, unseen)
    return list(found) or None


def _chat(messages: Any) -> str:
    return "\n".join(message["content"] for message in messages)


def _sft_rows(config: Config, run: Run, measure: Measure, unseen: frozenset[str]) -> Iterator[list[Length]]:
    for row in run.rows("templates.jsonl", Template):
        if row.id not in unseen:
            yield [_solved(row, config, measure)]


def _solved(row: Template, config: Config, measure: Measure) -> Length:
    prompt = measure(_chat(prompts.solve_messages(row.question, config.prompts.folder)))
    answer = measure(row.trace) + 1  # the end of turn
    return prompt + answer, answer


def _replayed(config: Config, run: Run, measure: Measure, unseen: frozenset[str]) -> list[Length]:
    """The solved rows that stage 2 draws from: those that SFT has not seen, where there are any."""
    templates = run.read("templates.jsonl", Template)
    chosen = [row for row in templates if row.id in unseen] or templates
    return [_solved(row, config, measure) for row in chosen]


def _warm_rows(config: Config, run: Run, measure: Measure, unseen: frozenset[str]) -> Iterator[list[Length]]:
    works = {(row.id, row.sample): row.trace for row in run.rows("attempts.jsonl", Attempt)}
    questions = {row.id: row.question for row in run.rows("problems.jsonl", Problem)}
    reviewed, continued, closed = [], [], []
    for row in run.rows("reviews.jsonl", Review):
        if row.id in questions and (row.id, row.sample) in works:
            work = work_of(works[row.id, row.sample])
            messages = prompts.review_messages(questions[row.id], render(work), config.prompts.folder)
            answer = measure(row.trace) + 1
            reviewed.append((measure(_chat(messages)) + answer, answer))
            if row.step is not None:
                prompt = measure(_chat(prompts.solve_messages(questions[row.id], config.prompts.folder)))
                solved = corrected(parse(row.trace).trace)
                given = prompt + measure("".join(step_pieces(solved.steps[: row.step])))
                whole = prompt + measure(render(solved)) + 1
                continued.append((whole, whole - given))
                if work.answer is not None and reviewed[-1][0] <= config.dpo.max_length:
                    closed.append((prompt + measure(render(work)) + 1, len(work.steps) + 1))
    solved = _replayed(config, run, measure, unseen) if reviewed else []
    share, seed = config.dpo.replay_share, config.seed
    for row in mix(reviewed, closed, solved=solved, continued=continued, share=share, seed=seed):
        yield [row]


def _dpo_rows(config: Config, run: Run, measure: Measure, unseen: frozenset[str]) -> Iterator[list[Length]]:
    questions = {row.id: row.question for row in run.rows("problems.jsonl", Problem)}
    bundles: dict[tuple[str, int], list[Pair]] = {}
    for pair in run.rows("pairs.jsonl", Pair):
        if pair.id in questions:
            bundles.setdefault((pair.id, pair.sample), []).append(pair)
    solved = _replayed(config, run, measure, unseen) if bundles else []
    due = 0.0
    for number, pairs in enumerate(bundles.values()):
        row = _bundle(pairs, questions[pairs[0].id], config, measure)
        due += min(1.0, config.dpo.replay_share)
        if solved and due >= 1:
            due -= 1
            row.append(solved[number % len(solved)])
        yield row


def _bundle(pairs: list[Pair], question: str, config: Config, measure: Measure) -> list[Length]:
    """The chosen and the rejected sequence of an attempt's pairs; the chosen alone where there is no content."""
    content = next((pair for pair in pairs if pair.kind == "content"), None)
    longest = content or max(pairs, key=lambda pair: pair.step)
    work = render(parse(pairs[0].attempt).trace)
    context = measure(_chat(prompts.review_messages(question, work, config.prompts.folder)))
    context += measure("".join(longest.prefix))
    if content is None:
        return [(context, 0)]
    sides = [measure(content.chosen), measure(content.rejected)]
    return [(context + side, side) for side in sides]


def forecast(config: Config, run: Run, stage: str, rows: list[list[Length]] | None) -> dict[str, Any]:
    """Rows, tokens over all epochs, optimizer steps and hours; None where they are unknown.

    Rows longer than max_length are left out and some are kept for the evaluation, as in training; steps and tokens are
    those of the order that it trains in. Hours come from the tokens per second that this run's own metrics.jsonl holds.
    """
    settings = config.sft if stage == "sft" else config.dpo
    epochs = config.dpo.warmup_epochs if stage == "warm" else settings.epochs
    speed = tokens_per_second(run, stage)
    unknown = dict.fromkeys(("rows", "too_long", "tokens", "loss_share", "steps", "hours"))
    if rows is None:
        return {**unknown, "epochs": epochs, "tokens_per_second": speed}
    fit = [row for row in rows if max(tokens for tokens, _ in row) <= settings.max_length]
    once = sum(tokens for row in fit for tokens, _ in row)
    kept = set(held_out_rows(len(fit), settings.eval_share, config.seed))
    trained = [sum(tokens for tokens, _ in row) for i, row in enumerate(fit) if i not in kept]
    order = training_order(trained, settings.batch, epochs, config.seed)
    tokens = sum(trained[i] for i in order)
    return {
        "rows": len(fit),
        "too_long": len(rows) - len(fit),
        "tokens": tokens,
        "loss_share": round(sum(part[1] for row in fit for part in row) / once, 4) if once else None,
        "steps": ceil(len(order) / settings.batch),
        "hours": None if speed is None else round(tokens / speed / 3600, 3),
        "epochs": epochs,
        "tokens_per_second": speed,
    }


def tokens_per_second(run: Run, stage: str) -> float | None:
    """The median over the steps of this stage that the run has timed; the warm-up, being the same work, may take SFT's."""
    found: dict[str, list[float]] = {}
    for name in ("sft/metrics.jsonl", "dpo/metrics.jsonl"):
        for row in read_metrics(run.path(name)):
            if row.get("tokens_per_second"):
                found.setdefault(row["phase"], []).append(row["tokens_per_second"])
    same = found.get(stage) or (found.get("sft") if stage == "warm" else None)
    return round(statistics.median(same), 1) if same else None
