"""The checks before the first step run before the student is loaded, which takes a minute on a GPU."""

from pathlib import Path

import pytest

from sclite.errors import DataError
from sclite.records import Pair, Template
from sclite.run import Run
from sclite.train import dpo, sft, stage
from tests.toy import TRAIN, Said, sample_texts, toy_config, write_pairs, write_tokenizer, write_toy


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
    ids = frozenset(row.id for row in prepared[1].read("templates.jsonl", Template))
    with pytest.raises(DataError, match="no rows are left") as error:
        sft.train_sft(*prepared, unseen=ids)
    assert "problems.correction_share" in error.value.hint


def test_dpo_refuses_pairs_whose_steps_go_on_otherwise_than_decided(prepared):
    config, run = prepared
    rows = run.read("pairs.jsonl", Pair)
    run.replace(
        "pairs.jsonl",
        [row.model_copy(update={"chosen": row.rejected, "rejected": row.chosen}) for row in rows],
    )
    with pytest.raises(DataError, match="the next token is not the chosen decision"):
        dpo.train_dpo(config, run)
