"""What is printed: tables and prose that fit the terminal, and what is read from it."""

import os
import re
import subprocess
import sys

import pytest

from sclite import console


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Prints to a terminal of some width; returns its lines without colors."""

    def call(width: int, work, *arguments, **named) -> list[str]:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", str(width))
        work(*arguments, **named)
        return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()

    return call


@pytest.mark.parametrize(("width", "lying"), [(60, False), (30, True)])
def test_a_table_too_wide_for_the_terminal_is_transposed(width, lying, terminal):
    header = ("student", "first answer", "after review", "corrected")
    rows = [("sft", "82.7", "82.7", "0.0"), ("dpo", "85.3", "91.7", "62.8")]
    lines = [line.split() for line in terminal(width, console.print_table, "", header, rows)]
    assert (["after", "review", "82.7", "91.7"] in lines) == lying
    assert (["dpo", "85.3", "91.7", "62.8"] in lines) != lying


def test_only_the_last_text_column_wraps(terminal):
    what = "640 attempts, 503 right, 137 wrong, 0 unknown"
    rows = [("corrections", what, "9.2")]
    lines = terminal(50, console.print_table, "", ("stage", "what", "seconds"), rows, texts=2)
    assert max(map(len, lines)) <= 50
    words = " ".join(lines).split()
    assert words.count("corrections") == words.count("9.2") == 1
    assert [word for word in words if word in what.split()] == what.split()


def test_prose_wraps_between_words_but_neither_commands_nor_paths(terminal):
    prose = "46 student review already right, 35 not readable"
    command = "sclite eval PROBLEMS --run runs/default"
    lines = terminal(30, console.print, prose)
    assert max(map(len, lines)) <= 30
    assert " ".join(line.strip() for line in lines) == prose
    assert terminal(30, console.print, f"Next: [bold cyan]{command}[/]", wrap=False) == [f"Next: {command}"]
    path = "/home/somebody/runs/default/prompts/student_review.txt"
    said = f"The file {path} is gone, so it cannot be read."
    assert terminal(40, console.print, said) == [said]  # the terminal itself breaks this line
    rows = [("sft", f"{path} is gone")]
    shown = "".join(terminal(40, console.print_table, "", ("stage", "what"), rows, texts=2))
    assert f"sft{path}isgone" in re.sub(r"[\s─]", "", shown)


def test_a_piped_table_fits_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    rows = [("sft", "320 rows, 60 steps, and more words than fit")]
    console.print_table("", ("stage", "what"), rows, texts=2)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40


def test_input_in_another_encoding_becomes_replacement_characters():
    code = "import sys; from sclite import console; console.prepare_streams(); print(ascii(sys.stdin.readline()))"
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as with LANG=en_US.UTF-8
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, input=b"caf\xe9 3\n", env=strict) == b"'caf\\ufffd 3\\n'\n"
