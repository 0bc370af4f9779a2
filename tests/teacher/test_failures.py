"""What a failed call means, how long to wait, and what a message never contains."""

import time
from email.utils import formatdate

import pytest

from sclite.teacher import failures
from sclite.teacher.failures import read_failure


class Failed(Exception):
    def __init__(self, text="", status=None, headers=None):
        super().__init__(text)
        self.status_code = status
        self.litellm_response_headers = headers


@pytest.mark.parametrize("status", [None, 408, 429, 500, 502, 503, 504, 529])
def test_transient_errors_are_retried(status):
    assert read_failure(Failed("later", status)).action == failures.RETRY


@pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
def test_refusal_concerns_one_request(status):
    error = Failed("litellm.NotFoundError: OpenAIException - no such question", status)
    assert read_failure(error).action == failures.REFUSED


@pytest.mark.parametrize(
    "error",
    [
        Failed("bad key", 401),
        Failed("pay", 402),
        Failed("You exceeded your current quota", 429),
        Failed("litellm.NotFoundError: OpenAIException - The model `x` does not exist", 404),
        Failed("InternalServerError: OpenAIException - Missing credentials. Please pass an `api_key`", 500),
    ],
)
def test_errors_of_every_request_stop_the_stage(error):
    assert read_failure(error).action == failures.STOP


def test_all_forms_of_retry_after_are_respected():
    assert read_failure(Failed(headers={"retry-after": "7"})).wait_seconds(1, 0.0) == 7
    assert read_failure(Failed(headers={"retry-after-ms": "250"})).wait_seconds(1, 0.0) == 0.25
    date = formatdate(time.time() + 20, usegmt=True)
    assert 17 < read_failure(Failed(headers={"retry-after": date})).wait_seconds(1, 0.0) < 21
    assert read_failure(Failed(headers={"retry-after": "soon"})).wait_seconds(1, 0.0) == 0.5


def test_backoff_grows_is_bounded_and_has_jitter():
    waits = [read_failure(Failed()).wait_seconds(attempt, 0.0) for attempt in range(1, 12)]
    assert waits[:4] == [0.5, 1, 2, 4]
    assert max(waits) == 60
    assert read_failure(Failed()).wait_seconds(4, 1.0) == 2


def test_message_is_one_line_without_prefixes_and_keys(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sk-very-secret")
    said = "litellm.RateLimitError: RateLimitError: OpenAIException - slow down, sk-very-secret\ntrace"
    error = Failed(said, 429)
    assert read_failure(error).message == "slow down, ***"
