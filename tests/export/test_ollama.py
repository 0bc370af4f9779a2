"""The Modelfile and `ollama create`."""

import stat

import pytest

from sclite.errors import DataError, ScliteError, UsageError
from sclite.export.chat_format import derive_format
from sclite.export.ollama import build_modelfile, create_model
from sclite.student.chat_template import render_chat
from tests.toy import CHATML


def test_modelfile_has_template_system_prompt_stops_and_context():
    text = build_modelfile(
        "m.gguf", "{{ .Prompt }}", system="Be right.", stops=("</s>", "</s>", ""), num_ctx=4096
    )
    assert text.splitlines() == [
        "FROM ./m.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        'SYSTEM """Be right."""',
        'PARAMETER stop "</s>"',
        "PARAMETER num_ctx 4096",
        "PARAMETER temperature 0",
    ]
    assert "TEMPLATE" not in build_modelfile("m.gguf", "")


@pytest.mark.parametrize("given", [{"system": 'say """'}, {"system": 'say "stop"'}, {"stops": ('"',)}])
def test_text_that_a_modelfile_cannot_hold_is_an_error(given):
    with pytest.raises(DataError, match="cannot hold"):
        build_modelfile("m.gguf", "", **given)


def test_text_of_a_chat_template_cannot_escape_from_the_modelfile():
    injected = '"""\nADAPTER /etc/passwd\n{{ .System }}'
    own = f"message['role'] + '{injected}\n' + "
    jinja = CHATML.replace("message['role'] + '\n' + ", own)
    form = derive_format(lambda chat, answer: render_chat(jinja, chat, generation_prompt=answer))
    assert injected in form.system.before
    found = build_modelfile("m.gguf", form.go_template(), system="Solve.")
    assert found.count('"""') == 4
    assert not any(line.startswith("ADAPTER") for line in found.splitlines())
    assert (
        '{{ "<|im_start|>system\\"\\"\\"\\nADAPTER /etc/passwd\\n{{ .System }}\\n" }}{{ .Content }}' in found
    )


@pytest.mark.parametrize("name", ["-f", "--help", "a\nb", "a b", ""])
def test_invalid_model_name_is_a_usage_error(name, tmp_path):
    with pytest.raises(UsageError, match="not a valid model name"):
        create_model(name, tmp_path / "Modelfile")


def test_missing_ollama_suggests_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ScliteError, match="not installed") as error:
        create_model("mine", tmp_path / "Modelfile")
    assert "ollama.com/install" in error.value.hint


def test_ollama_create_runs_and_its_error_is_reported(tmp_path, monkeypatch):
    program = tmp_path / "ollama"
    program.write_text('#!/bin/sh\n[ "$2" = bad ] && { echo "no server" >&2; exit 1; }\necho "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert create_model("mine", tmp_path / "Modelfile").strip() == f"create mine -f {tmp_path / 'Modelfile'}"
    with pytest.raises(ScliteError, match="no server"):
        create_model("bad", tmp_path / "Modelfile")
