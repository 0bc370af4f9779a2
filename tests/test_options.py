"""What a run remembers from a command: what determines its data and models, not one-off filters, and nothing forever."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from sclite.errors import DataError, UsageError
from sclite.records import Problem
from sclite.run import Report, Run
from sclite.settings import load
from tests.toy import raises, write_rows


def problems(count: int, name: str = "mine.jsonl") -> None:
    rows = [{"question": f"What is 1 + 1, for the {n}th time?", "answer": "2"} for n in range(count)]
    write_rows(name, rows)


def remembered(folder: str = "runs/default") -> dict:
    return tomllib.loads(Path(folder, "run.toml").read_text())


def rows(name: str = "problems.jsonl") -> int:
    return len(Path("runs/default", name).read_text().splitlines())


def test_a_limit_applies_to_one_command_only(build):
    problems(9)
    assert "6 (the first of mine.jsonl" in build("mine.jsonl", "--limit", "6").err
    assert rows("templates.jsonl") == 6
    assert "9 (all rows of mine.jsonl)" in build("mine.jsonl").err
    assert rows("templates.jsonl") == 9
    assert "limit" not in remembered()["problems"]


def test_training_uses_the_limited_problems(build, sclite):
    problems(9)
    build("mine.jsonl", "--limit", "6")
    ended = sclite("train", "--plan", "--json", "--set", "student.model=embedded")
    planned = json.loads(ended.out)["stages"]["sft"]["rows"]
    sclite("train", "--only", "sft", "--set", "student.model=embedded", "--set", "sft.num_train_epochs=0.01")
    assert rows() == 6
    assert planned < 6


def test_options_of_eval_export_and_chat_are_not_saved(sclite):
    problems(40)
    run = Run("runs/default")
    run.folder.mkdir(parents=True)
    sclite("eval", "mine.jsonl", "--limit", "20", "--set", "student.model=embedded", "--models", "sft")
    sclite("export", "--quant", "q9", "--set", "student.model=embedded")
    sclite("chat", "--set", "review.threshold=3", "1 + 1?")
    assert not run.path("run.toml").exists()


def test_data_settings_are_saved_and_can_be_unset(build, sclite):
    problems(6)
    export = ("--set", "export.ollama=me", "--set", "export.push=me/mine", "--set", "export.quant=q8_0")
    # a setting after an option of the same meaning wins
    cost = ("--max-cost", "0.5", "--set", "teacher.max_cost=5", "--set", "teacher.price=[1, 2]")
    build("mine.jsonl", *export, "--set", "seed=7", *cost)
    kept = remembered()
    assert (kept["seed"], kept["problems"]["source"], kept["export"]["quant"]) == (7, "mine.jsonl", "q8_0")
    assert not {"ollama", "push"} & kept["export"].keys()
    assert (kept["teacher"]["max_cost"], kept["teacher"]["price"]) == (5.0, [1.0, 2.0])
    build("--set", "teacher.price=", "--set", "teacher.max_cost=", "--set", "seed=")
    kept = remembered()
    assert kept["seed"] == 0
    assert not {"price", "max_cost"} & kept["teacher"].keys()


@pytest.mark.parametrize(
    ("key", "other", "default"),
    [
        ("teacher.price", "[1, 2]", None),
        ("review.threshold", "2", None),
        ("sft.num_train_epochs", "7", 3.0),
        ("eval.split", "dev", "test"),
        ("problems.avoid", '["x.jsonl"]', ()),
        ("student.load_in_4bit", "false", True),
    ],
)
def test_every_kind_of_value_can_be_reset_to_its_default(tmp_path, key, other, default):
    def value(*settings, environment=None):
        found = load(None, [f"run={tmp_path}", *settings], environment or {}, own_file=False)
        for part in key.split("."):
            found = getattr(found, part)
        return found

    with Run(tmp_path).recording(load(None, [f"{key}={other}"], {}, own_file=False)):
        pass
    assert value() != default
    assert value(f"{key}=") == default
    assert value(environment={f"SCLITE_{key.replace('.', '__').upper()}": ""}) == default


def test_the_environment_sets_any_key_and_a_misspelled_one_is_refused(tmp_path):
    """Then the run's settings apply, and an empty value restores a command's own default."""
    (tmp_path / "run.toml").write_text("[sft]\nnum_train_epochs = 9\n")
    given, own = {"SCLITE_SEED": "5", "SCLITE_RUN": str(tmp_path)}, {"sft": {"num_train_epochs": 5}}
    found = load(None, (), given, own, own_file=False)
    assert (found.seed, found.run, found.sft.num_train_epochs) == (5, str(tmp_path), 9)
    assert load(None, ["sft.num_train_epochs="], given, own, own_file=False).sft.num_train_epochs == 5
    given = {"SCLITE_SFT_NUM_TRAIN_EPOCHS": "5", "SCLITE_SFT__EPOCH": "5", "SCLITE_SEDE": "1"}
    with pytest.raises(UsageError) as error:
        load(None, (), given, own_file=False)
    names = ("sft_num_train_epochs", "sft.epoch", "sede")
    assert all(f"unknown key {name}" in error.value.message for name in names)
    assert "did you mean sft.num_train_epochs?" in error.value.hint
    assert "did you mean seed?" in error.value.hint


@pytest.mark.parametrize(("own", "default"), [(None, "runs/default"), ({"run": "runs/own"}, "runs/own")])
def test_an_empty_run_is_the_default_with_its_own_settings(tmp_path, monkeypatch, own, default):
    monkeypatch.chdir(tmp_path)
    for folder, seed in (("x", 7), (default, 3)):
        Path(folder).mkdir(parents=True)
        Path(folder, "run.toml").write_text(f"seed = {seed}\n")
    Path("sclite.toml").write_text('run = "x"\n')
    for settings, environment in ((["run="], {}), ([], {"SCLITE_RUN": ""})):
        found = load(None, settings, environment, own)
        assert (found.run, found.seed) == (default, 3)
    assert load(None, [], {}, own).seed == 7


@pytest.mark.parametrize("text", ["[sft\n", "sft = 3\n", "[sft]\nepoch = 1\n", "[sft]\nepochs = 'x'\n"])
def test_a_damaged_run_toml_is_reported(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with raises(DataError, str(path), hint=f"remove {path}"):
        load(None, [f"run={tmp_path}"], {}, own_file=False)
    path.unlink()
    load(None, [f"run={tmp_path}"], {}, own_file=False)


def test_a_run_continues_without_its_problem_file(build, teacher_of_sums):
    problems(6)
    assert build("mine.jsonl").code == 0
    asked = len(teacher_of_sums.requests)
    Path("mine.jsonl").unlink()
    for arguments in ((), ("mine.jsonl",), ("mine.jsonl", "--limit", "6")):
        ended = build(*arguments)
        assert ended.code == 0, ended.err
        assert "problems: 6 in the run" in ended.err
    assert len(teacher_of_sums.requests) == asked
    assert build("mine.jsonl", "--limit", "3").code == 2
    assert build("other.jsonl").code == 3


def test_a_moved_run_continues(build, sclite, monkeypatch):
    problems(6)
    problems(3, "measured.jsonl")
    build("mine.jsonl", "--set", "eval.source=measured.jsonl")
    kept = [row.question for row in Run("runs/default").read("problems.jsonl", Problem)]
    assert len(kept) == 3
    Path("elsewhere").mkdir()
    shutil.move("runs/default", "elsewhere/moved")
    monkeypatch.chdir("elsewhere")
    assert build("--run", "moved").code == 0
    assert [row.question for row in Run("moved").read("problems.jsonl", Problem)] == kept
    assert not Path("runs").exists()


def test_a_dry_run_writes_and_sends_nothing(build, teacher_of_sums):
    problems(6)
    before = sorted(Path().rglob("*"))
    ended = build("mine.jsonl", "--dry-run", "--json")
    assert json.loads(ended.out)["requests"] == 6
    assert sorted(Path().rglob("*")) == before
    build("mine.jsonl", "--limit", "4")
    asked = len(teacher_of_sums.requests)
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    assert json.loads(build("mine.jsonl", "--dry-run", "--json").out)["requests"] == 2
    other = ("--dry-run", "--json", "--fresh")
    other += ("--set", "teacher.temperature=0.5", "--set", "teacher.price=[1, 1]")
    again = json.loads(build("mine.jsonl", *other).out)
    assert again["requests"] == 6
    judged = ("--set", "teacher.inspector=openai/judge", "--set", "teacher.inspector_price=[10, 10]")
    inspected = json.loads(build("mine.jsonl", *other, *judged).out)
    assert inspected["requests"] == 6
    assert inspected["cost_usd"] > 5 * again["cost_usd"]
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    assert len(teacher_of_sums.requests) == asked


def test_templates_stay_until_a_new_teacher_has_answered(build, sclite):
    problems(6)
    assert build("mine.jsonl").code == 0
    before = Path("runs/default/templates.jsonl").read_bytes()
    other = ("--set", "teacher.model=openai/other", "--set", "teacher.api_base=http://127.0.0.1:9/v1")
    assert sclite("build-data", "--fresh", *other).code == 6
    assert Path("runs/default/templates.jsonl").read_bytes() == before
    Path("runs/default/sft/adapter").mkdir(parents=True)
    refused = sclite("build-data", *other)
    assert (refused.code, "--only corrections" in refused.hint) == (2, True)


def test_no_corrections_are_bought_for_a_student_that_new_templates_make_stale(build, teacher_of_sums):
    problems(6)
    assert build("mine.jsonl", "--limit", "4").code == 0
    run = Run("runs/default")
    run.path("sft/adapter").mkdir(parents=True)
    run.path("sft/adapter/adapter_model.safetensors").write_bytes(b"weights")
    run.sign("sft", {"templates.jsonl": run.file_digest("templates.jsonl")}, Report("sft"))
    ended = build("mine.jsonl", "--set", "student.model=embedded")
    assert ended.code == 0
    assert "corrections: skipped, SFT is stale (" in ended.err
    assert len(teacher_of_sums.requests) == rows("templates.jsonl") == rows()
