"""The command line: every error has one line that says where it is, a hint and an exit code."""

import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest

from sclite import console, doctor
from sclite.config import Config
from sclite.data.problems import gather_problems
from sclite.quickstart.stories import problem_set
from sclite.records import Drop, Problem
from sclite.run import Run
from sclite.settings import load
from tests.replay import TeacherServer, fail, say
from tests.toy import write_rows

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = [{"question": question, "answer": "2"} for question in ("1 + 1?", "0 + 2?", "2 + 0?")]
TEACHER = ("--set", "teacher.model=openai/replay", "--set", "teacher.attempts_per_call=1")
TOY = ("--set", "student.model=embedded")
TEMPLATE = '{"id":"a","question":"q","answer":"1","trace":"<Step1>x\\n</Step1>\\n<Answer>1</Answer>"}'


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        (None, "mine.jsonl does not exist"),
        ([], "mine.jsonl is empty"),
        (['{"question": "x'], "mine.jsonl: no usable row (1 row not readable); line 1: column 14: not JSON"),
        ([{"question": "?", "answer": ""}], "mine.jsonl: no usable row (1 no answer); line 1: no answer"),
        ([{"task": "How?"}, "[1, 2]"], "line 1: no known column, found: task"),
    ],
)
def test_an_unusable_problems_file_is_reported_with_its_line(sclite, rows, place):
    if rows is not None:
        write_rows("mine.jsonl", rows)
    ended = sclite("build-data", "mine.jsonl", *TEACHER)
    assert (ended.code, ended.out) == (3, "")
    assert place in ended.error
    assert ended.hint


ERRORS = [
    # a word or a value that no command knows
    ("train --gp 0", 2, "--gpu", "`sclite train --help`"),
    ("--jsn", 2, "no such option: --jsn", "`sclite --help`"),
    ("trian", 2, "no such command 'trian'. Did you mean 'train'?", "`sclite --help`"),
    ("show drops more", 2, "unexpected extra argument", "`sclite show --help`"),
    ("build-data --limit 0", 2, "--limit", ""),
    ("train --gpu first", 2, "--gpu", ""),
    ("train --gpu -1", 2, "--gpu", ""),
    ("doctor --gpu 0", 2, "--gpu", ""),
    ("quickstart --problems 5", 2, "--problems", ""),
    ("build-data --only pairs", 2, "'pairs' is not one of 'templates', 'corrections'", "`sclite build-data --help`"),
    ("train --only both", 2, "'both' is not one of 'sft', 'dpo'", "`sclite train --help`"),
    ("train --set teacher.api_key=x", 2, "unknown key teacher.api_key", "come from the environment"),
    ("train --set teacher.price=1", 2, "teacher.price = 1: write a list, such as", "teacher.price"),
    ("eval p.jsonl --models base,mine", 2, "mine", "use any of base, sft, dpo"),
    ("eval p.jsonl --models ,", 2, "invalid value for --models: ,", "use any of base, sft, dpo"),
    ("export --format onnx", 2, "onnx", "`sclite export --help`"),
    # settings
    ("train --config none.toml", 2, "none.toml: No such file or directory", ""),
    ("train --set sft.num_train_epochs", 2, "--set sft.num_train_epochs: no value", "--set KEY=VALUE"),
    ("train --set prompts.zzz=red", 2, "unknown key prompts.zzz", "sclite init"),
    ("train --set epochs=2", 2, "unknown key epochs", "did you mean"),
    ("train --config key.toml", 2, "configuration: unknown key sft.learning_rat", "mean sft.learning_rate?"),
    ("train --config line.toml", 2, "line.toml: Expected", "fix this line; the file is TOML"),
    ("train --set sft.num_train_epochs=x", 2, "'x': input should be a valid number", "sft.num_train_epochs: epochs"),
    ("train --set problems.correction_share=1.5", 2, "= 1.5: input should be less than 1", ""),
    # something is missing
    ("build-data --run empty --set teacher.model=a/b", 3, "problems.jsonl is missing or empty", "problems.source"),
    ("build-data mine.jsonl", 2, "error: teacher.model is not set", "--set teacher.model=openai/gpt-5.4-mini"),
    ("build-data mine.jsonl --dry-run", 2, "teacher.model is not set", "teacher.model="),
    ("run mine.jsonl --set student.model=embedded", 2, "teacher.model is not set", "teacher.model="),
    ("run --set student.model=embedded", 3, "problems.jsonl is missing or empty", "problems.source"),
    ("build-data --only corrections --run mine --set attempts.source=nope.jsonl --set problems.source=mine.jsonl", 3,
     "nope.jsonl does not exist", "attempts.source"),
    ("train", 2, "error: no student is configured", "--set student.model=Qwen/"),
    ("train --set student.model=./nowhere", 3, "nowhere has no config.json", ""),
    ("train --only sft --set student.model=embedded", 3, "templates.jsonl is missing or empty", "sclite build-data"),
    ("train --only dpo --set student.model=embedded", 3, "sft/adapter is missing", "sclite train --only sft"),
    ("export", 2, "no student is configured", "--set student.model=Qwen/"),
    ("export --format data", 3, "runs/default has no templates or pairs to export", "sclite build-data"),
    ("eval", 2, "error: eval.source is not set", "`sclite eval test.jsonl`"),
    ("eval mine.jsonl", 3, "mine.jsonl: too few problems, 3 of 3 were not trained on", ""),
    ("chat ?", 3, "runs/default/export contains no GGUF", "sclite train"),
    ("chat --model none.gguf ?", 3, "none.gguf does not exist", ""),
    ("chat none.gguf", 3, "none.gguf does not exist", ""),
    ("chat ''", 2, "error: the question is empty", ""),
    ("show --run none", 3, "the run none does not exist", "sclite build-data"),
    ("status --run runs/none", 3, "the run runs/none does not exist", "sclite build-data"),
    ("serve", 3, "runs/default/export contains no GGUF", "sclite train"),
    ("report", 3, "runs/default", "sclite eval"),
    ("runs none", 3, "none contains no run", "sclite runs FOLDER"),
    ("init --config none/sclite.toml", 2, "none/sclite.toml cannot be written: No such file", "--config"),
    ("build-data --run mine.jsonl --set teacher.model=a/b", 2, "mine.jsonl cannot be written", "--run"),
    (f"build-data mine.jsonl {shlex.join(TEACHER)} --set teacher.api_base=http://127.0.0.1:9/v1", 6,
     "teacher openai/replay at http://127.0.0.1:9/v1 does not answer", ""),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "code", "message", "hint"), ERRORS, ids=[typed for typed, *_ in ERRORS])
def test_an_error_says_what_is_wrong_and_what_to_type(sclite, typed, code, message, hint):
    write_rows("mine.jsonl", PROBLEMS)
    Path("key.toml").write_text("[sft]\nlearning_rat = 1e-4\n")
    Path("line.toml").write_text('run = "a"\n[sft\n')
    ended = sclite(*shlex.split(typed))
    assert (ended.code, ended.out) == (code, "")
    assert message in ended.error
    assert "line 2" in ended.error or "line.toml" not in typed
    assert ended.hint
    assert hint in ended.hint
    again = sclite(*shlex.split(typed), "--json")
    found = json.loads(again.out)  # one object
    assert again.code == found["exit_code"] == code
    assert (f"error: {found['error']}", f"try: {found['hint']}") == (ended.error, ended.hint)
    if typed.startswith("train --only sft --set student"):  # no stage has begun
        assert len(ended.err.splitlines()) == 2
    if not typed.startswith("build-data"):  # which has read the problems
        assert not Path("runs/default/run.toml").exists()


@pytest.mark.parametrize("name", ["7", "2026-11-23", "true", "1e5", "runs/[a]"])
def test_a_run_may_have_any_name(sclite, name):
    assert sclite("train", "--run", name).error == "error: no student is configured"
    assert load(None, [f"run={name}"], {}).run == name


def test_a_rejected_key_stops_the_command_and_is_never_printed(sclite, monkeypatch):
    key = "sk-secret-123456"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    write_rows("mine.jsonl", PROBLEMS)
    with TeacherServer(lambda request, nth: fail(401, f"Incorrect API key provided: {key}")) as server:
        ended = sclite("build-data", "mine.jsonl", *TEACHER, "--set", f"teacher.api_base={server.url}")
    assert ended.code == 6
    assert f"teacher openai/replay at {server.url} rejects the key (HTTP 401)" in ended.error
    assert "export OPENAI_API_KEY=..." in ended.hint
    assert "sk-secret" not in ended.out + ended.err


def test_training_on_a_missing_gpu_suggests_the_cpu(sclite):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    ended = sclite("train", "--gpu", "0", *TOY)
    assert ended.code == 5
    assert "CUDA GPU 0 not found" in ended.error
    assert "omit --gpu to train on the first GPU, or on the CPU if there is none" in ended.hint


def test_a_second_process_on_one_run_is_refused_and_ctrl_c_exits_with_130(sclite, monkeypatch):
    with Run("runs/default").lock():
        ended = sclite("build-data", "mine.jsonl")
    refused = "error: another sclite process is using runs/default\n"
    said = f"{refused}try: wait for it, or choose another folder with --run\n"
    assert (ended.code, ended.out, ended.err) == (2, "", said)
    monkeypatch.setattr(doctor, "run_checks", lambda *_: signal.raise_signal(signal.SIGINT))
    ended = sclite("doctor")
    assert (ended.code, ended.err) == (130, "interrupted; re-run to resume\n")


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_declining_is_not_an_error(sclite, monkeypatch, form):
    monkeypatch.setattr(console, "is_interactive", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    write_rows("mine.jsonl", [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)])
    price = ("--set", "teacher.price=[1, 2]", "--set", "problems.fit_share=0")
    with TeacherServer(lambda request, nth: say("<Step1>x</Step1><Answer>1</Answer>")) as server:
        address = ("--set", f"teacher.api_base={server.url}")
        ended = sclite("build-data", "mine.jsonl", *TEACHER, *price, *address, *form)
    assert (ended.code, ended.error) == (0, "")
    assert "Continue? [y/N]" in ended.err
    assert re.search(r"stopped after \d+ of 40 rows, as requested", ended.err)
    assert "re-run to resume" in ended.hint
    assert not form or json.loads(ended.out)["stopped"].startswith("stopped after")


COMMANDS = [
    "quickstart",
    "init",
    "doctor",
    "build-data",
    "train",
    "run",
    "eval",
    "export",
    "chat",
    "serve",
    "status",
    "show",
    "report",
    "runs",
]


def test_help_lists_the_commands_and_the_shell_completes_them(sclite, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = sclite("--help").out.partition("Commands:\n")[2].splitlines()
    assert [row.split()[0] for row in rows] == COMMANDS
    for row in rows:
        assert len(row) <= 80
        assert re.search(r"[^.]\.$", row)  # whole sentences
    assert sclite("--version").out == f"sclite {version('sclite')}\n"
    asked = {"_SCLITE_COMPLETE": "complete_bash", "COMP_WORDS": "sclite tr", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "sclite"]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["train"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(sclite, name):
    assert "Usage" in sclite(name, "-h").out
    assert sclite(name, "-h").out == sclite(name, "--help").out


def test_a_dry_run_of_corrections_needs_attempts(sclite):
    run = Path("runs/default")
    asked = ("build-data", "--only", "corrections", "--dry-run", *TEACHER)
    write_rows(run / "problems.jsonl", [{"id": "p0", "question": "What is 2 + 2?", "answer": "4"}])
    ended = sclite(*asked)
    assert ended.code == 3
    assert "attempts.jsonl" in ended.error
    assert "run without --dry-run" in ended.hint
    work = {"id": "p0", "sample": 0, "trace": "<Step1>2 + 2 = 5\n</Step1>\n<Answer>5</Answer>"}
    write_rows(run / "attempts.jsonl", [{**work, "answer": "5", "correct": False}])
    found = json.loads(sclite(*asked, "--json").out)
    assert found["requests"] == 1
    assert "2 + 2 = 5" in found["first_request"]["messages"][-1]["content"]
    write_rows(run / "templates.jsonl", [{**json.loads(TEMPLATE), "id": "p0"}])
    shown = sclite("build-data", "--dry-run", *TEACHER).out
    assert shown.startswith("No requests for templates left to send.")
    write_rows(run / "reviews.jsonl", [{**work, "step": None}])
    assert json.loads(sclite(*asked, "--json").out)["requests"] == 0  # imported reviews: no requests


@pytest.fixture
def dropped(tmp_path):
    """A run with two drops."""
    run = Run(tmp_path / "runs/default")
    run.append("problems.jsonl", [Problem(id="p1", question="What is 1 + 1?", answer="2")])
    reasons = {"p1": "wrong_answer", "p2": "no_steps"}
    drops = [Drop(stage="templates", id=id, reason=reason, raw="[b]½") for id, reason in reasons.items()]
    run.append("dropped.jsonl", drops)
    return run


def test_show_prints_plain_text_to_a_pipe_or_one_object_with_unchanged_rows(sclite, dropped):
    ended = sclite("show", "drops", "--reason", "wrong_answer")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "1/1  p1  templates  wrong_answer\nWhat is 1 + 1?\ngold answer 2\n[b]½\n\n"
    shown = json.loads(sclite("show", "drops", "--id", "p2", "--json").out)
    assert (shown["what"], shown["total"]) == ("drops", 1)
    assert shown["rows"] == [json.loads(dropped.path("dropped.jsonl").read_text().splitlines()[1])]
    assert json.loads(sclite("show", "pairs", "--json").out) == {"what": "pairs", "total": 0, "rows": []}


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        ("drop", "unknown kind of rows: drop", "problems, templates, attempts"),
        ("drops --reason leak", "--reason leak", "wrong_answer (1), no_steps (1)"),
    ],
)
def test_an_unknown_argument_of_show_lists_the_known_ones(sclite, dropped, typed, message, hint):
    ended = sclite("show", *typed.split())
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.error
    assert hint in ended.hint


def test_show_without_an_argument_and_status_are_overviews(sclite, dropped):
    listed = sclite("show").out
    assert "sclite show drops" in listed
    assert "1 wrong answer, 1 no steps" in listed
    rows = json.loads(sclite("show", "--json").out)["rows"]
    none = dict.fromkeys(("templates", "attempts", "reviews", "pairs"), 0)
    assert {row["what"]: row["rows"] for row in rows} == {**none, "problems": 1, "drops": 2}
    ended = sclite("status")
    assert ended.code == 0
    assert "Dropped: 1 wrong answer, 1 no steps" in ended.out
    assert ended.out.splitlines()[-1] == "Next: sclite init"
    figures = json.loads(sclite("status", "--json").out)
    assert figures["dropped"] == {"wrong_answer": 1, "no_steps": 1}
    assert figures["stages"]["problems"]["state"] == "done"


def in_a_terminal(folder: Path, pager: str) -> tuple[int, str]:
    """(exit code, output) of `sclite show drops` in a terminal."""
    ours, theirs = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "LESS")}
    environment = {**clean, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "PAGER": pager}
    command, ends = [sys.executable, "-m", "sclite", "show", "drops"], ("stdin", "stdout", "stderr")
    process = subprocess.Popen(command, cwd=folder, env=environment, **dict.fromkeys(ends, theirs))
    os.close(theirs)
    sent = b""
    with suppress(OSError):  # EIO on Linux when the last writer is gone
        while block := os.read(ours, 1 << 16):
            sent += block
    os.close(ours)
    return process.wait(timeout=60), sent.decode()


def test_show_is_colored_and_paged_and_closing_a_pipe_early_is_no_error(dropped, tmp_path):
    code, sent = in_a_terminal(tmp_path, "sed s/What/Which/")
    assert code == 0
    assert "\x1b[1;31mwrong_answer\x1b[0m" in sent
    assert "Which is 1 + 1?" in sent
    dropped.append(
        "dropped.jsonl", [Drop(stage="s", id=str(n), reason="r", raw="x" * 99) for n in range(5000)]
    )
    code, sent = in_a_terminal(tmp_path, "head -1")
    assert (code, "Traceback" in sent) == (0, False)
    command = f"{sys.executable} -m sclite show drops | head -1; exit ${{PIPESTATUS[0]}}"
    given = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "check": False}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, **given)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)


@pytest.mark.parametrize("command", ["status", "show"])
def test_commands_that_read_a_run_fall_back_to_the_quickstarts(sclite, command):
    assert sclite(command).code == 3
    for folder in ("runs/quickstart", "runs/default"):
        Run(folder).append("problems.jsonl", [Problem(id="p", question="1 + 1?", answer="2")])
        assert folder in sclite(command).out
        assert f"{folder} has no templates" in sclite("export", "--format", "data").error
        if folder == "runs/quickstart":  # an explicit run is that run
            assert sclite(command, "--run", "runs/default").code == 3


@pytest.mark.parametrize("command", ["build-data", "train", "run"])
def test_no_command_replaces_the_problems_of_a_quickstart_with_those_of_sclite_toml(sclite, command):
    run = Run("runs/quickstart")
    run.replace("problems.jsonl", problem_set("train", 60))
    if command != "run":  # as the quickstart leaves them, and as a killed one does
        gather_problems(Config(), run)
    write_rows("mine.jsonl", PROBLEMS)
    Path("sclite.toml").write_text('problems.source = "mine.jsonl"\nstudent.model = "embedded"\n')
    before = {path: path.read_bytes() for path in run.folder.rglob("*.json*")}
    ended = sclite(*command.split(), "--run", run.folder, "--set", "teacher.model=embedded/tutor")
    assert (ended.code, ended.error) == (2, "error: runs/quickstart has other problems than mine.jsonl")
    assert "--set problems.source=" in ended.hint
    assert {path: path.read_bytes() for path in run.folder.rglob("*.json*")} == before
    assert not run.path("run.toml").exists()


def test_the_quickstart_does_not_replace_the_problems_of_another_run(sclite):
    write_rows("mine.jsonl", PROBLEMS)
    run = Run("runs/default")
    with run.recording(load(None, ["problems.source=mine.jsonl"], {}, own_file=False)):
        run.replace("problems.jsonl", [Problem(id="a", question="1 + 1?", answer="2")])
    ended = sclite("quickstart", "--run", "runs/default")
    assert (ended.code, ended.error) == (2, "error: runs/default has other problems than mine.jsonl")
    assert "--run" in ended.hint
    assert [row.id for row in run.read("problems.jsonl", Problem)] == ["a"]
