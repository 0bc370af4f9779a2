"""Ollama's address and its list of models."""

import pytest

from sclite.errors import TeacherError, UsageError
from sclite.student.ollama_api import call_ollama, find_model, ollama_url
from tests.replay import TeacherServer


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("box", "http://box:11434"),
        ("box:80", "http://box:80"),
        (":1234", "http://127.0.0.1:1234"),
        ("http://box", "http://box:80"),
        ("https://box/", "https://box:443"),
        ("https://box/ollama/", "https://box:443/ollama"),
    ],
)
def test_address_is_read_as_ollama_does(monkeypatch, given, url):
    """Expected values as from Host in Ollama's envconfig/config.go; 0.0.0.0 is only an address to listen on."""
    monkeypatch.setenv("OLLAMA_HOST", given)
    assert ollama_url() == url


def test_models_are_found_by_any_spelling_and_a_refusal_is_named(monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "box:port")
    with pytest.raises(UsageError, match="OLLAMA_HOST=box:port"):
        ollama_url()
    with TeacherServer(None, {"me:latest": "sha256:1", "qwen3:8b": "sha256:2"}) as server:
        url = server.url.removesuffix("/v1")
        assert [find_model(url, name) for name in ("me", "Qwen3:8b")] == ["sha256:1", "sha256:2"]
        with pytest.raises(TeacherError, match="refuses /api/nothing"):
            call_ollama(url, "/api/nothing")
