"""The trained model as a student."""

import pytest

from sclite.config import Config
from sclite.errors import DataError
from sclite.student.base import Request
from sclite.student.hf_model import HFModel
from sclite.student.loader import load_student

ASK = Request(({"role": "user", "content": "Tom has 20 nuts. He buys 11 more."},), max_tokens=40)


@pytest.fixture(scope="module")
def student(folder):
    config = Config.model_validate(
        {"student": {"model": str(folder), "backend": "plain", "load_in_4bit": False}}
    )
    return HFModel(*load_student(config, "sft"))


def test_settings_of_the_checkpoint_change_nothing(student, folder):
    config = Config.model_validate(
        {"student": {"model": str(folder), "backend": "plain", "load_in_4bit": False}}
    )
    model, tokenizer = load_student(config, "sft")
    model.generation_config.repetition_penalty = 5.0
    assert list(HFModel(model, tokenizer).generate([ASK])) == list(student.generate([ASK]))


def test_an_answer_beyond_the_positions_is_an_error(student):
    with pytest.raises(DataError, match="positions"):
        list(student.generate([Request(ASK.messages, max_tokens=100_000)]))
