"""Long demonstrations: a full quickstart, and one that is killed in every stage (`pytest -m slow`)."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SMALL = ("--problems", "200", "--set", "sft.num_train_epochs=6", "--set", "eval.limit=40")
STAGES = (
    "templates",
    "sft",
    "attempts",
    "corrections",
    "warm-up",
    "pairs",
    "dpo",
    "export",
    "threshold",
    "eval",
)
TIMED = ("seconds", "seconds_first", "signature")


def start(run: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sclite", "quickstart", "--run", str(run), "--json", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def table(run: Path) -> dict:
    """The results of the evaluation without timings."""
    (summary,) = run.glob("eval/*/summary.json")
    models = json.loads(summary.read_text())["models"]
    return {name: {k: v for k, v in figures.items() if k not in TIMED} for name, figures in models.items()}


def kill_during(stage: str, process: subprocess.Popen, after: float) -> None:
    """Send SIGKILL some seconds after the line that announces the stage."""
    for line in process.stderr:
        if re.match(rf"\d+/\d+ {stage}:", line):
            time.sleep(after)
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_run_killed_in_every_stage_ends_with_the_same_results(tmp_path):
    whole = start(tmp_path / "whole", *SMALL)
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    broken = tmp_path / "broken"
    for stage in STAGES:
        kill_during(stage, start(broken, *SMALL), after=1.5)
    last = start(broken, *SMALL)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert table(broken) == table(tmp_path / "whole")
    for name in ("templates.jsonl", "attempts.jsonl", "reviews.jsonl", "pairs.jsonl"):
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_full_quickstart_shows_self_correction_at_work(tmp_path):
    began = time.monotonic()
    process = start(tmp_path / "run")
    output, errors = process.communicate()
    minutes = (time.monotonic() - began) / 60
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{minutes:.1f} minutes on {os.cpu_count()} cores, {gigabytes:.2f} GB at most")
    assert process.returncode == 0, errors
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
