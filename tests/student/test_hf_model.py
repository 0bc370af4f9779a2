"""The trained model as a student: its text is streamed as it is generated."""

from threading import Event

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


def test_streamed_pieces_are_the_text_of_the_reply(student):
    (whole,) = student.generate([ASK])
    *pieces, reply = student.stream(ASK)
    assert reply == whole
    assert len(pieces) > 1  # in words
    assert "".join(pieces) == whole.text
    assert list(student.stream(ASK, pieces=False)) == [whole.text, whole]


def test_cancelling_ends_the_text_at_the_next_token(student):
    cancel, pieces = Event(), []
    for found in student.stream(ASK, cancel):
        pieces.append(found)
        cancel.set()
    (whole,) = student.generate([ASK])
    assert pieces[-1].finish == "cancelled"
    assert pieces[-1].tokens < whole.tokens
    assert whole.text.startswith(pieces[-1].text)


def test_a_caller_that_stops_reading_ends_it_too_and_an_error_is_raised(student):
    arriving = student.stream(Request(ASK.messages, max_tokens=400))
    next(arriving)
    arriving.close()
    with pytest.raises(DataError, match="positions"):
        list(student.stream(Request(ASK.messages, max_tokens=100_000)))
