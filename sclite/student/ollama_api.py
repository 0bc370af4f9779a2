"""Ollama's own HTTP API: where it listens, and which models it has."""

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from sclite.config import is_loopback
from sclite.errors import TeacherError, UsageError

PREFIX = "ollama/"
"""Prefix of a student that Ollama runs: ollama/NAME."""


def ollama_url() -> str:
    """Ollama's address: http://127.0.0.1:11434, or that in OLLAMA_HOST (HOST, HOST:PORT or a URL)."""
    address = os.environ.get("OLLAMA_HOST", "").strip()
    scheme, _, rest = address.rpartition("://")
    try:
        parts = urlsplit(f"//{rest}")
        port = parts.port or {"http": 80, "https": 443}.get(scheme, 11434)
    except ValueError:
        raise UsageError(f"OLLAMA_HOST={address} is not an address", "write OLLAMA_HOST=HOST:PORT") from None
    host = (parts.hostname or "127.0.0.1").replace("0.0.0.0", "127.0.0.1")  # an address to listen on
    return f"{scheme or 'http'}://{host}:{port}{parts.path.rstrip('/')}"


def call_ollama(
    url: str, path: str, body: Mapping[str, Any] | None = None, seconds: float = 30
) -> dict[str, Any]:
    """The reply to a GET, or to a POST of `body`. Raises TeacherError if Ollama is not running or refuses."""
    import httpx

    method = "GET" if body is None else "POST"
    proxied = not is_loopback(url)  # `ollama` uses no proxy to this machine either
    try:
        response = httpx.request(method, f"{url}{path}", json=body, timeout=seconds, trust_env=proxied)
        found: dict[str, Any] = response.json()
    except (httpx.HTTPError, ValueError) as error:
        hint = "start it: ollama serve (OLLAMA_HOST is its address)"
        raise TeacherError(f"Ollama does not answer at {url}: {error}", hint) from None
    if response.is_error:
        raise TeacherError(
            f"Ollama at {url} refuses {path}: {found.get('error')}", "update Ollama, and see its log"
        )
    return found


def find_model(url: str, name: str) -> str:
    """The digest of a model in Ollama; TeacherError if it has none of that name."""
    models = {str(m.get("name")).lower(): m for m in call_ollama(url, "/api/tags").get("models") or ()}
    found = models.get(name.lower()) or models.get(f"{name.lower()}:latest")
    if found is None:
        hint = f"get it with: ollama pull {name}; `ollama list` shows the installed models"
        raise TeacherError(f"Ollama at {url} has no model {name}", hint)
    return str(found.get("digest"))
