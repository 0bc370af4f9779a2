"""What is printed: tables and prose that fit the terminal, and what is read from it."""

import io
import re
import sys

import pytest

from sclite import console


@pytest.mark.parametrize(("width", "lying"), [(60, False), (30, True)])
def test_a_table_too_wide_for_the_terminal_is_transposed(width, lying, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    header = ("student", "first answer", "after review", "mended")
    console.print_table("", header, [("sft", "82.7", "82.7", "0.0"), ("dpo", "85.3", "91.7", "62.8")])
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in capsys.readouterr().out.splitlines()]
    assert (["after", "review", "82.7", "91.7"] in lines) == lying
    assert (["dpo", "85.3", "91.7", "62.8"] in lines) != lying


def test_input_in_another_encoding_becomes_replacement_characters(monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9 3\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", typed)
    assert console.read_line() == "caf\ufffd 3\n"
    monkeypatch.setattr(sys, "stdin", None)
    assert console.read_line() == ""


def test_only_the_last_text_column_wraps(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "50")
    what = "640 attempts, 503 right, 137 wrong, 0 unknown"
    console.print_table("", ("stage", "what", "seconds"), [("corrections", what, "9.2")], texts=2)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 50
    words = " ".join(lines).split()
    assert words.count("corrections") == words.count("9.2") == 1
    assert [word for word in words if word in what.split()] == what.split()


def test_prose_wraps_between_words_and_commands_do_not(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "30")
    prose, command = (
        "46 student review already right, 35 not readable",
        "sclite eval PROBLEMS --run runs/default",
    )
    console.print(prose)
    console.print(f"Next: [bold cyan]{command}[/]", wrap=False)
    *lines, last = (re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines())
    assert max(map(len, lines)) <= 30
    assert " ".join(line.strip() for line in lines) == prose
    assert last == f"Next: {command}"


def test_a_long_path_is_not_broken(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    path = "/home/somebody/runs/default/prompts/student_review.txt"
    console.print(f"The file {path} is gone, so it cannot be read.")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [f"The file {path} is gone, so it cannot be read."]  # the terminal breaks this line
    console.print_table("", ("stage", "what"), [("sft", f"{path} is gone")], texts=2)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert f"sft{path}isgone" in re.sub(r"[\s─]", "", shown)


def test_a_piped_table_fits_columns_without_trailing_blanks(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    console.print_table(
        "", ("stage", "what"), [("sft", "320 rows, 60 steps, and more words than fit")], texts=2
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    assert lines == [line.rstrip() for line in lines]
