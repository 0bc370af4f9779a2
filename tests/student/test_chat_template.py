"""Chat templates from model files: system messages, thinking, failures."""

import pytest

from sclite.errors import DataError
from sclite.student.chat_template import render_chat
from tests.toy import raises

USER = ({"role": "user", "content": "2 + 2?"},)
CHAT = ({"role": "system", "content": "Be brief."}, *USER)
R1 = (  # the end of DeepSeek-R1-Distill's template
    "{% for m in messages %}<|User|>{{ m['content'].split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
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
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
    ],
)
def test_template_that_fails_or_runs_code_is_refused(template, reason):
    with raises(DataError, reason, hint="chat template"):
        render_chat(template, USER)


def test_open_think_tag_becomes_an_empty_block():
    assert render_chat(R1, USER) == "<|User|>2 + 2?<|Assistant|><think>\n\n</think>\n\n"
    assert render_chat(R1, USER, generation_prompt=False) == "<|User|>2 + 2?"
