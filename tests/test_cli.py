"""The command line: every error has one line with its place, a hint and an exit code."""

import io
import itertools
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sclite import console, doctor
from sclite.records import Drop, Problem
from sclite.run import Run
from sclite.settings import load
from tests.replay import TeacherServer, fail, say

PROBLEM = {"question": "What is 1 + 1?", "answer": "2"}
TEACHER = ("--set", "teacher.model=openai/replay", "--set", "teacher.attempts_per_call=1")


def write(name: str, *rows: object) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return name


# -- problems ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        (None, "mine.jsonl does not exist"),
        ((), "mine.jsonl is empty"),
        (('{"question": "x',), "mine.jsonl: no usable row (1 row not readable); line 1: column 14: not JSON"),
        (({"question": "How?", "answer": ""},), "mine.jsonl: no usable row (1 no answer); line 1: no answer"),
        (({"task": "How?"}, "[1, 2]"), "line 1: no known column, found: task"),
    ],
)
def test_an_unusable_problems_file_is_reported_with_its_line(sclite, rows, place):
    if rows is not None:
        write("mine.jsonl", *rows)
    ended = sclite("build-data", "mine.jsonl", *TEACHER)
    assert ended.code == 3
    assert place in ended.error
    assert ended.hint
    assert ended.out == ""


def test_version_prints_the_installed_version(sclite):
    from importlib.metadata import version

    ended = sclite("--version")
    assert (ended.code, ended.out) == (0, f"sclite {version('sclite')}\n")


def test_an_unreachable_hub_is_a_network_error(sclite, monkeypatch):
    import datasets

    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    ended = sclite("build-data", "openai/gsm8k", *TEACHER)
    assert ended.code == 6
    assert "openai/gsm8k cannot be reached" in ended.error


def test_a_dry_run_of_corrections_needs_attempts(sclite):
    run = Path("runs/default")
    asked = ("build-data", "--only", "corrections", "--dry-run", *TEACHER)
    run.mkdir(parents=True)
    write(run / "problems.jsonl", {"id": "p0", "question": "What is 2 + 2?", "answer": "4"})
    ended = sclite(*asked)
    assert ended.code == 3
    assert "attempts.jsonl" in ended.error
    assert "run without --dry-run" in ended.hint
    trace = "<Step1>2 + 2 = 5\n</Step1>\n<Answer>5</Answer>"
    write(run / "attempts.jsonl", {"id": "p0", "sample": 0, "trace": trace, "answer": "5", "correct": False})
    ended = sclite(*asked, "--json")
    found = json.loads(ended.out)
    assert found["requests"] == 1
    assert "2 + 2 = 5" in found["first_request"]["messages"][-1]["content"]
    write(run / "reviews.jsonl", {"id": "p0", "sample": 0, "step": None, "trace": trace})
    assert json.loads(sclite(*asked, "--json").out)["requests"] == 0  # imported reviews: no requests


def test_missing_problems_are_reported(sclite):
    ended = sclite("build-data", *TEACHER)
    assert ended.code == 3
    assert "problems.jsonl is missing or empty" in ended.error
    assert "problems.source" in ended.hint


# -- configuration -------------------------------------------------------------------------------------------------


def test_an_unknown_key_in_the_file_suggests_the_nearest_one(sclite):
    Path("sclite.toml").write_text("[sft]\nlearning_rat = 1e-4\n")
    ended = sclite("train")
    assert ended.code == 2
    assert ended.error == "error: configuration: unknown key sft.learning_rat"
    assert ended.hint == "try: did you mean sft.learning_rate?"


@pytest.mark.parametrize(
    ("setting", "message", "hint"),
    [
        ("sft.num_train_epochs", "--set sft.num_train_epochs: no value", "--set KEY=VALUE"),
        ("sft.epoch=2", "unknown key sft.epoch", "did you mean sft.num_train_epochs?"),
        ("epochs=2", "unknown key epochs", "did you mean"),
        ("prompts.zzz=red", "unknown key prompts.zzz", "prompts has folder."),
        (
            "sft.num_train_epochs=many",
            "sft.num_train_epochs = 'many': input should be a valid number",
            "sclite init",
        ),
        ("problems.correction_share=1.5", "problems.correction_share = 1.5: input should be less than 1", ""),
    ],
)
def test_a_wrong_setting_on_the_command_line_is_reported(sclite, setting, message, hint):
    ended = sclite("train", "--set", setting)
    assert ended.code == 2
    assert message in ended.error
    assert hint in ended.hint


def test_invalid_toml_is_reported_with_its_line(sclite):
    Path("sclite.toml").write_text('run = "a"\n[sft\n')
    ended = sclite("train")
    assert ended.code == 2
    assert "sclite.toml: " in ended.error
    assert "line 2" in ended.error


def test_a_configuration_file_named_with_config_must_exist(sclite):
    ended = sclite("train", "--config", "none.toml")
    assert ended.code == 2
    assert "none.toml: No such file or directory" in ended.error


@pytest.mark.parametrize("name", ["7", "2026-11-23", "true", "1e5", "runs/[a]"])
def test_a_run_may_have_any_name(sclite, name):
    assert sclite("train", "--run", name).error == "error: no student is configured"
    assert load(None, [f"run={name}"], {}).run == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--gp", "0"), "--gp"),
        (("trian",), "trian"),
        (("build-data", "--limit", "0"), "--limit"),
        (("train", "--gpu", "first"), "--gpu"),
        (("train", "--gpu", "-1"), "--gpu"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(sclite, arguments, message):
    ended = sclite(*arguments)
    assert ended.code == 2
    assert message in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build-data", "--only", "pairs"), "use --only templates or --only corrections"),
        (("train", "--only", "both", "--set", "student.model=embedded"), "use --only sft or --only dpo"),
        (("eval", "p.jsonl", "--models", "base,mine"), "use any of base, sft, dpo"),
    ],
)
def test_an_invalid_value_names_the_valid_ones(sclite, arguments, message):
    ended = sclite(*arguments)
    assert ended.code == 2
    assert message in ended.hint


# -- teachers ------------------------------------------------------------------------------------------------------


def test_a_rejected_key_stops_the_command_and_is_never_printed(sclite, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123456")
    write("mine.jsonl", *[{**PROBLEM, "question": f"{i}?"} for i in range(6)])
    with TeacherServer(
        lambda request, nth: fail(401, "Incorrect API key provided: sk-secret-123456")
    ) as server:
        ended = sclite("build-data", "mine.jsonl", *TEACHER, "--set", f"teacher.api_base={server.url}")
    assert ended.code == 6
    assert f"teacher openai/replay at {server.url} rejects the key (HTTP 401)" in ended.error
    assert "export OPENAI_API_KEY=.." in ended.hint
    assert "sk-secret" not in ended.out + ended.err


def test_an_unreachable_teacher_is_named(sclite):
    write("mine.jsonl", PROBLEM, {**PROBLEM, "question": "And 0 + 2?"}, {**PROBLEM, "question": "And 2 + 0?"})
    ended = sclite("build-data", "mine.jsonl", *TEACHER, "--set", "teacher.api_base=http://127.0.0.1:9/v1")
    assert ended.code == 6
    assert "teacher openai/replay at http://127.0.0.1:9/v1 does not answer" in ended.error
    assert ended.hint


def test_a_missing_teacher_is_reported(sclite):
    write("mine.jsonl", PROBLEM, {**PROBLEM, "question": "And 0 + 2?"}, {**PROBLEM, "question": "And 2 + 0?"})
    ended = sclite("build-data", "mine.jsonl")
    assert ended.code == 2
    assert ended.error == "error: teacher.model is not set"
    assert "--set teacher.model=openai/gpt-5.4-mini" in ended.hint


# -- GPUs, models, runs -------------------------------------------------------------------------------------------


def test_training_on_a_missing_gpu_suggests_the_cpu(sclite):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    ended = sclite("train", "--gpu", "0", "--set", "student.model=embedded")
    assert ended.code == 5
    assert "CUDA GPU 0 not found" in ended.error
    assert "omit --gpu to train on the CPU" in ended.hint


def test_training_reports_a_missing_student_or_missing_templates(sclite):
    ended = sclite("train")
    assert (ended.code, ended.error) == (2, "error: no student is configured")
    assert "--set student.model=Qwen/" in ended.hint
    ended = sclite("train", "--set", "student.model=./nowhere")
    assert ended.code == 3
    assert "nowhere has no config.json" in ended.error
    ended = sclite("train", "--only", "sft", "--set", "student.model=embedded")
    assert ended.code == 3
    assert "templates.jsonl is missing or empty" in ended.error
    assert "sclite build-data" in ended.hint
    ended = sclite("train", "--only", "dpo", "--set", "student.model=embedded")
    assert ended.code == 3
    assert "sclite train --only sft" in ended.hint


def test_a_damaged_row_of_the_run_is_named(sclite):
    Path("runs/default").mkdir(parents=True)
    row = '{"id":"a","question":"q","answer":"1","trace":"<Step1>x\\n</Step1>\\n<Answer>1</Answer>","requests":1}'
    write("runs/default/templates.jsonl", row, row.replace('"trace"', '"trce"'), row)
    ended = sclite("train", "--only", "sft", "--set", "student.model=embedded")
    assert ended.code == 3
    assert "templates.jsonl, line 2: trace: Field required" in ended.error
    assert ended.hint == "try: fix or remove the line, or re-run the command that wrote the file"


def test_an_unknown_export_format_names_the_known_ones(sclite):
    ended = sclite("export", "--format", "onnx")
    assert ended.code == 2
    assert ended.hint == "try: use --format gguf, lora, merged or data"


def test_exporting_data_without_rows_suggests_build_data(sclite):
    ended = sclite("export", "--format", "data")
    assert ended.code == 3
    assert "runs/default has no templates or pairs to export" in ended.error
    assert "sclite build-data" in ended.hint


def test_chatting_without_a_gguf_suggests_train(sclite):
    ended = sclite("chat", "How many?")
    assert ended.code == 3
    assert "runs/default/export holds no GGUF" in ended.error
    assert "sclite train" in ended.hint
    ended = sclite("chat", "--model", "none.gguf", "How many?")
    assert ended.code == 3
    assert "none.gguf does not exist" in ended.error


def test_evaluating_without_problems_is_reported(sclite):
    ended = sclite("eval")
    assert ended.code == 2
    assert ended.error == "error: eval.source is not set"
    assert "`sclite eval test.jsonl`" in ended.hint
    write("few.jsonl", PROBLEM)
    ended = sclite("eval", "few.jsonl")
    assert ended.code == 3
    assert "few.jsonl: too few problems, 1 of 1 were not trained on" in ended.error
    saved = Path("runs/default/run.toml")  # or the next build-data would look for it
    assert not saved.is_file() or "few.jsonl" not in saved.read_text()


def test_an_unwritable_run_folder_is_reported(sclite):
    Path("taken").write_text("a file")
    ended = sclite("build-data", "--run", "taken", *TEACHER)
    assert ended.code == 2
    assert "taken cannot be written" in ended.error
    assert "--run" in ended.hint


def test_a_second_process_on_one_run_is_refused(tmp_path):
    command = [sys.executable, "-m", "sclite", "build-data", "mine.jsonl", "--run", str(tmp_path / "run")]
    root = Path(__file__).resolve().parents[1]
    with Run(tmp_path / "run").lock():
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: another sclite process is using {tmp_path / 'run'}",
        "try: wait for it, or choose another folder with --run",
    ]


def _interrupt(*_):
    raise KeyboardInterrupt


def test_ctrl_c_exits_with_130_and_suggests_to_resume(sclite, monkeypatch):
    monkeypatch.setattr(doctor, "run_checks", _interrupt)
    ended = sclite("doctor")
    assert (ended.code, ended.err) == (130, "interrupted; re-run to resume\n")


# -- successful commands ----------------------------------------------------------------------------------------------------


GROUPS = {
    "Start": ["quickstart", "init", "doctor"],
    "Build data and train": ["build-data", "train", "run"],
    "Evaluate and use": ["eval", "export", "chat", "serve"],
    "Inspect a run": ["status", "show", "report", "runs"],
}


def test_help_lists_the_commands_in_groups_in_80_columns(sclite, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, *groups = sclite("--help").out.split("\n\n")[2:]
    lines = [group.strip().splitlines() for group in groups]
    assert {heading.rstrip(":"): [row.split()[0] for row in rows] for heading, *rows in lines} == GROUPS
    for row in itertools.chain(*(rows for _, *rows in lines)):
        assert len(row) <= 80
        assert row.endswith(".")
        assert not row.endswith("...")


@pytest.mark.parametrize("name", itertools.chain(*GROUPS.values()))
def test_every_command_has_help(sclite, name):
    assert "Usage" in sclite(name, "-h").out
    assert sclite(name, "-h").out == sclite(name, "--help").out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("quickstart", "--problems", "5"), 2),
        (("init", "--config", "none/sclite.toml"), 2),
        (("doctor", "--gpu", "0"), 2),
        (("build-data", "none.jsonl", "--set", "teacher.model=a/b"), 3),
        (("train",), 2),
        (("run", "--set", "student.model=embedded"), 3),
        (("eval", "none.jsonl"), 3),
        (("export",), 2),
        (("chat", "How many?"), 3),
        (("serve",), 3),
        (("status", "--run", "none"), 3),
        (("show", "drop", "--run", "none"), 3),
        (("report",), 3),
        (("runs", "none"), 3),
        (("--jsn",), 2),
    ],
)
def test_with_json_every_error_is_one_object_on_stdout(sclite, arguments, code):
    ended = sclite(*arguments, "--json")
    found = json.loads(ended.out)
    assert ended.code == found["exit_code"] == code
    assert ended.error == f"error: {found['error']}"
    assert found["hint"]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_an_answer_of_no_is_not_an_error(sclite, monkeypatch, form):
    monkeypatch.setattr(console, "is_interactive", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    write("mine.jsonl", *[{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)])
    price = ("--set", "teacher.price=[1, 2]", "--set", "problems.fit_share=0")
    with TeacherServer(lambda request, nth: say("<Step1>x</Step1><Answer>1</Answer>")) as server:
        ended = sclite(
            "build-data", "mine.jsonl", *TEACHER, *price, "--set", f"teacher.api_base={server.url}", *form
        )
    assert ended.code == 0
    assert "Continue? [y/N]" in ended.err
    assert re.search(r"stopped after \d+ of 40 rows, as you answered", ended.err)
    assert ended.error == ""
    assert "re-run to resume" in ended.hint
    assert not form or json.loads(ended.out)["stopped"].startswith("stopped after")


def test_doctor_json_is_one_object(sclite):
    ended = sclite("doctor", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["checks"]


def test_exported_data_is_printed_as_one_json_object(sclite):
    Path("runs/default").mkdir(parents=True)
    row = '{"id":"a","question":"q","answer":"1","trace":"<Step1>x\\n</Step1>\\n<Answer>1</Answer>","requests":1}'
    write("runs/default/templates.jsonl", row)
    ended = sclite("export", "--format", "data", "--json")
    assert ended.code == 0
    found = json.loads(ended.out)
    assert (found["templates"], found["pairs"]) == (1, 0)
    assert (Path(found["folder"]) / "templates.jsonl").is_file()
    printed = sclite("export", "--format", "data").out
    assert "1 rows in runs/default/export/data/templates.jsonl" in printed
    assert "no pairs" in printed


def test_the_configuration_from_init_is_valid_and_never_overwritten(sclite):
    assert sclite("init").code == 0
    assert load(None, (), {}) is not None
    before = Path("sclite.toml").read_bytes()
    again = sclite("init")
    assert again.code == 2
    assert Path("sclite.toml").read_bytes() == before


# -- show and status ----------------------------------------------------------------------------------------------


@pytest.fixture
def dropped(tmp_path):
    """A run with two drops."""
    run = Run(tmp_path / "runs/default")
    run.append("problems.jsonl", [Problem(id="p1", question="What is 1 + 1?", answer="2")])
    reasons = {"p1": "wrong_answer", "p2": "no_steps"}
    run.append(
        "dropped.jsonl", [Drop(stage="templates", id=i, reason=r, raw="[b]½") for i, r in reasons.items()]
    )
    return run


def test_show_prints_plain_text_to_a_pipe(sclite, dropped):
    ended = sclite("show", "drops", "--reason", "wrong_answer")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "1/1  p1  templates  wrong_answer\nWhat is 1 + 1?\ngold answer 2\n[b]½\n\n"


def test_show_json_is_one_object_with_unchanged_rows(sclite, dropped):
    ended = sclite("show", "drops", "--from", "2", "--json")
    shown = json.loads(ended.out)
    assert (shown["what"], shown["total"]) == ("drops", 2)
    assert shown["rows"] == [json.loads(dropped.path("dropped.jsonl").read_text().splitlines()[1])]
    assert json.loads(sclite("show", "pairs", "--json").out) == {"what": "pairs", "total": 0, "rows": []}


def test_show_without_an_argument_is_an_overview(sclite, dropped):
    listed = sclite("show").out
    assert "sclite show drops" in listed
    assert "1 wrong answer, 1 no steps" in listed
    rows = json.loads(sclite("show", "--json").out)["rows"]
    assert {row["what"]: row["rows"] for row in rows} == {
        **dict.fromkeys(("templates", "attempts", "reviews", "pairs"), 0),
        **{"problems": 1, "drops": 2},
    }


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (("show", "drop"), 2, "unknown kind of rows: drop", "problems, templates, attempts"),
        (("show", "drops", "--reason", "leak"), 2, "--reason leak", "wrong_answer (1), no_steps (1)"),
        (("show", "drops", "--from", "3"), 2, "--from 3: only 2 drops match", "1 to 2"),
        (("show", "--run", "none"), 3, "the run none does not exist", "sclite build-data"),
        (("status", "--run", "runs/none"), 3, "the run runs/none does not exist", "sclite build-data"),
    ],
)
def test_what_cannot_be_shown_names_what_can(sclite, dropped, arguments, code, message, hint):
    ended = sclite(*arguments)
    assert (ended.code, ended.out) == (code, "")
    assert message in ended.error
    assert hint in ended.hint


def test_status_shows_states_drops_and_the_next_command(sclite, dropped):
    ended = sclite("status")
    assert ended.code == 0
    assert "incomplete" in ended.out
    assert "Dropped: 1 wrong answer, 1 no steps" in ended.out
    assert ended.out.splitlines()[-1] == "Next: sclite init"
    figures = json.loads(sclite("status", "--json").out)
    assert figures["dropped"] == {"wrong_answer": 1, "no_steps": 1}
    assert figures["stages"]["problems"]["state"] == "done"


def in_a_terminal(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """(exit code, output) of a command in a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sclite", *arguments]
    paths = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "TERM": "xterm-256color"}
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "PAGER", "LESS")}
    process = subprocess.Popen(
        command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env={**clean, **paths, **environment}
    )
    os.close(theirs)
    sent = b""
    while True:
        try:
            block = os.read(ours, 1 << 16)
        except OSError:  # EIO on Linux when the last writer is gone
            break
        if not block:
            break
        sent += block
    os.close(ours)
    return process.wait(timeout=60), sent.decode()


def test_show_is_colored_and_paged_in_a_terminal(dropped, tmp_path):
    code, sent = in_a_terminal(tmp_path, "show", "drops", PAGER="sed s/What/Which/")
    assert code == 0
    assert "\x1b[1;31mwrong_answer\x1b[0m" in sent
    assert "Which is 1 + 1?" in sent


def test_a_missing_pager_is_skipped(dropped, tmp_path):
    code, sent = in_a_terminal(tmp_path, "show", "drops", PAGER="no-such-pager")
    assert code == 0
    assert "\x1b[1;31mwrong_answer\x1b[0m" in sent


def test_quitting_the_pager_early_is_no_error(dropped, tmp_path):
    dropped.append(
        "dropped.jsonl", (Drop(stage="s", id=str(n), reason="r", raw="x" * 99) for n in range(5000))
    )
    code, sent = in_a_terminal(tmp_path, "show", "drops", PAGER="head -1")
    assert (code, "Traceback" in sent) == (0, False)


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_pipe_closed_early_is_no_error(dropped, tmp_path, form):
    dropped.append(
        "dropped.jsonl", (Drop(stage="s", id=str(n), reason="r", raw="x" * 99) for n in range(5000))
    )
    command = f"{sys.executable} -m sclite show drops {' '.join(form)} | head -1; exit ${{PIPESTATUS[0]}}"
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=paths, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)


def test_a_missing_attempts_source_is_reported_before_any_request(sclite):
    ended = sclite(
        "build-data", "p.jsonl", "--set", "attempts.source=nope.jsonl", "--set", "teacher.model=a/b"
    )
    assert ended.code == 3
    assert "attempts.source: nope.jsonl does not exist" in ended.error
    assert "unset it: --set attempts.source=" in ended.hint


def test_an_empty_question_is_refused(sclite):
    ended = sclite("chat", " ")
    assert (ended.code, ended.error) == (2, "error: the question is empty")


@pytest.mark.parametrize("command", ["run", "build-data", "build-data --dry-run"])
def test_a_missing_teacher_is_named_with_an_example(sclite, command):
    name, *options = command.split()
    ended = sclite(name, write("mine.jsonl", PROBLEM), *options, "--set", "student.model=embedded")
    assert ended.code == 2
    assert "teacher.model is not set" in ended.error
    assert "teacher.model=" in ended.hint


@pytest.mark.parametrize("command", ["status", "show"])
def test_commands_that_read_a_run_find_the_quickstarts(sclite, command):
    assert sclite(command).code == 3
    Run(Path("runs/quickstart")).append("problems.jsonl", [Problem(id="p", question="1 + 1?", answer="2")])
    assert "runs/quickstart" in sclite(command).out
    Run(Path("runs/default")).append("problems.jsonl", [Problem(id="p", question="1 + 1?", answer="2")])
    assert "runs/default" in sclite(command).out


def test_the_shell_gets_completions():
    environment = {
        **os.environ,
        "_SCLITE_COMPLETE": "complete_bash",
        "COMP_WORDS": "sclite tr",
        "COMP_CWORD": "1",
    }
    command = [sys.executable, "-m", "sclite"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["train"]
