"""The rows of a run in the formats of other trainers: chat messages, preference pairs, Step-DPO fields, and a dataset card.

TRL, Axolotl and LLaMA-Factory all read the same folder. Each row of templates.jsonl, reviews.jsonl and pairs.jsonl becomes
exactly one row here, in the same order, and the same run gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sclite import prompts
from sclite.config import Config
from sclite.errors import DataError
from sclite.export.cards import build_dataset_card, source_name
from sclite.records import Attempt, Pair, Problem, Review, Template
from sclite.run import Report, Run, timed, write_text
from sclite.student.loader import load_tokenizer, model_name
from sclite.student.tokenization import prompt_text
from sclite.trace import parse, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, Any]]
FOLDER = "export/data"
TEMPLATES, REVIEWS, PAIRS, STEP_DPO = "templates.jsonl", "reviews.jsonl", "pairs.jsonl", "step_dpo.jsonl"


def export_data(config: Config, run: Run) -> Report:
    """Write export/data: one JSONL file per kind of row, dataset_info.json and the dataset card README.md.

    Pairs need the student's tokenizer, whose chat template renders their prompts. Raises DataError when the run has neither
    templates nor pairs, or when the problem of a row is missing.
    """
    report = Report("export-data")
    with timed(report):
        templates, reviews = run.read(TEMPLATES, Template), run.read(REVIEWS, Review)
        pairs = run.read(PAIRS, Pair)
        if not templates and not pairs:
            raise DataError(
                f"{run.folder} has no templates or pairs to export", "run `sclite build-data` first"
            )
        problems = {problem.id: problem for problem in run.read("problems.jsonl", Problem)}
        attempts = {(a.id, a.sample): a for a in run.read("attempts.jsonl", Attempt)}
        folder = config.prompts.folder
        tokenizer = load_tokenizer(model_name(config.student)) if pairs else None
        files = {
            TEMPLATES: template_rows(templates, folder),
            REVIEWS: review_rows(reviews, attempts, problems, folder),
            PAIRS: preference_rows(tokenizer, pairs, problems, folder),
            STEP_DPO: step_dpo_rows(pairs, reviews, problems, source_name(config), folder),
        }
        for name, rows in files.items():
            path = run.path(f"{FOLDER}/{name}")
            if rows:
                write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            else:
                path.unlink(missing_ok=True)  # written by an earlier export
        report.counts = {name.removesuffix(".jsonl"): len(rows) for name, rows in files.items()}
        info = json.dumps(dataset_info(report.counts), ensure_ascii=False, indent=2)
        write_text(run.path(f"{FOLDER}/dataset_info.json"), info + "\n")
        write_text(run.path(f"{FOLDER}/README.md"), build_dataset_card(config, run, report.counts))
    report.figures = {"folder": str(run.path(FOLDER))}
    return report


# -- chats ---------------------------------------------------------------------------------------------------------


def template_rows(templates: Iterable[Template], folder: str = "") -> Rows:
    """Each template as {"id", "messages"}: the solving prompt, and the trace as the assistant's turn."""
    return [
        {"id": row.id, "messages": _chat(prompts.solve_messages(row.question, folder), row.trace)}
        for row in templates
    ]


def review_rows(
    reviews: Iterable[Review],
    attempts: dict[tuple[str, int], Attempt],
    problems: dict[str, Problem],
    folder: str = "",
) -> Rows:
    """Each review as {"id", "sample", "step", "messages"}, as in the warm-up before DPO (METHOD section 4.5)."""
    rows = []
    for row in reviews:
        attempt = attempts.get((row.id, row.sample))
        if attempt is None:
            raise DataError(
                f"reviews.jsonl, {row.id}/{row.sample}: no such row in attempts.jsonl",
                "restore the attempt, or remove the review",
            )
        prompt = prompts.review_messages(_problem(row, problems).question, _normalize(attempt.trace), folder)
        messages = _chat(prompt, row.trace)
        rows.append({"id": row.id, "sample": row.sample, "step": row.step, "messages": messages})
    return rows


def _chat(prompt: Iterable[dict[str, str]], trace: str) -> list[dict[str, str]]:
    return [*prompt, {"role": "assistant", "content": _normalize(trace)}]


def _normalize(trace: str) -> str:
    return render(parse(trace).trace)


def _problem(row: Pair | Review, problems: dict[str, Problem]) -> Problem:
    if row.id not in problems:
        kind = type(row).__name__.lower()
        raise DataError(
            f"problems.jsonl has no problem {row.id}, required by {kind} {row.id}/{row.sample}",
            f"restore the problem, or remove the {kind}",
        )
    return problems[row.id]


# -- pairs ---------------------------------------------------------------------------------------------------------


def preference_rows(
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: Iterable[Pair],
    problems: dict[str, Problem],
    folder: str = "",
) -> Rows:
    """Each pair in TRL's standard format: prompt, chosen and rejected as text, with `prefix` and the keys of the pair.

    `prompt` is the review chat rendered with the chat template, followed by the assistant's pieces in `prefix`. It cannot be
    conversational: trainers would open a second assistant turn after the prefix.
    """
    return [
        _keys(pair)
        | {
            "origin": pair.origin,
            "prompt": prompt_text(tokenizer, _review_prompt(pair, problems, folder)) + "".join(pair.prefix),
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "prefix": list(pair.prefix),
        }
        for pair in pairs
    ]


def step_dpo_rows(
    pairs: Iterable[Pair],
    reviews: Iterable[Review],
    problems: dict[str, Problem],
    source: str,
    folder: str = "",
) -> Rows:
    """Each pair with the fields of Math-Step-DPO-10K: `initial_reason_steps` is the assistant's prefix.

    `prompt` is the user turn and `system` the system prompt, both without a chat template. `full_chosen` and `full_rejected`
    continue to the end of the teacher's review and of the original attempt if these begin with the pair; otherwise they
    equal `chosen` and `rejected`.
    """
    traces = {(row.id, row.sample): _normalize(row.trace) for row in reviews}
    rows = []
    for pair in pairs:
        system, user = _review_prompt(pair, problems, folder)
        prefix = "".join(pair.prefix)
        review, attempt = traces.get((pair.id, pair.sample), ""), _normalize(pair.attempt)
        rows.append(
            _keys(pair)
            | {
                "dataset": source,
                "system": system["content"],
                "prompt": user["content"],
                "initial_reason_steps": prefix,
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "full_chosen": _continue(prefix, pair.chosen, review),
                "full_rejected": _continue(prefix, pair.rejected, attempt),
                "answer": _problem(pair, problems).answer,
            }
        )
    return rows


def _keys(pair: Pair) -> dict[str, Any]:
    return {"id": pair.id, "sample": pair.sample, "step": pair.step, "kind": pair.kind}


def _review_prompt(pair: Pair, problems: dict[str, Problem], folder: str) -> tuple[dict[str, str], ...]:
    return prompts.review_messages(_problem(pair, problems).question, _normalize(pair.attempt), folder)


def _continue(prefix: str, completion: str, trace: str) -> str:
    """The completion, continued to the end of `trace` if that begins with prefix and completion."""
    return trace[len(prefix) :] if trace.startswith(prefix + completion) else completion


# -- LLaMA-Factory -------------------------------------------------------------------------------------------------


def dataset_info(counts: dict[str, int]) -> dict[str, Any]:
    """LLaMA-Factory's description of the written files, by dataset name."""
    roles = {f"{role}_tag": role for role in ("role", "content", "user", "assistant", "system")}
    chat = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": roles}
    columns = {name: name for name in ("prompt", "chosen", "rejected")}
    datasets = {
        "sclite_templates": {"file_name": TEMPLATES, **chat},
        "sclite_reviews": {"file_name": REVIEWS, **chat},
        "sclite_pairs": {"file_name": PAIRS, "ranking": True, "columns": columns},
    }
    return {name: entry for name, entry in datasets.items() if counts[name.removeprefix("sclite_")]}
