"""Request handling of both services: check the key, bound the body, answer errors as problems."""

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
    shown,
)

log = logging.getLogger(__name__)
Result = TypeVar("Result")
_MAX_JSON_FIELDS = 500_000  # A request of 4,096 completions has about 50,000.
# OpenAPI's description of errors: one answer for all of them, whose `type` names the class.
PROBLEMS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "An RFC 9457 problem whose type names a class of shared/errors.py",
        "content": {MEDIA_TYPE: {"schema": {"type": "object"}}},
    }
}


def raw_body(media_type: str) -> dict[str, Any]:
    """OpenAPI's description of a route that reads its body itself."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": {}}}}}


async def check_query(request: Request) -> None:
    """A dependency of every route: raise InvalidRequest for a query parameter that it lacks."""
    route = request.scope["route"]
    known = [parameter.alias for parameter in route.dependant.query_params]
    for name in request.query_params:
        if name not in known:
            remedy = f"it takes {', '.join(known)}" if known else "remove it"
            raise InvalidRequest(
                f"{request.method} {route.path} has no query parameter {name!r}: {remedy}"
            )


def prepare_app(
    app: FastAPI,
    *,
    api_key: str | None,
    max_body_bytes: int,
    max_json_values: int,
    body_timeout_s: float,
    streamed: frozenset[str] = frozenset(),
    open_paths: frozenset[str] = frozenset(),
    on_error: Callable[[ServiceError], None] = lambda _: None,
    answer_errors: Mapping[str, Callable[[ServiceError], Response]] = {},
) -> None:
    """Install the request checks and the error handlers.

    `max_json_values` bounds what a JSON body may hold, because it is parsed on the event loop.
    `streamed` paths read and bound their body themselves; `open_paths` need no key, nor does
    /healthz. `answer_errors` maps path prefixes to functions that answer errors of these paths in
    another format than problems.
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
        max_json_values=max_json_values,
        body_timeout_s=body_timeout_s,
        streamed=streamed,
        open_paths=open_paths | {"/healthz"},
        error_response=error_response,
    )


def as_service_error(request: Request, error: Exception) -> ServiceError:
    """The error that a client receives for an exception of a route."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, RequestValidationError):
        return invalid_request(error.errors()[0])
    if isinstance(error, HTTPException):
        asked = f"{request.method} {request.url.path}"
        if error.status_code in (404, 405):
            return NotFound(f"there is no route {asked}: see docs/wire.md for the routes")
        return InvalidRequest(f"{asked}: {error.detail}")
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}")


def problem_response(error: ServiceError) -> JSONResponse:
    """An RFC 9457 answer with the headers that its status requires."""
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
    """One sentence from the first entry of a pydantic error: its field, value and message."""
    path = [str(part) for part in first["loc"] if part != "body"]
    field = ".".join(path) or "the body"
    if first["type"] == "extra_forbidden":
        return InvalidRequest(
            f"unknown field {shown(field)}: see docs/wire.md for the fields of this request"
        )
    if first["type"] == "json_invalid":
        return InvalidRequest(
            f"the body is not JSON: {first['ctx']['error']} at character {path[-1]}"
        )
    if first["type"] == "missing":
        return InvalidRequest(f"field {field!r} is required")
    if not path and isinstance(first.get("input"), bytes):
        return InvalidRequest("send the JSON body with 'Content-Type: application/json'")
    return InvalidRequest(f"{field} is {shown(first.get('input'))}: {first['msg']}")


class _Gate:
    """Checks the key, or the site if there is no key, and reads the body before the app runs."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body_bytes: int,
        max_json_values: int,
        body_timeout_s: float,
        streamed: frozenset[str],
        open_paths: frozenset[str],
        error_response: Callable[[str, ServiceError], Response],
    ) -> None:
        self.app = app
        self.api_key = api_key
        self.max_body_bytes = max_body_bytes
        self.max_json_values = max_json_values
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
        """`receive` with a deadline for the body, and without one once the body is complete."""
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
                    f"the body did not arrive within {self.body_timeout_s:g} s: send "
                    "the request again"
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
            if message["type"] != "http.request":  # A truncated body may still parse, as YAML does.
                raise ClientClosed("the client closed the connection during the upload")
            chunks.append(message.get("body", b""))
            num_bytes += len(chunks[-1])
            if num_bytes > self.max_body_bytes:
                raise too_large(self.max_body_bytes)
            if not message.get("more_body"):
                break
        body = b"".join(chunks)
        _check_json_size(body, self.max_json_values)
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return replay


def _check_json_size(body: bytes, max_values: int) -> None:
    """Raise BodyTooLarge for a body that would take long to parse, however short it is.

    Commas, brackets and colons in texts count too: a body with so many is too large anyway.
    """
    for what, limit, num in (
        ("values", max_values, body.count(b",") + body.count(b"[")),
        ("fields", _MAX_JSON_FIELDS, body.count(b":")),
    ):
        if num > limit:
            raise BodyTooLarge(
                f"the body holds about {num} JSON {what}, the limit is {limit}: send it in parts"
            )


def check_site(request: Request) -> None:
    """Raise Forbidden for a request that a browser sends on behalf of another site's page."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    is_foreign = request.headers.get("sec-fetch-site") == "cross-site"
    if origin is not None:
        is_foreign |= origin.partition("://")[2].lower() != host.lower()
    if is_foreign:
        raise Forbidden(
            f"a web page of another site ({origin or 'without a name'}) sent this request to "
            f"{host}: a service accepts such requests only with a key; set TANDEM_API_KEY"
        )
    # Another site may point its host name at this machine (DNS rebinding).
    bound, _ = request.scope.get("server") or ("", None)
    if host and is_loopback(bound) and not is_loopback(_hostname(host)):
        raise Forbidden(
            f"this service listens on {bound}, but the request names the host {host}: use "
            "127.0.0.1 or localhost, or set TANDEM_API_KEY"
        )


def _hostname(host: str) -> str:
    """The host name in a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def check_content_length(request: Request, limit_bytes: int) -> None:
    """Raise BodyTooLarge if the announced length is over the limit, before reading the body."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and len(announced) < 20 and int(announced) > limit_bytes:
        raise too_large(limit_bytes, int(announced))


def too_large(limit_bytes: int, announced: int | None = None) -> BodyTooLarge:
    size = f"of {announced} bytes " if announced else ""
    return BodyTooLarge(f"the body {size}is over the limit of {limit_bytes} bytes")


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work`, and cancel it if the client disconnects, because nobody waits for its result."""

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
