"""The checks before the first step run before the student is loaded, which takes a minute on a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest

from sclite.errors import DataError
from sclite.records import Pair, Problem, Template
from sclite.run import Run
from sclite.student.loader import load_tokenizer
from sclite.student.tokenization import TrainingSequence, decision_ids
from sclite.train import dpo, sft, stage
from sclite.train.bundle import build_bundles, check_bundles
from tests.toy import CHATML, TRAIN, Said, sample_texts, toy_config, write_pairs, write_tokenizer, write_toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student with a tokenizer and a configuration, but no weights."""
    path = tmp_path_factory.mktemp("student")
    write_tokenizer(path, sample_texts())
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


@pytest.fixture
def prepared(tmp_path, folder, monkeypatch):
    """(config, run) with rows for every stage; loading the student fails the test."""

    def loaded(*_, **__):
        raise AssertionError("the student was loaded")

    monkeypatch.setattr(stage, "load_student", loaded)
    monkeypatch.setattr(stage, "fetch_model", Path)  # it has no weights
    run = Run(tmp_path / "run")
    write_toy(run)
    write_pairs(run)
    return toy_config(folder), run


@pytest.fixture
def rewrite(folder):
    """Replaces the student's chat template for one test."""
    template = folder / "chat_template.jinja"
    yield template.write_text
    template.write_text(CHATML)


@pytest.mark.parametrize("stage", TRAIN)
def test_a_chat_template_without_the_question_fails_before_loading(prepared, rewrite, stage):
    rewrite("{% for message in messages %}<|im_start|>hello<|im_end|>{% endfor %}")
    with pytest.raises(DataError, match="drops the question"):
        TRAIN[stage](*prepared)


@pytest.mark.parametrize("stage", TRAIN)
def test_if_all_rows_are_too_long_training_fails_before_loading(prepared, stage):
    config, run = prepared
    short = config.stage(stage).model_copy(update={"max_length": 64})
    said = Said()
    with pytest.raises(DataError, match=r"nothing to train on|no pair fits"):
        TRAIN[stage](config.model_copy(update={stage: short}), run, progress=said)
    assert "rows have more than 64 tokens and are skipped" in said[-1]
    assert said[-1].endswith(f"raise {stage}.max_length")
    assert not run.path(f"{stage}/adapter").exists()
    assert run.manifest(stage) is None


@pytest.mark.parametrize(
    ("stage", "name", "next_command"),
    [
        ("sft", "templates", "sclite build-data"),
        ("warmup", "reviews", "sclite build-data --only corrections"),
        ("warmup", "templates", "sclite build-data"),
        ("dpo", "pairs", "sclite train"),
        ("dpo", "templates", "sclite build-data"),
    ],
)
def test_without_rows_the_hint_names_the_next_command(prepared, stage, name, next_command):
    config, run = prepared
    run.path(f"{name}.jsonl").unlink()
    with pytest.raises(DataError, match=rf"{name}\.jsonl is missing or empty") as error:
        TRAIN[stage](config, run)
    assert next_command in error.value.hint


def test_if_all_templates_are_reserved_for_stage_2_sft_fails(prepared):
    config, run = prepared
    ids = frozenset(row.id for row in run.read("templates.jsonl", Template))
    with pytest.raises(DataError, match=f"all {len(ids)} templates belong to problems reserved") as error:
        sft.train_sft(config, run, unseen=ids)
    assert "problems.correction_share" in error.value.hint


def test_the_pairs_of_a_run_pass_the_check_and_invalid_ones_are_refused(prepared):
    config, run = prepared
    tokenizer, pairs = load_tokenizer(config.student.model), run.read("pairs.jsonl", Pair)
    questions = {problem.id: problem.question for problem in run.read("problems.jsonl", Problem)}
    made, decisions = build_bundles(tokenizer, pairs, questions), decision_ids(tokenizer)
    check_bundles(made, decisions)
    whole = next(bundle for bundle in made if bundle.rejected is not None)
    ids, weights = whole.rejected.ids, whole.rejected.weights
    empty, unmasked = [0.0] * len(ids), [1.0, *weights[1:]]
    turned = replace(whole.review, accused=tuple(not a for a in whole.review.accused))
    wrong = {
        "both sides of the content pair are the same": {"rejected": whole.review},
        "one side of the content pair is empty": {"rejected": TrainingSequence(ids, empty)},
        "the prompt is not masked": {"rejected": TrainingSequence(ids, unmasked)},
        "neither a decision nor a content": {"rejected": None, "review": TrainingSequence(ids, weights)},
        "the next token is not the chosen decision": {"review": turned},
    }
    for message, change in wrong.items():
        with pytest.raises(DataError, match=f"the pairs of {whole.key}: {message}"):
            check_bundles([replace(whole, **change)], decisions)


def test_dpo_checks_pairs_before_loading(prepared):
    config, run = prepared
    rows = run.read("pairs.jsonl", Pair)
    same = [row.model_copy(update={"rejected": row.chosen}) if row.kind == "content" else row for row in rows]
    run.replace("pairs.jsonl", same)
    with pytest.raises(DataError, match="both sides of the content pair are the same tokens"):
        dpo.train_dpo(config, run)


def test_a_template_that_opens_thinking_gives_a_warning(prepared, rewrite):
    said, opening = Said(), CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    assert "<think>" in opening
    rewrite(opening)
    with pytest.raises(AssertionError, match="the student was loaded"):
        sft.train_sft(*prepared, progress=said)
    assert ["opens a <think> block" in text for text in said] == [True]
