"""The one way to call a service: typed body in, typed answer or the service's own error out."""

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
_KEPT_S = 60.0  # an idle connection; the services keep theirs for 75 s
Answer = TypeVar("Answer", bound=Wire)


ROLLOUT_PORT, TRAINER_PORT = 8000, 8080  # of services, unless their settings or URLs name others


def service_url(text: str, *, port: int) -> str:
    """The URL of `http://host:port`, `host:port` or `host`, whose port is `port`.

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
    """Takes turns between small pools of connections, straight to the service, without a proxy.

    For every request httpx's pool compares all of its connections with all others: with 256 of
    them the client is busy for 14 ms per request.
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
    """An HTTP client of one service at `url`. Use as an async context manager, or `aclose()` it.

    Every call has a deadline. A service that cannot be reached raises Unavailable, one that does
    not answer in time DeadlineExceeded, and an error answer the class that the service named; any
    other answer is a plain ServiceError.
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
                f"{method} {self.url}{path} answered something else than a {answer.__name__}: is "
                "this the right service, of the same version?"
            ) from error


def raise_problem(response: httpx.Response) -> None:
    """Raise the error that an error response describes."""
    try:
        problem = response.json()
    except ValueError:  # not ours: something between us and the service
        if response.status_code in (502, 503, 504):
            raise Unavailable(f"{response.url} answered {response.status_code}") from None
        problem = {"detail": response.text[:500]}
    raise from_problem(problem if isinstance(problem, dict) else {}, response.status_code)
