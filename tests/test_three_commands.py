"""build-data, train and chat, with nothing in between, make a complete run; `sclite run` does the same in one command."""

import json

import pytest

from tests.nuts import QUESTION, nuts_project, run_command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which build-data and train have run."""
    folder = tmp_path_factory.mktemp("project")
    with nuts_project(folder):
        run_command(folder, "build-data")
        run_command(folder, "train")
        yield folder


def test_three_commands_end_in_a_chat_that_reviews(trained):
    (found,) = json.loads((trained / "runs/default/export/threshold.json").read_text()).values()
    assert found["problems"] == 50
    assert found["acc_t2"] > found["acc_t1"]
    asked = "\n".join(QUESTION.format(n) for n in range(12, 210, 4))
    lines = run_command(trained, "chat", "--self-correct", "--json", text=asked).splitlines()
    answers = [json.loads(line) for line in lines]
    assert all(answer["step_scores"] for answer in answers)
    assert any(f"<Answer>{answer['answer']}</Answer>" not in answer["first"] for answer in answers)


def test_nothing_was_trained_on_the_problems_of_the_threshold(trained):
    names = ("templates.jsonl", "attempts.jsonl")
    lines = [line for name in names for line in (trained / "runs/default" / name).read_text().splitlines()]
    assert len({json.loads(line)["id"] for line in lines}) == 150


@pytest.fixture
def command(sclite, monkeypatch, trained):
    """Run a command in the folder; return its output."""
    monkeypatch.chdir(trained)

    def call(*arguments: str) -> str:
        ended = sclite(*arguments)
        assert ended.code == 0, ended.err
        return ended.out

    return call


def test_afterwards_all_is_done_and_train_restores_what_is_missing(trained, command):
    status = json.loads(command("status", "--json"))
    assert {name for name, stage in status["stages"].items() if stage["state"] != "done"} == {"eval"}
    assert status["next"].startswith("sclite chat")
    stages = json.loads(command("run", "--yes", "--json"))
    assert {"templates", "sft", "warmup", "dpo", "export-dpo", "threshold"} <= set(stages)
    assert all(stage["skipped"] for name, stage in stages.items() if name != "problems")
    (gguf,) = (trained / "runs/default/export").glob("dpo-*.gguf")
    gguf.unlink()
    command("train")
    assert gguf.is_file()
