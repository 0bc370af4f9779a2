"""Resolving a model through LiteLLM: its provider, options, key and price."""

import asyncio
import gc
import logging
import os
import re
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
from sclite.teacher.cost import FREE, Price
from sclite.teacher.http import allow_connections, bound_litellm, check_certificates
from sclite.teacher.openai_client import OpenAIClient, find_client
from sclite.teacher.reply import Completion, read

_LOCAL_PROVIDERS = ("ollama", "ollama_chat", "lm_studio", "llamafile")


@dataclass(frozen=True)
class Provider:
    """LiteLLM, the options of every call, the variable that holds the key, and the price (None: unknown).

    `direct` is a client that bypasses LiteLLM, if the model allows it.
    """

    litellm: ModuleType
    model: str
    options: dict[str, Any]
    key_variable: str
    price: Price | None
    priced_by_user: bool
    direct: OpenAIClient | None = None

    async def complete(
        self, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any], seconds: float
    ) -> Completion:
        """The reply to one request, sent once. Raises errors of LiteLLM, OpenAI and httpx, and OSError."""
        if self.direct is not None:
            return await self.direct.complete(messages, parameters, seconds)
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
        return read(response.model_dump(), response._hidden_params.get("response_cost"))

    async def close(self) -> None:
        """Close all connections."""
        if self.direct is not None:
            await self.direct.close()
        await self.litellm.close_litellm_async_clients()


def import_litellm() -> ModuleType:
    """Import LiteLLM (takes seconds): silent, without network access and without reading .env files."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    os.environ["LITELLM_MODE"] = "PRODUCTION"
    import litellm

    # a call that is cancelled right after its start leaves a coroutine that was never awaited; Python would warn
    warnings.filterwarnings("ignore", r"coroutine '.*completion' was never awaited", RuntimeWarning)
    litellm.suppress_debug_info = True
    gc.freeze()  # its objects stay, so garbage collection during a call need not walk them
    litellm.telemetry = False
    logging.getLogger("LiteLLM").setLevel(logging.CRITICAL)
    bound_litellm()
    return litellm


def connect(settings: config.Teacher, prepare: Callable[[], None] | None = None) -> Provider:
    """Import LiteLLM and resolve the model.

    Raises UsageError for a model without a provider, an invalid api_base, an invalid key, and a spending limit without a
    price.
    """
    if settings.api_base and not is_address(settings.api_base):
        shown = re.sub(r"^(\w+://)?.*@", r"\1", settings.api_base)  # without a password
        raise UsageError(
            f"the api_base {shown} of {settings.model} is not a valid URL", "write http://HOST:PORT/v1"
        )
    check_certificates()
    allow_connections(settings.concurrency)
    # strip keys: sourcing a file with Windows line ends leaves a carriage return in them
    for variable, value in os.environ.items():
        if variable.endswith("_API_KEY") and value != value.strip():
            os.environ[variable] = value.strip()
    litellm = import_litellm()
    if prepare is not None:
        prepare()
    try:
        name = litellm.get_llm_provider(settings.model, api_base=settings.api_base or None)[1]
    except litellm.exceptions.BadRequestError:
        raise UsageError(
            f"teacher.model {settings.model}: LiteLLM knows no provider of that name",
            "write PROVIDER/NAME: anthropic/NAME, ollama_chat/NAME, or openai/NAME for an OpenAI-compatible endpoint",
        ) from None
    missing = litellm.validate_environment(settings.model)["missing_keys"]
    missing = [variable for variable in missing if variable.endswith("_API_KEY")]
    options: dict[str, Any] = {}
    if settings.api_base:
        options["api_base"] = config.without_password(settings.api_base)
        if options["api_base"] != settings.api_base:  # aiohttp refuses a password beside the SDK's own header
            parts = urlsplit(settings.api_base)
            login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
            options["extra_headers"] = {"Authorization": f"Basic {b64encode(login.encode()).decode()}"}
        if missing:  # a self-hosted endpoint often needs none, but LiteLLM insists
            options["api_key"] = "none"
    known = litellm.get_supported_openai_params(settings.model, name) or ()
    if new := [parameter for parameter in settings.extra if parameter not in known]:
        options["allowed_openai_params"] = new  # LiteLLM refuses those that it does not know for this model
    price = _price(litellm, settings, name)
    if price is None and settings.max_cost is not None:
        raise UsageError(
            f"a spending limit is set, but the price of {settings.model} is unknown",
            "add --set 'teacher.price=[0.5, 1.5]', US dollars per million prompt and completion tokens (attempts.price for "
            "a student behind an endpoint)",
        )
    key_variable = missing[0] if missing else f"{name.upper()}_API_KEY"
    if not re.fullmatch("[!-~]*", os.environ.get(key_variable, "")):
        raise UsageError(
            f"the key in {key_variable} contains a space, a line break or a non-ASCII character",
            f"copy the whole key and run: export {key_variable}=..",
        )
    direct, priced_by_user = None, settings.price is not None
    if settings.direct:
        listed = not priced_by_user and price != FREE
        direct = find_client(
            litellm, settings.model, settings.api_base, options.get("api_key"), listed, settings.extra
        )
    return Provider(litellm, settings.model, options, key_variable, price, priced_by_user, direct)


def _price(litellm: ModuleType, settings: config.Teacher, provider: str) -> Price | None:
    """The user's price, zero for a local server, else LiteLLM's price list; None if the model is not listed."""
    if settings.price is not None:
        return Price(*(dollars / 1e6 for dollars in settings.price))
    if is_local(settings.api_base) or (provider in _LOCAL_PROVIDERS and not settings.api_base):
        return FREE
    listed = litellm.model_cost.get(settings.model) or litellm.model_cost.get(
        settings.model.partition("/")[2]
    )
    if not listed or listed.get("input_cost_per_token") is None:
        return None
    tier = settings.extra.get("service_tier")
    prices = (
        [listed.get(name) or 0.0 for name in (f"{side}_cost_per_token", f"{side}_cost_per_token_{tier}")]
        for side in ("input", "output")
    )
    return Price(*map(max, prices))  # a bound: endpoints may serve another tier than was requested


def is_address(api_base: str) -> bool:
    """Whether this is a URL with http or https, a host and a valid port."""
    try:
        parts = urlsplit(api_base)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port
        return False


def is_local(api_base: str) -> bool:
    """Whether an address is on this machine."""
    host = urlsplit(api_base).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
