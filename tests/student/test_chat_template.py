"""Chat templates from model files: limits on time, memory and length; an open <think> is closed."""

import pytest

from sclite.errors import DataError
from sclite.student import chat_template
from sclite.student.chat_template import opens_thinking, render_chat
from tests.tiny import CHATML

CHAT = ({"role": "user", "content": "2 + 2?"},)
R1 = (  # the end of DeepSeek-R1-Distill's template
    "{% for m in messages %}<|User|>{{ m['content'].split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "more than 2 seconds",
        ),
        ("{{ 9 ** (9 ** 10) }}", "more than 2 seconds"),
        ("{{ 'a' * 10 ** 10 }}", "more than 1024 MB"),
        ("{{ 'a' | center(10 ** 8) }}", "more than 4,000,000 characters"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
    ],
)
def test_hostile_template_fails_and_the_next_one_renders(monkeypatch, template, reason):
    monkeypatch.setattr(chat_template, "SECONDS", 2)
    with pytest.raises(DataError, match=reason) as error:
        render_chat(template, CHAT)
    assert "chat template" in error.value.hint
    assert render_chat("{{ messages[0].content }}", CHAT) == "2 + 2?"


def test_open_think_tag_becomes_an_empty_block():
    assert render_chat(R1, CHAT) == "<|User|>2 + 2?<|Assistant|><think>\n\n</think>\n\n"
    assert render_chat(R1, CHAT, generation_prompt=False) == "<|User|>2 + 2?"
    assert opens_thinking(R1)
    assert not opens_thinking(CHATML)
