"""Exported data: one row per row of the run, as the student is trained, in formats that other trainers accept."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard
from trl import DPOConfig, DPOTrainer
from trl.data_utils import is_conversational, maybe_apply_chat_template, maybe_extract_prompt

from sclite import prompts
from sclite.config import Config
from sclite.errors import DataError
from sclite.export.cards import source_name
from sclite.export.datasets import FOLDER, export_data
from sclite.records import Attempt, Pair, Problem, Review, Template
from sclite.run import Run
from sclite.student.loader import load_tokenizer
from sclite.student.tokenization import end_id, prompt_text
from sclite.trace import CAUSE, parse, render
from tests.toy import export_config, make_run, raises, write_rows

STEP_DPO = "dataset prompt initial_reason_steps chosen rejected full_chosen full_rejected answer".split()  # noqa: SIM905
KINDS = {"templates": Template, "reviews": Review, "pairs": Pair}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module", autouse=True)
def report(run, student):
    """The report of an export of the run."""
    return export_data(export_config(student), run)


def rows_of(run: Run, name: str) -> list[dict]:
    return [json.loads(line) for line in run.path(f"{FOLDER}/{name}.jsonl").read_text("utf-8").splitlines()]


def read_card(run: Run) -> str:
    return run.path(f"{FOLDER}/README.md").read_text("utf-8")


def questions(run: Run) -> dict[str, str]:
    return {problem.id: problem.question for problem in run.read("problems.jsonl", Problem)}


@pytest.mark.parametrize("name", KINDS)
def test_every_row_is_exported_once_in_the_same_order(run, report, name):
    kept = run.read(f"{name}.jsonl", KINDS[name])
    assert len(kept) > 3
    assert [row["id"] for row in rows_of(run, name)] == [row.id for row in kept]
    assert report.counts[name] == len(kept)


def test_chats_and_pair_prompts_are_what_the_student_is_trained_on(run, student):
    for row, template in zip(rows_of(run, "templates"), run.read("templates.jsonl", Template), strict=True):
        answer = {"role": "assistant", "content": template.trace}
        assert row["messages"] == [*prompts.solve_messages(template.question), answer]
    attempts = {a.id: render(parse(a.trace).trace) for a in run.read("attempts.jsonl", Attempt)}
    for row, review in zip(rows_of(run, "reviews"), run.read("reviews.jsonl", Review), strict=True):
        chat = prompts.review_messages(questions(run)[review.id], attempts[review.id])
        assert row["messages"] == [*chat, {"role": "assistant", "content": review.trace}]
    tokenizer = load_tokenizer(str(student))
    for row, pair in zip(rows_of(run, "pairs"), run.read("pairs.jsonl", Pair), strict=True):
        chat = prompt_text(tokenizer, prompts.review_messages(questions(run)[pair.id], pair.attempt))
        assert row["prompt"] == chat + "".join(pair.prefix)
        assert (row["chosen"], row["rejected"]) == (pair.chosen, pair.rejected)
        assert row["prefix"] == list(pair.prefix)


def test_attempts_are_exported_without_corrections_of_their_own(student, tmp_path):
    """As the warm-up shows them to the student."""
    run = make_run(tmp_path / "run")
    (review, *_), rows = run.read("reviews.jsonl", Review), []
    for row in run.read("attempts.jsonl", Attempt):
        noted = row.trace.replace(
            "\n</Step1>", "\n<Cause>Hm.</Cause>\n<Correction>2 + 2 = 4</Correction>\n</Step1>", 1
        )
        rows.append(Attempt(**row.model_dump() | ({"trace": noted} if row.id == review.id else {})))
    run.replace("attempts.jsonl", rows)
    export_data(export_config(student), run)
    shown = rows_of(run, "reviews")[0]["messages"][1]["content"]
    assert "2 + 2 = 4" in shown
    assert "Hm." not in shown


def test_custom_prompts_are_exported(student, tmp_path):
    run, own = make_run(tmp_path / "run"), tmp_path / "own"
    own.mkdir()
    (own / "student_solve.txt").write_text("Do this sum: {{ question }}")
    export_data(export_config(student, prompts={"folder": str(own)}), run)
    assert rows_of(run, "templates")[0]["messages"][1]["content"].startswith("Do this sum: Anna")


def test_step_dpo_rows_have_its_fields_and_continue_to_the_end_if_known(run):
    answers = {problem.id: problem.answer for problem in run.read("problems.jsonl", Problem)}
    for row, pair in zip(rows_of(run, "step_dpo"), run.read("pairs.jsonl", Pair), strict=True):
        assert set(STEP_DPO) <= set(row)
        assert row["initial_reason_steps"] == "".join(pair.prefix)
        assert row["answer"] == answers[pair.id]
        assert row["dataset"] == "sums.jsonl"
        assert row["full_chosen"].startswith(row["chosen"])
        assert row["full_rejected"].startswith(row["rejected"])
    reviews = {r.id: r for r in run.read("reviews.jsonl", Review)}
    attempts = {a.id: a for a in run.read("attempts.jsonl", Attempt)}
    flagged = [row for row in rows_of(run, "step_dpo") if row["chosen"] == CAUSE]
    assert flagged
    for row in flagged:
        assert row["initial_reason_steps"] + row["full_chosen"] == reviews[row["id"]].trace
        assert row["initial_reason_steps"] + row["full_rejected"] == attempts[row["id"]].trace
    contents = [row for row in rows_of(run, "step_dpo") if row["kind"] == "content"]
    assert all(row["full_chosen"].endswith("</Answer>") for row in contents)
    assert all(row["full_rejected"] == row["rejected"] for row in contents)


def test_same_run_gives_the_same_bytes(run, student, tmp_path):
    again = make_run(tmp_path / "again")
    export_data(export_config(student), again)
    names = sorted(path.name for path in run.path(FOLDER).iterdir())
    rows = ["pairs.jsonl", "reviews.jsonl", "step_dpo.jsonl", "templates.jsonl"]
    assert names == ["README.md", "dataset_info.json", *rows]
    for name in names:
        assert again.path(f"{FOLDER}/{name}").read_bytes() == run.path(f"{FOLDER}/{name}").read_bytes(), name


@pytest.mark.parametrize("name", [*KINDS, "step_dpo"])
def test_datasets_loads_each_file_by_path_and_by_configuration(run, tmp_path, name):
    path = str(run.path(f"{FOLDER}/{name}.jsonl"))
    alone = load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path))
    named = load_dataset(str(run.path(FOLDER)), name, split="train", cache_dir=str(tmp_path))
    assert alone.to_list() == named.to_list() == rows_of(run, name)


def test_run_without_pairs_needs_no_student_and_removes_old_pairs(student, tmp_path):
    run = make_run(tmp_path / "run")
    export_data(export_config(student), run)
    run.replace("pairs.jsonl", [])
    report = export_data(export_config(""), run)
    assert report.counts["pairs"] == report.counts["step_dpo"] == 0
    assert not any(run.path(f"{FOLDER}/{name}.jsonl").exists() for name in ("pairs", "step_dpo"))
    assert "sclite_pairs" not in run.read_json(f"{FOLDER}/dataset_info.json")
    assert "pairs.jsonl" not in read_card(run)


def test_empty_run_or_a_row_without_its_problem_or_attempt_is_an_error(student, tmp_path):
    with raises(DataError, "no templates or pairs", hint="sclite build-data"):
        export_data(export_config(student), Run(tmp_path / "run"))
    run = make_run(tmp_path / "run")
    attempts = run.read("attempts.jsonl", Attempt)
    run.replace("attempts.jsonl", attempts[1:])
    with pytest.raises(DataError, match=r"the attempt of review p0/0 is not in attempts.jsonl"):
        export_data(export_config(student), run)
    run.replace("reviews.jsonl", [])
    run.replace("problems.jsonl", [p for p in run.read("problems.jsonl", Problem) if p.id != "p1"])
    with pytest.raises(DataError, match=r"the problem of pair p1/0 is not in problems.jsonl"):
        export_data(export_config(student), run)


def test_card_lists_sources_counts_and_cost_and_the_hub_reads_it(run, report):
    config = Config.model_validate({"teacher": {"model": "embedded/tutor"}})
    assert source_name(config) == "the arithmetic word problems of sclite's quickstart"
    card = read_card(run)
    for line in (
        "- Problems: sums.jsonl",
        "- Teacher: openai/large",
        "- Teacher prompts for templates: 0123456789abcdef",
        "- Teacher prompts for corrections: unknown",
        f"- Prompt student_review: {prompts.digest_prompts('student_review')}",
        "| templates | wrong answer | 3 |",
        "| pairs | chosen equals rejected | 1 |",
        "- 2 requests, 110 prompt tokens, 44 completion tokens",
        "- 0.250000 USD; 1 requests have no known price",
    ):
        assert f"\n{line}\n" in card
    assert f"| pairs.jsonl | {report.counts['pairs']} |" in card
    # its front matter, whose license is to be filled in
    card = DatasetCard.load(run.path(f"{FOLDER}/README.md"))
    assert card.data.license == "unknown"
    assert "> **TO FILL IN.**" in card.text
    assert [entry["config_name"] for entry in card.data.to_dict()["configs"]] == list(report.counts)


SOURCES = {
    "openai/gsm8k": "openai/gsm8k (main train)",
    "mine/sums.jsonl": "sums.jsonl",
    "here/sums.tsv": "sums.tsv",  # which exists
    "../secret/sums.csv": "sums.csv",
    "../secret/folder": "folder",
    "": "unknown",
}
MODELS = {
    "openai//data/alice/models/Qwen": "openai/Qwen",
    "openrouter/deepseek/deepseek-r1:free": "openrouter/deepseek/deepseek-r1:free",
    "fireworks_ai/accounts/fireworks/models/r1": "fireworks_ai/accounts/fireworks/models/r1",
    "gpt-4o": "gpt-4o",
}
STUDENTS = [{"attempts": {"student": model, "api_base": "http://here/v1"}} for model in MODELS]
BY = "; the corrected attempts are by"


@pytest.mark.parametrize(
    ("sections", "shown"),
    [
        ({"attempts": {"source": "/home/somebody/wrong.jsonl"}}, "were imported from wrong.jsonl"),
        *(({"problems": {"source": p, "subset": "main"}}, f"- Problems: {SOURCES[p]}\n") for p in SOURCES),
        *(({"teacher": {"model": model}}, f"- Teacher: {MODELS[model]}\n") for model in MODELS),
        *((own, f"{BY} {name}\n") for own, name in zip(STUDENTS, MODELS.values(), strict=True)),
        ({"teacher": {"model": ""}}, "- Teacher: unknown\n"),
    ],
)
def test_card_names_sources_and_models_without_their_places(student, tmp_path, monkeypatch, sections, shown):
    monkeypatch.chdir(tmp_path)
    write_rows("here/sums.tsv", [])
    export_data(export_config(student, **sections), run := make_run(tmp_path / "run"))
    card = read_card(run)
    assert shown in card
    for secret in ("here/v1", "/home/somebody", "10.0.0.7", "alice/models", "secret", str(student)):
        assert secret not in card


def test_trl_reads_chats_as_conversations_and_pairs_as_text(run, student):
    tokenizer = load_tokenizer(str(student))
    for name in ("templates", "reviews"):
        row = rows_of(run, name)[0]
        assert is_conversational(row)
        text = maybe_apply_chat_template({"messages": row["messages"]}, tokenizer)["text"]
        assert text.rstrip().endswith("</Answer><|im_end|>")
    for row in rows_of(run, "pairs"):
        assert not is_conversational(row)
        assert maybe_extract_prompt(row) == row
        assert maybe_apply_chat_template(row, tokenizer) == row


def test_trl_appends_an_end_token_to_both_sides_as_the_card_says(run, student):
    tokenizer = load_tokenizer(str(student))
    args = DPOConfig(output_dir="unused", use_cpu=True, bf16=False, max_length=None, report_to=[])
    trainer, pairs = SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(rows_of(run, "pairs"))
    for row in DPOTrainer._prepare_dataset(trainer, pairs, tokenizer, args, "train"):
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == end_id(tokenizer)
    assert "**yes, on both sides**" in read_card(run)
