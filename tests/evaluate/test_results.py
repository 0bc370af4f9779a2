"""Each dataset and limit has its own result folder, never overwritten by another evaluation."""

import os

import pytest

from sclite import evaluation
from sclite.config import Config
from sclite.context import Context
from sclite.data import problems
from sclite.evaluate.evaluate import result_folder, summaries
from sclite.records import Problem


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"source": "data/gsm8k-test.jsonl"}, "eval/gsm8k-test"),
        ({"source": "gsm8k-test.jsonl.gz", "limit": 20}, "eval/gsm8k-test-limit-20"),
        ({"source": "openai/gsm8k", "subset": "main"}, "eval/gsm8k-main-test"),
        ({"source": "openai/gsm8k", "subset": "main", "split": "test[:20]"}, "eval/gsm8k-main-test-20"),
        ({"source": "../Aufgaben: ä & b.csv"}, "eval/Aufgaben-b"),
        ({"source": ".jsonl"}, "eval/problems"),
    ],
)
def test_dataset_and_limit_name_the_folder(run, monkeypatch, settings, folder):
    rows = [Problem(id=str(n), question=f"{n}?", answer="1") for n in range(40)]
    monkeypatch.setattr(problems, "load_problems", lambda *_, **__: rows)
    config = Config.model_validate({"eval": settings})
    assert evaluation.held_out(Context(config, run, None)).folder == folder


def test_another_dataset_with_the_same_name_gets_its_own_folder(run, tmp_path):
    folders = []
    for place in ("a", "b", "a"):
        dataset = str(tmp_path / place / "test.jsonl")
        folders.append(result_folder(run, dataset, ["test"], 500, 500))
        run.write_json(f"{folders[-1]}/summary.json", {"dataset": dataset, "folder": folders[-1]})
    assert folders[0] == folders[2] == "eval/test"
    assert folders[1].startswith("eval/test-")
    assert len(folders[1]) == len("eval/test-") + 6


def test_newest_summary_comes_first_and_damaged_ones_are_skipped(run):
    for age, name in enumerate(("new", "old", "damaged")):
        run.write_json(f"eval/{name}/summary.json", {"n": age})
        os.utime(run.path(f"eval/{name}/summary.json"), (1000 - age, 1000 - age))
    run.path("eval/damaged/summary.json").write_text('{"n": ')
    assert summaries(run) == [{"n": 0}, {"n": 1}]
