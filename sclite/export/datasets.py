"""The run's rows in the forms that other trainers read: chat messages, preference pairs, Step-DPO's fields, and a data card.

TRL, Axolotl and LLaMA-Factory read one folder. Nothing is left out and nothing is added: every row of templates.jsonl,
reviews.jsonl and pairs.jsonl is one row here, in the same order, and the same run gives the same bytes.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from sclite import prompts
from sclite.config import Config
from sclite.errors import DataError
from sclite.export import dataset_card
from sclite.records import Attempt, Pair, Problem, Review, Template
from sclite.run import Report, Run, timed, write_text
from sclite.student.loader import load_tokenizer, model_name
from sclite.student.tokenization import prompt_text
from sclite.trace import parse, render

FOLDER = "export/data"
TEMPLATES, REVIEWS, PAIRS, STEP_DPO = "templates.jsonl", "reviews.jsonl", "pairs.jsonl", "step_dpo.jsonl"
INFO, CARD = "dataset_info.json", "README.md"
STAGE = "export-data"
_ROLES = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def export_data(config: Config, run: Run) -> Report:
    """Write export/data: one JSONL for each kind of rows that the run has, dataset_info.json and the card README.md.

    The student's tokenizer is loaded where there are pairs: its chat template writes their prompts. Raises DataFault
    where the run has neither templates nor pairs, or a row's problem is missing.
    """
    report = Report(STAGE)
    with timed(report):
        templates, reviews, pairs = (
            run.read(TEMPLATES, Template),
            run.read(REVIEWS, Review),
            run.read(PAIRS, Pair),
        )
        if not templates and not pairs:
            raise DataError(
                f"{run.folder} has neither templates nor pairs to export", "run `sclite build-data` first"
            )
        problems = {problem.id: problem for problem in run.read("problems.jsonl", Problem)}
        attempts = {(a.id, a.sample): a for a in run.read("attempts.jsonl", Attempt)}
        folder = config.prompts.folder
        rows = {
            TEMPLATES: template_rows(templates, folder),
            REVIEWS: review_rows(reviews, attempts, problems, folder),
            PAIRS: preference_rows(load_tokenizer(model_name(config.student)), pairs, problems, folder)
            if pairs
            else [],
            STEP_DPO: step_dpo_rows(pairs, reviews, problems, dataset_card.source_name(config), folder),
        }
        for name, lines in rows.items():
            _write(run, name, lines)
        report.counts = {name.removesuffix(".jsonl"): len(lines) for name, lines in rows.items()}
        write_text(run.path(f"{FOLDER}/{INFO}"), _json(dataset_info(report.counts), indent=2) + "\n")
        write_text(run.path(f"{FOLDER}/{CARD}"), dataset_card.text(config, run, report.counts))
    report.figures = {"folder": str(run.path(FOLDER))}
    return report


def _write(run: Run, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """A file of rows; where there are none, no file of an earlier export stays behind."""
    path = run.path(f"{FOLDER}/{name}")
    if rows:
        write_text(path, "".join(_json(row) + "\n" for row in rows))
    else:
        path.unlink(missing_ok=True)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


# -- chats ---------------------------------------------------------------------------------------------------------


def template_rows(templates: Iterable[Template], folder: str = "") -> list[dict[str, Any]]:
    """Each template as {"id", "messages"}: the student's solving prompt, and the trace as the assistant's turn."""
    return [
        {"id": row.id, "messages": _chat(prompts.solve_messages(row.question, folder), row.trace)}
        for row in templates
    ]


def review_rows(
    reviews: Iterable[Review],
    attempts: dict[tuple[str, int], Attempt],
    problems: dict[str, Problem],
    folder: str = "",
) -> list[dict[str, Any]]:
    """Each review as {"id", "sample", "step", "messages"}: what the warm-up before DPO learns (METHOD section 4.5)."""
    rows = []
    for row in reviews:
        attempt = attempts.get((row.id, row.sample))
        if attempt is None:
            raise DataError(
                f"reviews.jsonl, {row.id}/{row.sample}: no such row in attempts.jsonl",
                "put the attempts that were reviewed back, or remove this review",
            )
        asked = prompts.review_messages(_problem(row, problems).question, _canonical(attempt.trace), folder)
        step = {"id": row.id, "sample": row.sample, "step": row.step}
        rows.append({**step, "messages": _chat(asked, row.trace)})
    return rows


def _chat(asked: Iterable[dict[str, str]], trace: str) -> list[dict[str, str]]:
    return [*asked, {"role": "assistant", "content": _canonical(trace)}]


def _canonical(trace: str) -> str:
    return render(parse(trace).trace)


def _problem(row: Pair | Review, problems: dict[str, Problem]) -> Problem:
    if row.id not in problems:
        raise DataError(
            f"problems.jsonl has no problem {row.id}, which {type(row).__name__.lower()} {row.id}/{row.sample} is about",
            "put its problem there, or remove the row",
        )
    return problems[row.id]


# -- pairs ---------------------------------------------------------------------------------------------------------


def preference_rows(
    tokenizer: Any, pairs: Iterable[Pair], problems: dict[str, Problem], folder: str = ""
) -> list[dict[str, Any]]:
    """Each pair in TRL's standard form, prompt, chosen and rejected as text, with `prefix` and what names the pair.

    `prompt` is the review chat as the student's chat template writes it, up to where the assistant begins, and then
    the assistant's pieces in `prefix`, joined. A conversational prompt cannot say this: trainers would open a second
    assistant turn after the prefix.
    """
    rows = []
    for pair in pairs:
        context = prompt_text(tokenizer, _asked(pair, problems, folder))
        rows.append(
            {
                **_name(pair),
                "origin": pair.origin,
                "prompt": context + "".join(pair.prefix),
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "prefix": list(pair.prefix),
            }
        )
    return rows


def step_dpo_rows(
    pairs: Iterable[Pair],
    reviews: Iterable[Review],
    problems: dict[str, Problem],
    source: str,
    folder: str = "",
) -> list[dict[str, Any]]:
    """Each pair with the fields of Math-Step-DPO-10K: `initial_reason_steps` is the assistant's prefix.

    `prompt` is the user turn and `system` the system prompt, both without a chat template. `full_chosen` and
    `full_rejected` go on to the end where the run knows how: the teacher's review, the attempt as it stood. Elsewhere
    they equal `chosen` and `rejected`.
    """
    whole = {(row.id, row.sample): _canonical(row.trace) for row in reviews}
    rows = []
    for pair in pairs:
        system, user = _asked(pair, problems, folder)
        begun = "".join(pair.prefix)
        rows.append(
            {
                **_name(pair),
                "dataset": source,
                "system": system["content"],
                "prompt": user["content"],
                "initial_reason_steps": begun,
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "full_chosen": _to_the_end(whole.get((pair.id, pair.sample), ""), begun, pair.chosen),
                "full_rejected": _to_the_end(_canonical(pair.attempt), begun, pair.rejected),
                "answer": _problem(pair, problems).answer,
            }
        )
    return rows


def _name(pair: Pair) -> dict[str, Any]:
    return {"id": pair.id, "sample": pair.sample, "step": pair.step, "kind": pair.kind}


def _asked(pair: Pair, problems: dict[str, Problem], folder: str) -> tuple[dict[str, str], ...]:
    return prompts.review_messages(_problem(pair, problems).question, _canonical(pair.attempt), folder)


def _to_the_end(whole: str, begun: str, piece: str) -> str:
    """What `whole` says after `begun`, where it goes on with `piece`; the piece alone where it does not."""
    said = begun + piece
    return whole[len(begun) :] if whole.startswith(said) else piece


# -- LLaMA-Factory -------------------------------------------------------------------------------------------------


def dataset_info(counts: dict[str, int]) -> dict[str, Any]:
    """LLaMA-Factory's description of the files that were written, by data set name."""
    chat = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": _ROLES}
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    known = {
        "sclite_templates": {"file_name": TEMPLATES, **chat},
        "sclite_reviews": {"file_name": REVIEWS, **chat},
        "sclite_pairs": {"file_name": PAIRS, "ranking": True, "columns": columns},
    }
    return {name: entry for name, entry in known.items() if counts[name.removeprefix("sclite_")]}
