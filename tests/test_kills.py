"""Commands killed (SIGKILL) in every stage and run again produce the same files; and a full quickstart."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tomlkit

from sclite.quickstart.flow import DEFAULTS
from sclite.quickstart.stories import problem_set
from tests.toy import write_rows

MARKS = {
    "templates": "templates.jsonl",
    "sft": "sft/metrics.jsonl",
    "attempts": "attempts.jsonl",
    "corrections": "reviews.jsonl",
    "warmup": "warmup/metrics.jsonl",
    "pairs": "pairs.jsonl",
    "dpo": "dpo/metrics.jsonl",
    "export": "export/unfinished/",
    "threshold": "done/export-dpo-q8_0.json",
    "eval": "export/threshold.json",
}
"""Each stage is killed as soon as this file has a line, or this folder a file."""
TIMED = ("seconds", "seconds_first", "prefill", "prefill_first", "signature")


def start(folder: Path, arguments: Sequence[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "sclite", *arguments, "--json"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder: Path, arguments: Sequence[str]) -> str:
    process = start(folder, arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def kill_during(stage: str, folder: Path, run: Path, arguments: Sequence[str]) -> None:
    """Run the command and kill it while it is in this stage."""
    mark = run / MARKS[stage]
    process = start(folder, arguments)
    while process.poll() is None:
        if any(mark.iterdir()) if mark.is_dir() else mark.is_file() and mark.read_bytes().count(b"\n"):
            break
        time.sleep(0.01)
    assert process.poll() is None, process.stderr.read()
    process.kill()
    process.communicate()


def results(run: Path) -> dict:
    """What must not depend on kills: rows, adapters, GGUFs, thresholds, and the evaluation without its timings."""
    names = [*run.glob("*.jsonl"), *run.glob("*/adapter/*.safetensors"), *run.glob("export/*")]
    suffixes = (".jsonl", ".safetensors", ".gguf")
    kept = [path for path in names if path.suffix in suffixes or path.name == "threshold.json"]
    found = {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}
    if (dropped := run / "dropped.jsonl").is_file():  # in the order in which replies came
        found[dropped.name] = sorted(dropped.read_text().splitlines())
    for summary in run.glob("eval/*/summary.json"):
        for name, figures in json.loads(summary.read_text())["models"].items():
            found[name] = {key: value for key, value in figures.items() if key not in TIMED}
    return found


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with a small project on the bundled student: its configuration, problems and held-out problems."""
    for name, problems in (("train", problem_set("train", 220)), ("test", problem_set("test", 40))):
        write_rows(tmp_path / f"{name}.jsonl", [problem.model_dump(exclude={"id"}) for problem in problems])
    chosen = {name: dict(value) for name, value in DEFAULTS.items() if name not in ("run", "problems")}
    chosen["eval"] |= {"source": "test.jsonl", "limit": 40}
    chosen["sft"] |= {"num_train_epochs": 6}  # with fewer the attempts are not readable
    (tmp_path / "sclite.toml").write_text(tomlkit.dumps(chosen))
    return tmp_path


@pytest.mark.slow
def test_a_run_killed_in_training_continues_to_the_same_adapter(project):
    sft = ("train", "--only", "sft", "--set", "sft.num_train_epochs=1", "--set", "sft.batch_size=8")
    finish(project, ("build-data", "train.jsonl", "--limit", "64", "--only", "templates"))
    shutil.copytree(project / "runs/default", project / "runs/whole")
    command = ("run", "train.jsonl", "--limit", "64", "--yes", *sft[3:])
    kill_during("sft", project, project / "runs/default", command)
    finish(project, sft)
    finish(project, (*sft, "--run", "runs/whole"))
    found = results(project / "runs/default")
    assert "sft/adapter/adapter_model.safetensors" in found
    assert found == results(project / "runs/whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [("run", "train.jsonl", "--yes"), ("quickstart", "--problems", "200", "--set", "eval.limit=40")],
    ids=["run", "quickstart"],
)
def test_a_command_killed_in_every_stage_ends_with_the_same_files(project, command):
    finish(project, (*command, "--run", "whole"))
    for stage in MARKS:
        kill_during(stage, project, project / "broken", (*command, "--run", "broken"))
    finish(project, (*command, "--run", "broken"))
    whole = results(project / "whole")
    assert {"templates.jsonl", "pairs.jsonl", "dpo/adapter/adapter_model.safetensors", "dpo"} < set(whole)
    assert "export/threshold.json" in whole
    assert results(project / "broken") == whole


@pytest.mark.slow
def test_full_quickstart_shows_self_correction_at_work(tmp_path):
    began = time.monotonic()
    output = finish(tmp_path, ("quickstart", "--run", "run"))
    minutes = (time.monotonic() - began) / 60
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{minutes:.1f} minutes on {os.cpu_count()} cores, {gigabytes:.2f} GB at most")
    models = json.loads(output)["models"]
    base, sft, dpo = models["base"], models["sft"], models["dpo"]
    print(json.dumps({name: {k: m[k] for k in ("acc_t1", "acc_t2", "auc")} for name, m in models.items()}))
    assert dpo["n"] >= 300
    assert 0.2 <= base["acc_t1"] <= 0.6
    assert sft["acc_t1_interval"][0] > base["acc_t1_interval"][1]
    assert dpo["difference_interval"][0] > 0
    assert dpo["wrong_to_right"] > 3 * dpo["right_to_wrong"]
    assert dpo["acc_t1_interval"][1] >= sft["acc_t1"]
    assert gigabytes < 3
