"""Asking an OpenAI-compatible address without LiteLLM in between, whose own work costs milliseconds of CPU per call.

What is sent, what a reply says and what a failure is called are as if LiteLLM had asked; tests hold the two together.
"""

import asyncio
import contextlib
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

if TYPE_CHECKING:
    import aiohttp

_PLAIN = ("OpenAIGPTConfig", "OpenAIUnknownModelConfig", "HostedVLLMChatConfig")
"""LiteLLM's names for models whose requests it passes on as they are (it rewrites those to gpt-5, o3 ..)."""
_KEEP_ALIVE_SECONDS = 4.0  # less than the 5 after which uvicorn, and so vLLM, closes an idle connection
_THOUGHT = re.compile(r"<(think|thinking|budget:thinking)>.*?</(?:think|thinking|budget:thinking)>", re.S)


@dataclass(frozen=True)
class Said:
    """A reply as it was read. Tokens are None where the endpoint does not count; `listed_usd` is LiteLLM's own sum."""

    text: str
    finish_reason: str
    tokens: tuple[int | None, int | None]
    listed_usd: float | None = None


@dataclass
class Direct:
    """One address and the model there. All methods belong to the event loop.

    `headers` hold the key; `listed` says that LiteLLM's price list decides the cost of a reply.
    """

    litellm: ModuleType
    provider: str
    model: str
    url: str
    headers: Mapping[str, str]
    proxy: str | None
    connections: int
    listed: bool = False

    @cached_property
    def _session(self) -> "aiohttp.ClientSession":
        import aiohttp
        from litellm.llms.custom_httpx.http_handler import get_ssl_configuration

        connector = aiohttp.TCPConnector(
            limit=self.connections, keepalive_timeout=_KEEP_ALIVE_SECONDS, ssl=get_ssl_configuration()
        )
        return aiohttp.ClientSession(
            connector=connector,
            headers=self.headers,
            timeout=aiohttp.ClientTimeout(total=None),  # `ask` has its own
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Close the connections; the next question opens new ones."""
        session = self.__dict__.pop("_session", None)
        if session is not None:
            await session.close()

    async def ask(
        self, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any], seconds: float
    ) -> Said:
        """The reply to one request.

        Raises what LiteLLM raises for an error status, TimeoutError after `seconds`, ConnectionError for a lost
        connection and for a body that is no chat completion.
        """
        asked = {"model": self.model, "messages": list(map(dict, messages)), **parameters}
        asked.pop("drop_params", None)  # LiteLLM's own: it passes all the others to such an address
        try:
            async with asyncio.timeout(seconds):
                status, headers, body = await self._post(asked)
        except TimeoutError:
            raise TimeoutError(f"no reply within {seconds:g} s") from None
        if status >= 400:
            self._fail(self._failure(status, headers, body))
        return self._read(_decoded(body))

    async def _post(self, asked: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        import aiohttp

        data = json.dumps(asked).encode()
        for last in (False, True):
            try:
                async with self._session.post(self.url, data=data, proxy=self.proxy) as response:
                    _acknowledge(response)
                    return response.status, response.headers, await response.read()
            except aiohttp.ClientConnectionResetError as error:
                if last:  # the first time a kept connection had ended, and nothing was sent
                    raise ConnectionError(str(error)) from None
            except aiohttp.ClientResponseError as error:
                # its own words hold an address, and so a proxy's password
                raise ConnectionError(f"HTTP {error.status} {error.message}") from None
            except aiohttp.InvalidURL:
                raise ConnectionError("the address is no URL") from None
            except aiohttp.ClientError as error:
                raise ConnectionError(str(error) or type(error).__name__) from None
        raise AssertionError("unreachable")

    # -- what came back --------------------------------------------------------------------------------------------

    def _read(self, body: Any) -> Said:
        if not isinstance(body, dict):
            raise ConnectionError("a reply that is no chat completion")
        self._look_for_error(body.get("error"))
        choices = body.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise ConnectionError("a reply without any choice")
        usage = body.get("usage")
        known = isinstance(usage, dict) and usage.get("total_tokens")
        tokens = (
            (usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0) if known else (None, None)
        )
        return Said(
            _text(message), self._finish(choice, message), tokens, self._listed_usd(body) if known else None
        )

    def _finish(self, choice: Mapping[str, Any], message: Mapping[str, Any]) -> str:
        reason = choice.get("finish_reason") or "stop"
        if reason == "stop":
            return "tool_calls" if message.get("tool_calls") else "stop"
        if reason == "length":
            return reason
        return self.litellm.litellm_core_utils.core_helpers.map_finish_reason(reason)

    def _listed_usd(self, body: Mapping[str, Any]) -> float | None:
        """What LiteLLM's list makes of a reply (it knows of cached tokens and service tiers); None where it is silent."""
        name = f"{self.provider}/{self.model}"
        names = (name, self.model, body.get("model")) if self.provider == "openai" else (name,)
        if not self.listed or not any(name in self.litellm.model_cost for name in names):
            return None
        told = {name: body[name] for name in ("model", "usage", "service_tier") if name in body}
        with contextlib.suppress(ValueError, TypeError):  # counts that are none
            return self.litellm.completion_cost(self.litellm.ModelResponse(**told), model=name)
        return None

    # -- what failed -----------------------------------------------------------------------------------------------

    def _look_for_error(self, error: Any) -> None:
        """Some endpoints put an error into a body with status 200, some an empty one beside a good reply."""
        if isinstance(error, dict):
            if error.get("message") or error.get("code") is not None:
                said = str(error.get("message", "Error in response object"))
                self._fail(self._fault(error.get("code", 422), said, {}, None))
        elif error:
            self._fail(self._fault(422, "Error in response object", {}, None))

    def _failure(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception:
        """An error status in the words of the OpenAI SDK, which LiteLLM reads."""
        text = body.decode(errors="replace").strip()
        try:
            found = json.loads(text)
        except ValueError:
            return self._fault(status, text or f"Error code: {status}", headers, text)
        detail = found.get("error", found) if isinstance(found, dict) else found
        return self._fault(status, f"Error code: {status} - {found}", headers, detail)

    def _fault(self, status: Any, message: str, headers: Mapping[str, str], body: Any) -> Exception:
        named = {name.lower(): value for name, value in headers.items()}
        return self.litellm.llms.openai.common_utils.OpenAIError(
            status_code=status, message=message, headers=named, body=body
        )

    def _fail(self, fault: Exception) -> NoReturn:
        """Raise the class that LiteLLM has for it."""
        self.litellm.exception_type(self.model, fault, self.provider)
        raise fault


def _acknowledge(response: Any) -> None:
    """Acknowledge the headers now. A server that writes its body apart waits for that, 40 ms if left to Linux."""
    option = getattr(socket, "TCP_QUICKACK", None)  # Linux alone has it
    transport = response.connection and response.connection.transport
    found = transport and transport.get_extra_info("socket")
    if option is not None and found is not None:
        found.setsockopt(socket.IPPROTO_TCP, option, 1)


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        said = body[:80].decode(errors="replace").strip()
        raise ConnectionError(f"a reply that is no JSON: {said}" if said else "an empty reply") from None


def _text(message: Mapping[str, Any]) -> str:
    """The content; a think block before it is left out, as LiteLLM does where the endpoint has no field for it."""
    content = message.get("content")
    if not isinstance(content, str):
        return ""
    if content.startswith("<") and "reasoning_content" not in message and "reasoning" not in message:
        thought = _THOUGHT.match(content)
        return content[thought.end() :] if thought else content
    return content


# -- where it is possible ------------------------------------------------------------------------------------------


def find(
    litellm: ModuleType, model: str, api_base: str, api_key: str | None, connections: int, listed: bool
) -> Direct | None:
    """The direct way to a model; None where only LiteLLM knows the way.

    `api_key` None stands for the variable in which LiteLLM would look.
    """
    name, provider, found, _ = litellm.get_llm_provider(model, api_base=api_base or None, api_key=api_key)
    if not _is_plain(litellm, name, provider, api_base):
        return None
    where = urlsplit(api_base)
    proxies = {} if proxy_bypass(where.hostname) else getproxies()
    proxy = proxies.get(where.scheme) or proxies.get("all")
    if proxy and urlsplit(proxy).scheme not in ("http", "https"):
        return None
    key = api_key or found or os.environ.get("OPENAI_API_KEY")
    if not key:
        return None
    url = api_base.rstrip("/")
    if provider != "hosted_vllm" or not url.endswith("/chat/completions"):
        url += "/chat/completions"
    headers = _headers(litellm, provider, key, api_base)
    return Direct(litellm, provider, name, url, headers, proxy, connections, listed)


def _is_plain(litellm: ModuleType, name: str, provider: str, api_base: str) -> bool:
    """Whether LiteLLM would post the request as it is to this address."""
    where = urlsplit(api_base)
    if provider not in ("openai", "hosted_vllm") or where.scheme not in ("http", "https"):
        return False
    if not where.hostname or where.username or where.query:  # it has its own ways with these
        return False
    listed = litellm.model_cost.get(name) or {}
    if name.startswith("responses/") or listed.get("mode", "chat") != "chat":
        return False
    rules = litellm.utils.ProviderConfigManager.get_provider_chat_config(name, litellm.LlmProviders(provider))
    return type(rules).__name__ in _PLAIN


def _headers(litellm: ModuleType, provider: str, key: str, api_base: str) -> dict[str, str]:
    """The headers that go with every request: those of the OpenAI SDK, which take more from the environment."""
    headers = {"Content-Type": "application/json"}
    if provider == "openai":
        organization = litellm.organization or os.environ.get("OPENAI_ORGANIZATION")
        openai = litellm.exceptions.openai
        client = openai.AsyncOpenAI(api_key=key, base_url=api_base, organization=organization or None)
        headers |= {name: value for name, value in client.default_headers.items() if isinstance(value, str)}
    return {**headers, "Authorization": f"Bearer {key}"}
