"""Evaluation notes, stored thresholds, and the GGUF that chat uses."""

import os

import pytest

from sclite import evaluation
from sclite.config import Config
from sclite.context import Context
from sclite.errors import DataError
from sclite.evaluation import FEW_TO_FIT, THRESHOLDS, cut_note, fit_note, keep_thresholds
from sclite.progress import ProgressDisplay
from sclite.run import Run


def test_many_truncated_first_answers_are_reported_with_a_remedy():
    figures = {"base": {"n": 300, "cut": 0}, "sft": {"n": 20, "cut": 5}}
    (note,) = cut_note(figures, 320)
    assert note == "truncated first answers: sft 5 of 20; raise eval.max_tokens (320) or eval.context"


def test_one_truncated_answer_in_a_hundred_is_not_reported():
    assert cut_note({"sft": {"n": 300, "cut": 3}}, 320) == []
    assert len(cut_note({"sft": {"n": 300, "cut": 4}}, 320)) == 1


def test_a_threshold_fitted_on_few_problems_is_reported():
    figures = {"base": {"fitted": None}, "dpo": {"fitted": {"n": 5}}}
    (note,) = fit_note(figures, 5)
    assert "only 5 problems" in note
    assert "review.threshold" in note
    assert fit_note(figures, FEW_TO_FIT) == []
    assert fit_note({"base": {"fitted": None}}, 5) == []


def test_a_file_that_is_not_a_gguf_is_refused(tmp_path):
    path = tmp_path / "student.gguf"
    path.write_bytes(b"GGML and more")
    with pytest.raises(DataError, match=r"student\.gguf is not a GGUF file"):
        evaluation.find_gguf(None, path)
    path.write_bytes(b"GGUF and more")
    assert evaluation.find_gguf(None, path) == path


def test_chat_uses_the_configured_quantization_or_the_newest_file(tmp_path):
    context = context_of(tmp_path)
    context.run.path("export").mkdir()
    for second, name in enumerate(("dpo-q8_0", "dpo-f16", "sft-q4_k_m", "dpo-lora", "dpo-full")):
        path = context.run.path(f"export/{name}.gguf")
        path.write_bytes(b"GGUF")
        os.utime(path, (second, second))
    assert evaluation.find_gguf(context, None).name == "dpo-f16.gguf"
    context.run.path("export/dpo-q4_k_m.gguf").write_bytes(b"GGUF")
    os.utime(context.run.path("export/dpo-q4_k_m.gguf"), (0, 0))
    assert evaluation.find_gguf(context, None).name == "dpo-q4_k_m.gguf"


def context_of(folder, **review):
    return Context(Config.model_validate({"review": review}), Run(folder), None)


def fitted(threshold, count):
    return {
        "dpo": {"gguf": "abc", "threshold": threshold, "fitted": {"n": count}},
        "base": {"threshold": None},
    }


def test_a_threshold_is_replaced_by_one_that_as_many_problems_have_fitted_and_not_by_one_of_fewer(tmp_path):
    context = context_of(tmp_path)

    def kept():
        return context.run.read_json(THRESHOLDS)["abc"]["threshold"]

    assert keep_thresholds(context, fitted(-1.5, 400)) == []
    assert keep_thresholds(context, fitted(2.0, 399)) == [
        "chat keeps the threshold fitted earlier on 400 problems; --set review.threshold=2 overrides it"
    ]
    assert kept() == -1.5
    assert keep_thresholds(context, fitted(0.5, 400)) == []
    assert kept() == 0.5


def test_a_threshold_that_the_user_has_set_is_not_stored_as_fitted(tmp_path):
    context = context_of(tmp_path, threshold=0.0)
    assert keep_thresholds(context, {"dpo": {"gguf": "abc", "threshold": 0.0, "fitted": None}}) == []
    assert context.run.read_json(THRESHOLDS) is None


def test_a_threshold_of_another_harm_or_an_older_sclite_is_replaced(tmp_path):
    keep_thresholds(context_of(tmp_path), fitted(-1.5, 400))
    context = context_of(tmp_path, max_harm=0.02)
    assert keep_thresholds(context, fitted(2.0, 10)) == []
    assert context.run.read_json(THRESHOLDS)["abc"]["threshold"] == 2.0
    older = context.run.read_json(THRESHOLDS)["abc"]
    context.run.write_json(THRESHOLDS, {"abc": {name: older[name] for name in ("threshold", "prompts")}})
    assert keep_thresholds(context, fitted(3.0, 10)) == []
    assert context.run.read_json(THRESHOLDS)["abc"]["threshold"] == 3.0


def test_a_threshold_is_found_beside_the_file_and_the_largest_measured_file_stands_in_for_another(tmp_path):
    home, here = context_of(tmp_path / "a"), context_of(tmp_path / "b")
    folder = home.run.path("export")
    folder.mkdir(parents=True)
    for name, size in (("dpo-q2_k", 9), ("dpo-q4_k_m", 12), ("dpo-q8_0", 20), ("sft-q8_0", 30)):
        (folder / f"{name}.gguf").write_bytes(b"GGUF" + name.encode().ljust(size))
    figures = {
        name: {"gguf": home.run.file_digest(f"export/{name}.gguf"), "threshold": 1.0, "fitted": {"n": 9}}
        for name in ("dpo-q4_k_m", "dpo-q8_0", "sft-q8_0")
    }
    keep_thresholds(home, figures)
    assert evaluation.stored_threshold(here, folder / "dpo-q8_0.gguf") == 1.0
    assert evaluation.stored_threshold(here, folder / "dpo-q2_k.gguf") is None
    assert evaluation.measured_gguf(home, folder / "dpo-q2_k.gguf") == folder / "dpo-q8_0.gguf"
    assert evaluation.measured_gguf(here, tmp_path / "b/export/dpo-q2_k.gguf") is None
    run = Context(Config.model_validate({"export": {"quant": "q2_k"}}), home.run, ProgressDisplay(quiet=True))
    assert evaluation.for_chat(run, None, self_correct=True) == (folder / "dpo-q8_0.gguf", 1.0)
    assert evaluation.for_chat(run, None, self_correct=False) == (folder / "dpo-q2_k.gguf", None)
    assert evaluation.for_chat(run, folder / "dpo-q2_k.gguf", self_correct=True)[1] is None
