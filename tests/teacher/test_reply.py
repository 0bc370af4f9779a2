"""Parsing chat completions: whatever can be read is read, anything else is reported."""

import json

import pytest

from sclite.teacher.reply import ErrorReply, UnreadableReply, clean_text, decode, read


def body(message, finish_reason="stop", **more):
    return {"choices": [{"index": 0, "finish_reason": finish_reason, "message": message}], **more}


TEXTS = [
    "good",
    [{"type": "text", "text": "go"}, {"type": "text", "text": "od"}],
    [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "good"}],
    "<think>a</think>\n\ngood", "<THINK>\n</THINK>good", '<think time="3">a</think>good',
    "<thought>a</thought><reasoning>b</reasoning>good", "<scratchpad>a</scratchpad>good", "[THINK]a[/THINK]good",
    "a, without an opening tag\n</think>\ngood",
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>good<|return|>",
    "go\x00o\x1b[31md\x07",
]  # fmt: skip
CHOICES = [
    {"index": 0, "text": "good", "finish_reason": "stop"},
    {"index": 0, "delta": {"content": "good"}},
    {"finish_reason": None, "message": {"content": "good", "tool_calls": []}},
    {"finish_reason": "STOP", "message": {"content": "good", "tool_calls": None}},
    {"finish_reason": "end_turn", "message": {"content": "good"}},
]


@pytest.mark.parametrize("choice", [*CHOICES, *({"message": {"content": content}} for content in TEXTS)])
def test_text_is_read_in_any_format(choice):
    found = read({"choices": [choice]})
    assert (found.text, found.finish_reason) == ("good", "stop")


def test_the_choice_with_index_0_counts_and_any_text_can_be_encoded():
    second = {"index": 1, "message": {"content": "bad"}}
    assert read({"choices": [second, {"index": 0, "message": {"content": "good"}}]}).text == "good"
    paired = json.loads(r'"\ud83d\ude42"') + "\ud83d"
    assert clean_text("\ud83d" + "\ude42") == "🙂"
    assert clean_text(paired) == "🙂\ufffd"
    assert clean_text("a\tb\r\nc 你好 \u2028") == "a\tb\r\nc 你好 \u2028"
    assert read(body({"content": "a \udfff b"})).text == "a \ufffd b"
    assert read(decode(b"\xef\xbb\xbf" + json.dumps(body({"content": "good"})).encode())).text == "good"
    assert read(decode(b'{"choices": [{"message": {"content": "a \xff"}}]}')).text == "a \ufffd"


REASONS = {
    "length": "length",
    "MAX_TOKENS": "length",
    "content_filter": "content_filter",
    "SAFETY": "content_filter",
}
THOUGHT = ("<think>so</think>", "<think><Step1>so", "<|channel|>analysis<|message|>so")


@pytest.mark.parametrize(
    ("message", "reason", "found", "text"),
    [
        *(({"content": content}, "stop", "empty", "") for content in ("", None, " \n", {"a": 1})),
        ({}, "stop", "empty", ""),
        ({"content": None, "reasoning_content": "so"}, "stop", "only_reasoning", ""),
        ({"content": "", "reasoning": "so"}, "stop", "only_reasoning", ""),
        *(({"content": thought}, "stop", "only_reasoning", "") for thought in THOUGHT),
        ({"content": None, "refusal": "I can't help."}, "stop", "refusal", "I can't help."),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "stop", "tool_calls", ""),
        *(({"content": "good"}, reason, name, "good") for reason, name in REASONS.items()),
        *(({"content": "good"}, reason, "unreadable", "good") for reason in (["stop"], {"a": 1}, 7)),
    ],
)
def test_finish_reason_is_read_in_any_case_and_without_a_text(message, reason, found, text):
    reply = read(body(message, reason))
    assert (reply.finish_reason, reply.text) == (found, text)


@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        (10, 20, (10, 20)), (10.0, 20, (10, 20)), ("10", True, (None, None)), (-1, 0, (None, None)),
        (float("nan"), float("inf"), (None, None)), (2**63, 10.5, (None, None)),
    ],
)  # fmt: skip
def test_token_counts_are_numbers_or_unknown(prompt, completion, tokens):
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    assert read(body({"content": "good"}, usage=usage)).tokens == tokens
    for other in (None, [], "30"):
        assert read(body({"content": "good"}, usage=other)).tokens == (None, None)


@pytest.mark.parametrize(
    ("data", "message", "paid"),
    [
        (b"", "the reply is empty", True),
        (b'{"choices": [', 'the reply is not JSON: {"choices": [', True),
        (b"<html>Bad gateway</html>", "the reply is not JSON: <html>Bad gateway</html>", False),
        (b"[" * 100_000, "the JSON of the reply is nested too deep", True),
        (b"[1]", "the reply is not a chat completion", True),
        *((data, "the reply has no choices", True) for data in (
            b'{"choices": []}', b'{"choices": "x"}', b'{"choices": [null]}', b'{"detail": "Not Found"}')),
        (b'{"choices": [{"message": "x"}]}', "the reply has no message", True),
    ],
)  # fmt: skip
def test_body_that_is_not_a_chat_completion_is_reported(data, message, paid):
    with pytest.raises(UnreadableReply) as caught:
        read(decode(data))
    assert (str(caught.value), caught.value.paid) == (message, paid)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"message": "busy", "code": 503}, 503), ({"message": "busy", "code": "429"}, 429),
        ({"message": "busy", "code": "rate_limit_exceeded"}, 429), ({"message": "busy"}, None), ("busy", None),
        ({"message": "busy", "code": "5" * 5000}, None),
    ],
)  # fmt: skip
def test_error_with_status_200_is_an_error(error, status):
    with pytest.raises(ErrorReply, match="busy") as caught:
        read({**body({"content": "good"}), "error": error})
    assert caught.value.status_code == status
    for empty in (None, "", {}, {"message": ""}):  # are ignored beside a reply
        assert read({**body({"content": "good"}), "error": empty}).text == "good"
