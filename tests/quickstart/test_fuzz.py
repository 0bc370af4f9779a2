"""Damage to any file of a finished run: no command prints a traceback, and no paid reply is lost."""

import json
from pathlib import Path

import pytest

from sclite.quickstart.stories import problem_set
from tests.damages import damages, survive

pytestmark = pytest.mark.slow


def test_three_hundred_damages_of_a_finished_quickstart(tmp_path, sclite, capsys, monkeypatch):
    whole = tmp_path / "whole"
    small = ("--set", "sft.num_train_epochs=6", "--set", "eval.limit=30")
    assert sclite("quickstart", "--problems", "200", "--run", whole, *small).code == 0
    rows = [{"question": p.question, "answer": p.answer} for p in problem_set("test", 24)]
    Path("held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for number, (name, kind, content) in enumerate(damages(whole, 300)):
        wrong = survive(whole, name, content, tmp_path, capsys, monkeypatch)
        found |= {f"{number} {name} {kind}": wrong} if wrong else {}
    assert found == {}
