"""Parsing chat completions: whatever can be read is read, anything else is reported."""

import json

import pytest

from sclite.teacher.reply import ErrorReply, clean_text, read


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
]  # fmt: skip


@pytest.mark.parametrize("content", TEXTS)
@pytest.mark.parametrize("reason", ["stop", "STOP", None, "end_turn", ["stop"], 7])
def test_text_is_read_in_any_format_whatever_the_finish_reason(content, reason):
    found = read(body({"content": content, "tool_calls": None}, reason))
    assert (found.text, found.finish_reason) == ("good", "stop")


def test_any_text_can_be_encoded():
    paired = json.loads(r'"\ud83d\ude42"') + "\ud83d"
    assert clean_text("\ud83d" + "\ude42") == "🙂"
    assert clean_text(paired) == "🙂\ufffd"
    assert clean_text("a\tb\r\nc 你好 \u2028") == "a\tb\r\nc 你好 \u2028"
    assert read(body({"content": "a \udfff b"})).text == "a \ufffd b"


THOUGHT = ("<think>so</think>", "<think><Step1>so", "<|channel|>analysis<|message|>so")


@pytest.mark.parametrize(
    ("message", "reason", "found", "text"),
    [
        *(({"content": content}, "stop", "empty", "") for content in ("", None, " \n", {"a": 1}, *THOUGHT)),
        ({}, "stop", "empty", ""),
        ({"content": None, "reasoning_content": "so"}, "stop", "empty", ""),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls", "empty", ""),
        *(({"content": "good"}, reason, reason, "good") for reason in ("length", "content_filter")),
    ],
)
def test_finish_reason_says_whether_a_reply_is_empty_or_was_stopped(message, reason, found, text):
    reply = read(body(message, reason))
    assert (reply.finish_reason, reply.text) == (found, text)


@pytest.mark.parametrize(
    ("prompt", "completion", "tokens"),
    [
        (10, 20, (10, 20)), ("10", True, (None, None)), (-1, 0, (None, None)),
        (float("nan"), float("inf"), (None, None)), (10, 10.5, (10, None)),
    ],
)  # fmt: skip
def test_token_counts_are_numbers_or_unknown(prompt, completion, tokens):
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    assert read(body({"content": "good"}, usage=usage)).tokens == tokens
    for other in (None, [], "30"):
        assert read(body({"content": "good"}, usage=other)).tokens == (None, None)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1], "the reply is not a chat completion"),
        *((found, "the reply has no choices") for found in (
            {"choices": []}, {"choices": "x"}, {"choices": [None]}, {"detail": "Not Found"}, {"choices": [{"message": "x"}]})),
    ],
)  # fmt: skip
def test_body_that_is_not_a_chat_completion_is_reported(found, message):
    with pytest.raises(ConnectionError, match=message):
        read(found)


@pytest.mark.parametrize(
    ("error", "status"),
    [({"message": "busy", "code": 503}, 503), ({"message": "busy", "code": "x"}, None), ("busy", None)],
)
def test_error_with_status_200_is_an_error(error, status):
    with pytest.raises(ErrorReply, match="busy") as caught:
        read({**body({"content": "good"}), "error": error})
    assert caught.value.status_code == status
    for empty in (None, "", {}, {"message": ""}):  # are ignored beside a reply
        assert read({**body({"content": "good"}), "error": empty}).text == "good"
