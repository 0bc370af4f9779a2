"""Keys, certificates, open files and passwords are checked before the first request."""

import os
import resource
import subprocess
import sys

import pytest

from sclite import config
from sclite.config import Config, without_password
from sclite.errors import TeacherError, UsageError
from sclite.run import Run
from sclite.teacher import provider
from tests.replay import TeacherServer, fail, job, say


@pytest.mark.parametrize("direct", [True, False])
def test_key_with_a_windows_line_end_works(ask, monkeypatch, direct):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-secret\r\n")
    with TeacherServer(lambda request, nth: say("good")) as server:
        assert ask(server, [job(1)], direct=direct)[0].text == "good"
    assert server.keys == {"Bearer sk-test-secret"}


@pytest.mark.parametrize("key", ["sk-sec\rret", "sk-sec ret", "sk-secrét", "sk-sec\nret"])
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
    # without an address, LiteLLM would send the problems to OpenAI
    monkeypatch.delenv("LM_STUDIO_API_BASE", raising=False)
    with pytest.raises(UsageError, match="needs an address") as error:
        provider.connect(config.Teacher(model="lm_studio/qwen3"))
    assert "teacher.api_base" in error.value.hint


def test_ollama_gets_a_context_for_prompt_and_reply_unless_replies_are_short():
    """It would silently drop the beginning of anything over 4,096 tokens."""
    teacher = {"model": "ollama_chat/qwen3", "max_tokens": 4096}
    assert provider.connect(config.Teacher(**teacher)).options["num_ctx"] > 2 * 4096
    for own in ({"max_tokens": 1024}, {"extra": {"num_ctx": 9000}}):
        assert "num_ctx" not in provider.connect(config.Teacher(**teacher | own)).options


def test_missing_certificates_are_reported_before_any_request(tmp_path, monkeypatch):
    settings = config.Teacher(model="openai/replay", api_base="http://127.0.0.1:9/v1")
    (tmp_path / "text.pem").write_text("no certificate")
    for name, why in (("none.pem", "does not exist"), ("text.pem", "cannot be read")):
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / name))
        with pytest.raises(UsageError, match=f"SSL_CERT_FILE=.*{name} {why}"):
            provider.connect(settings)


def test_limit_on_open_files_is_raised_or_the_setting_reported():
    code = (
        "import resource, sys; from sclite.teacher.provider import prepare_process\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, int(sys.argv[1])))\n"
        "try: prepare_process(300)\n"
        "except Exception as error: print(error.message, error.hint)\n"
        "else: print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )

    def outcome(hard):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.check_output([sys.executable, "-c", code, str(hard)], text=True, env=environment)

    assert int(outcome(1000)) >= 300
    message = outcome(400)
    assert "teacher.concurrency = 300 needs 428 open files, and this system allows 400" in message
    assert "--set teacher.concurrency=272" in message
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256  # this process is unchanged


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


@pytest.mark.parametrize("direct", [True, False])
def test_password_in_an_address_is_sent_but_neither_shown_nor_stored(ask, ledger, direct):
    def answer(request, nth):
        return say("good") if nth == 1 else fail(404, f"no model at {address}")

    with TeacherServer(answer) as server:
        address = server.url.replace("http://", "http://me:hush@")
        for api_base in (address, server.url):
            assert ask(api_base, [job(1)], direct=direct)[0].text == "good"
        assert len(server.requests) == 1  # the same request, with the password or without
        assert server.keys == {"Basic bWU6aHVzaA=="}
        assert b"hush" not in ledger.path.read_bytes()
        with pytest.raises(TeacherError, match="at http://127") as caught:
            ask(address, [job(1, sample=1)], direct=direct)
    assert "hush" not in str(caught.value) + caught.value.hint
