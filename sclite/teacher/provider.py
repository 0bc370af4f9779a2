"""Finding a model through LiteLLM: its provider, options, key, and price."""

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
from sclite.teacher.openai_client import Direct, find
from sclite.teacher.reply import Completion, read

_LOCAL_PROVIDERS = ("ollama", "ollama_chat", "lm_studio", "llamafile")


@dataclass(frozen=True)
class Provider:
    """LiteLLM, what to pass with every call, the variable that holds the key, and the price (None: unknown).

    `direct` is the way past LiteLLM, None where there is none.
    """

    litellm: ModuleType
    model: str
    options: dict[str, Any]
    key_variable: str
    price: Price | None
    priced_by_user: bool
    direct: Direct | None = None

    async def ask(
        self, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any], seconds: float
    ) -> Completion:
        """The reply to one request, sent once. Raises faults of LiteLLM, OpenAI, httpx, and OSError."""
        if self.direct is not None:
            return await self.direct.ask(messages, parameters, seconds)
        async with asyncio.timeout(
            seconds + 1
        ):  # LiteLLM's own limit is for silence; a trickle never reaches it
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
    """LiteLLM, imported when it is first needed (seconds), silent and without a look at the net or at .env files."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    os.environ["LITELLM_MODE"] = "PRODUCTION"
    import litellm

    # a call that is cancelled in its first moments leaves a coroutine behind, which Python reports on the terminal
    warnings.filterwarnings("ignore", r"coroutine '.*completion' was never awaited", RuntimeWarning)
    litellm.suppress_debug_info = True
    gc.freeze()  # its objects stay: a collection need not walk them in the middle of a call
    litellm.telemetry = False
    logging.getLogger("LiteLLM").setLevel(logging.CRITICAL)
    bound_litellm()
    return litellm


def connect(settings: config.Teacher, prepare: Callable[[], None] | None = None) -> Provider:
    """Import LiteLLM and find out what it needs for the model.

    Raises UsageFault for a model without a provider, an api_base that is no address, and a spending limit without a price.
    """
    if settings.api_base and not is_address(settings.api_base):
        shown = re.sub(r"^(\w+://)?.*@", r"\1", settings.api_base)  # without a password
        raise UsageError(
            f"the api_base {shown} of {settings.model} is no address", "write http://HOST:PORT/v1"
        )
    check_certificates()
    allow_connections(settings.concurrency)
    _tidy_keys()
    litellm = import_litellm()
    if prepare is not None:
        prepare()
    try:
        name = litellm.get_llm_provider(settings.model, api_base=settings.api_base or None)[1]
    except litellm.exceptions.BadRequestError:
        raise UsageError(
            f"teacher.model {settings.model} names no provider that LiteLLM knows",
            "write PROVIDER/NAME: anthropic/NAME, ollama_chat/NAME, openai/NAME for any OpenAI-compatible endpoint",
        ) from None
    missing = litellm.validate_environment(settings.model)["missing_keys"]
    missing = [variable for variable in missing if variable.endswith("_API_KEY")]
    options: dict[str, Any] = {}
    if settings.api_base:
        options["api_base"] = config.without_password(settings.api_base)
        if options["api_base"] != settings.api_base:  # aiohttp refuses a password beside the SDK's own header
            options["extra_headers"] = {"Authorization": _basic(settings.api_base)}
        if missing:  # an endpoint of one's own often wants none, but LiteLLM insists
            options["api_key"] = "none"
    price = _price(litellm, settings, name)
    if price is None and settings.max_cost is not None:
        raise UsageError(
            f"a spending limit is set, but nobody knows what {settings.model} costs",
            "add --set 'teacher.price=[0.5, 1.5]', US dollars per million tokens sent and written (attempts.price for a "
            "student behind an endpoint)",
        )
    key_variable = missing[0] if missing else f"{name.upper()}_API_KEY"
    _check_key(key_variable)
    way = None
    if settings.direct:
        listed = settings.price is None and price != FREE
        key = options.get("api_key")
        way = find(litellm, settings.model, settings.api_base, key, listed)
    priced_by_user = settings.price is not None
    return Provider(litellm, settings.model, options, key_variable, price, priced_by_user, way)


def _price(litellm: ModuleType, settings: config.Teacher, provider: str) -> Price | None:
    """What the user says, nothing for a machine of one's own, else LiteLLM's list; None where that has no such model."""
    if settings.price is not None:
        return Price(*(dollars / 1e6 for dollars in settings.price))
    if is_local(settings.api_base) or (provider in _LOCAL_PROVIDERS and not settings.api_base):
        return FREE
    listed = litellm.model_cost.get(settings.model) or litellm.model_cost.get(
        settings.model.partition("/")[2]
    )
    if not listed or listed.get("input_cost_per_token") is None:
        return None
    return Price(listed["input_cost_per_token"], listed.get("output_cost_per_token") or 0.0)


def _basic(address: str) -> str:
    """The header for the name and password in an address."""
    parts = urlsplit(address)
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return f"Basic {b64encode(pair.encode()).decode()}"


def _tidy_keys() -> None:
    """Take blanks and line ends off the keys in the environment, as a file with Windows line ends leaves them there."""
    for name, value in os.environ.items():
        if name.endswith("_API_KEY") and value != value.strip():
            os.environ[name] = value.strip()


def _check_key(variable: str) -> None:
    """Raises UsageFault for a key that no HTTP header can hold."""
    if not re.fullmatch("[!-~]*", os.environ.get(variable, "")):
        raise UsageError(
            f"the key in {variable} holds a space, a line break or a character that is not ASCII",
            f"export {variable}=.. again, copied whole",
        )


def is_address(api_base: str) -> bool:
    """Whether a request can be sent there: http or https, a host, a port that there is."""
    try:
        parts = urlsplit(api_base)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535, or that is no number
        return False


def is_local(api_base: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(api_base).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
