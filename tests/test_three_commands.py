"""build-data, train and chat, in that order and with nothing between them, are a whole run; `sclite run` is the same in one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomlkit
from transformers import AutoModelForCausalLM

from sclite.quickstart.flow import DEFAULTS
from sclite.quickstart.problem_sets import problem_set
from tests.toy import write_rows

QUESTION = "Tom has 20 nuts. He buys 11 more. He sells 12 nuts. How many nuts does Tom have now?"


def sclite(folder: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sclite", *arguments]
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder in which build-data and train have run on a file of problems."""
    folder = tmp_path_factory.mktemp("project")
    rows = [problem.model_dump(exclude={"id"}) for problem in problem_set("train", 220)]
    write_rows(folder / "train.jsonl", rows)
    chosen = {name: value for name, value in DEFAULTS.items() if name not in ("run", "problems")}
    (folder / "sclite.toml").write_text(tomlkit.dumps(chosen))
    sclite(folder, "build-data", "train.jsonl")
    sclite(folder, "train")
    return folder


def test_train_fits_the_threshold_on_untrained_problems_and_chat_uses_it(trained):
    run = trained / "runs/default"
    (fitted,) = json.loads((run / "export/threshold.json").read_text()).values()
    assert fitted["problems"] == 50
    assert (fitted["threshold"] is None) == bool(fitted["off"])
    taught = [json.loads(line)["id"] for line in (run / "templates.jsonl").read_text().splitlines()]
    tried = [json.loads(line)["id"] for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert len({*taught, *tried}) <= 170
    done = sclite(trained, "chat", "--self-correct", "--json", QUESTION)
    answer = json.loads(done.stdout)
    (fitted,) = json.loads((trained / "runs/default/export/threshold.json").read_text()).values()
    assert answer["answer"]
    assert ("step_scores" in answer) == (fitted["threshold"] is not None)
    assert ("review is off" in answer["note"]) == (fitted["threshold"] is None)


def test_afterwards_all_is_done_and_train_repairs_what_is_missing(trained):
    status = json.loads(sclite(trained, "status", "--json").stdout)
    assert {name for name, stage in status["stages"].items() if stage["state"] != "done"} == {"eval"}
    assert status["next"].startswith("sclite chat")
    done = sclite(trained, "run", "train.jsonl", "--yes", "--json")
    stages = json.loads(done.stdout)
    assert {"templates", "sft", "warmup", "dpo", "export-dpo", "threshold"} <= set(stages)
    assert all(stage["skipped"] for name, stage in stages.items() if name != "problems")
    (gguf,) = (trained / "runs/default/export").glob("dpo-*.gguf")
    gguf.unlink()
    sclite(trained, "train")
    assert gguf.is_file()


def test_the_merged_folder_is_a_hugging_face_model(trained):
    done = sclite(trained, "export", "--format", "merged", "--json")
    folder = trained / json.loads(done.stdout)["merged"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == 1024
    assert (folder / "chat_template.jinja").is_file()
