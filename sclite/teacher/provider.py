"""Resolves a model through LiteLLM: its provider, options, key and price."""

import asyncio
import gc
import logging
import math
import os
import re
import resource
import ssl
import warnings
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

from sclite import config
from sclite.errors import UsageError
from sclite.teacher.limits import FREE, Price
from sclite.teacher.openai_client import OpenAIClient, bound_client, find_client
from sclite.teacher.reply import Completion, UnreadableReply, read

_LOCAL_PROVIDERS = ("ollama", "ollama_chat", "lm_studio", "llamafile")
_BYTES_PER_TOKEN = 4  # of English text; bounds the charge for a reply that is longer than max_tokens
_LONGEST_TOKEN_BYTES = 128  # no vocabulary in use has a longer one
_OTHER_FILES = 128  # open files other than connections
# tokens; Ollama's context is 4,096 on most machines, and it silently drops the beginning of longer texts
_SHORT_REPLY, _LONGEST_PROMPT = 2048, 4096


@dataclass(frozen=True)
class Provider:
    """LiteLLM and one of its models."""

    litellm: ModuleType
    model: str
    options: dict[str, Any]  # passed with every call
    key_variable: str  # holds the key
    price: Price | None  # None: unknown
    priced_by_user: bool
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
        if self.direct is not None and on_text is None:
            return await self.direct.complete(messages, parameters, seconds)
        if on_text is not None:
            parameters = {**parameters, "stream": True, "stream_options": {"include_usage": True}}
        # LiteLLM's own timeout is for each read: a slow trickle of bytes never reaches it
        async with asyncio.timeout(seconds + 1):
            response = await self.litellm.acompletion(
                model=self.model,
                messages=[dict(message) for message in messages],
                timeout=seconds,
                max_retries=0,
                num_retries=0,
                **parameters,
                **self.options,
            )
            if on_text is None:
                return read(response.model_dump(), response._hidden_params.get("response_cost"))
            message = {"content": "", "reasoning_content": ""}
            reason, usage = None, None
            async for chunk in response:
                found = chunk.model_dump()
                usage = found.get("usage") or usage
                for choice in found["choices"]:
                    reason = choice.get("finish_reason") or reason
                    for name in message:
                        if text := (choice.get("delta") or {}).get(name):
                            message[name] += text
                            if name == "content":
                                on_text(text)
        if not any(message.values()) and reason in (None, "stop"):
            raise UnreadableReply("the stream is empty: the endpoint may not support streaming")
        return read({"choices": [{"index": 0, "finish_reason": reason, "message": message}], "usage": usage})

    def charge(
        self, completion: Completion, limits: tuple[int, int]
    ) -> tuple[tuple[int | None, int | None], float | None]:
        """(token counts, US dollars): by the user's price, else as LiteLLM computes it (it knows about cached tokens).

        Counts that exceed `limits` or do not fit the length of the reply are None; it then costs what was reserved for it,
        or as many tokens as its length suggests if it is clearly longer than max_tokens.
        """
        (prompt, written), size, price = completion.tokens, completion.reply_bytes, self.price
        least = -(-size // _LONGEST_TOKEN_BYTES)
        if prompt and written is not None and prompt <= limits[0] and least <= written <= limits[1]:
            cost_usd = None if price is None else price.cost_usd(prompt, written)
            if cost_usd and not self.priced_by_user and 0 < (completion.listed_usd or 0) < math.inf:
                cost_usd = completion.listed_usd
            return (prompt, written), cost_usd
        estimate = max(limits[1], size // _BYTES_PER_TOKEN, min(written or 0, size))
        return (None, None), None if price is None else price.cost_usd(limits[0], estimate)

    async def close(self) -> None:
        if self.direct is not None:
            await self.direct.close()
        await self.litellm.close_litellm_async_clients()


def import_litellm() -> ModuleType:
    """Import LiteLLM (takes seconds): silent, without network access, without .env files, its clients bounded like ours."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    os.environ["LITELLM_MODE"] = "PRODUCTION"
    import litellm
    from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler
    from litellm.llms.openai.common_utils import BaseOpenAILLM

    # a call that is cancelled right after its start leaves a coroutine that was never awaited; Python would warn
    warnings.filterwarnings("ignore", r"coroutine '.*completion' was never awaited", RuntimeWarning)
    litellm.suppress_debug_info = True
    gc.freeze()  # its objects stay, so garbage collection during a call need not walk them
    litellm.telemetry = False
    logging.getLogger("LiteLLM").setLevel(logging.CRITICAL)
    for owner, name in ((AsyncHTTPHandler, "create_client"), (BaseOpenAILLM, "_get_async_http_client")):
        original = getattr(owner, name)
        if hasattr(original, "bounds"):  # by an earlier call
            continue

        def create(*arguments: Any, original: Any = original, **named: Any) -> Any:
            client = original(*arguments, **named)
            return client and bound_client(client)

        create.bounds = True  # type: ignore[attr-defined]
        static = isinstance(owner.__dict__[name], staticmethod)
        setattr(owner, name, staticmethod(create) if static else create)
    return litellm


def prepare_process(connections: int) -> None:
    """Check the certificates, raise the limit on open files, and strip keys. Raises UsageError."""
    if path := os.environ.get("SSL_CERT_FILE"):
        try:
            ssl.create_default_context(cafile=path)
        except OSError as error:  # an SSLError too
            why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            hint = "fix the path, or unset SSL_CERT_FILE to use the system's certificates"
            raise UsageError(f"SSL_CERT_FILE={path} {why}", hint) from None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UsageError(
                f"teacher.concurrency = {connections} needs {needed} open files, and this system allows {hard}",
                f"lower it with --set teacher.concurrency={max(1, hard - _OTHER_FILES)}, or raise the limit (ulimit -Hn)",
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    # sourcing a file with Windows line ends leaves a carriage return in keys
    for variable, value in os.environ.items():
        if variable.endswith("_API_KEY") and value != value.strip():
            os.environ[variable] = value.strip()


def connect(settings: config.Teacher, prepare: Callable[[], None] | None = None) -> Provider:
    """Import LiteLLM and resolve the model; `prepare` is called between the two. UsageError if it cannot be called."""
    if not settings.model:
        hint = "add a LiteLLM model, for example --set teacher.model=openai/gpt-5.4-mini, or set it in sclite.toml"
        raise UsageError("teacher.model is not set", hint)
    address = config.without_password(settings.api_base)
    try:
        parts = urlsplit(settings.api_base)
        http = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.fragment
        valid = http or not settings.api_base
    except ValueError:  # an invalid port
        valid = False
    if not valid:
        why = f"the api_base {address} of {settings.model} is not a valid URL"
        raise UsageError(why, "write http://HOST:PORT/v1; in a password, escape special characters: # is %23")
    prepare_process(settings.concurrency)
    litellm = import_litellm()
    if prepare is not None:
        prepare()
    try:
        name = litellm.get_llm_provider(settings.model, api_base=settings.api_base or None)[1]
    except litellm.exceptions.BadRequestError:
        message = f"teacher.model {settings.model}: LiteLLM knows no provider of that name"
        hint = "write PROVIDER/NAME: anthropic/NAME, ollama_chat/NAME, or openai/NAME for an OpenAI-compatible endpoint"
        raise UsageError(message, hint) from None
    missing = litellm.validate_environment(settings.model)["missing_keys"]
    # LiteLLM lists Azure's key even if only its version is missing
    missing = [each for each in missing if each.endswith("_API_KEY") and not os.environ.get(each)]
    options: dict[str, Any] = {"api_base": address} if address else {}
    if address != settings.api_base:  # aiohttp rejects a password in addition to the SDK's own header
        login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        options["extra_headers"] = {"Authorization": f"Basic {b64encode(login.encode()).decode()}"}
    if address and missing:  # a self-hosted endpoint often needs none, but LiteLLM insists
        options["api_key"] = "none"
    long = (
        settings.repairs and settings.max_tokens > _SHORT_REPLY
    )  # a student has no repairs, and its own context
    if name.startswith("ollama") and long and "num_ctx" not in settings.extra:
        options["num_ctx"] = _LONGEST_PROMPT + 2 * settings.max_tokens
    if name == "lm_studio" and not (
        address or os.environ.get("LM_STUDIO_API_BASE")
    ):  # LiteLLM would call OpenAI
        raise UsageError(
            f"{settings.model} needs an address", "set teacher.api_base=http://localhost:1234/v1"
        )
    known = litellm.get_supported_openai_params(settings.model, name) or ()
    new = [parameter for parameter in settings.extra if parameter not in known]
    if new and "allowed_openai_params" not in new:
        options["allowed_openai_params"] = new  # LiteLLM rejects those that it does not know for this model
    key_variable = missing[0] if missing else f"{name.removesuffix('_chat').upper()}_API_KEY"
    if not re.fullmatch("[!-~]*", os.environ.get(key_variable, "")):
        message = f"the key in {key_variable} contains a space, a line break or a non-ASCII character"
        hint = f"copy the whole key and run: export {key_variable}=..."
        raise UsageError(message, hint)
    prices = litellm.model_cost
    listed = prices.get(settings.model) or prices.get(settings.model.partition("/")[2]) or {}
    price = find_price(settings, name, listed)
    if price is None and settings.max_cost is not None:
        raise UsageError(
            f"a spending limit is set, but the price of {settings.model} is unknown",
            "add --set 'teacher.price=[0.5, 1.5]', US dollars per million prompt and completion tokens (attempts.price for "
            "a student behind an endpoint)",
        )
    direct, by_user = None, settings.price is not None
    if settings.direct:
        by_list = not by_user and price != FREE
        direct = find_client(litellm, settings, options.get("api_key"), by_list)
    most = listed.get("max_output_tokens") or math.inf
    return Provider(litellm, settings.model, options, key_variable, price, by_user, most, direct)


def find_price(settings: config.Teacher, provider: str, listed: Mapping[str, Any]) -> Price | None:
    """The user's price, zero for a local server, else that of LiteLLM's price list; None if the model is not listed."""
    if settings.price is not None:
        return Price(*(dollars / 1e6 for dollars in settings.price))
    host = urlsplit(settings.api_base).hostname or ""
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost" or host.endswith(".localhost")
    if local or (provider in _LOCAL_PROVIDERS and not settings.api_base):
        return FREE
    if listed.get("input_cost_per_token") is None:
        return None
    tier = settings.extra.get("service_tier")
    prices = (
        [listed.get(name) or 0.0 for name in (f"{side}_cost_per_token", f"{side}_cost_per_token_{tier}")]
        for side in ("input", "output")
    )
    return Price(*map(max, prices))  # an upper bound: endpoints may serve another tier than requested
