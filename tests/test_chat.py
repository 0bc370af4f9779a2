"""What chat shows of an answer: its steps, what the student mended while it solved, and what the review mended."""

import io
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

from sclite.chat import repl
from sclite.chat.repl import _show
from sclite.config import Config
from sclite.student.review import Reviewed, Settings
from sclite.trace import Step, Trace, render

OWN = Trace(
    (Step("2 + 2 = 5", None, "The units end in 4.", "2 + 2 = 4"), Step("4 + 1 = 6"), Step("6 + 1 = 7")),
    None,
    "7",
)


def lines_of(capsys) -> list[str]:
    return [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_a_step_that_the_student_mended_while_solving_is_shown_with_its_reason_and_correction(capsys):
    _show(render(OWN), None, Settings())
    assert lines_of(capsys) == [
        "✗ 1 2 + 2 = 5", "why wrong  The units end in 4.", "corrected  2 + 2 = 4",
        "2 4 + 1 = 6", "3 6 + 1 = 7", "answer 7",
    ]  # fmt: skip


def test_what_the_review_mends_comes_after_what_was_mended_while_solving(capsys):
    final = Trace((Step("2 + 2 = 4"), Step("4 + 1 = 5"), Step("5 + 1 = 6")), None, "6")
    review = Reviewed(render(final), (-2.0, 3.0, -1.0), 2, "4 and 1 are 5.", "4 + 1 = 5")
    _show(render(OWN), review, Settings())
    assert lines_of(capsys) == [
        "✗ 1 2 + 2 = 5", "why wrong  The units end in 4.", "corrected  2 + 2 = 4",
        "✗ 2 4 + 1 = 6", "why wrong  4 and 1 are 5.", "corrected  4 + 1 = 5",
        "✓ 3 5 + 1 = 6", "answer 7 → 6",
    ]  # fmt: skip


def test_where_a_student_knows_one_kind_of_problems_others_are_told_of(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(repl, "check_gguf", lambda path: None)
    monkeypatch.setattr(
        repl, "Engine", lambda *_, **__: nullcontext(SimpleNamespace(offloaded=False, description=""))
    )
    monkeypatch.setattr(repl, "_answer", lambda _, question, *__: asked.append(question))
    monkeypatch.setattr("sys.stdin", io.StringIO("a story\nWhat is 1 + 1?\n"))
    repl.talk(Path("x.gguf"), Config(), 0.0, self_correct=False, example="a story", familiar="a story".__eq__)
    assert asked == ["a story", "What is 1 + 1?"]
    assert capsys.readouterr().err.count("it has learned no problems of this kind") == 1
