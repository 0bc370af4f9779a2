"""Full disks, closed pipes, long names and ASCII terminals: one error line and an exit code."""

import json
import os
import resource
import subprocess
import sys

import pytest

from sclite.records import Problem
from sclite.run import Run
from tests.toy import file_limit, write_rows


@pytest.fixture
def shown(tmp_path):
    """A run with 4,000 problems with non-ASCII text."""
    run = Run(tmp_path / "run")
    rows = (Problem(id=f"p{n}", question=f"How much is ½ of {n}?", answer="1") for n in range(4000))
    run.replace("problems.jsonl", rows)
    return run


def process(*arguments: object, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OPENAI_API_KEY": "sk-test", **options.pop("environment", {})}
    command = [sys.executable, "-m", "sclite", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, env=environment, text=True, encoding="utf-8", check=False, **options)


SHOWN = ("status", "status --json", "show", "show problems", "show problems --json")


@pytest.mark.parametrize("command", [*SHOWN, "doctor --json", "--help"])
def test_a_full_stdout_is_a_one_line_error_and_a_closed_pipe_is_not(shown, command):
    words = [*command.split(), *(["--run", shown.folder] if command.startswith("s") else [])]
    with open("/dev/full", "w") as full:
        done = process(*words, stdout=full)
    assert done.returncode == 1
    assert "standard output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = process(*words, stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "ascii:strict"}])
def test_an_ascii_terminal_gets_all_rows(shown, environment):
    command = ("show", "problems", "--limit", "1", "--run", shown.folder)
    done = process(*command, environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "How much is ? of 0?" in done.stdout
    done = process(*command, "--json", environment=environment)
    assert json.loads(done.stdout)["rows"][0]["question"] == "How much is ½ of 0?"
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    "command",
    [
        "status --run LONG", "build-data LONG.jsonl", "build-data --config LONG.toml",
        "build-data mine.jsonl --run runs/LONG", "build-data mine.jsonl --set prompts.folder=LONG",
        "chat --model LONG.gguf 1?", "export --run LONG", "show --run LONG",
    ],
)  # fmt: skip
def test_a_name_that_is_too_long_is_a_usage_error(sclite, command):
    write_rows("mine.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    ended = sclite(*command.replace("LONG", "x" * 300).split())
    assert ended.code == 2
    assert "File name too long" in ended.error.replace("file", "File")
    assert ended.hint


def test_a_read_only_run_with_rows_is_a_usage_error(sclite, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied", "runs/default/problems.jsonl")

    write_rows("mine.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    monkeypatch.setattr("sclite.run.write_text", refused)
    ended = sclite("build-data", "mine.jsonl")
    assert (ended.code, ended.error) == (2, "error: runs/default/problems.jsonl: Permission denied")


def test_a_full_disk_leaves_whole_files_and_a_rerun_resumes(tmp_path, teacher_of_sums):
    """Files are limited to 40 kB, so a row in the middle does not fit."""
    run, long = Run(tmp_path / "run"), "?" * 2000
    rows = [{"question": f"What is 1 + 1, for the {n}th time{long}", "answer": "2"} for n in range(30)]
    named = ("--set", "teacher.model=openai/replay", "--set", f"teacher.api_base={teacher_of_sums.url}")
    problems = write_rows(tmp_path / "mine.jsonl", rows)
    command = ("build-data", problems, "--run", run.folder, "--yes", *named)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    stopped = process(*command, preexec_fn=limit)
    assert stopped.returncode in (1, 3)
    assert "Traceback" not in stopped.stderr
    assert "error: " in stopped.stderr
    assert all(path.read_bytes()[-1:] in (b"\n", b"") for path in run.folder.rglob("*.jsonl"))
    assert not [path for path in run.folder.rglob(".*.new")]
    done = process(*command)
    assert done.returncode == 0, done.stderr
    assert len(run.path("templates.jsonl").read_text().splitlines()) == 30


def test_rows_that_do_not_fit_leave_the_file_unchanged(tmp_path):
    run, row = Run(tmp_path), lambda n: Problem(id=str(n), question="q" * 300, answer="1")
    run.append("problems.jsonl", [row(1)])
    for write in (run.append, run.replace):
        with pytest.raises(OSError, match="File too large"), file_limit(1000):
            write("problems.jsonl", map(row, range(2, 9)))
    assert [row.id for row in run.read("problems.jsonl", Problem)] == ["1"]
    assert [path.name for path in tmp_path.iterdir()] == ["problems.jsonl"]
