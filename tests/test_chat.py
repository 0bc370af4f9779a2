"""What chat prints of an answer and its review; sessions in a pipe and in a terminal."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sclite.chat import repl
from sclite.chat.repl import Answer, review_off_reason, show
from sclite.config import Config
from sclite.student.base import Reply, Scores
from sclite.student.self_correction import NEVER, SAME_RESULT, Reviewed
from sclite.trace import Step, Trace, render
from tests.tiny import tiny_gguf, tiny_llama

ROOT = Path(__file__).resolve().parents[1]
OWN = Trace(
    (Step("2 + 2 = 5", None, "The units end in 4.", "2 + 2 = 4"), Step("4 + 1 = 6"), Step("6 + 1 = 7")),
    None,
    "7",
)
PLAIN = render(Trace((Step("2 + 2 = 4"), Step("4 + 1 = 5")), None, "5"))


def lines_of(capsys) -> list[str]:
    return [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_a_step_corrected_while_solving_shows_cause_and_correction(capsys):
    show(Answer("?", render(OWN), None))
    assert lines_of(capsys) == [
        "✗ 1 2 + 2 = 5", "why wrong  The units end in 4.", "corrected  2 + 2 = 4",
        "· 2 4 + 1 = 6", "· 3 6 + 1 = 7", "answer 7",
    ]  # fmt: skip


def test_steps_after_a_correction_are_marked_as_not_reviewed(capsys):
    first = render(Trace((Step("2 + 2 = 4"), Step("4 + 1 = 6"), Step("6 + 1 = 7")), None, "7"))
    final = Trace((Step("2 + 2 = 4"), Step("4 + 1 = 5"), Step("5 + 1 = 6")), None, "6")
    show(Answer("?", first, Reviewed(render(final), (-2.0, 3.0, -1.0), 2, "4 and 1 are 5.", "4 + 1 = 5")))
    assert lines_of(capsys) == [
        "✓ 1 2 + 2 = 4", "✗ 2 4 + 1 = 6", "why wrong  4 and 1 are 5.", "corrected  4 + 1 = 5",
        "· 3 5 + 1 = 6", "answer 7 → 6",
    ]  # fmt: skip


class Student:
    """A student with one reply and fixed review scores; too long questions have none."""

    context = trained_context = 512
    offloaded, description = False, ""

    def __init__(self, text=PLAIN, scores=(-3.0, -3.0), finish="stop", correction="unreadable"):
        self.text, self.scores, self.finish, self.correction = text, scores, finish, correction

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def generate(self, requests):
        for index, request in enumerate(requests):
            text = self.correction if request.pieces else self.text
            yield Reply(index, text, 5, 5, "error" if request.messages[-1]["content"].count("word") > 99 else self.finish, "too long")  # fmt: skip

    def score(self, requests):
        yield Scores(0, self.scores or (float("nan"),) * len(requests[0].marks), 5)


def chatted(monkeypatch, student, threshold=0.0, lines=("How many?",), **options) -> bool:
    monkeypatch.setattr(repl, "check_gguf", lambda path: None)
    monkeypatch.setattr(repl, "Engine", lambda *_, **__: student)
    monkeypatch.setattr("sys.stdin", iter_lines(lines))
    return repl.run_chat(Path("x.gguf"), Config(), threshold, self_correct=True, **options)


def iter_lines(lines):
    import io

    return io.StringIO("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(
    ("student", "threshold", "options", "message"),
    [
        (Student(), None, {}, "review is off: x.gguf has no fitted threshold"),
        (Student(), NEVER, {}, "review is off: no threshold improved the answers of x.gguf"),
        (Student(scores=()), 0.0, {}, "too long to review"),
        (Student(scores=(-3.0, 3.0)), 0.0, {}, "the review could not be read"),
        (Student(finish="length"), 0.0, {}, "cut off at 1024 tokens; increase eval.max_tokens"),
        (Student(text="<Step1>blue\n</Step1>", scores=(-3.0,)), 0.0, {}, "the steps reach no answer"),
        (Student(text="asdf"), 0.0, {}, "the answer has no steps to review"),
        (Student(), 0.0, {"familiar": lambda _: False}, "not trained on this kind of problem"),
    ],
)
def test_unreviewed_steps_are_never_marked_right(monkeypatch, capsys, student, threshold, options, message):
    assert chatted(monkeypatch, student, threshold, question="How many?", **options)
    out, err = capsys.readouterr()
    assert "✓" not in out
    assert message in " ".join(err.split())


def test_steps_without_an_error_are_marked_right(monkeypatch, capsys):
    chatted(monkeypatch, Student(), question="How many?")
    assert lines_of(capsys) == ["✓ 1 2 + 2 = 4", "✓ 2 4 + 1 = 5", "answer 5"]
    same = Reviewed(PLAIN, (-3.0, 3.0), 2, "why", "4 + 1 = 5", 3, SAME_RESULT)
    show(Answer("?", PLAIN, same))
    assert "✓ 1 2 + 2 = 4" in capsys.readouterr().out


def test_without_self_correct_a_note_says_how_to_turn_it_on():
    assert "turn it on with --self-correct" in review_off_reason(Path("x.gguf"), Config(), 0.0, False)
    free = Config().model_copy(update={"review": Config().review.model_copy(update={"mode": "free"})})
    assert review_off_reason(Path("x.gguf"), free, None, True) == ""


def test_a_pipe_gets_one_answer_per_question_despite_errors(monkeypatch, capsys):
    lines = ("How many?", "", "   ", "word " * 100, "[/red] \x1b[2J?")
    assert not chatted(monkeypatch, Student(text=PLAIN.replace(">5<", ">5 [/red]\x1b[2J\n6<")), lines=lines)
    out, err = capsys.readouterr()
    assert out == "5 [/red]␛[2J 6\n\n5 [/red]␛[2J 6\n"
    assert "error: cannot answer the question" in err


def test_a_json_answer_says_why_it_was_not_reviewed(monkeypatch, capsys):
    chatted(monkeypatch, Student(), None, question="How many?", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == "5"
    assert "no fitted threshold" in found["note"]


def test_unfamiliar_problems_get_a_note(monkeypatch, capsys):
    chatted(monkeypatch, Student(), lines=("a story", "What?"), example="a story", familiar="a story".__eq__)
    assert capsys.readouterr().err.count("not trained on this kind of problem") == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], "llama.cpp cannot load"),
        (lambda whole: whole[:4], "llama.cpp cannot load"),
        (lambda whole: b"", "is not a GGUF file"),
        (None, "does not exist"),
    ],
)
def test_a_damaged_or_missing_gguf_is_reported(sclite, tmp_path, damage, message):
    path = tmp_path / "small.gguf"
    if damage is not None:
        path.write_bytes(
            damage(tiny_gguf(tiny_llama(tmp_path / "tiny"), tmp_path / "whole.gguf").read_bytes())
        )
    ended = sclite("chat", "--model", path, "How many?")
    assert (ended.code, ended.out) == (3, "")
    assert message in ended.error
    assert ended.err.endswith(f"{ended.error}\n{ended.hint}\n")


# -- in a terminal -------------------------------------------------------------------------------------------------

SESSION = """
import sys, time
from pathlib import Path
from sclite.chat import repl
from sclite.config import Config
from sclite.errors import DataError
from tests.test_chat import Student

def answer(engine, question, *_):
    if question == "slow":
        print("begun", flush=True)
        time.sleep(60)
    if question == "long":
        raise DataError("too long", "shorten it")
    return repl.Answer(question, f"read {len(question.splitlines())} lines: {question!r}", None)

repl.check_gguf, repl.Engine, repl._answer = (lambda path: None), (lambda *_, **__: Student()), answer
repl.run_chat(Path("x.gguf"), Config(), None, self_correct=False)
print("left")
"""


class Terminal:
    """A program in its own terminal: `send` input, `wait` for output."""

    def __init__(self, code: str):
        self.ours, theirs = pty.openpty()
        environment = {
            **os.environ,
            "TERM": "xterm",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        command = [sys.executable, "-c", code]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # so that Ctrl-C is its own
        )  # fmt: skip
        os.close(theirs)
        self.written = ""

    def send(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait(self, text: str, seconds: float = 60) -> str:
        """The output up to this text, which must come. What follows is kept for the next call."""
        end = time.monotonic() + seconds
        while text not in self.written:
            ready, _, _ = select.select([self.ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.written!r}"
            try:
                self.written += os.read(self.ours, 1 << 16).decode("utf-8", "replace")
            except OSError:
                raise AssertionError(f"it ended without {text!r}: {self.written!r}") from None
        before, _, self.written = self.written.partition(text)
        return before


@pytest.fixture
def terminal():
    pytest.importorskip("prompt_toolkit", reason="the environment lacks prompt_toolkit or what it needs")
    opened = Terminal(SESSION)
    yield opened
    opened.process.kill()
    os.close(opened.ours)


@pytest.mark.parametrize("leave", ["/bye\r", "exit\r", "quit\r", "\x04"])
def test_a_session_takes_pastes_and_survives_errors_and_ctrl_c(terminal, leave):
    terminal.wait("\x1b[?2004h")  # the terminal is asked to mark what is pasted
    terminal.send("\r  \r")
    terminal.send("\x1b[200~Emma has 4 apples.\rShe gets 2.\r\r; echo How many?\x1b[201~")
    time.sleep(0.3)  # the Enter that follows is typed, not pasted
    terminal.send("\r")
    terminal.wait("read 4 lines")
    terminal.send("long\r")
    terminal.wait("too long")
    terminal.send("slow\r")
    terminal.wait("begun")
    terminal.send("\x03")
    terminal.wait("interrupted")
    terminal.wait("\x1b[?2004h")
    terminal.send("half a line\x03")
    terminal.wait("Use Ctrl-D or /bye to exit")
    terminal.send("still here?\r")
    terminal.wait("read 1 lines: 'still here?'")
    terminal.wait("\x1b[?2004h")
    terminal.send(leave)
    terminal.wait("left")
    assert terminal.process.wait(timeout=30) == 0
