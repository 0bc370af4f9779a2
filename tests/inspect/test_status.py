"""The status of a run: done, stale, half-way or not started, read without changing the run."""

import os
import shutil
from pathlib import Path

import pytest

from sclite import prompts
from sclite.data import attempts, corrections, templates
from sclite.data.problems import split_for_stages
from sclite.errors import DataError
from sclite.evaluate.threshold import FittedThreshold, store_threshold
from sclite.inspect.status import OUTPUTS, Stage, next_command, read_status
from sclite.records import FEEDBACK, Attempt, Drop, Feedback, Problem, Review, Template
from sclite.run import Report, Run
from sclite.settings import load
from sclite.student.ggufs import export_stage, inputs_of, source_digest
from sclite.teacher.ledger import Ledger
from sclite.train.stage import training_inputs
from tests.toy import pay

TRACE = "<Step1>x\n</Step1>\n<Answer>1</Answer>"
PROBLEMS = [Problem(id=f"p{n}", question=f"{n}?", answer="1") for n in range(8)]
TAUGHT, KEPT = split_for_stages(PROBLEMS, 0.5, 0)
TEMPLATES = [Template(id=p.id, question=p.question, answer=p.answer, trace=TRACE) for p in PROBLEMS]
ATTEMPTS = [Attempt(id=p.id, sample=0, trace=TRACE, answer="2", correct=False) for p in PROBLEMS]
REVIEW = Review(id=KEPT[0].id, sample=0, step=1, trace=TRACE)
SETTINGS = ("teacher.model=openai/replay", "student.model=embedded", "attempts.samples=1")


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(run: Run, *more: str):
    return load(None, [f"run={run.folder}", *SETTINGS, *more], {})


def read(run: Run, *more: str) -> dict:
    return read_status(config(run, *more), run)


def states(run: Run, *more: str) -> dict[str, str]:
    return {name: stage["state"] for name, stage in read(run, *more)["stages"].items()}


def state(run: Run, name: str) -> tuple:
    """(state, reasons, rows so far, total) of a stage."""
    return tuple(read(run)["stages"][name][key] for key in ("state", "why", "rows", "total"))


def following(run: Run, *more: str) -> str:
    return read(run, *more)["next"].partition(" --run")[0]


def adapter(run: Run, name: str, weights: bytes = b"weights") -> None:
    run.path(name).mkdir(parents=True, exist_ok=True)
    run.path(f"{name}/adapter_model.safetensors").write_bytes(weights)


def export(run: Run, name: str, quant: str = "q4_k_m") -> Path:
    """The GGUF of a student, as `sclite export` leaves it."""
    gguf = run.path(f"export/{name}-{quant}.gguf")
    gguf.parent.mkdir(exist_ok=True)
    gguf.write_bytes(b"GGUF" + name.encode() + quant.encode() * (quant != "q4_k_m"))
    files = {gguf.name: {"megabytes": 0.0, "sha256": run.file_digest(str(gguf.resolve()))}}
    made = config(run, f"export.quant={quant}")
    report = Report(export_stage(name, made), figures={"files": files})
    run.sign(report.stage, inputs_of(made, run, name), report)
    return gguf


def fit(run: Run, name: str, threshold: float | None = 2.0, problems: int = 70) -> None:
    """The threshold of an exported student, as an evaluation leaves it."""
    gguf = export(run, name)
    fitted = FittedThreshold(threshold=threshold, problems=problems, max_harm=0.005)
    store_threshold(config(run), run, gguf, fitted)


def write_corrections(run: Run, *more: str) -> None:
    run.replace("reviews.jsonl", [REVIEW])
    inputs = corrections.corrections_inputs(config(run, *more), run)
    run.sign("corrections", inputs, Report("corrections", {"corrected": 1}))


@pytest.fixture
def built(run) -> Run:
    """A run whose templates are done, with one drop."""
    run.replace("problems.jsonl", PROBLEMS)
    run.write_json("templates.begun.json", {})
    run.replace("templates.jsonl", TEMPLATES[:7])
    run.replace_drops("templates", [Drop(stage="templates", id="p7", reason="no_steps")])
    pay(run, "templates", 0.25, None)
    report = Report("templates", {"problems": 8, "templates": 7}, {"no_steps": 1}, 2.5, 0.25)
    run.sign("templates", templates.templates_inputs(config(run), [*TAUGHT, *KEPT]), report)
    return run


@pytest.fixture
def trained(built) -> Run:
    """The same after SFT, attempts and corrections."""
    adapter(built, "sft/adapter")
    made, unseen = config(built), frozenset(problem.id for problem in KEPT)
    report = Report("sft", {"rows": 4, "steps": 2})
    report.figures["adapter"] = built.file_digest("sft/adapter/adapter_model.safetensors")
    built.sign("sft", training_inputs(made, built, "sft", unseen), report)
    built.replace("attempts.jsonl", [row for row in ATTEMPTS if row.id in unseen])
    built.sign("attempts", attempts.attempts_inputs(made, built, KEPT), Report("attempts", {"wrong": 4}))
    write_corrections(built)
    return built


def test_another_teacher_for_the_corrections_makes_no_learned_templates_stale(built, request):
    other = "teacher.model=openai/other"
    assert states(built, other)["templates"] == "stale"
    trained = request.getfixturevalue("trained")
    write_corrections(trained, other)
    found = states(trained, other)
    assert (found["templates"], found["sft"], found["corrections"]) == ("done", "done", "done")
    assert following(trained, other) == "sclite train"


def test_a_run_must_exist_and_needs_a_configuration_problems_and_a_teacher(run):
    with pytest.raises(DataError, match="does not exist"):
        read(run)
    assert not run.folder.exists()
    run.folder.mkdir()
    found = read(run)
    assert {stage["state"] for stage in found["stages"].values()} == {"not_begun"}
    assert (found["ledger"], found["dropped"]) == (None, {})
    assert following(run, "teacher.model=") == "sclite init"
    Path("sclite.toml").write_text("")
    needed = "set problems.source and teacher.model in sclite.toml"
    assert following(run, "teacher.model=") == needed
    assert following(run, "problems.source=p.jsonl") == "sclite build-data"


def test_problems_dropped_for_the_evaluation_make_nothing_stale(built):
    built.append("problems.jsonl", [Problem(id="e1", question="Asked?", answer="1")])
    assert state(built, "templates")[0] == "stale"
    left_out = Drop(stage="problems", id="e1", reason="overlaps_evaluation", raw="Asked?")
    built.append("dropped.jsonl", [left_out])
    found = read(built)["stages"]
    assert (found["templates"]["state"], found["problems"]["counts"]) == ("done", {"problems": 8})


def test_a_finished_stage_shows_counts_drops_seconds_and_cost(built):
    found = read(built)
    expected = {"state": "done", "why": [], "counts": {"problems": 8, "templates": 7}, "seconds": 2.5}
    expected |= {"dropped": {"no_steps": 1}, "cost_usd": 0.25, "rows": None, "total": None}
    assert found["stages"]["templates"] == expected
    assert found["dropped"] == {"no_steps": 1}
    paid = {"requests": 2, "prompt_tokens": 200, "completion_tokens": 40, "cost_usd": 0.25, "unpriced": 1}
    assert {name: found["ledger"][name] for name in paid} == paid


def test_stages_are_done_until_an_output_is_missing_or_another_file(trained):
    done = [name for name, state in states(trained).items() if state == "done"]
    assert done == ["problems", "templates", "sft", "attempts", "corrections"]
    adapter(trained, "sft/adapter", b"others")
    found = read(trained)["stages"]
    assert (found["sft"]["state"], found["attempts"]["state"]) == ("stale", "stale")
    assert "is not the adapter that sft wrote" in found["sft"]["why"][0]
    assert following(trained) == "sclite train --fresh"  # otherwise it is refused
    trained.path("sft/adapter/adapter_model.safetensors").unlink()
    assert read(trained)["stages"]["sft"]["why"][-1].endswith("safetensors is missing")


OTHER = "teacher.model: openai/replay before, openai/other now"


@pytest.mark.parametrize(
    ("setting", "stage", "why"),
    [
        ("teacher.model=openai/other", "corrections", OTHER),  # SFT has learned the templates
        ("seed=1", "templates", "problems changed"),
        ("sft.num_train_epochs=7", "sft", "sft.num_train_epochs: 3 before, 7 now"),
        ("attempts.temperature=0.1", "attempts", "sampling changed"),
        ("attempts.confirmation_share=0.1", "corrections", "confirmations: 0.5 before, 0.1 now"),
        ("prompts.folder=mine", "corrections", "prompts changed"),
        ("student.model=", "sft", "no student is configured"),  # its inputs cannot be read
    ],
)
def test_a_changed_setting_makes_its_stage_and_later_ones_stale(trained, setting, stage, why):
    shutil.copytree(prompts.SHIPPED, "mine")
    Path("mine/teacher_system.txt").write_text("Otherwise.")
    found = read(trained, setting)["stages"]
    assert why in "; ".join(found[stage]["why"])
    order = ["templates", "sft", "attempts", "corrections"]
    assert [name for name in order if found[name]["state"] == "stale"] == order[order.index(stage) :]


def test_an_unfinished_file_is_half_way(run):
    run.replace("problems.jsonl", PROBLEMS)
    run.write_json("templates.begun.json", {})
    run.append("templates.jsonl", TEMPLATES[:3])
    with open(run.path("templates.jsonl"), "a") as file:
        file.write('{"id":"p')
    assert state(run, "templates") == ("half_way", [], 3, 8)


def test_a_build_that_was_killed_before_its_first_row_is_a_run(run):
    with run.lock():
        pay(run, "chat", 0.5)
        judged = Feedback(question="q", attempt="a", final="a", accused=None, good=True, model="m")
        run.append(FEEDBACK, [judged])
        assert not run.is_begun()  # the ledger and feedback of a chat
    with run.recording(config(run)):
        assert run.is_begun()
    pay(run, "templates", 0.5)
    assert read(run)["ledger"]["requests"] == 2
    assert following(run, "problems.source=p.jsonl") == "sclite build-data"


def test_unanswered_requests_leave_a_stage_half_way(trained):
    inputs = trained.manifest("templates")["inputs"]
    trained.sign("templates", {**inputs, "unanswered": 2}, Report("templates", {"templates": 5}))
    assert state(trained, "templates")[:2] == ("half_way", ["2 requests without a reply"])


def test_interrupted_training_is_half_way_at_its_last_step(built):
    dpo = '{"phase": "dpo", "step": 1}\n{"phase": "dpo", "step": 2}\n{"phase": "d'
    for name, rows in (("warmup", '{"phase": "warmup", "step": 10}\n'), ("dpo", dpo)):
        built.path(name).mkdir()
        built.path(f"{name}/metrics.jsonl").write_text(rows)
    assert state(built, "sft") == ("not_begun", [], None, None)
    assert state(built, "warmup") == ("half_way", [], 10, None)
    assert state(built, "dpo") == ("half_way", [], 2, None)


def test_imported_rows_and_an_imported_adapter_are_done(run):
    names = ["templates", "sft", "attempts", "corrections"]
    run.append("templates.jsonl", TEMPLATES[:3])
    run.append("attempts.jsonl", ATTEMPTS[:1])
    run.append("reviews.jsonl", [REVIEW])
    adapter(run, "sft/adapter")
    found = read(run)["stages"]
    assert {found[name]["state"] for name in names} == {"done"}
    assert [found[name]["counts"]["imported"] for name in names] == [3, 1, 1, 1]
    for name in names:
        run.mark_started(name)
    found = states(run)
    assert [found[name] for name in names] == ["half_way", "not_begun", "half_way", "half_way"]


def test_damaged_rows_are_reported_with_the_command_that_repairs_them(trained):
    for stage, name, rows in (("templates", "templates.jsonl", 7), ("corrections", "reviews.jsonl", 1)):
        manifest = trained.manifest(stage)
        trained.sign(stage, manifest["inputs"], Report.of(manifest), {name: rows})
    trained.path("reviews.jsonl").write_bytes(b"{}\n")
    assert "0 of 1 rows are intact" in state(trained, "corrections")[1][0]
    assert following(trained) == "sclite train"
    trained.path("templates.jsonl").write_bytes(b"\0\n")
    assert "0 of 7 rows are intact" in state(trained, "templates")[1][0]
    assert following(trained) == "sclite build-data"
    named = Run(trained.folder.rename(trained.folder.with_name("teacher-prompts")))
    assert following(named) == "sclite build-data"  # --fresh would empty the file


def evaluated(run: Run) -> None:
    run.path("export").mkdir(exist_ok=True)
    run.path("export/sft-q4_k_m.gguf").write_bytes(b"one")
    made = source_digest(config(run), run, "sft")
    figures = {"file": "sft-q4_k_m.gguf", "bytes": 3, "made_from": made}
    run.write_json("eval/a/summary.json", {"models": {"sft": figures}, "n": 300, "folder": "eval/a"})


def test_an_evaluation_of_another_adapter_is_stale(built):
    evaluated(built)
    older = {"models": {"sft": {"file": "x.gguf", "bytes": 1, "made_from": ""}}, "n": 20, "folder": "eval/b"}
    built.write_json("eval/b/summary.json", older)
    os.utime(built.path("eval/b/summary.json"), (1, 1))
    stage = read(built)["stages"]["eval"]
    assert stage["state"] == "done"
    assert stage["counts"] == {"problems in eval/a": 300, "problems in eval/b": 20}
    adapter(built, "sft/adapter", b"trained again")
    assert states(built)["eval"] == "stale"


def test_status_reads_no_gguf(built, monkeypatch):
    adapter(built, "sft/adapter")
    evaluated(built)
    adapter(built, "sft/adapter")  # its known hash no longer counts
    opened, really_open = [], open

    def watched(path, *rest, **named):
        opened.append(Path(path).name if isinstance(path, Path) else "")
        return really_open(path, *rest, **named)

    monkeypatch.setattr("builtins.open", watched)
    assert states(built)["eval"] == "done"
    assert "adapter_model.safetensors" in opened
    os.utime(export(built, "sft"), (1, 1))
    opened.clear()
    assert states(built)["export"] == "done"
    assert not [name for name in opened if name.endswith(".gguf")]


def test_status_changes_no_file_and_works_on_a_read_only_run(trained):
    def snapshot():
        paths = [path for path in trained.folder.rglob("*") if path.is_file()]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    before = snapshot()
    trained.folder.chmod(0o555)  # which root may write to anyway
    try:
        assert read(trained, "seed=5")["ledger"]["requests"] == 2
    finally:
        trained.folder.chmod(0o755)
    assert snapshot() == before


def test_status_works_while_another_process_writes(built):
    with built.lock(), Ledger(built.path("ledger.sqlite")) as ledger:
        pay(built, "corrections", 0.5)
        found = read(built)
        assert (found["ledger"]["requests"], found["ledger"]["cost_usd"]) == (3, 0.75)
        ledger.sent("newer", "templates", "m")
        assert read(built)["ledger"]["requests"] == 3


def test_the_next_command_runs_the_first_unfinished_stage(trained):
    assert read(trained)["next"] == f"sclite train --run {trained.folder}"
    assert following(trained, "teacher.model=openai/other") == "sclite train --fresh"
    assert following(trained, "teacher.max_tokens=8192") == "sclite train"  # the rows stay
    assert following(trained, "seed=1") == "sclite build-data"
    assert following(trained, "sft.num_train_epochs=7") == "sclite train --fresh"  # otherwise it is refused
    own = ("teacher.model=embedded/tutor", "problems.source=")
    assert following(trained, *own, "sft.num_train_epochs=7") == "sclite quickstart --fresh"
    adapter(trained, "warmup/adapter")
    trained.sign("warmup", training_inputs(config(trained), trained, "warmup"), Report("warmup"))
    # else the warm-up would be refused
    assert following(trained, "attempts.temperature=0.1") == "sclite train --fresh"
    trained.path("done/sft.json").unlink()
    unnamed = "sclite train --fresh --set student.model=MODEL"
    assert following(trained, "student.model=") == unnamed
    assert following(trained, "student.model=", "teacher.model=") != unnamed
    Path("sclite.toml").write_text("")
    assert following(trained, "student.model=") == "set student.model in sclite.toml"


@pytest.mark.parametrize(
    ("settings", "fitted", "command"),
    [
        ([], None, "chat"),
        (["eval.source=openai/gsm8k"], None, "eval"),
        (["review.threshold=1"], None, "chat --self-correct"),
        ([], Stage(), "train"),
        ([], Stage("done", ["nothing to gain"], {"problems": 60, "fitted": 0}), "chat"),
        ([], Stage("done", [], {"problems": 60, "fitted": 1}), "chat --self-correct"),
    ],
)
def test_eval_is_suggested_only_with_problems_and_review_with_a_threshold(run, settings, fitted, command):
    stages = {name: Stage("done") for name in ("problems", *OUTPUTS, "export")} | {"eval": Stage()}
    stages |= {} if fitted is None else {"threshold": fitted}
    assert next_command(config(run, *settings), stages) == f"sclite {command} --run {run.folder}"


def test_the_threshold_of_the_newest_student_is_found(built):
    adapter(built, "sft/adapter")
    export(built, "sft")
    assert "threshold" not in states(built)  # train fits that of DPO's student
    fit(built, "sft")
    assert read(built)["stages"]["threshold"]["counts"] == {"problems": 70, "fitted": 1}
    adapter(built, "dpo/adapter")
    export(built, "dpo")
    assert states(built)["threshold"] == "not_begun"
    fit(built, "dpo", problems=60)
    stage = read(built)["stages"]["threshold"]
    assert (stage["state"], stage["counts"]) == ("done", {"problems": 60, "fitted": 1})
    built.path("export/dpo-q4_k_m.gguf").unlink()
    assert states(built)["export"] == "stale"


def test_imported_attempts_are_done(built):
    Path("tries.jsonl").write_text("{}")
    named = "attempts.source=tries.jsonl"
    built.replace("attempts.jsonl", ATTEMPTS)
    inputs = attempts.attempts_inputs(config(built, named), built, [*TAUGHT, *KEPT])
    built.sign("attempts", inputs, Report("attempts", {"wrong": 8}))
    assert states(built, named)["attempts"] == "done"
    assert following(built, named) == "sclite train"


def test_a_file_in_another_type_leaves_the_finished_export_and_its_threshold(built):
    adapter(built, "dpo/adapter")
    fit(built, "dpo")
    export(built, "dpo", "f16")  # `sclite export --quant f16`
    assert [states(built)[stage] for stage in ("export", "threshold")] == ["done", "done"]
    other = states(built, "export.quant=f16")
    assert [other[stage] for stage in ("export", "threshold")] == ["done", "not_begun"]
    made = config(built, "export.imatrix=true", "export.keep_template=true")  # options of one export
    stage = export_stage("dpo", made)
    built.sign(stage, inputs_of(made, built, "dpo"), Report(stage, figures={"files": {}}))
    assert states(built)["export"] == "done"


def test_threshold_is_stale_without_its_prompts_and_fitted_for_one_limit(built):
    adapter(built, "dpo/adapter")
    fit(built, "dpo")
    assert states(built, "review.max_harm=0.2")["threshold"] == "not_begun"
    stage = read(built, "prompts.folder=gone")["stages"]["threshold"]
    assert (stage["state"], stage["why"]) == ("stale", ["prompts.folder: gone is not a folder"])


def test_the_newest_student_must_be_exported_and_evaluated(built):
    adapter(built, "sft/adapter")
    fit(built, "sft")
    evaluated(built)
    adapter(built, "dpo/adapter")  # the export that follows DPO has failed
    found = read(built)["stages"]
    assert (found["export"]["state"], "threshold" in found) == ("not_begun", False)
    assert (found["eval"]["state"], found["eval"]["why"]) == ("stale", ["dpo has not been evaluated"])
    stages = {name: Stage("done" if name in OUTPUTS else stage["state"]) for name, stage in found.items()}
    assert next_command(config(built), stages).startswith("sclite train ")
    export(built, "dpo")
    assert states(built)["export"] == "done"
