"""The one way to call a service: a typed body in, a typed answer or the service's error out."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterable, Mapping
from typing import Any, Self, TypeVar

import httpx
from pydantic import ValidationError

from shared.auth import authorization
from shared.errors import DeadlineExceeded, ServiceError, Unavailable, from_problem
from shared.schemas import Wire

_NUM_POOLS = 32
_KEPT_S = 60.0  # Lifetime of an idle connection, below the 75 s after which a service closes it.
Answer = TypeVar("Answer", bound=Wire)


ROLLOUT_PORT, TRAINER_PORT = 8000, 8080  # Default ports of the services.


def service_url(text: str, *, port: int) -> str:
    """The URL for `http://host:port`, `host:port` or `host`; the last one gets `port`.

    Raises ValueError for anything else.
    """
    url = text if "://" in text else f"http://{text}"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{text!r} is not a URL: {error}") from error
    has_more = parsed.path != "/" or " " in text
    if parsed.scheme not in ("http", "https") or not parsed.host or has_more:
        raise ValueError(f"{text!r} is not a URL: write http://host:port, or host:port")
    if url != text and parsed.port is None:
        return f"{url}:{port}"
    return url


class _Pools(httpx.AsyncBaseTransport):
    """Rotates requests among small connection pools; never uses a proxy.

    For every request httpx compares all connections of a pool with each other: with 256 of them in
    one pool that takes 14 ms per request.
    """

    def __init__(self) -> None:
        context = httpx.create_ssl_context(trust_env=False)
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEPT_S
        )
        self._pools = [
            httpx.AsyncHTTPTransport(verify=context, limits=limits, trust_env=False)
            for _ in range(_NUM_POOLS)
        ]
        self._turns = itertools.cycle(self._pools)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await next(self._turns).handle_async_request(request)

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()


class ServiceClient:
    """HTTP client of the service at `url`. Use it as an async context manager, or `aclose()` it.

    Every call has a deadline. A call raises Unavailable if it cannot reach the service,
    DeadlineExceeded if the answer is late, the class that an error answer names, and a plain
    ServiceError for any other unexpected answer.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=authorization(api_key),
            timeout=httpx.Timeout(None, connect=5.0),
            transport=transport or _Pools(),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: Wire | None = None,
        content: bytes | AsyncIterable[bytes] | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        deadline_s = timeout_s or self.timeout_s
        sent = dict(headers or {})
        if body is not None:
            content = body.model_dump_json().encode()
            sent["Content-Type"] = "application/json"
        try:
            async with asyncio.timeout(deadline_s):
                response = await self._http.request(
                    method, path, content=content, params=params, headers=sent
                )
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{method} {self.url}{path} gave no answer within {deadline_s:g} s"
            ) from error
        except httpx.RequestError as error:
            raise Unavailable(
                f"{method} {self.url}{path} failed: {type(error).__name__} {error}".rstrip()
            ) from error
        if response.is_error:
            raise_problem(response)
        return response.content

    async def _call(self, answer: type[Answer], method: str, path: str, **options: Any) -> Answer:
        content = await self._request(method, path, **options)
        try:
            return answer.model_validate_json(content)
        except ValidationError as error:
            raise ServiceError(
                f"{method} {self.url}{path} did not answer with a {answer.__name__}: check that "
                "this is the right service, and of the same version"
            ) from error


def raise_problem(response: httpx.Response) -> None:
    """Raise the error that an error response describes."""
    try:
        problem = response.json()
    except ValueError:  # Something between the client and the service answered.
        if response.status_code in (502, 503, 504):
            raise Unavailable(f"{response.url} answered {response.status_code}") from None
        problem = {"detail": response.text[:500]}
    raise from_problem(problem if isinstance(problem, dict) else {}, response.status_code)
