"""Calls a model: through LiteLLM, which knows its provider, key and price, or directly at an OpenAI-compatible address."""

import asyncio
import contextlib
import gc
import logging
import math
import os
import re
import resource
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sclite import config
from sclite.errors import UsageError
from sclite.teacher.limits import Price
from sclite.teacher.reply import Completion, read

if TYPE_CHECKING:
    import ssl

    from openai import AsyncOpenAI

_LOCAL_PROVIDERS = ("ollama", "ollama_chat", "lm_studio", "llamafile")
# tokens; Ollama's context is 4,096 on most machines, and it silently drops the beginning of longer texts
_SHORT_REPLY, _LONGEST_PROMPT = 2048, 4096
_KEEP_ALIVE_SECONDS = 4.0  # uvicorn, and so vLLM, closes idle connections after 5
_PLAIN = ("OpenAIGPTConfig", "OpenAIUnknownModelConfig", "HostedVLLMChatConfig")
"""LiteLLM's configurations that pass requests on unchanged (those of gpt-5, o3, ... rewrite them)."""


@dataclass
class OpenAIClient:
    """One model at an OpenAI-compatible address, through OpenAI's SDK: a fraction of LiteLLM's CPU per call.

    Requests, replies and errors are the same as through LiteLLM; tests compare the two.
    """

    model: str
    api_base: str
    key: str
    certificates: "ssl.SSLContext | str | bool"
    idle: list["AsyncOpenAI"] = field(default_factory=list)  # each with its own connection

    async def post(self, parameters: Mapping[str, Any]) -> object:
        """The parsed body of the reply to one request."""
        import httpx
        from openai import AsyncOpenAI

        request = {"model": self.model, **parameters}
        request.pop("drop_params", None)  # LiteLLM's own; it passes on all others
        request |= request.pop("extra_body", {})
        if self.idle:
            client = self.idle.pop()
        else:  # one per call in flight: each request costs httpcore's pool time quadratic in its connections
            http_client = httpx.AsyncClient(
                limits=httpx.Limits(keepalive_expiry=_KEEP_ALIVE_SECONDS),
                timeout=None,
                verify=self.certificates,
                trust_env=not config.is_loopback(self.api_base),  # proxies
            )
            client = AsyncOpenAI(
                api_key=self.key,
                base_url=self.api_base,
                timeout=None,
                max_retries=0,
                http_client=http_client,
            )
        try:
            response = await client.post("/chat/completions", cast_to=httpx.Response, body=request)
        finally:
            self.idle.append(client)
        try:
            return response.json()
        except ValueError:
            raise ConnectionError(f"the reply is not JSON: {response.text[:80]}") from None


@dataclass(frozen=True)
class Provider:
    """LiteLLM and one of its models."""

    litellm: ModuleType
    settings: config.Teacher
    options: dict[str, Any]  # passed to LiteLLM with every call
    key_variable: str  # holds the key
    price: Price | None  # None: unknown
    max_output_tokens: float  # per reply, infinity if unknown
    direct: OpenAIClient | None  # bypasses LiteLLM, if the model allows it

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """The errors that `complete` raises if a call fails."""
        return (self.litellm.exceptions.openai.OpenAIError, self.litellm.exceptions.httpx.HTTPError, OSError)

    async def complete(
        self,
        messages: Sequence[Mapping[str, str]],
        parameters: Mapping[str, Any],
        seconds: float,
        on_text: Callable[[str], None] | None = None,
    ) -> Completion:
        """The reply to one request, sent once. With `on_text` it is streamed, through LiteLLM."""
        request = {"messages": [dict(message) for message in messages], **parameters}
        try:
            # LiteLLM's own timeout is for each read: a slow trickle of bytes never reaches it
            async with asyncio.timeout(seconds):
                if on_text is None and self.direct is not None:
                    return read(await self.direct.post(request))
                if on_text is None:
                    return read((await self.litellm.acompletion(**request, **self.options)).model_dump())
                streaming = {"stream": True, "stream_options": {"include_usage": True}}
                message = {"content": "", "reasoning_content": ""}
                reason, usage = None, None
                async for chunk in await self.litellm.acompletion(**request, **streaming, **self.options):
                    found = chunk.model_dump()
                    usage = found.get("usage") or usage
                    for choice in found["choices"]:
                        reason = choice.get("finish_reason") or reason
                        for name in message:
                            if text := (choice.get("delta") or {}).get(name):
                                message[name] += text
                                if name == "content":
                                    on_text(text)
        except TimeoutError:
            raise TimeoutError(f"no reply within {seconds:g} s; raise teacher.timeout_seconds") from None
        if not any(message.values()) and reason in (None, "stop"):
            raise ConnectionError("the stream is empty: the endpoint may not support streaming")
        return read({"choices": [{"finish_reason": reason, "message": message}], "usage": usage})

    def charge(
        self, completion: Completion, limits: tuple[int, int]
    ) -> tuple[tuple[int | None, int | None], float | None]:
        """(token counts, US dollars): by the user's price, else as LiteLLM computes it (it knows about cached tokens).

        Without valid counts it costs what was reserved for it, by `limits`.
        """
        (prompt, written), price = completion.tokens, self.price
        if not prompt or not written:
            return (None, None), None if price is None else price.cost_usd(*limits)
        cost_usd = None if price is None else price.cost_usd(prompt, written)
        if cost_usd and self.settings.price is None:
            with contextlib.suppress(Exception):  # LiteLLM raises any; the reply is paid for
                used = {name: completion.body.get(name) for name in ("usage", "service_tier")}
                reply = self.litellm.ModelResponse(**used)
                cost_usd = self.litellm.completion_cost(reply, model=self.settings.model) or cost_usd
        return (prompt, written), cost_usd

    async def close(self) -> None:
        """Close the connections."""
        while self.direct is not None and self.direct.idle:
            await self.direct.idle.pop().close()
        await self.litellm.close_litellm_async_clients()


def import_litellm() -> ModuleType:
    """Import LiteLLM (takes seconds): silent, without network access and without .env files."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    os.environ["LITELLM_MODE"] = "PRODUCTION"
    import litellm

    # a call that is cancelled right after its start leaves a coroutine that was never awaited; Python would warn
    warnings.filterwarnings("ignore", r"coroutine '.*completion' was never awaited", RuntimeWarning)
    litellm.suppress_debug_info = True
    gc.freeze()  # its objects stay, so garbage collection during a call need not walk them
    litellm.telemetry = False
    logging.getLogger("LiteLLM").setLevel(logging.CRITICAL)
    return litellm


def connect(settings: config.Teacher, prepare: Callable[[], None] | None = None) -> Provider:
    """Import LiteLLM and resolve the model; `prepare` is called between the two. UsageError if it cannot be called."""
    if not settings.model:
        hint = "add a LiteLLM model, for example --set teacher.model=openai/gpt-5.4-mini, or set it in sclite.toml"
        raise UsageError("teacher.model is not set", hint)
    try:
        parts = urlsplit(settings.api_base)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # an invalid port
        valid = False
    if settings.api_base and not valid:
        address = config.without_password(settings.api_base)
        why = f"the api_base {address} of {settings.model} is not a valid URL"
        raise UsageError(why, "write http://HOST:PORT/v1")
    # each call in flight needs an open file
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft_limit < 2 * settings.concurrency:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    litellm = import_litellm()
    if prepare is not None:
        prepare()
    try:
        resolved = litellm.get_llm_provider(settings.model, api_base=settings.api_base or None)
    except litellm.exceptions.BadRequestError:
        message = f"teacher.model {settings.model}: LiteLLM knows no provider of that name"
        hint = "write PROVIDER/NAME: anthropic/NAME, ollama_chat/NAME, or openai/NAME for an OpenAI-compatible endpoint"
        raise UsageError(message, hint) from None
    model, provider, key, _ = resolved
    missing = litellm.validate_environment(settings.model)["missing_keys"]
    # LiteLLM lists Azure's key even if only its version is missing
    missing = [each for each in missing if each.endswith("_API_KEY") and not os.environ.get(each)]
    key_variable = missing[0] if missing else f"{provider.removesuffix('_chat').upper()}_API_KEY"
    if not re.fullmatch("[!-~]*", os.environ.get(key_variable, "")):
        message = f"the key in {key_variable} contains a space, a line break or a non-ASCII character"
        raise UsageError(message, f"copy the whole key and run: export {key_variable}=...")
    listed = litellm.model_cost.get(settings.model) or {}
    listed = listed or litellm.model_cost.get(settings.model.partition("/")[2]) or {}
    price: Price | None = None
    if settings.price is not None:
        price = Price(*(dollars / 1e6 for dollars in settings.price))
    elif config.is_loopback(settings.api_base) or (provider in _LOCAL_PROVIDERS and not settings.api_base):
        price = Price(0.0, 0.0)
    elif listed.get("input_cost_per_token") is not None:
        # an upper bound: endpoints may serve another tier than requested
        tier = settings.extra.get("service_tier")
        names = [(f"{side}_cost_per_token", f"{side}_cost_per_token_{tier}") for side in ("input", "output")]
        price = Price(*(max(listed.get(name) or 0.0 for name in pair) for pair in names))
    if price is None and settings.max_cost is not None:
        raise UsageError(
            f"a spending limit is set, but the price of {settings.model} is unknown",
            "add --set 'teacher.price=[0.5, 1.5]', US dollars per million prompt and completion tokens (attempts.price for "
            "a student behind an endpoint)",
        )
    options = request_options(litellm, settings, provider, bool(missing))
    key = options.get("api_key") or key or os.environ.get("OPENAI_API_KEY")
    direct = find_client(litellm, settings, provider, model, key) if key and settings.direct else None
    most = listed.get("max_output_tokens") or math.inf
    return Provider(litellm, settings, options, key_variable, price, most, direct)


def request_options(
    litellm: ModuleType, settings: config.Teacher, provider: str, key_missing: bool
) -> dict[str, Any]:
    """What LiteLLM gets with every call, in addition to the messages and the parameters that decide the reply."""
    options: dict[str, Any] = {"model": settings.model, "max_retries": 0, "num_retries": 0}
    options["timeout"] = 3 * settings.timeout_seconds  # longer than ours
    if settings.api_base:
        options["api_base"] = settings.api_base
        if key_missing:  # a self-hosted endpoint often needs none, but LiteLLM insists
            options["api_key"] = "none"
    # a student has no repairs, and its own context
    long = settings.repairs and settings.max_tokens > _SHORT_REPLY
    if provider.startswith("ollama") and long and "num_ctx" not in settings.extra:
        options["num_ctx"] = _LONGEST_PROMPT + 2 * settings.max_tokens
    known = litellm.get_supported_openai_params(settings.model, provider) or ()
    new = [parameter for parameter in settings.extra if parameter not in known]
    if new and "allowed_openai_params" not in new:
        options["allowed_openai_params"] = new  # LiteLLM rejects those that it does not know for this model
    return options


def find_client(
    litellm: ModuleType, settings: config.Teacher, provider: str, model: str, key: str
) -> OpenAIClient | None:
    """A client that bypasses LiteLLM; None for models, addresses and extra parameters that only LiteLLM knows."""
    only_litellm = set(settings.extra) & set(litellm.types.utils.all_litellm_params)
    if provider not in ("openai", "hosted_vllm") or not settings.api_base or only_litellm:
        return None
    rules = litellm.utils.ProviderConfigManager.get_provider_chat_config(
        model, litellm.LlmProviders(provider)
    )
    if type(rules).__name__ not in _PLAIN:
        return None
    certificates = litellm.llms.custom_httpx.http_handler.get_ssl_configuration()
    return OpenAIClient(model, settings.api_base, key, certificates)
