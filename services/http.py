"""What both services do to a request: check who asks, bound the body, answer errors as problems."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.auth import check_authorization, is_loopback
from shared.errors import (
    MEDIA_TYPE,
    BodyTooLarge,
    ClientClosed,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
    ServiceError,
)

log = logging.getLogger(__name__)
Result = TypeVar("Result")
# What OpenAPI says of errors: one answer for all, whose `type` names the class.
PROBLEMS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "A problem of RFC 9457, whose type is an error of shared/errors.py",
        "content": {MEDIA_TYPE: {"schema": {"type": "object"}}},
    }
}


def raw_body(media_type: str) -> dict[str, Any]:
    """What OpenAPI says of a route that reads its body itself."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": {}}}}}


def prepare_app(
    app: FastAPI,
    *,
    api_key: str | None,
    max_body_bytes: int,
    body_timeout_s: float,
    streamed: frozenset[str] = frozenset(),
    open_paths: frozenset[str] = frozenset(),
    on_error: Callable[[ServiceError], None] = lambda _: None,
    answer_errors: Mapping[str, Callable[[ServiceError], Response]] = {},
) -> None:
    """Install the gate and the error handlers. `streamed` paths read and bound their own body;
    `open_paths`, beside /healthz, need no key.

    `answer_errors` maps the beginnings of paths to what answers their errors in place of problems.
    """

    def error_response(path: str, error: ServiceError) -> Response:
        on_error(error)
        answers = (to for prefix, to in answer_errors.items() if path.startswith(prefix))
        return next(answers, problem_response)(error)

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(request.url.path, as_service_error(request, error))

    for kind in (ServiceError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
    app.add_middleware(
        _Gate,
        api_key=api_key,
        max_body_bytes=max_body_bytes,
        body_timeout_s=body_timeout_s,
        streamed=streamed,
        open_paths=open_paths | {"/healthz"},
        error_response=error_response,
    )


def as_service_error(request: Request, error: Exception) -> ServiceError:
    """What the client is told about any exception of a route."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, RequestValidationError):
        return invalid_request(error.errors()[0])
    if isinstance(error, HTTPException):
        asked = f"{request.method} {request.url.path}"
        if error.status_code in (404, 405):
            return NotFound(f"there is no {asked}: see /docs for the routes")
        return InvalidRequest(f"{asked}: {error.detail}")
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}")


def problem_response(error: ServiceError) -> JSONResponse:
    """RFC 9457, with the headers that the status asks for."""
    headers = error_headers(error)
    return JSONResponse(error.to_problem(), error.status, headers=headers, media_type=MEDIA_TYPE)


def error_headers(error: ServiceError) -> dict[str, str]:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def invalid_request(first: dict[str, Any]) -> InvalidRequest:
    """One sentence from the first entry of a pydantic error: field, value, complaint."""
    path = [str(part) for part in first["loc"] if part != "body"]
    field = ".".join(path) or "the body"
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field {field!r}: see /docs for the fields of this request")
    if first["type"] == "json_invalid":
        return InvalidRequest(
            f"the body is not JSON: {first['ctx']['error']} at character {path[-1]}"
        )
    if first["type"] == "missing":
        return InvalidRequest(f"field {field!r} is required")
    if not path and isinstance(first.get("input"), bytes):
        return InvalidRequest("the body is JSON: send it with 'Content-Type: application/json'")
    value = repr(first.get("input"))
    shown = value if len(value) <= 80 else value[:77] + "..."
    return InvalidRequest(f"{field} is {shown}: {first['msg']}")


class _Gate:
    """Checks the key, or without one the site, then reads a bounded body before the app sees the
    request."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body_bytes: int,
        body_timeout_s: float,
        streamed: frozenset[str],
        open_paths: frozenset[str],
        error_response: Callable[[str, ServiceError], Response],
    ) -> None:
        self.app = app
        self.api_key = api_key
        self.max_body_bytes = max_body_bytes
        self.body_timeout_s = body_timeout_s
        self.streamed = streamed
        self.open_paths = open_paths
        self.error_response = error_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            request = Request(scope)
            if scope["path"] not in self.open_paths:
                check_authorization(request.headers.get("authorization"), self.api_key)
                if not self.api_key:
                    check_site(request)
            receive = self._in_time(receive)
            if scope["path"] not in self.streamed:
                receive = await self._bounded_body(request, receive)
        except ServiceError as error:
            return await self.error_response(scope["path"], error)(scope, receive, send)
        return await self.app(scope, receive, send)

    def _in_time(self, receive: Receive) -> Receive:
        """`receive` with a deadline until the body is complete; then it waits for a disconnect."""
        deadline = asyncio.get_running_loop().time() + self.body_timeout_s
        complete = False

        async def receive_in_time() -> Message:
            nonlocal complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise DeadlineExceeded(
                    f"the body did not arrive within {self.body_timeout_s:g} s: send it again"
                ) from error
            complete = not message.get("more_body")
            return message

        return receive_in_time

    async def _bounded_body(self, request: Request, receive: Receive) -> Receive:
        check_content_length(request, self.max_body_bytes)
        chunks: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":  # what came may parse: YAML has no end
                raise ClientClosed("the client closed the connection during the upload")
            chunks.append(message.get("body", b""))
            num_bytes += len(chunks[-1])
            if num_bytes > self.max_body_bytes:
                raise too_large(self.max_body_bytes)
            if not message.get("more_body"):
                break
        pending: list[Message] = [
            {"type": "http.request", "body": b"".join(chunks), "more_body": False}
        ]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return replay


def check_site(request: Request) -> None:
    """Raise Forbidden for what a browser on this machine sends for a page of another site."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    is_foreign = request.headers.get("sec-fetch-site") == "cross-site"
    if origin is not None:
        is_foreign |= origin.partition("://")[2].lower() != host.lower()
    if is_foreign:
        raise Forbidden(
            f"a web page of another site ({origin or 'it has no name'}) sent this to {host}: a "
            "service takes that with a key alone, set TANDEM_API_KEY"
        )
    # The name of another site may have been made to lead here (DNS rebinding).
    bound, _ = request.scope.get("server") or ("", None)
    if host and is_loopback(bound) and not is_loopback(_hostname(host)):
        raise Forbidden(
            f"this service listens on {bound}, and was asked as {host}: ask 127.0.0.1 or "
            "localhost, or set TANDEM_API_KEY"
        )


def _hostname(host: str) -> str:
    """Of a Host header, without the port and the brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def check_content_length(request: Request, limit_bytes: int) -> None:
    """Refuse a body that announces itself as too large, before reading any of it."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit_bytes:
        raise too_large(limit_bytes, int(announced))


def too_large(limit_bytes: int, announced: int | None = None) -> BodyTooLarge:
    size = f"of {announced} bytes " if announced else ""
    return BodyTooLarge(f"the body {size}is over the limit of {limit_bytes} bytes")


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work`, and cancel it when the client goes away: nobody waits for its result."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientClosed("the client closed the connection")
        return await task
    finally:
        watcher.cancel()
        task.cancel()
