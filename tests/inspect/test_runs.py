"""`sclite runs` and `sclite report`."""

import json
import os

from sclite.run import Run


def evaluated(folder, student="org/model", acc=0.5):
    run = Run(folder)
    run.folder.mkdir(parents=True)
    run.path("run.toml").write_text(f'[student]\nmodel = "{student}"\n')
    figures = {"file": "x.gguf", "bytes": 1, "made_from": "", "acc_t1": acc, "acc_t2": acc + 0.25, "n": 40}
    other = {**figures, "acc_t1": 0.1}
    models = {"base": other, "dpo": figures, "ollama/x": other}
    run.write_json("eval/a/summary.json", {"models": models, "n": 40, "folder": "eval/a"})
    run.path("eval/a/report.html").write_text("<html>")
    return run


def test_runs_are_listed_with_their_student_and_last_accuracy(sclite, tmp_path):
    evaluated(tmp_path / "runs/b", "org/second", 0.25)
    evaluated(tmp_path / "runs/a")
    (tmp_path / "runs/not-a-run").mkdir()
    ended = sclite("runs", str(tmp_path / "runs"), "--json")
    first, second = json.loads(ended.out)["runs"]
    assert (first["student"], first["acc_t1"], first["acc_t2"], first["n"]) == ("org/model", 0.5, 0.75, 40)
    assert (second["student"], second["acc_t1"]) == ("org/second", 0.25)
    assert second["run"] == str(tmp_path / "runs/b")
    assert first["bytes"] == sum(p.stat().st_size for p in (tmp_path / "runs/a").rglob("*") if p.is_file())
    assert "org/second" in sclite("runs", str(tmp_path / "runs")).out


def test_the_last_stage_of_a_run_in_training_is_the_one_in_progress(sclite, tmp_path):
    run = evaluated(tmp_path / "runs/a")
    run.path("eval/a/summary.json").unlink()
    template = {"id": "p", "question": "q", "answer": "1", "trace": "<Step1>x\n</Step1>\n<Answer>1</Answer>"}
    run.path("templates.jsonl").write_text(json.dumps({**template, "requests": 1}) + "\n")
    run.path("sft").mkdir()
    run.path("sft/metrics.jsonl").write_text('{"phase": "sft", "step": 3, "loss": 0.5}\n')
    (found,) = json.loads(sclite("runs", str(tmp_path / "runs"), "--json").out)["runs"]
    assert (found["stage"], found["state"]) == ("sft", "half_way")
    assert "sft incomplete" in sclite("runs", str(tmp_path / "runs")).out


def test_a_damaged_run_or_an_evaluation_of_no_model_hides_no_other_run(sclite, tmp_path):
    summary = {"models": {}, "n": 40, "folder": "eval/a"}
    evaluated(tmp_path / "runs/a").write_json("eval/a/summary.json", summary)
    evaluated(tmp_path / "runs/b").path("run.toml").write_text("[student\n")
    first, second = json.loads(sclite("runs", str(tmp_path / "runs"), "--json").out)["runs"]
    assert (first["error"], first["acc_t1"]) == ("", None)
    assert "run.toml" in second["error"]
    ended = sclite("runs", str(tmp_path))
    assert ended.code == 3
    assert "contains no run" in ended.error


def test_report_prints_the_path_of_the_newest_report_without_a_display(sclite, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    run = evaluated(tmp_path / "a")
    run.write_json("eval/b/summary.json", {})
    run.path("eval/b/report.html").write_text("<html>")
    os.utime(run.path("eval/b/report.html"), (1, 1))
    assert sclite("report", "--run", str(run.folder)).out.strip() == str(run.path("eval/a/report.html"))
    ended = sclite("report", "--run", str(tmp_path / "none"))
    assert ended.code == 3
    assert "sclite eval" in ended.hint
