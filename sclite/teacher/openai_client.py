"""A client for OpenAI-compatible endpoints through OpenAI's SDK, which takes a fraction of LiteLLM's CPU per call.

Requests, replies and errors are the same as through LiteLLM; tests compare the two.
"""

import asyncio
import contextlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from sclite.teacher.http import open_client
from sclite.teacher.reply import Completion, decode, read

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_PLAIN = ("OpenAIGPTConfig", "OpenAIUnknownModelConfig", "HostedVLLMChatConfig")
"""LiteLLM's configurations that pass requests on unchanged (those of gpt-5, o3 .. rewrite them)."""


@dataclass
class OpenAIClient:
    """One model at one address. All methods belong to the event loop.

    `listed`: LiteLLM's price list decides the cost of a reply.
    """

    litellm: ModuleType
    provider: str
    model: str
    url: str
    key: str
    listed: bool = False
    _idle: list["AsyncOpenAI"] = field(default_factory=list)  # each with its own connection

    def _open(self) -> "AsyncOpenAI":
        from openai import AsyncOpenAI

        organization = self.litellm.organization or os.environ.get("OPENAI_ORGANIZATION") or None
        return AsyncOpenAI(
            api_key=self.key, base_url=self.url, organization=organization, timeout=None, max_retries=0,
            http_client=open_client(),
        )  # fmt: skip

    async def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        while self._idle:
            await self._idle.pop().close()

    async def complete(
        self, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any], seconds: float
    ) -> Completion:
        """The reply to one request.

        Raises openai.APIError for an error status or a lost connection, TimeoutError after `seconds`, and the errors of
        `reply.read`.
        """
        import httpx

        request = {"model": self.model, "messages": list(map(dict, messages)), **parameters}
        request.pop("drop_params", None)  # LiteLLM's own; it passes on all others
        request |= request.pop("extra_body", {})
        client = self._idle.pop() if self._idle else self._open()
        try:
            async with asyncio.timeout(seconds):
                response = await client.post(self.url, cast_to=httpx.Response, body=request)
        except TimeoutError:
            raise TimeoutError(f"no reply within {seconds:g} s") from None
        finally:
            self._idle.append(client)
        body = decode(response.content)
        return read(body, self._listed_usd(body))

    def _listed_usd(self, body: object) -> float | None:
        """The cost by LiteLLM's price list, which knows cached tokens and service tiers; None if the model is not listed."""
        if not self.listed or not isinstance(body, Mapping):
            return None
        name = f"{self.provider}/{self.model}"
        names = (name, self.model, body.get("model")) if self.provider == "openai" else (name,)
        if not any(isinstance(name, str) and name in self.litellm.model_cost for name in names):
            return None
        known = {name: body[name] for name in ("model", "usage", "service_tier") if name in body}
        with contextlib.suppress(ValueError, TypeError, AttributeError):  # invalid counts
            return self.litellm.completion_cost(self.litellm.ModelResponse(**known), model=name)
        return None


def find_client(
    litellm: ModuleType, model: str, api_base: str, api_key: str | None, listed: bool, extra: Collection[str]
) -> OpenAIClient | None:
    """A client that bypasses LiteLLM; None for models and `extra` parameters that only LiteLLM knows.

    `api_key` None: the environment variable that LiteLLM would read.
    """
    if set(extra) & set(litellm.types.utils.all_litellm_params):
        return None
    name, provider, found, _ = litellm.get_llm_provider(model, api_base=api_base or None, api_key=api_key)
    if not _is_plain(litellm, name, provider, api_base):
        return None
    proxies = {} if proxy_bypass(urlsplit(api_base).hostname) else getproxies()
    proxy = proxies.get(urlsplit(api_base).scheme) or proxies.get("all") or "http:"
    if urlsplit(proxy).scheme not in ("http", "https"):
        return None  # httpx needs an extra package for SOCKS
    key = api_key or found or os.environ.get("OPENAI_API_KEY")
    if not key:
        return None
    url = api_base.rstrip("/")
    if provider != "hosted_vllm" or not url.endswith("/chat/completions"):
        url += "/chat/completions"
    return OpenAIClient(litellm, provider, name, url, key, listed)


def _is_plain(litellm: ModuleType, name: str, provider: str, api_base: str) -> bool:
    """Whether LiteLLM would post the request unchanged to this address."""
    url = urlsplit(api_base)
    if provider not in ("openai", "hosted_vllm") or url.scheme not in ("http", "https"):
        return False
    if not url.hostname or url.query:
        return False
    listed = litellm.model_cost.get(name) or {}
    if name.startswith("responses/") or listed.get("mode", "chat") != "chat":
        return False
    rules = litellm.utils.ProviderConfigManager.get_provider_chat_config(name, litellm.LlmProviders(provider))
    return type(rules).__name__ in _PLAIN
