"""What a failed call means, how long to wait, and what a message never contains."""

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


def test_wait_is_that_of_the_header_or_the_text():
    for said, seconds in (("7", 7), ("soon", None), ("Wed, 21 Oct 2045 07:28:00 GMT", None)):
        assert read_failure(Failed(headers={"retry-after": said})).retry_after == seconds
    for said, seconds in (("15.002s", 15.002), ("2h", None)):
        assert read_failure(Failed(GEMINI % (f" Please retry in {said}", ""))).retry_after == seconds


def test_message_is_one_line_without_prefixes_and_keys(monkeypatch):
    failure = read_failure(Failed(CREDIT, 400))
    error = failures.teacher_error(failure, config.Teacher(model="anthropic/claude"), "ANTHROPIC_API_KEY")
    assert "has no credit left: Your credit balance" in error.message
    monkeypatch.setenv("SOME_API_KEY", "sk-very-secret")
    said = "litellm.RateLimitError: RateLimitError: OpenAIException - slow down, sk-very-secret\nnow"
    error = Failed(said, 429)
    assert read_failure(error).message == "slow down, *** now"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GEMINI % ("", ""),
            "You exceeded your current quota, please check your plan and billing details.\\n* Quota exceeded",
        ),
        (UNKNOWN, 'models/gemini-9 is "not" found'),
        (BAD_KEY, "API key not valid. Please pass a valid API key."),
        ('AnthropicException - {"error": {"message": "model: claude-x"}}', "model: claude-x"),
        ('{"error": {"message": ""}}', '{"error": {"message": ""}}'),
        ("Error code: 404 - {'detail': 'Not Found'}", "{'detail': 'Not Found'}"),
    ],
)
def test_message_inside_json_is_shown(text, message):
    assert read_failure(Failed(text, 400)).message == message
