"""Chat sessions in a real terminal, tmux: at 80 and 120 columns, in colors, with NO_COLOR, and with TERM=dumb.

SCLITE_RECORDINGS=FOLDER keeps the screens, with their colors; SCLITE_RECORDED_RUN=RUN chats with the student of a
quickstart run instead of a scripted one. docs/picture.py makes the README's picture of one of these screens.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

if not shutil.which("tmux"):
    pytest.skip("needs tmux: apt-get install tmux", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
RUN = os.environ.get("SCLITE_RECORDED_RUN", "")
SCRIPTED = """
import re, sys, time
from pathlib import Path
from sclite.chat import answer, conversation, repl
from sclite.config import Config
from sclite.run import Run
from tests.chat.scripted import CORRECTING, Scripted

class Slow(Scripted):
    def stream(self, ask, cancel=None, pieces=True):
        for found in super().stream(ask, cancel, pieces):
            if isinstance(found, str):
                for piece in re.findall(r"\\s*\\S+", found):
                    yield piece
                    time.sleep(0.1)
            else:
                yield found

Path("base-q8_0.gguf").touch()
answer.check_gguf = lambda path: None
answer.Engine = lambda *_, **__: Slow(**CORRECTING)
conversation.open_gguf = lambda *_: Scripted(text="It is 9.")
repl.run_chat(Path("dpo-q8_0.gguf"), Config(), None, Run("run"))
"""
STORY = (
    "Emma has 24 nuts. She loses 3 of them. She finds 11 nuts at home. She gives 9 nuts to Rosa. "
    "How many nuts does Emma have now?"
)
QUESTION = os.environ.get("SCLITE_RECORDED_QUESTION", STORY)
PASTED = "Tom has 20 nuts.\n\ntouch reached\n\nHe buys 11 more nuts.\n; touch reached\n\nHow many nuts does Tom have now?\n"


class Screen:
    """A shell in tmux: `type` and `paste` into it, `wait` for what it shows."""

    def __init__(self, folder: Path, width: int, environment: dict[str, str]):
        self.socket, self.environment, self.kept = str(folder / "tmux"), environment, 0
        record = os.environ.get("SCLITE_RECORDINGS")
        name = "-".join([str(width), *(f"{key}_{value}" for key, value in environment.items())])
        self.record = Path(record) / name if record else None
        clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TMUX", "CI")}
        clean |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        clean["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]])
        clean |= {"XDG_STATE_HOME": str(folder), "LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
        setting = [f"{key}={value}" for key, value in environment.items()]
        shell = ["env", "-u", "COLUMNS", "PS1=shell$ ", *setting, "bash", "--norc", "--noprofile"]
        size = ["-x", str(width), "-y", "45"]
        command = ["-f", "/dev/null", "new-session", "-d", *size, "-c", str(folder), shlex.join(shell)]
        self.tmux(*command, environment=clean)

    def tmux(self, *command: str, environment: dict[str, str] | None = None) -> str:
        return subprocess.check_output(["tmux", "-S", self.socket, *command], text=True, env=environment)

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.tmux("capture-pane", "-p").rstrip().split("\n")]

    def type(self, text: str, *keys: str) -> None:
        self.tmux("send-keys", "-l", text)
        self.tmux("send-keys", *(keys or ("Enter",)))

    def paste(self, text: str) -> None:
        self.tmux("set-buffer", text)
        self.tmux("paste-buffer", "-p")

    def wait(self, *expected: str) -> str:
        """The screen as soon as it matches all the patterns."""
        end = time.monotonic() + 90
        while not all(re.search(each, shown := "\n".join(self.lines())) for each in expected):
            assert time.monotonic() < end, f"{expected} did not come:\n{shown}"
            time.sleep(0.02)
        if self.record is not None:
            self.record.mkdir(parents=True, exist_ok=True)
            self.kept += 1
            colored = self.tmux("capture-pane", "-p", "-e")
            (self.record / f"{self.kept:02}.txt").write_text(colored, encoding="utf-8")
        return shown


ENVIRONMENTS = [
    pytest.param({}, id="colors"),
    pytest.param({"NO_COLOR": "1"}, id="NO_COLOR", marks=pytest.mark.slow),
    pytest.param({"TERM": "dumb"}, id="dumb"),
]


@pytest.fixture(params=[80, pytest.param(120, marks=pytest.mark.slow)])
def width(request) -> int:
    return request.param


@pytest.fixture(params=ENVIRONMENTS)
def screen(request, tmp_path, width) -> Iterator[Screen]:
    pytest.importorskip("prompt_toolkit", reason="pip install prompt_toolkit")
    opened = Screen(tmp_path, width, request.param)
    yield opened
    opened.tmux("kill-server")


def test_a_session_shows_the_correction_and_keeps_what_is_pasted_from_the_shell(screen, width, tmp_path):
    dumb, colors = (screen.environment.get("TERM") == "dumb"), not screen.environment
    if RUN:
        shutil.copytree(RUN, tmp_path / "run")
        command = "sclite chat --self-correct --run run"
    else:
        (tmp_path / "session.py").write_text(SCRIPTED)
        command = f"{sys.executable} session.py"
    screen.wait(r"\$")
    screen.type(command)
    screen.wait("lists the commands")
    if not dumb:
        screen.wait("review guided")
    time.sleep(1)  # until the prompt is shown
    screen.type(QUESTION)
    if not dumb:  # the wrong step is on the screen before its correction is complete
        screen.wait(r"solving|reviewing|correcting")
        screen.wait(r"✗ +\d+ +\d+%", r"correcting")
    shown = screen.wait("tokens/s; review")
    assert re.search(r"✗ +(\d) +\d+% .+\n +why .+\n(?: {12} .+\n)* +→ +\1 ", shown)
    assert re.search(r"\n  answer \d+  \(was \d+\)\n", shown)
    colored = screen.tmux("capture-pane", "-p", "-e")
    assert bool(re.search(r"\x1b\[[0-9;]*3[1-6]m", colored)) == (colors)
    assert max(map(len, shown.split("\n"))) <= width
    screen.type("/why")
    shown = screen.wait("log-odds", "flagged")
    assert re.search(r"\d+\.\d % +│? *\+\d+\.\d\d", shown), shown
    screen.type("/compare")
    screen.wait(r"base-q8_0.gguf\n", "after review")
    screen.type("/bad")
    screen.wait("build-data")
    (judged,) = (tmp_path / "run" / "feedback.jsonl").read_text().splitlines()[-1:]
    assert '"good": false' in judged or '"good":false' in judged
    if not dumb:  # a dumb terminal does not mark a paste
        screen.paste(PASTED)
        time.sleep(1)
        assert "now?" in screen.wait("How many nuts does Tom have now")
        screen.type("")
        screen.wait(r"(?s)does Tom have now.*answer .*tokens/s")
    screen.type("/clear")
    screen.wait("cleared")
    screen.type(QUESTION)
    screen.wait(r"(?s)cleared.*Emma has" if dumb else r"(?s)cleared.* 1 ")
    time.sleep(0.5)
    screen.tmux("send-keys", "C-c")
    screen.wait("stopped")
    screen.type("/bye")
    screen.wait(r"shell\$\Z|\$ *\Z")
    time.sleep(0.5)
    assert "command not found" not in "\n".join(screen.lines())
    assert not (tmp_path / "reached").exists()
