"""How commands fail: one line and a hint, one object with --json, never a traceback."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sclite import config, console, doctor, settings
from sclite.commands import start
from sclite.errors import DataError, UsageError
from sclite.records import Drop, Problem, Template
from sclite.run import Run
from tests.toy import write_rows

ROOT = Path(__file__).resolve().parents[1]


def in_a_process(folder: Path, *arguments: str, code: str = "", path: str = "", **environment: str):
    """A command in a process of its own; `code` runs before it, `path` comes before everything on sys.path."""
    main = f"import sys; sys.argv[0] = 'sclite'\n{code}\nfrom sclite.__main__ import main; main()"
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, (path, str(ROOT)))), "TMPDIR": str(folder)}
    options = {"cwd": folder, "env": {**os.environ, **paths, **environment}, "timeout": 300, "check": False}
    command = [sys.executable, "-c", main, *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


FAILING = r"""
import sclite.doctor as m
def fail(*_): raise ZeroDivisionError('no\n\x1b[31m[/red]')
m.run_checks = fail
"""


def test_an_unexpected_exception_is_one_line_with_a_traceback_file(tmp_path):
    address = "teacher.api_base=http://me:hunter2@localhost:8000/v1"
    done = in_a_process(tmp_path, "doctor", "--set", address, code=FAILING)
    assert (done.returncode, done.stdout) == (1, "")
    first, hint = done.stderr.splitlines()
    assert first == "error: unexpected ZeroDivisionError: no"
    log = Path(re.search(r"the traceback is in (\S+\.log)", hint)[1])
    assert log.parent == tmp_path
    assert "in fail" in log.read_text()
    assert "doctor" in log.read_text()
    assert "hunter2" not in log.read_text()
    debugged = in_a_process(tmp_path, "doctor", code=FAILING, SCLITE_DEBUG="1")
    assert "Traceback" in debugged.stderr
    assert debugged.returncode == 1


@pytest.mark.parametrize(
    ("thrown", "code", "said"),
    [("ZeroDivisionError", 1, "unexpected ZeroDivisionError"), ("KeyboardInterrupt", 130, "interrupted")],
)
def test_an_error_with_json_is_one_object(tmp_path, thrown, code, said):
    done = in_a_process(tmp_path, "doctor", "--json", code=FAILING.replace("ZeroDivisionError", thrown))
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == code
    assert said in found["error"]
    assert found["hint"]
    assert "Traceback" not in done.stderr


def test_unreadable_rows_leave_no_partial_json_object(sclite):
    row = Template(id="a", question="1 + 1?", answer="2", trace="<Answer>2</Answer>").model_dump()
    write_rows("runs/default/templates.jsonl", [row, "no row", row])
    ended = sclite("show", "templates", "--json")
    found = json.loads(ended.out)
    assert "templates.jsonl, line 2" in found["error"]
    assert ended.code == found["exit_code"] == 3


def test_no_arguments_print_the_help_in_80_columns_and_are_a_usage_error(sclite, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ended = sclite()
    assert (ended.code, ended.err) == (2, "")
    assert "Usage: sclite" in ended.out
    assert "..." not in ended.out.partition("Commands:")[2]  # no summary is cut off
    assert max(map(len, ended.out.splitlines())) <= 80


HOSTILE = "\x1b]0;title\x07\x9b31m\u202e[/red][bold]:apple:\ud800\x7f"


def test_control_characters_and_markup_are_neutralized(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    error = DataError(HOSTILE, HOSTILE)
    error.details = {"raw": HOSTILE}
    console.error(error, as_json=True)
    console.print(console.escape(HOSTILE))
    console.print_table(HOSTILE, ("a", "b"), [(console.escape(HOSTILE), "1")])
    out, err = capsys.readouterr()
    colours = re.compile(r"\x1b\[[0-9;]*m")
    for text in (colours.sub("", out), colours.sub("", err)):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", text)
        text.encode()
    assert err.count("[/red][bold]:apple:") == 2
    assert json.loads(out[: out.index("\n}") + 2])["raw"] == HOSTILE


def test_a_run_may_be_named_like_markup(sclite, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    run, trace = Run("a[/b]c"), "<Step1>[/red] [bold]\n</Step1>\n<Answer>1</Answer>"
    run.append("problems.jsonl", [Problem(id="p[/b]", question="[/red] [bold]?", answer="1")])
    run.append("templates.jsonl", [Template(id="p[/b]", question="[/red]", answer="1", trace=trace)])
    run.append("dropped.jsonl", [Drop(stage="templates", id="p[/b]", reason="x[/b]", raw="[/red]")])
    for command in (
        ("status",), ("show",), ("show", "drops"), ("show", "templates"), ("show", "pairs"),
        ("export", "--format", "data"), ("export",), ("chat", "[/red]"), ("train",),
        ("show", "drops", "--reason", "[/red]"), ("train", "--set", "sft.num_train_epochs=[/red]"), ("[/red]",),
    ):  # fmt: skip
        ended = sclite(*command, *(() if command == ("[/red]",) else ("--run", "a[/b]c")))
        assert "unexpected" not in ended.err, (command, ended.err)
        assert ended.code in (0, 2, 3), command
        assert "[/b]" in ended.out + ended.err or command[-1] not in ("status", "drops"), command


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        ("raise RuntimeError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
        ("import os; os.abort()", "crashes on import (signal 6)"),
        ("raise ImportError('torch is half installed')", "torch is half installed"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_doctor_survives_broken_libraries(tmp_path, torch, said):
    broken = tmp_path / "broken"
    (broken / "llama_cpp").mkdir(parents=True)
    (broken / "torch.py").write_text(torch)
    (broken / "llama_cpp/__init__.py").write_text("import os; os.abort()")
    done = in_a_process(tmp_path, "doctor", path=str(broken))
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(rf"✗ torch: .*{re.escape(said)}", done.stdout)
    assert "✗ llama.cpp: crashes on import (signal 6)" in done.stdout
    assert "✓ Python" in done.stdout
    found = json.loads(in_a_process(tmp_path, "doctor", "--json", path=str(broken)).stdout)["checks"]
    (check,) = [check for check in found if check["name"] == "torch"]
    assert (check["works"], check["required"]) == (False, True)
    assert "pip install" in check["fix"]
    assert in_a_process(tmp_path, "init", path=str(broken)).returncode == 0


@pytest.mark.parametrize("memory_gb", [None, 12.0, 24.0])
def test_every_line_from_init_is_valid_when_uncommented(tmp_path, monkeypatch, memory_gb):
    path, gpus = tmp_path / "sclite.toml", [{"name": "GPU", "total_gb": memory_gb}] if memory_gb else []
    monkeypatch.setattr(doctor, "probe_torch", lambda: {"gpus": gpus})
    start.init(path)
    with pytest.raises(UsageError, match="already exists"):
        start.init(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    keys = [i for i, line in enumerate(lines) if line.startswith("# ")]
    assert len(keys) > len(config.keys()) - 3
    for chosen in (*([i] for i in range(len(lines)) if lines[i].startswith("#")), keys):
        text = "\n".join(line[1:].lstrip() if i in chosen else line for i, line in enumerate(lines))
        path.write_text(text, encoding="utf-8")
        settings.load(path, (), {})
