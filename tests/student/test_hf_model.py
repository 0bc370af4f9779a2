"""The trained model as a student."""

import pytest

from sclite.errors import DataError
from sclite.student.base import Request
from sclite.student.hf_model import HFModel
from sclite.student.loader import load_student
from tests.toy import toy_config

ASK = Request(({"role": "user", "content": "Tom has 20 nuts. He buys 11 more."},), max_tokens=40)


def test_settings_of_the_checkpoint_change_nothing_and_positions_end(folder):
    model, tokenizer = load_student(toy_config(folder, student={"load_in_4bit": False}), "sft")
    student = HFModel(model, tokenizer)
    before = list(student.generate([ASK]))
    model.generation_config.repetition_penalty = 5.0
    assert list(HFModel(model, tokenizer).generate([ASK])) == before
    with pytest.raises(DataError, match="positions"):
        list(student.generate([Request(ASK.messages, max_tokens=100_000)]))
