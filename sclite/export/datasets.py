"""The rows of a run in the formats of other trainers: chat messages, preference pairs, Step-DPO fields, and a dataset card.

TRL, Axolotl and LLaMA-Factory all read the same folder. Each row of templates.jsonl, reviews.jsonl and pairs.jsonl becomes
exactly one row here, in the same order, and the same run gives the same bytes.
"""

from __future__ import annotations

import json
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.errors import DataError
from sclite.export.cards import build_dataset_card, source_name
from sclite.records import Attempt, Pair, Problem, Review, Template
from sclite.run import Report, Run, timed, write_text
from sclite.student.loader import load_tokenizer, model_name
from sclite.student.tokenization import prompt_text
from sclite.trace import render

Rows = list[dict[str, Any]]
FOLDER = "export/data"
TEMPLATES, REVIEWS, PAIRS, STEP_DPO = "templates.jsonl", "reviews.jsonl", "pairs.jsonl", "step_dpo.jsonl"
_TAGS = {f"{role}_tag": role for role in ("role", "content", "user", "assistant", "system")}
_CHATS = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": _TAGS}
_SIDES = {name: name for name in ("prompt", "chosen", "rejected")}
LLAMA_FACTORY: dict[str, dict[str, Any]] = {
    "sclite_templates": {"file_name": TEMPLATES, **_CHATS},
    "sclite_reviews": {"file_name": REVIEWS, **_CHATS},
    "sclite_pairs": {"file_name": PAIRS, "ranking": True, "columns": _SIDES},
}
"""dataset_info.json: LLaMA-Factory's description of the files, by dataset name."""


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
            hint = "run `sclite build-data` first"
            raise DataError(f"{run.folder} has no templates or pairs to export", hint)
        problems = {problem.id: problem for problem in run.read("problems.jsonl", Problem)}
        attempts = {(row.id, row.sample): row for row in run.read("attempts.jsonl", Attempt)}
        needy: list[Review | Pair] = [*reviews, *pairs]
        for row in needy:
            kind, missing = type(row).__name__.lower(), "" if row.id in problems else "problem"
            if isinstance(row, Review) and (row.id, row.sample) not in attempts:
                missing = "attempt"
            if missing:
                message = f"the {missing} of {kind} {row.id}/{row.sample} is not in {missing}s.jsonl"
                raise DataError(message, f"restore it, or remove the {kind}")
        folder, files = config.prompts.folder, dict[str, Rows]()
        files[TEMPLATES], files[REVIEWS] = [], []
        for template in templates:
            answer = {"role": "assistant", "content": render(template.parsed.trace)}
            chat = [*prompts.solve_messages(template.question, folder), answer]
            files[TEMPLATES].append({"id": template.id, "messages": chat})
        for row in reviews:  # as in the warm-up before DPO
            attempt = render(attempts[row.id, row.sample].parsed.work)
            answer = {"role": "assistant", "content": render(row.parsed.trace)}
            chat = [*prompts.review_messages(problems[row.id].question, attempt, folder), answer]
            files[REVIEWS].append({"id": row.id, "sample": row.sample, "step": row.step, "messages": chat})
        files[PAIRS], files[STEP_DPO] = _pair_rows(config, pairs, reviews, problems)
        for name, rows in files.items():
            path = run.path(f"{FOLDER}/{name}")
            if rows:
                write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            else:
                path.unlink(missing_ok=True)  # written by an earlier export
        report.counts = {name.removesuffix(".jsonl"): len(rows) for name, rows in files.items()}
        known = {name: about for name, about in LLAMA_FACTORY.items() if files[about["file_name"]]}
        description = json.dumps(known, ensure_ascii=False, indent=2) + "\n"
        write_text(run.path(f"{FOLDER}/dataset_info.json"), description)
        write_text(run.path(f"{FOLDER}/README.md"), build_dataset_card(config, run, report.counts))
    report.figures = {"folder": str(run.path(FOLDER))}
    return report


def _pair_rows(
    config: Config, pairs: list[Pair], reviews: list[Review], problems: dict[str, Problem]
) -> tuple[Rows, Rows]:
    """Each pair in TRL's standard format, and in the fields of Math-Step-DPO-10K.

    TRL: `prompt` is the review chat rendered with the chat template, followed by the assistant's pieces in `prefix`. It cannot
    be conversational: trainers would open a second assistant turn after the prefix. Step-DPO: `prompt` is the user turn and
    `system` the system prompt, both without a chat template, and `initial_reason_steps` the prefix. `full_chosen` and
    `full_rejected` continue to the end of the teacher's review and of the original attempt if these begin with the pair.
    """
    preferences, step_dpo = Rows(), Rows()
    if not pairs:
        return preferences, step_dpo
    tokenizer = load_tokenizer(model_name(config.student))
    traces = {(row.id, row.sample): render(row.parsed.trace) for row in reviews}
    for pair in pairs:
        keys = {"id": pair.id, "sample": pair.sample, "step": pair.step, "kind": pair.kind}
        problem, attempt, prefix = problems[pair.id], render(pair.work), "".join(pair.prefix)
        chat = prompts.review_messages(problem.question, attempt, config.prompts.folder)
        sides, full = {"chosen": pair.chosen, "rejected": pair.rejected}, dict[str, str]()
        for side, whole in (("chosen", traces.get((pair.id, pair.sample), "")), ("rejected", attempt)):
            begins = whole.startswith(prefix + sides[side])
            full[f"full_{side}"] = whole[len(prefix) :] if begins else sides[side]
        prompt = prompt_text(tokenizer, chat) + prefix
        trl = {"prompt": prompt, **sides, "prefix": list(pair.prefix)}
        preferences.append({**keys, "origin": pair.origin, **trl})
        step_dpo.append(
            {
                **keys,
                "dataset": source_name(config),
                "system": chat[0]["content"],
                "prompt": chat[1]["content"],
                "initial_reason_steps": prefix,
                **sides,
                **full,
                "answer": problem.answer,
            }
        )
    return preferences, step_dpo
