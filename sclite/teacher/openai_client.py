"""A client for OpenAI-compatible endpoints through OpenAI's SDK, which takes a fraction of LiteLLM's CPU per call.

Requests, replies and errors are the same as through LiteLLM; tests compare the two. Neither HTTP client trusts
the server: replies are bounded and uncompressed, and redirects are not followed.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from sclite import config
from sclite.teacher.reply import Completion, decode, read

if TYPE_CHECKING:
    import ssl

    import httpx
    from openai import AsyncOpenAI

MAX_BODY_BYTES = 4 * 2**20
"""128,000 tokens as JSON take less than 1 MiB, 3 MiB with every character escaped."""
_KEEP_ALIVE_SECONDS = 4.0  # uvicorn, and so vLLM, closes idle connections after 5
_PLAIN = ("OpenAIGPTConfig", "OpenAIUnknownModelConfig", "HostedVLLMChatConfig")
"""LiteLLM's configurations that pass requests on unchanged (those of gpt-5, o3, ... rewrite them)."""


def bound_client(client: "httpx.AsyncClient") -> "httpx.AsyncClient":
    """Restrict what the client accepts, and return it."""
    client.follow_redirects = False  # 301 to 303 would repeat the request as a GET, others elsewhere
    client.headers["Accept-Encoding"] = "identity"
    client.event_hooks = {"response": [_bound_body]}
    return client


async def _bound_body(response: "httpx.Response") -> None:
    import httpx

    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":  # 1 kB of gzip may hold 1 MB
        raise httpx.DecodingError(f"a reply compressed with {encoding}, which was not requested")
    response.stream = _limited_stream()(response.stream)


@cache
def _limited_stream() -> type:
    import httpx

    class LimitedStream(httpx.AsyncByteStream):
        def __init__(self, stream: httpx.AsyncByteStream):
            self.stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in self.stream:
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    raise httpx.ReadError(f"a reply of more than {MAX_BODY_BYTES >> 20} MiB")
                yield chunk

        async def aclose(self) -> None:
            await self.stream.aclose()

    return LimitedStream


@dataclass
class OpenAIClient:
    """One model at one address. All methods belong to the event loop."""

    litellm: ModuleType
    model: str
    url: str
    key: str
    certificates: "ssl.SSLContext | str | bool"
    listed: bool  # LiteLLM's price list decides the cost of a reply
    _idle: list["AsyncOpenAI"] = field(default_factory=list)  # each with its own connection

    def _open(self) -> "AsyncOpenAI":
        """A client for one call at a time: each request costs httpcore's pool time quadratic in its connections."""
        import httpx
        from openai import AsyncOpenAI

        limits = httpx.Limits(keepalive_expiry=_KEEP_ALIVE_SECONDS)
        proxied = not config.is_loopback(self.url)
        http_client = httpx.AsyncClient(
            limits=limits, timeout=None, verify=self.certificates, trust_env=proxied
        )
        organization = self.litellm.organization or os.environ.get("OPENAI_ORGANIZATION") or None
        return AsyncOpenAI(
            api_key=self.key, base_url=self.url, organization=organization, timeout=None, max_retries=0,
            http_client=bound_client(http_client),
        )  # fmt: skip

    async def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        while self._idle:
            await self._idle.pop().close()

    async def complete(
        self, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any], seconds: float
    ) -> Completion:
        """The reply to one request. Raises openai.APIError, TimeoutError after `seconds`, and the errors of `read`."""
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
        body, cost_usd = decode(response.content), None
        if self.listed and isinstance(body, Mapping):  # the price list knows cached tokens and service tiers
            known = {field: body[field] for field in ("model", "usage", "service_tier") if field in body}
            names, prices = (f"openai/{self.model}", self.model, body.get("model")), self.litellm.model_cost
            found = [prices.get(name, {}) for name in names if isinstance(name, str)]
            if any(each.get("litellm_provider") == "openai" for each in found):
                with contextlib.suppress(Exception):  # LiteLLM raises any; the reply is paid for
                    reply = self.litellm.ModelResponse(**known)
                    cost_usd = self.litellm.completion_cost(reply, model=names[0])
        return read(body, cost_usd)


def find_client(
    litellm: ModuleType, settings: config.Teacher, api_key: str | None, listed: bool
) -> OpenAIClient | None:
    """A client that bypasses LiteLLM; None for models, addresses and extra parameters that only LiteLLM knows."""
    api_base, model = settings.api_base, settings.model
    name, provider, found, _ = litellm.get_llm_provider(model, api_base=api_base or None, api_key=api_key)
    url, key = urlsplit(api_base), api_key or found or os.environ.get("OPENAI_API_KEY")
    if provider not in ("openai", "hosted_vllm") or name.startswith("responses/") or not key:
        return None
    if not url.hostname or url.query or set(settings.extra) & set(litellm.types.utils.all_litellm_params):
        return None
    if (litellm.model_cost.get(name) or {}).get("mode", "chat") != "chat":
        return None
    rules = litellm.utils.ProviderConfigManager.get_provider_chat_config(name, litellm.LlmProviders(provider))
    proxies = {} if proxy_bypass(url.hostname) else getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all") or "http:"
    # httpx needs an extra package for SOCKS
    if type(rules).__name__ not in _PLAIN or urlsplit(proxy).scheme not in ("http", "https"):
        return None
    address = api_base.rstrip("/")
    if provider != "hosted_vllm" or not address.endswith("/chat/completions"):
        address += "/chat/completions"
    certificates = litellm.llms.custom_httpx.http_handler.get_ssl_configuration()
    return OpenAIClient(litellm, name, address, key, certificates, listed and provider == "openai")
