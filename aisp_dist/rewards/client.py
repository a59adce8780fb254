"""Requests to a model behind HTTP: key, limits, retries. Owns which failures are the server's and which are about one
request; knows neither rewards nor what compares answers."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

import httpx
from tenacity import (
    AsyncRetrying,
    BaseRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from aisp_dist.config import ConfigError
from aisp_dist.config.rewards import Endpoint, Server

_BACKOFF = wait_random_exponential(multiplier=0.5, max=30)
_OVER = "the time for the answers of one round is over, and it has not been asked for all"
_ABOUT_THE_REQUEST = (400, 413, 422)  # too long, refused by a filter, malformed
Item = TypeVar("Item")
Result = TypeVar("Result")


class Unavailable(RuntimeError):
    """The server gave no answer: a fault of the infrastructure, unless it answers others. why: the message without the
    address."""

    def __init__(self, message: str, why: str = "") -> None:
        super().__init__(message)
        self.why = why or message


class Limited(Unavailable):
    """The server answers that it is asked too often, which is never about a text."""


class Rejected(Unavailable):
    """The server answers that the key, the model or the address is wrong; or something on the way to it refuses a
    text."""


class _Again(Unavailable):
    def __init__(self, reason: str, after: float | None = None, limited: bool = False) -> None:
        super().__init__(reason)
        self.after = after  # seconds that the server asked for
        self.limited = limited


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a request has no usable answer."""

    reason: str


class _Connection:
    """What clients of a server share: key, proxy, turns, and what an answer means. Raises ConfigError where the
    variable with the API key is not set."""

    def __init__(self, key: str, settings: Server) -> None:
        self.settings = settings
        headers = {}
        if settings.api_key_env:
            if not (secret := os.environ.get(settings.api_key_env)):
                raise ConfigError(
                    f"{key}.api_key_env: {settings.api_key_env} is not set where this runs; export it there"
                )
            if not secret.isascii() or not secret.isprintable():
                raise ConfigError(
                    f"{key}.api_key_env: what {settings.api_key_env} holds is no API key; set it to the key"
                )
            headers["Authorization"] = f"Bearer {secret}"
        # No proxy of the environment reaches a server on this machine.
        far = not is_loopback(settings.url)
        limits = httpx.Limits(max_connections=settings.max_parallel)
        self._options: dict[str, Any] = {"headers": headers, "timeout": settings.timeout, "limits": limits}
        self._options["trust_env"] = far
        self._proxy = _proxy_variable(settings.url) if far else None
        self._turn = threading.Lock()
        self._next = 0.0

    def _retrying(self, deadline: float) -> dict[str, Any]:
        """How a request is repeated, for tenacity."""
        return {
            "stop": stop_after_attempt(self.settings.retries + 1) | stop_before_delay(deadline - time.monotonic()),
            "wait": _wait,
            "retry": retry_if_exception_type(_Again),
            "reraise": True,
        }

    def _until_turn(self, deadline: float = math.inf) -> float:
        """Seconds until a request may go out, by requests_per_minute. Raises _Again where that is not before the
        deadline; then no turn is used up, which a later request would wait for."""
        if self.settings.requests_per_minute is None:
            return 0.0
        with self._turn:
            at = max(self._next, time.monotonic())
            if at >= deadline:
                raise _Again(_OVER)
            self._next = at + 60 / self.settings.requests_per_minute
        return max(0.0, at - time.monotonic())

    def _left(self, deadline: float) -> float:
        left = min(self.settings.timeout, deadline - time.monotonic())
        if left <= 0:
            raise _Again(_OVER)
        return left

    def _lost(self, error: httpx.TransportError) -> _Again:
        way = f" by way of the proxy in {self._proxy}; list the host in NO_PROXY to ask it directly"
        return _Again(f"no answer ({type(error).__name__}){way if self._proxy else ''}")

    @staticmethod
    def _passes(answer: httpx.Response) -> httpx.Response:
        if answer.status_code == 429 or answer.status_code >= 500:
            after = _retry_after(answer.headers.get("Retry-After"))
            raise _Again(f"it answers {answer.status_code}", after, limited=answer.status_code == 429)
        return answer

    @staticmethod
    def _read(url: str, answer: httpx.Response) -> Any:
        """The JSON of an answer, or Refused where it is about this request. Raises Rejected."""
        if answer.status_code in _ABOUT_THE_REQUEST:
            return Refused(f"the server answers {answer.status_code}: {' '.join(answer.text.split())[:300]}")
        if not answer.is_success:
            why = f"it answers {answer.status_code} {answer.reason_phrase}"
            raise Rejected(f"{url}: {why}; look at url, model and key", why)
        try:
            return answer.json()
        except ValueError:
            return Refused("the answer is no JSON")


class Client(_Connection):
    """A server, for any number of threads."""

    def __init__(self, key: str, settings: Server) -> None:
        super().__init__(key, settings)
        self._http = httpx.Client(**self._options)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results in the order of the items, `max_parallel` at a time. Raises what the first of them raises."""
        with ThreadPoolExecutor(self.settings.max_parallel) as threads:
            return list(threads.map(function, items))

    def post(self, url: str, body: dict[str, Any], deadline: float = math.inf) -> Any:
        """The JSON of an answer, or Refused where it is about this request. deadline: of time.monotonic. Raises
        Unavailable: no connection or 5xx after all retries, or no answer before the deadline; Limited: 429 after all
        retries; Rejected."""
        retrying = Retrying(**self._retrying(deadline))
        try:
            answer: httpx.Response = retrying(self._once, url, body, deadline)
        except _Again as error:
            raise _unavailable(url, error, retrying) from None
        return self._read(url, answer)

    def chat(self, messages: list[dict[str, str]], deadline: float = math.inf) -> str | Refused:
        """What the model says to these messages, greedily. Raises as `post`."""
        answer = self.post(*self.chat_request(messages), deadline)
        return answer if isinstance(answer, Refused) else said(answer)

    def chat_request(self, messages: list[dict[str, str]]) -> tuple[str, dict[str, Any]]:
        """Address and body of OpenAI's chat completions."""
        assert isinstance(self.settings, Endpoint)
        body = {"model": self.settings.model, "messages": messages, "max_tokens": self.settings.max_tokens}
        return f"{self.settings.url}/chat/completions", body | {"temperature": 0} | self.settings.body

    def _once(self, url: str, body: dict[str, Any], deadline: float) -> httpx.Response:
        time.sleep(self._until_turn(deadline))
        try:
            answer = self._http.post(url, json=body, timeout=self._left(deadline))
        except httpx.TransportError as error:
            raise self._lost(error) from None
        return self._passes(answer)


class AsyncClient(_Connection):
    """A server, for one event loop. A call that is cancelled closes its connection, so that the server can stop."""

    def __init__(self, key: str, settings: Server) -> None:
        super().__init__(key, settings)
        self._http = httpx.AsyncClient(**self._options | {"timeout": None})

    async def request(self, method: str, url: str, body: dict[str, Any] | None, seconds: float) -> Any:
        """As Client.post. seconds: for this request and its repetitions, from when its turn has come."""
        await asyncio.sleep(self._until_turn())
        deadline = time.monotonic() + seconds
        retrying = AsyncRetrying(**self._retrying(deadline))
        try:
            answer: httpx.Response = await retrying(self._once, method, url, body, deadline)
        except _Again as error:
            raise _unavailable(url, error, retrying) from None
        return self._read(url, answer)

    async def close(self) -> None:
        await self._http.aclose()

    async def _once(self, method: str, url: str, body: dict[str, Any] | None, deadline: float) -> httpx.Response:
        try:
            answer = await self._http.request(method, url, json=body, timeout=self._left(deadline))
        except httpx.TransportError as error:
            raise self._lost(error) from None
        return self._passes(answer)


def _unavailable(url: str, error: _Again, retrying: BaseRetrying) -> Unavailable:
    """Of a type that crosses processes."""
    times = retrying.statistics["attempt_number"]
    why = f"{error}, {times} time{'s' * (times > 1)}"
    return (Limited if error.limited else Unavailable)(f"{url}: {why}", why)


def is_loopback(url: str) -> bool:
    """Whether a URL's server is on this machine."""
    host = urlsplit(url if "//" in url else f"//{url}").hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _proxy_variable(url: str) -> str | None:
    """The environment variable whose proxy requests to `url` take."""
    address = urlsplit(url)
    if proxy_bypass(address.hostname or ""):
        return None
    names = [f"{scheme}_proxy" for scheme in (address.scheme, "all")]
    return next((name for plain in names for name in (plain, plain.upper()) if os.environ.get(name)), None)


def said(answer: Any) -> str | Refused:
    """The text of a chat completion."""
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    return text if isinstance(text, str) else Refused("the answer is no chat completion with a text")


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    after = error.after if isinstance(error, _Again) else None
    return _BACKOFF(state) if after is None else after


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3): a number or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
