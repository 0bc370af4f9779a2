"""End to end: one small quickstart, shared by all tests of this file, and commands on its run."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sclite import pipeline
from sclite.context import Context
from sclite.errors import UsageError
from sclite.progress import ProgressDisplay
from sclite.quickstart import flow
from sclite.quickstart.stories import problem_set
from sclite.records import Problem
from sclite.run import Run
from sclite.settings import load

SMALL = ("--set", "problems.limit=160", "--set", "sft.num_train_epochs=6")
SMALL += ("--set", "eval.limit=20", "--set", "eval.max_tokens=160")


@pytest.fixture
def command(sclite, monkeypatch):
    """Runs `sclite ARGUMENTS` in a folder; it must end with this exit code."""

    def call(*arguments: str, folder: Path, text: str = "", code: int = 0):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        ended = sclite(*arguments)
        assert ended.code == code, ended.err
        return ended

    return call


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def quickstarted(tmp_path_factory):
    """(folder, run folder, summary) of a small quickstart; what it prints is in `printed`."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "sclite", "quickstart", *SMALL]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    (summary,) = (folder / "runs/quickstart/eval").glob("*/summary.json")
    return folder, folder / "runs/quickstart", json.loads(summary.read_text())


def test_the_summary_is_of_problems_that_were_never_trained_on(quickstarted):
    _, run, summary = quickstarted
    trained = {row["question"] for row in rows_of(run / "problems.jsonl")}
    tested = {row["question"] for row in rows_of(run / summary["folder"] / "dpo.jsonl")}
    assert trained
    assert tested
    assert not trained & tested
    assert set(summary["models"]) == {"base", "sft", "dpo"}
    for figures in summary["models"].values():
        assert figures["n"] + figures["unknown"] == 20
        gained = figures["wrong_to_right"] - figures["right_to_wrong"]
        assert figures["difference"] == pytest.approx(gained)
    # SFT teaches the form
    assert summary["models"]["sft"]["format_validity"] > summary["models"]["base"]["format_validity"] + 0.5


def test_dpo_starts_at_ln_2_and_its_gguf_agrees_with_the_trained_model(quickstarted):
    _, run, _ = quickstarted
    first = next(row for row in rows_of(run / "dpo/metrics.jsonl") if row["phase"] == "dpo")
    assert first["dpo_loss"] == pytest.approx(0.6931, abs=0.001)
    assert first["margin"] == pytest.approx(0, abs=1e-3)
    parity = json.loads((run / "export/parity.json").read_text())
    assert parity["tokens_equal"] == parity["tokens_compared"] > 0
    assert all(figures["top1_agreement"] > 0.98 for figures in parity["files"].values())
    assert parity["unquantized"]["mean_abs_logprob_diff"] < 0.004


def test_a_second_quickstart_repeats_no_stage_and_one_says_what_to_type(quickstarted, command):
    folder, run, summary = quickstarted
    made = [path for path in run.rglob("*") if path.suffix in (".safetensors", ".gguf")]
    before = [path.stat().st_mtime_ns for path in made]
    again = command("quickstart", *SMALL, "--json", folder=folder)
    assert json.loads(again.out) == summary
    assert before == [path.stat().st_mtime_ns for path in made] != []
    printed = [line.strip() for line in (folder / "printed").read_text().splitlines()]
    chat = f"sclite chat --self-correct --run {run.relative_to(folder)}"
    assert [line.split("  ")[0] for line in printed if line.startswith("sclite ")] == [chat, "sclite init"]


def test_chat_reviews_its_own_answer_and_reads_questions_from_standard_input(quickstarted, command):
    folder, run, summary = quickstarted
    measured = rows_of(run / summary["folder"] / "dpo.jsonl")
    known = next(row for row in measured if row["correct1"] and row["step_scores"])
    never = ("--set", "review.threshold=50")  # scored, and nothing flagged
    done = command("chat", "--self-correct", "--json", known["question"], *never, folder=folder)
    answer = json.loads(done.out)
    assert len(answer["step_scores"]) == len(known["step_scores"])
    assert answer["answer"] == known["gold"]

    # questions from standard input
    text = "Tom has 20 nuts. He buys 11 more. He sells 12 nuts. How many nuts does Tom have now?\n"
    done = command("chat", "--self-correct", folder=folder, text=text)
    assert len(done.out.splitlines()) == 1
    assert done.out.strip().isdigit()


def test_status_and_export_suggest_the_command_that_follows(quickstarted, tmp_path, command):
    _, run, _ = quickstarted
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "done/dpo.json").rename(tmp_path / "dpo.json")
    unfinished = command("status", "--run", str(copy), folder=tmp_path).out.replace("\n", " ")
    assert f"Next: sclite quickstart --run {copy}" in unfinished
    (tmp_path / "dpo.json").rename(copy / "done/dpo.json")
    done = command("export", "--quant", "f16", "--run", str(copy), folder=tmp_path)
    assert done.out.splitlines()[-1] == f"Next: sclite chat --run {copy}"


def test_other_commands_split_the_problems_identically(quickstarted, command):
    folder, run, _ = quickstarted
    names = ("problems.jsonl", "attempts.jsonl", "reviews.jsonl")
    before = [(run / name).read_bytes() for name in names]
    for asked in (["build-data"], ["train"]):
        done = command(*asked, "--run", str(run), folder=folder)
        fits = json.loads((run / "export/threshold.json").read_text()).values()
        review = " --self-correct" if any(fit["threshold"] is not None for fit in fits) else ""
        assert done.out.splitlines()[-1] == f"Next: sclite chat{review} --run {run}"
    assert "dpo: " in done.err
    assert before == [(run / name).read_bytes() for name in names]
    planned = json.loads(command("train", "--plan", "--json", "--run", str(run), folder=folder).out)
    assert planned["stages"]["sft"]["rows"] == 80


def test_eval_without_dpo_and_results_per_dataset(quickstarted, tmp_path, command):
    _, run, summary = quickstarted
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "dpo")
    first = {path: path.read_bytes() for path in (copy / summary["folder"]).iterdir()}
    thresholds = json.loads((copy / "export/threshold.json").read_text())
    rows = [json.dumps({"question": p.question, "answer": p.answer}) for p in problem_set("test", 16)]
    (tmp_path / "other.jsonl").write_text("\n".join([*rows, "not JSON"]))
    done = command("eval", "other.jsonl", "--json", "--run", str(copy), folder=tmp_path)
    other = json.loads(done.out)
    assert (other["folder"], list(other["models"])) == ("eval/other", ["base", "sft"])
    assert other["dropped"] == {"row_not_readable": 1}
    fewer = command("eval", "other.jsonl", "--limit", "10", "--run", str(copy), folder=tmp_path)
    assert "eval/other-limit-10/report.html" in fewer.out
    assert "review is off for base: " in fewer.out
    assert {path: path.read_bytes() for path in first} == first
    assert (copy / "eval/other/sft.jsonl").is_file()
    after = json.loads((copy / "export/threshold.json").read_text())
    fits = {key: fit for key, fit in thresholds.items() if key.startswith(summary["models"]["sft"]["gguf"])}
    assert fits
    assert after | fits == after  # fitted on more problems


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """begin(setting, ..): the quickstart in this folder up to its templates; returns its problems."""
    monkeypatch.chdir(tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    def call(*chosen: str) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "build_templates", stop)
            with pytest.raises(KeyboardInterrupt):
                flow.quickstart(load(None, chosen, {}, flow.DEFAULTS, own_file=False), quiet=True)
        return Path("runs/quickstart/problems.jsonl")

    return call


def test_problems_of_the_user_are_not_replaced(tmp_path):
    run = Run(tmp_path)
    config = load(None, [f"run={tmp_path}"], {}, flow.DEFAULTS, own_file=False)
    rows = [Problem(id=f"arithmetic-103-{n}", question=f"What is {n} + 1?", answer="1") for n in range(300)]
    run.replace("problems.jsonl", rows)
    with pytest.raises(UsageError, match="already contains other problems"):
        flow.quickstart(config, quiet=True)
    assert run.read("problems.jsonl", Problem) == rows


def test_a_damaged_problem_is_restored_and_none_is_lost_with_it(begin):
    whole = begin().read_bytes()
    assert whole.count(b"\n") == 1040
    Path("runs/quickstart/problems.jsonl").write_bytes(whole.replace(b'"question"', b'"queston"', 1))
    assert begin().read_bytes() == whole


def test_more_problems_than_the_threshold_set_matches_stay(begin):
    assert begin("problems.limit=1700").read_bytes().count(b"\n") == 2700
    assert begin().read_bytes().count(b"\n") == 2700


def test_evaluation_on_other_problems_leaves_the_split_of_the_run(begin):
    begin()
    train = problem_set("train", 640)
    rows = [json.dumps({"question": p.question, "answer": p.answer}) for p in train[:9]]
    Path("other.jsonl").write_text("\n".join(rows))
    config = load(None, ["eval.source=other.jsonl"], {}, flow.DEFAULTS, own_file=False)
    context = Context(config, Run(config.run), ProgressDisplay(quiet=True))
    sft, stage2, fit = pipeline.divided_problems(context)
    assert (sft, stage2, fit) == (train[:320], train[320:], problem_set("threshold", 400))


def test_a_changed_setting_needs_fresh_and_keeps_the_templates(quickstarted, command):
    folder, run, _ = quickstarted
    before = (run / "templates.jsonl").read_bytes()
    adapter = (run / "sft/adapter/adapter_model.safetensors").read_bytes()
    asked = ["train", "--only", "sft", "--json", "--run", str(run), "--set", "sft.num_train_epochs=0.1",
               "--set", "student.model=embedded", "--set", "problems.limit=160"]  # fmt: skip
    refused = command(*asked, folder=folder, code=2)
    assert "sft.num_train_epochs: 6 before, 0.1 now" in refused.err
    assert (run / "sft/adapter/adapter_model.safetensors").read_bytes() == adapter
    done = command(*asked, "--fresh", folder=folder)
    assert json.loads(done.out)["sft"]["counts"]["steps"] < 10
    assert (run / "templates.jsonl").read_bytes() == before
