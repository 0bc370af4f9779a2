"""Evaluation notes, stored thresholds, and the GGUF that chat uses."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from sclite import evaluation, exports, pipeline
from sclite.config import Config
from sclite.context import Context
from sclite.errors import DataError
from sclite.evaluate.evaluate import HeldOut, summary_notes
from sclite.evaluate.metrics import Outcome
from sclite.evaluate.threshold import FittedThreshold, store_threshold
from sclite.inspect.summaries import print_results
from sclite.progress import ProgressDisplay
from sclite.records import Problem
from sclite.run import Report, Run
from sclite.student.adapters import adapter_weights
from sclite.student.ggufs import export_stage, inputs_of
from sclite.student.step_scores import Cutoff
from tests.toy import ScriptedStudent, raises


def notes_on(**more):
    """The notes on a student with nothing to note except `more`."""
    figures = {"n": 300, "cut": 0, "off": "", "fitted": None} | more
    held_out = HeldOut([], [], "", "", "", {"overlaps_training": 1200})
    first, *notes = summary_notes({"sft": figures}, held_out, 320)
    assert first == "skipped (overlaps training): 1,200"
    return notes


def test_notes_name_truncated_answers_costly_thresholds_and_disabled_reviews():
    assert notes_on(cut=3) == []
    (note,) = notes_on(cut=4)
    assert note == "truncated first answers: sft 4 of 300; raise eval.max_tokens (320) or eval.context"
    fitted = fit(n=400, acc_t1=0.5, acc_t2=0.6)
    assert notes_on(fitted=fitted.model_dump()) == []
    best = {"best_threshold": 0.0, "best_acc_t2": 0.7, "best_right_to_wrong": 0.05}
    (note,) = notes_on(fitted=fitted.model_copy(update=best).model_dump())
    assert note.startswith(
        "review threshold of sft: 1.00 fitted on 400 problems: 50.0 → 60.0 % right, 0.0 % spoiled"
    )
    assert "; 0.00 would reach 70.0 %" in note
    assert notes_on(off="no steps") == ["review is off for sft: no steps"]


@pytest.mark.parametrize(("after", "notes"), [(0.715, 0), (0.642, 1), (None, 0)])
def test_a_stage_2_that_harms_solving_is_reported(after, notes):
    sft = {"n": 500, "cut": 0, "off": "", "fitted": None, "acc_t1": 0.752, "acc_t1_interval": [0.714, 0.792]}
    found = summary_notes({"sft": sft, "dpo": sft | {"acc_t1": after}}, HeldOut([], [], "", "", "", {}), 320)
    hint = "lower warmup.learning_rate, or raise warmup.replay_share"
    text = f"stage 2 made first answers worse, 75.2 → 64.2 % right; {hint}"
    assert found == [text] * notes


def fit(threshold=1.0, problems=60, max_harm=0.005, **more):
    return FittedThreshold(threshold=threshold, problems=problems, max_harm=max_harm, **more)


def context_of(folder, **review):
    return Context(Config.model_validate({"review": review}), Run(folder), None)


def write_gguf(context, name, content=b""):
    """A file in the run that starts like a GGUF."""
    path = context.run.path(f"export/{name}.gguf")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF" + content)
    return path


def test_chat_uses_the_configured_the_newest_or_the_given_gguf(tmp_path):
    context, path = context_of(tmp_path), tmp_path / "student.gguf"
    path.write_bytes(b"GGUF and more")
    assert exports.for_chat(context, path, False)[0] == path
    # unfinished files are ignored
    write_gguf(context, "unfinished/sft-q4_k_m")
    with pytest.raises(DataError, match="contains no GGUF"):
        exports.for_chat(context, None, None)
    for second, name in enumerate(("dpo-q8_0", "dpo-f16", "sft-q4_k_m", "dpo-lora")):
        os.utime(write_gguf(context, name), (second, second))
    assert exports.for_chat(context, None, False)[0].name == "dpo-f16.gguf"
    os.utime(write_gguf(context, "dpo-q4_k_m"), (0, 0))
    assert exports.for_chat(context, None, False)[0].name == "dpo-q4_k_m.gguf"


def test_the_threshold_of_the_chosen_file_is_used(tmp_path):
    home = context_of(tmp_path)
    path = write_gguf(home, "dpo-q4_k_m")
    store_threshold(home.config, home.run, path, fit(confidence_weight=0.5))
    assert exports.for_chat(home, None, self_correct=True) == (path, Cutoff(1.0, 0.5), "")
    # used by /correct on
    off = "review is off; turn it on with --self-correct"
    assert exports.for_chat(home, path, False) == (path, Cutoff(1.0, 0.5), off)
    given = Config.model_validate({"review": {"threshold": 2.0}})
    context = Context(given, home.run, ProgressDisplay(quiet=True))
    assert exports.for_chat(context, None, False)[1].threshold == 2.0


def test_chat_says_why_review_is_off_and_what_turns_it_on(tmp_path):
    context = context_of(tmp_path)
    gguf = write_gguf(context, "dpo-q4_k_m")
    assert "has not been fitted; run `sclite train`" in exports.for_chat(context, None, None)[2]
    with raises(DataError, "has not been fitted", hint="sclite train"):
        exports.for_chat(context, None, self_correct=True)
    gguf.rename(write_gguf(context, "sft-q4_k_m"))  # train fits that of DPO's student
    assert "has not been fitted; run `sclite eval PROBLEMS`" in exports.for_chat(context, None, None)[2]
    gguf = write_gguf(context, "dpo-q4_k_m")
    fitted = fit(threshold=None, off="too few", problems=9, max_harm=0.1)
    store_threshold(context.config, context.run, gguf, fitted)
    assert exports.for_chat(context, None, self_correct=True) == (gguf, None, "review is off: too few")
    never = context_of(tmp_path, rounds=0)
    assert exports.for_chat(never, None, None)[1:] == (None, "review is off: review.rounds is 0")
    free = context_of(tmp_path, mode="free")
    assert exports.for_chat(free, None, self_correct=True) == (gguf, Cutoff(), "")


def test_models_are_evaluated_in_the_order_of_training_whatever_the_order_of_their_names(sclite, monkeypatch):
    """The last of them is the one that is compared with votes."""
    seen = []

    def evaluate(_, names, __):
        seen.append(names)
        raise DataError("enough", "")

    monkeypatch.setattr(pipeline, "evaluate_students", evaluate)
    for models in ("dpo,base", " ollama/b, dpo,ollama/a,base,dpo"):
        assert sclite("eval", "p.jsonl", "--models", models).code == 3
    assert seen == [["base", "dpo"], ["base", "dpo", "ollama/b", "ollama/a"]]


@pytest.fixture
def two_runs(tmp_path, monkeypatch):
    """The folders `here` and `there`, whose dpo answers five problems; `here` needs no evaluation."""
    monkeypatch.chdir(tmp_path)
    verdicts = {"here": (True, True, True, False, None), "there": (False, True, False, False, True)}
    for name, right in verdicts.items():
        run = Run(tmp_path / name)
        named = [{"id": str(n), "question": f"{n}?", "gold": "1", "first": "1"} for n in range(5)]
        same = {"second": None, "format_ok": True, "correct1": False}
        run.replace(
            "eval/mine/dpo.jsonl",
            [Outcome(**n, **same, correct2=c) for n, c in zip(named, right, strict=True)],
        )
        summary = {
            "models": {"dpo": {"rows": "eval/mine/dpo.jsonl"}},
            "dataset": f"/{name}/mine.jsonl",  # as in two clones
            "folder": "eval/mine",
        }
        run.write_json("eval/mine/summary.json", summary)
    problems = [Problem(id=str(n), question=f"{n}?", answer="1") for n in range(5)]
    held_out = HeldOut(problems, (), "mine.jsonl", "/mine.jsonl", "eval/mine")
    monkeypatch.setattr(pipeline, "untrained_problems", lambda _: ())
    monkeypatch.setattr(exports, "export", lambda *_: ())
    monkeypatch.setattr(evaluation, "held_out", lambda *_: held_out)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: dict(summary))


COMPARE = ("eval", "mine.jsonl", "--run", "here", "--models", "dpo", "--compare")


def test_eval_compares_with_the_results_of_another_run(two_runs, sclite, capsys, monkeypatch):
    """By hand: of four problems that both know, two are right here only."""
    compared = json.loads(sclite(*COMPARE, "there", "--json").out)["compared"]
    after = compared["dpo, after review"]
    assert (after["n"], after["this"], after["other"], after["difference"]) == (4, 0.75, 0.25, 0.5)
    assert compared["dpo, first answer"]["difference"] == 0
    monkeypatch.setenv("COLUMNS", "140")
    summary = {"models": {}, "n": 5, "notes": [], "folder": "eval/mine", "compared": compared}
    print_results(Run("here"), summary, Path("there"))
    row = next(line for line in capsys.readouterr().out.splitlines() if "dpo, after review" in line)
    assert row.split()[:5] == ["dpo,", "after", "review", "4", "75.0"]
    assert row.split()[-3:] == ["50.0", "0.0", "0.500"]


def test_comparison_needs_results_on_the_same_problems(two_runs, sclite):
    done = sclite(*COMPARE, "nowhere")
    assert done.code == 3
    assert "nowhere has no results of dpo on mine.jsonl" in done.error
    assert "sclite eval mine.jsonl --run nowhere" in done.hint


def train(run, name, weights):
    path = run.path(adapter_weights(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(weights)


@pytest.fixture
def exported(monkeypatch):
    """The exported students, each as a file of the configured type."""
    names = []

    def export(context):
        name = context.students()[-1]
        content = context.config.export.quant.encode() + context.run.path(adapter_weights(name)).read_bytes()
        path = write_gguf(context, f"{name}-{context.config.export.quant}", content)
        report = Report(export_stage(name, context.config), figures={"files": {path.name: {}}})
        context.run.sign(report.stage, inputs_of(context.config, context.run, name), report)
        names.append(name)

    monkeypatch.setattr(exports, "export", export)
    return names


def test_chat_exports_a_student_whose_files_are_of_another_one_or_of_an_earlier_adapter(tmp_path, exported):
    context, name = context_of(tmp_path / "run"), lambda: exports.for_chat(context, None, False)[0].name
    write_gguf(context, "base-q8_0")
    train(context.run, "sft", b"first")
    assert [name(), name(), exported] == ["sft-q4_k_m.gguf", "sft-q4_k_m.gguf", ["sft"]]
    train(context.run, "dpo", b"second")
    assert [name(), exported] == ["dpo-q4_k_m.gguf", ["sft", "dpo"]]
    train(context.run, "dpo", b"third")
    assert [name(), exported] == ["dpo-q4_k_m.gguf", ["sft", "dpo", "dpo"]]
    context.run.folder.rename(tmp_path / "moved")
    context = context_of(tmp_path / "moved")
    assert [name(), len(exported)] == ["dpo-q4_k_m.gguf", 3]
    context.run.path("export/sft-q4_k_m.gguf").unlink()
    for stage in ("dpo", "sft"):
        context.run.path(adapter_weights(stage)).unlink()
        assert [name(), len(exported)] == ["dpo-q4_k_m.gguf", 3]


def test_no_fitted_file_of_an_earlier_adapter_replaces_one_without_threshold(tmp_path, exported):
    context = context_of(tmp_path)
    context.display = ProgressDisplay(quiet=True)
    train(context.run, "dpo", b"first")
    exports.export(context)
    store_threshold(context.config, context.run, context.run.path("export/dpo-q4_k_m.gguf"), fit())
    train(context.run, "dpo", b"second")
    context.config = Config.model_validate({"export": {"quant": "q8_0"}})
    path, cutoff, why = exports.for_chat(context, None, None)
    assert (path.name, cutoff) == ("dpo-q8_0.gguf", None)
    assert "has not been fitted" in why


class Stepper(ScriptedStudent):
    """An engine that writes one step and judges every step right."""

    def __init__(self, *_, **__):
        super().__init__("<Step1>1 + 1 = 2\n</Step1>\n<Answer>2</Answer>")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("mode", ["guided", "free"])
def test_progress_of_an_evaluation_is_the_share_of_its_texts_and_scores(tmp_path, monkeypatch, mode):
    """Guided: 10 answers and 60 for the threshold, as many scores and corrections of 36, then 10 answers to the native prompt, and 2 samples each."""
    monkeypatch.setattr(evaluation, "Engine", Stepper)
    monkeypatch.setattr(evaluation, "source_digest", lambda *_: "")
    seen = []

    class Display(ProgressDisplay):
        @contextmanager
        def stage(self, name, text):
            yield lambda done, total, share=None, note="": seen.append((done, total, share))

    tree = {"eval": {"baselines": True, "votes": 2}, "review": {"mode": mode}, "export": {"quant": "q8_0"}}
    context = Context(Config.model_validate(tree), Run(tmp_path), Display(quiet=True))
    write_gguf(context, "dpo-q8_0")
    problems = [Problem(id=f"p{n}", question=f"question {n}", answer="2") for n in range(70)]
    held_out = evaluation.HeldOut(problems[:10], problems[10:], "mine", "mine", "eval/mine")
    evaluation.evaluate(context, ["dpo"], held_out)
    *shares, last = (share for _, _, share in seen)
    assert last is None  # the end
    assert shares == sorted(shares)
    done = 140 + 36 if mode == "guided" else 20
    # 10 answers, 20 samples and their scores; 20 corrections are never written
    expected = [done / 210 / 2 if mode == "guided" else 19 / 40, *(0.5 + n / 70 / 2 for n in range(51))]
    assert list(dict.fromkeys(shares))[-52:] == pytest.approx(expected)
    assert seen[-1][:2] == (10, 10)


def test_an_interrupted_evaluation_resumes_with_the_answers_it_has(tmp_path, monkeypatch):
    engines = []

    class Interrupted(Stepper):
        def generate(self, requests):
            for number, reply in enumerate(super().generate(requests)):
                if number == 6 and not engines:
                    raise KeyboardInterrupt
                yield reply

        def __exit__(self, *_):
            engines.append(self)

    monkeypatch.setattr(evaluation, "Engine", Interrupted)
    monkeypatch.setattr(evaluation, "source_digest", lambda *_: "")
    tree = {"review": {"threshold": 0.0}, "export": {"quant": "q8_0"}}
    context = Context(Config.model_validate(tree), Run(tmp_path), ProgressDisplay(quiet=True))
    write_gguf(context, "dpo-q8_0")
    problems = [Problem(id=f"p{n}", question=f"question {n}", answer="2") for n in range(10)]
    held_out = evaluation.HeldOut(problems, [], "mine", "mine", "eval/mine")
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(context, ["dpo"], held_out)
    figures = evaluation.evaluate(context, ["dpo"], held_out)["models"]["dpo"]
    assert [len(engine.requests) for engine in engines] == [10, 4]
    assert (figures["acc_t1"], figures["seconds"]) == (1.0, None)
    assert not list(tmp_path.rglob("*.partial.jsonl"))
