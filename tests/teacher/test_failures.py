"""What a failed call means, how long to wait, and what a message never contains."""

import time
from email.utils import formatdate

import pytest

from sclite import config
from sclite.teacher import failures
from sclite.teacher.failures import read_failure

# as LiteLLM reports them; Gemini's OpenAI-compatible endpoint sends a list, which OpenAI's SDK shows as Python's repr
GEMINI = """litellm.RateLimitError: litellm.RateLimitError: geminiException - {
  "error": {
    "code": 429,
    "message": "You exceeded your current quota, please check your plan and billing details.\\n* Quota exceeded%s",
    "details": [{"quotaId": "GenerateRequests%sPerProjectPerModel-FreeTier"}]
  }
}"""
UNKNOWN = """litellm.NotFoundError: GeminiException - {
  "error": {"code": 404, "message": "models/gemini-9 is \\"not\\" found"}
}"""
MISSING_KEY = "InternalServerError: OpenAIException - Missing credentials. Please pass an `api_key`"
NO_QUESTION = "litellm.NotFoundError: OpenAIException - no such question"
CREDIT = "Your credit balance is too low to access the Anthropic API."
BAD_KEY = "Error code: 400 - [{'error': {'code': 400, 'message': 'API key not valid. Please pass a valid API key.'}}]"


class Failed(Exception):
    def __init__(self, text="", status=None, headers=None):
        super().__init__(text)
        self.status_code = status
        self.litellm_response_headers = headers


@pytest.mark.parametrize(
    ("action", "text", "statuses"),
    [
        (failures.RETRY, "later", (None, 408, 429, 500, 502, 503, 504, 529)),
        (failures.REFUSED, NO_QUESTION, (400, 403, 404, 413, 422)),
        (failures.STOP, "bad key, or pay", (401, 402)),
        (failures.STOP, "You exceeded your current quota", (429,)),
        (failures.STOP, GEMINI % ("\\nPlease retry in 15.002s.", "PerDay"), (429,)),
        (failures.RETRY, GEMINI % ("\\nPlease retry in 15.002s.", ""), (429,)),
        (failures.RETRY, GEMINI % ("", "PerMinute"), (429,)),
        (failures.STOP, CREDIT, (400,)),
        (failures.STOP, "You have reached your specified API usage limits.", (400,)),
        (failures.STOP, "litellm.BadRequestError: DeepseekException - Insufficient Balance", (400,)),
        (failures.STOP, UNKNOWN, (404,)),
        (failures.STOP, BAD_KEY, (400,)),
        (failures.STOP, "litellm.NotFoundError: OpenAIException - The model `x` does not exist", (404,)),
        (failures.STOP, MISSING_KEY, (500,)),
    ],
)
def test_an_error_concerns_one_attempt_one_request_or_every_one(action, text, statuses):
    for status in statuses:
        assert read_failure(Failed(text, status)).action == action, status


def test_waits_follow_retry_after_or_grow_with_jitter_up_to_a_bound():
    assert read_failure(Failed(headers={"retry-after": "7"})).wait_seconds(1, 0.0) == 7
    assert read_failure(Failed(headers={"retry-after-ms": "250"})).wait_seconds(1, 0.0) == 0.25
    date = formatdate(time.time() + 20, usegmt=True)
    assert 17 < read_failure(Failed(headers={"retry-after": date})).wait_seconds(1, 0.0) < 21
    for unusable in ("soon", "1e999", f"Wed, 21 Oct {'9' * 12} 07:28:00 GMT"):
        assert read_failure(Failed(headers={"retry-after": unusable})).wait_seconds(1, 0.0) == 0.5
    for said, seconds in (("15.002s", 15.002), ("250ms", 0.25), ("2h", 0.5)):
        assert read_failure(Failed(GEMINI % (f" Please retry in {said}", ""))).wait_seconds(1, 0.0) == seconds
    waits = [read_failure(Failed()).wait_seconds(attempt, 0.0) for attempt in range(1, 12)]
    assert waits[:4] == [0.5, 1, 2, 4]
    assert max(waits) == 60
    assert read_failure(Failed()).wait_seconds(4, 1.0) == 2


def test_message_is_one_line_without_prefixes_and_keys(monkeypatch):
    failure = read_failure(Failed(CREDIT, 400))
    error = failures.teacher_error(failure, config.Teacher(model="anthropic/claude"), "ANTHROPIC_API_KEY")
    assert "has no credit left: Your credit balance" in error.message
    monkeypatch.setenv("SOME_API_KEY", "sk-very-secret")
    said = "litellm.RateLimitError: RateLimitError: OpenAIException - slow down, sk-very-secret\ntrace"
    error = Failed(said, 429)
    assert read_failure(error).message == "slow down, ***"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GEMINI % ("", ""), "You exceeded your current quota, please check your plan and billing details."),
        (UNKNOWN, 'models/gemini-9 is "not" found'),
        (BAD_KEY, "API key not valid. Please pass a valid API key."),
        ('AnthropicException - {"error": {"message": "model: claude-x"}}', "model: claude-x"),
        ('{"error": {"message": ""}}', '{"error": {"message": ""}}'),
        ("Error code: 404 - {'detail': 'Not Found'}", "{'detail': 'Not Found'}"),
        (r'XException - {"error":{"message":"caf\u00e9 now"}}', "café now"),
        ('{"error":{"message":"No","metadata":{"raw":"x is busy"}}}', "No: x is busy"),
    ],
)
def test_message_inside_json_is_shown(text, message):
    assert read_failure(Failed(text, 400)).message == message
