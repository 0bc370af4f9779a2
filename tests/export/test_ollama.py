"""The Modelfile and `ollama create`."""

import json
import re
import shutil
import stat

import pytest

from sclite.config import Config
from sclite.errors import DONE, FAILED, NETWORK, USAGE, DataError, ScliteError, UsageError
from sclite.export.ollama import check_ollama, create_model, write_modelfile
from sclite.run import Run
from sclite.student.base import Request
from sclite.student.llama_cpp.engine import Engine
from tests.replay import Answer, TeacherServer
from tests.toy import CHATML, tiny_gguf


@pytest.fixture
def written(run, student, tmp_path):
    """Writes the Modelfile of a student whose folder and settings are changed, and returns its text."""

    def write(template=CHATML, **settings):
        folder = shutil.copytree(student, tmp_path / "student", dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        run.path("export").mkdir(parents=True, exist_ok=True)
        tiny_gguf(folder, run.path("export/base-f16.gguf"))
        tree = {"student": {"model": str(folder)}, "export": {"quant": "f16", "num_ctx": 512}, **settings}
        path, _ = write_modelfile(run, Config.model_validate(tree), "base")
        return path.read_text()

    return write


def test_modelfile_has_template_system_prompt_stop_and_context(written, tmp_path):
    system = tmp_path / "prompts/student_system.txt"
    system.parent.mkdir()
    system.write_text("Be right.")
    lines = written(prompts={"folder": str(system.parent)}).splitlines()
    assert lines[0] == "FROM ./base-f16.gguf"
    assert lines[1].startswith('TEMPLATE """{{ range ')
    assert lines[-5:] == [
        'SYSTEM """Be right."""',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER num_ctx 512",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ]
    for folder, text in (("quotes", 'say """ now'), ("end", 'say "stop"')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "student_system.txt").write_text(text)
        with pytest.raises(DataError, match="cannot contain"):
            written(prompts={"folder": str(tmp_path / folder)})


def test_no_text_of_a_template_escapes_from_the_modelfile(written):
    injected = '"""\nADAPTER /etc/passwd\n{{ .System }}'
    found = written(CHATML.replace("message['role'] + '\n' + ", f"message['role'] + '{injected}\n' + "))
    quoted = r'{{ "<|im_start|>system\"\"\"\nADAPTER /etc/passwd\n{{ .System }}\n" }}{{ .Content }}'
    assert found.count('"""') == 4
    assert not any(line.startswith("ADAPTER") for line in found.splitlines())
    assert quoted in found


@pytest.mark.parametrize(
    ("name", "code", "message", "hint"),
    [
        ("-f", USAGE, "export.ollama = '-f' is not a valid model name", "my-model:v1"),
        ("mine", FAILED, "ollama is not installed", "ollama.com/install"),
    ],
)
def test_ollama_that_cannot_create_the_model_is_reported_before_the_export(
    sclite, student, tmp_path, monkeypatch, name, code, message, hint
):
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = sclite("export", f"--ollama={name}", "--set", f"student.model={student}")
    assert ended.code == code
    assert message in ended.error
    assert hint in ended.hint
    assert not Run("runs/default").path("export").exists()


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A fake `ollama` that records its arguments and fails to create `bad`."""
    path = tmp_path / "bin/ollama"
    path.parent.mkdir()
    refuse = '[ "$2" = bad ] && { echo "no server" >&2; exit 1; }'
    path.write_text(f'#!/bin/sh\n{refuse}\necho "$@" > {tmp_path}/called\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}:/bin:/usr/bin")


def test_ollama_create_runs_and_its_error_is_reported(program, tmp_path):
    create_model("mine", tmp_path / "Modelfile")
    assert (tmp_path / "called").read_text() == f"create mine -f {tmp_path / 'Modelfile'}\n"
    with pytest.raises(ScliteError, match="no server"):
        create_model("bad", tmp_path / "Modelfile")
    for name in ("-f", "--help", "a\nb", "a b", ""):
        with pytest.raises(UsageError, match="not a valid model name"):
            check_ollama(name)


def serve_modelfile(body):
    """What Ollama replies with the file and system prompt of the Modelfile, and the template in the file."""
    folder = Run("runs/default").path("export")
    modelfile = (folder / "Modelfile").read_text()
    system = {"role": "system", "content": re.search('^SYSTEM """(.*?)"""', modelfile, re.S | re.M)[1]}
    assert (body["model"], body["options"]["temperature"]) == ("mine", 0)
    assert [message["role"] for message in body["messages"]] == ["user"]
    file = folder / re.search(r"^FROM \./(.+)$", modelfile, re.M)[1]
    with Engine(file, parallel=1, context=1024) as engine:
        asked = Request((system, *body["messages"]), max_tokens=body["options"]["num_predict"])
        (reply,) = engine.generate([asked])
    message = {"role": "assistant", "content": reply.text}
    return {"message": message, "prompt_eval_count": reply.prompt_tokens, "eval_count": reply.tokens}


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("nothing", DONE, r"^Ollama agrees: prompt of \d+ tokens, \d\d greedy tokens$"),
        ("old version", DONE, "^Ollama agrees: prompt of unknown length"),
        ("parts later", DONE, r"^Ollama agrees for \d+ of \d+ greedy tokens, up to .* by \d+\.\d\d nats"),
        ("longer prompt", FAILED, r"it gets a prompt of \d+ tokens instead of"),
        ("other beginning", FAILED, "it begins with 'QQ"),
    ],
)
def test_created_model_is_asked_and_compared(sclite, student, program, monkeypatch, change, code, said):
    def answer(body, nth):
        found = serve_modelfile(body)
        message = found["message"]
        if change == "old version":
            del found["prompt_eval_count"]
        elif change == "longer prompt":
            found["prompt_eval_count"] += 4
        elif change != "nothing":
            at = len(message["content"]) // 2 if change == "parts later" else 0
            message["content"] = message["content"][:at] + "QQ" + message["content"][at:]
        return Answer(body=found)

    with TeacherServer(answer) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url.removesuffix("/v1"))
        given = ("--ollama", "mine", "--quant", "f16", "--set", f"student.model={student}")
        ended = sclite("export", *given)
        assert ended.code == code
        assert re.search(said, ended.error or ended.out, re.M)
        assert code == DONE or "ollama rm mine" in ended.hint
        if change == "nothing":
            reply = json.loads(sclite("export", *given, "--json").out)["ollama_reply"]
            assert reply["prompt_tokens"] == reply["ollama_prompt_tokens"] > 50
            assert reply["equal_tokens"] == reply["tokens"]
            assert len(server.requests) == 2


def test_stopped_ollama_is_reported_after_the_export(sclite, student, program, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    ended = sclite("export", "--ollama", "mine", "--quant", "f16", "--set", f"student.model={student}")
    assert (ended.code, "ollama serve" in ended.hint) == (NETWORK, True)
    assert Run("runs/default").path("export/base-f16.gguf").is_file()
