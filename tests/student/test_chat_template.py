"""Chat templates from model files: system messages, thinking, and limits on time, memory and length."""

import os
import signal
import threading

import pytest

from sclite.errors import DataError
from sclite.student import chat_template
from sclite.student.chat_template import opens_thinking, render_chat
from tests.toy import CHATML, raises

USER = ({"role": "user", "content": "2 + 2?"},)
CHAT = ({"role": "system", "content": "Be brief."}, *USER)
R1 = (  # the end of DeepSeek-R1-Distill's template
    "{% for m in messages %}<|User|>{{ m['content'].split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
LOOP = "{{% for i in range({0}) %}}{{% for j in range({0}) %}}"
DROPS = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}"


def test_template_gets_what_transformers_gives_and_a_system_text():
    for single in (REFUSES + DROPS, DROPS):
        assert render_chat(single, CHAT) == "[Be brief.\n\n2 + 2?]"
        assert render_chat(single, USER) == "[2 + 2?]"
    template = (
        "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content | trim }}\n{% elif m.role == "
        "'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt and not enable_thinking %}A:<think></think>{% endif %}{{ messages | tojson }}"
    )
    chat = ({"role": "user", "content": " 1 <b>é "}, {"role": "assistant", "content": "x"})
    as_json = '[{"role": "user", "content": " 1 <b>é "}, {"role": "assistant", "content": "x"}]'
    wanted = f"1 <b>é\nx<|im_end|>A:<think></think>{as_json}"
    assert render_chat(template, chat, {"eos_token": "<|im_end|>"}) == wanted


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no roles') }}", "no roles"),
        (LOOP.format(90000) + "{% endfor %}{% endfor %}", "more than 2 seconds"),
        ("{{ 9 ** (9 ** 10) }}", "more than 2 seconds"),
        ("{{ 'a' * 10 ** 10 }}", "more than 1024 MB"),
        ("{{ 'a' | center(10 ** 8) }}", "more than 4,000,000 characters"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
    ],
)
def test_hostile_template_fails_and_the_next_one_renders(monkeypatch, template, reason):
    monkeypatch.setattr(chat_template, "SECONDS", 2 if "seconds" in reason else 60)
    with raises(DataError, reason, hint="chat template"):
        render_chat(template, USER)
    assert render_chat("{{ messages[0].content }}", USER) == "2 + 2?"


def test_interrupted_rendering_leaves_no_reply_to_the_next():
    assert render_chat("{{ messages[0].content }}", USER) == "2 + 2?"
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        render_chat(LOOP.format(5000) + "{% endfor %}{% endfor %}late", USER)
    assert render_chat("{{ messages[0].content }}", USER) == "2 + 2?"


def test_open_think_tag_becomes_an_empty_block():
    assert render_chat(R1, USER) == "<|User|>2 + 2?<|Assistant|><think>\n\n</think>\n\n"
    assert render_chat(R1, USER, generation_prompt=False) == "<|User|>2 + 2?"
    assert opens_thinking(R1, {})
    assert not opens_thinking(CHATML, {})
