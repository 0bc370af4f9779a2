"""The chat: reviewed answers as text, lines and objects; its commands; sessions in a terminal."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sclite.chat import answer, conversation, repl
from sclite.chat.answer import Settings
from sclite.chat.conversation import KEYS, Chat
from sclite.config import Config
from sclite.errors import DATA, DONE, NETWORK, DataError, TeacherError, UsageError
from sclite.quickstart.stories import problem_set
from sclite.quickstart.tutor import MODEL
from sclite.records import Feedback, Pair, Review
from sclite.run import Run
from sclite.trace import Step, Trace, render
from tests.chat.scripted import CORRECTING, PLAIN, WRONG, Scripted
from tests.toy import raises, tiny_gguf, write_rows


def chatted(monkeypatch, run, student, at=None, lines=("How many?",), config=None, **options) -> int:
    monkeypatch.setattr(answer, "check_gguf", lambda path: None)
    monkeypatch.setattr(answer, "Engine", lambda *_, **__: student)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return repl.run_chat(Path("x.gguf"), config or Config(), at, run, **options)


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (Scripted(), {"off": "review is off: too few problems"}, "review is off: too few problems"),
        (Scripted(scores=()), {}, "too long to review"),
        (Scripted(scores=(-3.0, 3.0)), {}, "the review could not be read"),
        (Scripted(finish="length"), {}, "cut off at 5 tokens; the context is full"),
        (Scripted(text="<Step1>blue\n</Step1>", scores=(-3.0,)), {}, "the steps do not lead to an answer"),
        (Scripted(text="asdf"), {}, "the answer has no steps to review"),
    ],
)
def test_notes_say_what_an_answer_lacks(monkeypatch, capsys, run, student, options, message):
    assert chatted(monkeypatch, run, student, question="How many?", **options) == DONE
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_pipe_gets_one_answer_per_question_or_the_whole_reply_without_one(monkeypatch, capsys, run):
    lines = ("How many?", "", "   ", "word " * 100, "[/red] \x1b[2J?")
    student = Scripted(text=PLAIN.replace(">5<", ">5 [/red]\x1b[2J\n6<"))
    assert chatted(monkeypatch, run, student, lines=lines) == DATA
    out, err = capsys.readouterr()
    assert out == "5 [/red]␛[2J 6\n\n5 [/red]␛[2J 6\n"
    assert "error: cannot answer the question" in err
    assert chatted(monkeypatch, run, Scripted(text="It is\nnine."), lines=("How many?", "")) == DONE
    assert capsys.readouterr().out == "It is nine.\n"


def test_json_gives_one_object_per_question(monkeypatch, capsys, run):
    lines = ("How many?", "word " * 100)
    assert chatted(monkeypatch, run, Scripted(**CORRECTING), lines=lines, as_json=True) == DATA
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["answer"], first["accused"], first["correction"]) == ("6", 2, "4 + 1 = 5")
    assert first["step_scores"] == [-2.0, 3.0, -1.0]
    assert first["tokens"] == 15
    assert second["error"] == "cannot answer the question: too long"
    for question in ("How many?", None):  # alone, or in a pipe
        chatted(monkeypatch, run, Scripted(), question=question, as_json=True, off="review is off: why")
        found = json.loads(capsys.readouterr().out)
        assert found["answer"] == "5"
        assert found["note"] == "review is off: why"


def test_a_pipe_ends_with_the_exit_code_of_its_last_error(monkeypatch, run):
    lines = ("word " * 100, "How many?")
    assert chatted(monkeypatch, run, Scripted(), lines=lines, endpoint=Scripted(), off="off") == NETWORK
    assert chatted(monkeypatch, run, Scripted(), lines=lines) == DATA


def test_a_damaged_or_missing_gguf_is_reported(sclite, folder, tmp_path):
    whole, path = tiny_gguf(folder, tmp_path / "whole.gguf").read_bytes(), tmp_path / "small.gguf"
    for content in (None, whole[: len(whole) // 2], whole[:4], b""):
        if content is not None:
            path.write_bytes(content)
        ended = sclite("chat", "--model", path, "How many?")
        assert (ended.code, ended.out) == (3, "")
        assert ("does not exist" if content is None else "llama.cpp cannot load") in ended.error
        assert ended.err.endswith(f"{ended.error}\n{ended.hint}\n")


ENDPOINT = """
from pathlib import Path
from sclite.chat import repl
from sclite.config import Config
from sclite.run import Run
from sclite.student.base import Reply, Student

class Remote(Student):
    def generate(self, requests):
        yield Reply(0, "<Step1>4 + 1 = 5</Step1><Answer>5</Answer>", 5, 20, "stop")

repl.run_chat(Path("openai/large"), Config(), None, Run("run"), endpoint=Remote(), off="review is off")
print("left", flush=True)
"""


@pytest.mark.parametrize("terminal", [{"code": ENDPOINT}], indirect=True, ids=["endpoint"])
def test_a_session_with_an_endpoint_never_asks_for_scores(terminal):
    for typed, shown in (
        ("", "openai/large"), ("/set mode guided", "/set mode free"), ("/correct on", "review is on"),
        ("How many?", "4 + 1 = 5"), ("/why", "only the steps of a GGUF"), ("/set temperature 3", "from 0 to 2"),
        ("/load none.json", "none.json: No such file"), ("/save /", "Is a directory"), ("?", "settings of /set"),
    ):  # fmt: skip
        terminal.send(typed and f"{typed}\r")
        terminal.wait(shown)
        terminal.wait(CLEARED)
    terminal.send("/EXIT\r")
    terminal.wait("left")


@pytest.fixture
def chat(run):
    return Chat(Scripted(**CORRECTING), 512, Path("x.gguf"), "x.gguf", run, Settings())


def test_questions_are_solved_alone_unless_history_is_on(chat):
    assert chat.ask("caf\udce9?").question == "caf\ufffd?"  # as Python reads $'caf\xe9?' in an argument
    assert "caf\ufffd?" in chat.student.asked[0].messages[-1]["content"]
    chat.command("/clear")
    chat.ask("How many?")
    chat.ask("And now?")
    assert "How many?" not in chat.student.asked[-1].messages[-1]["content"]
    chat.command("/set history on")
    chat.ask("And then?")
    asked = chat.student.asked[-1].messages[-1]["content"]
    assert "How many?\nAnswer: 6\n\nAnd now?\nAnswer: 6\n\nAnd then?" in asked
    assert chat.answers[-1].question == "And then?"


def test_a_history_that_is_too_long_says_how_to_clear_it(chat):
    chat.command("/set history on")
    chat.ask("old " + "word " * 60)
    with raises(DataError, "cannot answer the question: too long", hint="/clear the history"):
        chat.ask("new " + "word " * 60)
    assert [answer.complete for answer in chat.answers] == [True, False]
    chat.command("/clear")
    with raises(DataError, "cannot answer the question: too long", hint="shorten the question"):
        chat.ask("new " + "word " * 100)


def test_a_failed_call_of_an_endpoint_is_an_error_of_the_teacher(chat):
    chat.context = 0
    with raises(TeacherError, "too long", hint="ask again"):
        chat.ask("word " * 100)


def test_set_and_correct_change_the_next_request(chat, capsys):
    chat.command("/correct off")
    assert chat.ask("How many?").review is None
    chat.command("/set threshold 4")
    chat.command("/correct on")
    assert chat.ask("How many?").review.accused is None
    with pytest.raises(UsageError):
        chat.command("/correct maybe")
    for setting in ("temperature 0.5", "seed 7", "max_tokens 99"):
        chat.command(f"/set {setting}")
    chat.ask("How many?")
    first = [request for request in chat.student.asked if not request.pieces][-1]
    assert (first.temperature, first.seed, first.max_tokens) == (0.5, 7, 99)
    number = ("temperature hot", "temperature 2.1", "temperature", "seed -1", "seed 1e22", "max_tokens 0")
    for setting in (*number, "max_tokens 99999999999", "threshold nan", "history perhaps", "colour red"):
        with pytest.raises(UsageError, match=f"cannot set {setting}") as error:
            chat.command(f"/set {setting}")
        assert ("from" in error.value.hint) == (setting.split()[0] in KEYS)
    chat.command("/set threshold 0.20737024704638296")
    capsys.readouterr()
    chat.command("/set")
    expected = "temperature 0.5, seed 7, max_tokens 99, threshold 0.2074, confidence_weight 0, rounds 1, mode guided, history off"
    assert " ".join(capsys.readouterr().out.split()) == expected


def test_retry_samples_again_and_undo_forgets(chat):
    chat.ask("How many?")
    chat.command("/retry")
    assert [request.temperature for request in chat.student.asked if not request.pieces] == [0.0, 0.8]
    assert len(chat.answers) == 1
    chat.student.texts, chat.student.finish = ("",) * 3, "error"
    with pytest.raises(DataError):
        chat.command("/retry")
    assert [answer.first.text for answer in chat.answers] == [WRONG]
    chat.command("/undo")
    for command in ("/undo", "/retry", "/why", "/good", "/compare"):
        with pytest.raises(UsageError, match="no answer yet"):
            chat.command(command)


def test_retry_after_a_failed_question_asks_that_one_again(chat):
    chat.ask("How many?")
    with pytest.raises(DataError):
        chat.ask("word " * 100)
    for command in ("/good", "/why", "/compare"):
        with pytest.raises(UsageError, match="has no answer"):
            chat.command(command)
    with pytest.raises(DataError):
        chat.command("/retry")
    assert "word word" in chat.student.asked[-1].messages[-1]["content"]
    chat.command("/set history on")
    assert chat.ask("And now?").asked == "How many?\nAnswer: 6\n\nAnd now?"
    chat.command("/undo")
    chat.command("/undo")
    assert [answer.question for answer in chat.answers] == ["How many?"]


def test_text_before_ctrl_c_is_kept_as_the_answer(chat, run):
    class Interrupted(Scripted):
        def stream(self, ask, cancel=None, pieces=True):
            yield "<Step1>2 + 2 = 4</Step1><Ste"
            raise KeyboardInterrupt

    chat.ask("How many?")
    whole, chat.student = chat.student, Interrupted()
    for typed in ("/retry", "And now?", "/retry"):
        with pytest.raises(KeyboardInterrupt):
            chat.command(typed) if typed.startswith("/") else chat.ask(typed)
        assert chat.answers[-1].first.text == "<Step1>2 + 2 = 4</Step1><Ste"
        for command in ("/good", "/bad", "/why"):
            with pytest.raises(UsageError, match="was stopped"):
                chat.command(command)
    assert [answer.question for answer in chat.answers] == ["How many?", "And now?"]
    chat.student = whole
    chat.command("/set history on")
    chat.ask("And then?")
    assert chat.answers[-1].asked == "And then?"  # a stopped answer is not part of the conversation


def test_why_lists_the_probability_of_each_step(chat, capsys):
    chat.ask("How many?")
    capsys.readouterr()
    chat.command("/why")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert rows[1:] == [
        ["1", "2", "+", "2", "=", "4", "11.9", "%", "-2.00"],
        ["2", "4", "+", "1", "=", "6", "95.3", "%", "+3.00", "flagged"],
        ["3", "6", "+", "1", "=", "7", "26.9", "%", "-1.00"],
    ]
    corrected = Trace((Step("2 + 2 = 5", None, "Too many.", "2 + 2 = 4"), Step("4 + 1 = 5")), None, "5")
    chat.student = Scripted(render(corrected))
    chat.ask("How many?")
    capsys.readouterr()
    chat.command("/why")
    shown = capsys.readouterr().out
    assert "2 + 2 = 4" in shown  # the review scores the corrected step
    assert "2 + 2 = 5" not in shown
    chat.student = Scripted(render(Trace((Step("The list [a, b] has 2."), Step("See [/b].")), None, "2")))
    chat.ask("How many?")
    chat.command("/why")
    shown = capsys.readouterr().out
    assert "The list [a, b] has 2." in shown
    assert "See [/b]." in shown


def test_saved_conversations_can_be_loaded(chat, tmp_path):
    answer = chat.ask("How many?")
    chat.command(f"/save {tmp_path}/my chat.json")
    chat.command("/clear")
    assert chat.answers == []
    chat.command(f"/load {tmp_path}/my chat.json")
    assert chat.answers == [answer]
    (tmp_path / "other.json").write_text('[{"question": 3}]')
    with raises(DataError, "is not a saved conversation", hint="/save"):
        chat.command(f"/load {tmp_path}/other.json")
    with pytest.raises(UsageError, match="/load needs a file name"):
        chat.command("/load")


def test_verdicts_go_to_the_feedback_of_the_run(chat, run):
    chat.ask("How many?")
    chat.command("/bad")
    chat.command("/good")
    bad, good = run.read("feedback.jsonl", Feedback)
    assert (bad.good, good.good) == (False, True)
    assert (bad.question, bad.attempt, bad.accused) == ("How many?", WRONG, 2)
    assert "5 + 1 = 6" in bad.final


def test_compare_shows_the_base_models_answer_or_how_to_get_it(chat, capsys, monkeypatch, tmp_path):
    chat.ask("How many?")
    with raises(UsageError, r"no base-\*.gguf", hint="sclite eval"):
        chat.command("/compare")
    chat.path = tmp_path / "x.gguf"
    (tmp_path / "base-q8_0.gguf").touch()
    monkeypatch.setattr(conversation, "open_gguf", lambda *_: Scripted(text="It is 9."))
    capsys.readouterr()
    chat.command("/compare")
    out = capsys.readouterr().out
    assert "It is 9." in out
    assert "answer 7, after review 6" in out


def test_help_lists_the_commands(chat, capsys):
    with pytest.raises(UsageError, match="unknown command: /clera") as error:
        chat.command("/clera")
    assert "/help" in error.value.hint
    chat.command("/Help")
    out = capsys.readouterr().out
    for name in "help clear retry undo set correct compare why save load good bad bye".split():  # noqa: SIM905
        assert f"/{name} " in out


ROOT = Path(__file__).resolve().parents[2]
CLEARED = "\x1b[?2004h"
"""The terminal is asked to mark pasted text: a new prompt."""


class Terminal:
    """A program in its own terminal: `send` input, `wait` for output."""

    def __init__(self, code: str, **environment: str):
        self.ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", **environment, "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-c", code]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # sets the controlling terminal, for Ctrl-C
        )  # fmt: skip
        os.close(theirs)
        self.written = ""

    def send(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait(self, text: str, seconds: float = 60) -> str:
        """The output up to this text, which must appear. The rest is kept for the next call."""
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


SESSION = """
import sys, time
from pathlib import Path
from sclite.chat import answer, repl
from sclite.config import Config
from sclite.run import Run
from sclite.student.base import Reply
from tests.chat.scripted import Scripted

class Slow(Scripted):
    def stream(self, ask, cancel=None, pieces=True):
        asked = ask.messages[-1]["content"]
        if "slow" in asked:
            yield "<Step1>begun"
            time.sleep(60)
        if "four" in asked:
            lines = asked.partition("four")[2].count("\\n")
            yield Reply(0, f"read {lines} line ends{' and U+FFFD' * ('\ufffd' in asked)}", 5, 20, "stop")
        else:
            yield from super().stream(ask, cancel, pieces)

answer.check_gguf, answer.Engine = (lambda path: None), (lambda *_, **__: Slow())
repl.run_chat(Path("x.gguf"), Config(), None, Run("run"))
print("left", flush=True)
"""


@pytest.fixture
def terminal(request, tmp_path):
    pytest.importorskip("prompt_toolkit", reason="the environment lacks prompt_toolkit or what it needs")
    options = {"code": SESSION, **getattr(request, "param", {})}
    opened = Terminal(**options, XDG_STATE_HOME=str(tmp_path))
    yield opened
    opened.process.kill()
    os.close(opened.ours)


@pytest.mark.parametrize("leave", ["Exit\r", "/quit\r", "\x04", "\x03\x03"])
def test_a_session_ends_with_a_word_ctrl_d_or_two_ctrl_c(terminal, leave):
    terminal.wait(CLEARED)
    terminal.send(leave)
    terminal.wait("left")
    assert terminal.process.wait(timeout=30) == 0


def test_a_session_takes_pastes_and_survives_errors_and_ctrl_c(terminal, tmp_path):
    terminal.wait(CLEARED)
    terminal.send("\r  \r")
    terminal.send("\x1b[200~four\r\r; echo apples\r\rHow many?\r\r\r\x1b[201~")
    time.sleep(0.3)  # the Enter that follows is typed, not pasted
    terminal.send("\r")
    terminal.wait("read 4 line ends")
    terminal.wait(CLEARED)
    os.write(terminal.ours, b"four caf\xe9s\r")
    terminal.wait("and U+FFFD")
    terminal.wait(CLEARED)
    terminal.send("word " * 100 + "\r")
    terminal.wait("too long")
    terminal.send("/hlep\r")
    terminal.wait("/help")
    terminal.send("slow\r")
    for shown in ("solving", "Ctrl-C to stop", "begun"):
        terminal.wait(shown)
    terminal.send("ahead")
    time.sleep(0.3)
    terminal.send("\x03")
    assert "ahead" not in terminal.wait("stopped")
    terminal.wait(CLEARED)
    terminal.send("half a line\x03")
    terminal.send("still here?\r")
    terminal.wait("4 + 1 = 5")
    terminal.wait("tokens/s; review")
    terminal.wait(" s, 3 prompt tokens; context 25/512")
    terminal.wait(CLEARED)
    terminal.send("/bye\r")
    terminal.wait("left")
    assert terminal.process.wait(timeout=30) == 0
    history = (tmp_path / "sclite" / "chat_history").read_text()
    assert "still here?" in history


@pytest.mark.parametrize("terminal", [{"TERM": "dumb"}, {"NO_COLOR": "1"}], indirect=True, ids=str)
def test_steps_appear_without_colours_or_cursor_control(terminal):
    terminal.wait("lists the commands")
    time.sleep(1)
    terminal.send("How many?\r")
    shown = terminal.wait("tokens/s")
    assert "4 + 1 = 5" in shown
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)
    terminal.send("/bye\r")
    terminal.wait("left")


STORY = "Tom has 20 nuts. He buys 11 more. He sells 12 nuts. How many nuts does Tom have now?"
JUDGED = """
from pathlib import Path
from sclite.chat import answer, repl
from sclite.config import Config
from sclite.run import Run
from sclite.trace import Step, Trace, render
from tests.chat.scripted import Scripted

text = render(Trace((Step("20 + 11 = 31 nuts."), Step("31 - 12 = 18 nuts.")), "Follow the amount.", "18"))
answer.check_gguf, answer.Engine = (lambda path: None), (lambda *_, **__: Scripted(text))
repl.run_chat(Path("x.gguf"), Config(), None, Run({run!r}), off="no review")
"""


def test_answer_judged_bad_in_a_terminal_becomes_a_pair(sclite, tmp_path):
    """From /bad to pairs.jsonl, with the bundled teacher and no student: it solves the question and corrects the answer."""
    pytest.importorskip("prompt_toolkit", reason="the environment lacks prompt_toolkit or what it needs")
    run, tried = Run(tmp_path / "run"), problem_set("train", 3)
    chat = Terminal(JUDGED.format(run=str(run.folder)), XDG_STATE_HOME=str(tmp_path))
    chat.wait(CLEARED)
    for question, verdict in ((STORY, "/bad"), (tried[0].question, "/good")):
        for typed, shown in ((question, "tokens/s"), (verdict, "build-data")):
            chat.send(f"{typed}\r")
            chat.wait(shown)
            chat.wait(CLEARED)
    chat.send("/bye\r")
    assert chat.process.wait(timeout=30) == 0
    os.close(chat.ours)
    write_rows("sums.jsonl", [row.model_dump(exclude={"id"}) for row in tried])
    work = {"steps": ["It is 1."], "answer": "1"}
    write_rows("works.jsonl", [{"question": row.question, **work} for row in tried])
    chosen = {"teacher.model": MODEL, "problems.source": "sums.jsonl", "attempts.source": "works.jsonl"}
    options = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
    command = ("build-data", "--only", "corrections", "--run", "run", *options)
    built = json.loads(sclite(*command, "--json").out)
    assert built["feedback"] == {"good": 0, "bad": 1}
    assert built["dropped"]["verdict_contradicts_the_answer"] == 1  # the problem's answer is not 18
    pairs = [row for row in run.read("pairs.jsonl", Pair) if row.id.startswith("feedback-")]
    assert [(row.step, row.chosen) for row in pairs] == [(1, "</Step1>\n"), (2, "<Cause>")]
    review = next(row for row in run.read("reviews.jsonl", Review) if row.id == pairs[0].id)
    assert "31 - 12 = 19" in review.correction
    before = {path: path.read_bytes() for path in run.folder.glob("*.jsonl")}
    again = sclite(*command)
    assert "feedback: 0 good, 1 bad" in again.err
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads(run.path("done/feedback.json").read_text())["counts"] == {"good": 0, "bad": 1}
