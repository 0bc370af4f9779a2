"""Keys, certificates, open files and passwords are checked before the first request."""

import os
import subprocess
import sys

import pytest

from sclite import config
from sclite.config import Config, without_password
from sclite.errors import TeacherError, UsageError
from sclite.run import Run
from sclite.teacher import provider
from tests.replay import TeacherServer, fail, job, say


@pytest.mark.parametrize("key", ["sk-secret\r", "sk-sec ret", "sk-secrét", "sk-sec\nret"])
def test_key_that_no_header_can_hold_is_reported_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError, match="OPENAI_API_KEY") as caught:
        provider.connect(config.Teacher(model="openai/replay", api_base="http://127.0.0.1:9/v1"))
    assert "sk-" not in caught.value.message + caught.value.hint


def test_keys_and_addresses_of_providers_are_those_that_litellm_reads(monkeypatch):
    for model in ("cohere/command-a-03-2025", "cohere_chat/command-a-03-2025"):
        assert provider.connect(config.Teacher(model=model)).key_variable == "COHERE_API_KEY"
    monkeypatch.setenv("AZURE_API_KEY", "secret")
    monkeypatch.delenv("AZURE_API_VERSION", raising=False)
    found = provider.connect(config.Teacher(model="azure/gpt-4o", api_base="https://x.openai.azure.com"))
    assert "api_key" not in found.options


def test_ollama_gets_a_context_for_prompt_and_reply_unless_replies_are_short():
    """It would silently drop the beginning of anything over 4,096 tokens."""
    teacher = {"model": "ollama_chat/qwen3", "max_tokens": 4096}
    assert provider.connect(config.Teacher(**teacher)).options["num_ctx"] > 2 * 4096
    for own in ({"max_tokens": 1024}, {"extra": {"num_ctx": 9000}}):
        assert "num_ctx" not in provider.connect(config.Teacher(**teacher | own)).options


def test_limit_on_open_files_is_raised():
    code = (
        "import resource; from sclite import config; from sclite.teacher import provider\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1000))\n"
        "provider.connect(config.Teacher(model='openai/x', concurrency=300))\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment) == "1000\n"


@pytest.mark.parametrize("password", ["hush@hush", "hu[sh", "1#hush", "hush#hush", "hush/hush", "hush?hush"])
def test_password_in_an_address_is_in_no_dump_and_no_run(tmp_path, password):
    address = f"http://me:{password}@host:8000/v1"
    assert without_password(address) == "http://host:8000/v1"
    teacher = {"api_base": address, "model": "m", "inspector_api_base": address}
    chosen = Config.model_validate({"teacher": teacher, "attempts": {"api_base": address}})
    assert password not in chosen.model_dump_json()
    assert chosen.teacher.api_base == address
    run = Run(tmp_path)
    with run.recording(chosen):
        pass
    saved = run.path("run.toml").read_text()
    assert (password in saved, "http://host:8000/v1" in saved) == (False, True)
    for whole in ("http://host:8000/v1", "https://host/run/@cf/meta", "http://[::1]:8000/v1"):
        assert without_password(whole) == whole


def test_password_in_an_address_is_sent_but_neither_shown_nor_stored(ask, ledger):
    def answer(request, nth):
        return say("good") if nth == 1 else fail(404, f"no model at {address}")

    with TeacherServer(answer) as server:
        address = server.url.replace("http://", "http://me:hush@")
        for api_base in (address, server.url):
            assert ask(api_base, [job(1)])[0].text == "good"
        assert len(server.requests) == 1  # the same request, with the password or without
        assert server.keys == {"Basic bWU6aHVzaA=="}
        assert b"hush" not in ledger.path.read_bytes()
        with pytest.raises(TeacherError, match="at http://127") as caught:
            ask(address, [job(1, sample=1)])
    assert "hush" not in str(caught.value) + caught.value.hint
