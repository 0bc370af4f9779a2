"""Between the commands and the evaluation: what is told of its figures."""

import pytest

from sclite import measure
from sclite.errors import DataFault
from sclite.measure import FEW_TO_FIT, cut_note, fit_note


def test_where_many_first_answers_were_cut_off_the_remedy_is_told():
    figures = {"base": {"n": 300, "cut": 0}, "sft": {"n": 20, "cut": 5}}
    (note,) = cut_note(figures, 320)
    assert note == "first answers that were cut off: sft 5 of 20; raise eval.max_tokens (320) or eval.context"


def test_one_cut_answer_in_a_hundred_is_left_to_the_json():
    assert cut_note({"sft": {"n": 300, "cut": 3}}, 320) == []
    assert len(cut_note({"sft": {"n": 300, "cut": 4}}, 320)) == 1


def test_a_threshold_fitted_on_few_problems_is_told_of():
    figures = {"base": {"fitted": None}, "dpo": {"fitted": {"n": 5}}}
    (note,) = fit_note(figures, 5)
    assert "5 other problems" in note
    assert "review.threshold" in note
    assert fit_note(figures, FEW_TO_FIT) == []
    assert fit_note({"base": {"fitted": None}}, 5) == []


def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path):
    path = tmp_path / "student.gguf"
    path.write_bytes(b"GGML and more")
    with pytest.raises(DataFault, match=r"student\.gguf is no GGUF file"):
        measure.find_gguf(None, path)
    path.write_bytes(b"GGUF and more")
    assert measure.find_gguf(None, path) == path
