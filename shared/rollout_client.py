"""Typed client of the rollout service (services/rollout/app.py)."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Literal

import httpx
from pydantic import TypeAdapter, ValidationError

from shared.adapters import content_digest
from shared.errors import DeadlineExceeded, ServiceError, Unavailable, from_problem
from shared.http_client import ServiceClient, raise_problem
from shared.schemas import (
    GenerateRequest,
    GenerateResponse,
    PoliciesResponse,
    RolloutStatus,
    ScoreRequest,
    ScoreResponse,
    StreamAlive,
    StreamEnd,
    StreamError,
    StreamRecord,
    StreamStart,
    StreamTokens,
    SyncReceipt,
)

_RECORD: TypeAdapter[StreamRecord] = TypeAdapter(StreamRecord)
_PIECE_BYTES = 1 << 20


class RolloutClient(ServiceClient):
    async def generate(
        self, request: GenerateRequest, *, timeout_s: float | None = None
    ) -> GenerateResponse:
        return await self._call(
            GenerateResponse, "POST", "/generate", body=request, timeout_s=timeout_s
        )

    async def stream(
        self, request: GenerateRequest, *, timeout_s: float | None = None, silence_s: float = 10.0
    ) -> AsyncGenerator[StreamStart | StreamTokens]:
        """Yield the tokens of a request as they arrive, until the replica ends the stream.

        Raises the error that the service answers or sends in the stream, Unavailable if the stream
        is cut off or silent for `silence_s`, and DeadlineExceeded after `timeout_s`. Closing the
        generator closes the connection, which ends the work on the replica.
        """
        lines = self._lines(request, timeout_s or self.timeout_s, silence_s)
        async with aclosing(lines):
            async for line in lines:
                match self._record(line):
                    case StreamEnd():
                        # Reading to the end lets the connection be reused; no record is missing.
                        with suppress(ServiceError):
                            async for _ in lines:
                                pass
                        return
                    case StreamError(problem=problem):
                        raise from_problem(problem, 500)
                    case StreamAlive():
                        pass
                    case record:
                        yield record
        raise Unavailable(f"{self.url}/generate ended a stream without its end record")

    async def _lines(
        self, request: GenerateRequest, timeout_s: float, silence_s: float
    ) -> AsyncGenerator[bytes]:
        where = f"POST {self.url}/generate"
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s

        def patience() -> asyncio.Timeout:
            return asyncio.timeout_at(min(deadline, clock() + silence_s))

        call = self._http.build_request(
            "POST",
            "/generate",
            content=request.model_copy(update={"stream": True}).model_dump_json().encode(),
            headers={"Content-Type": "application/json"},
        )
        async with AsyncExitStack() as stack:
            try:
                async with patience():
                    response = await self._http.send(call, stream=True)
                    stack.push_async_callback(response.aclose)
                    if response.is_error:
                        await response.aread()
                        raise_problem(response)
                chunks, rest = response.aiter_bytes(), b""
                while True:
                    async with patience():
                        chunk = await anext(chunks, None)
                    if chunk is None:
                        return
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield line
            except TimeoutError as error:
                if clock() < deadline:
                    raise Unavailable(f"{where} sent nothing for {silence_s:g} s") from error
                raise DeadlineExceeded(
                    f"{where} did not end its stream within {timeout_s:g} s"
                ) from error
            except httpx.RequestError as error:
                raise Unavailable(
                    f"{where} failed: {type(error).__name__} {error}".rstrip()
                ) from error

    def _record(self, line: bytes) -> StreamRecord:
        try:
            return _RECORD.validate_json(line)
        except ValidationError as error:
            raise ServiceError(
                f"POST {self.url}/generate sent a line that is not a StreamRecord: check that this "
                "is the right service, and of the same version"
            ) from error

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        return await self._call(ScoreResponse, "POST", "/score", body=request)

    async def sync_weights(
        self,
        adapter: bytes | memoryview,
        *,
        activate: bool = True,
        replace_run: bool = False,
        in_flight: Literal["finish", "continue"] = "finish",
        probe: bool = False,
        digest: str | None = None,
        timeout_s: float | None = None,
    ) -> SyncReceipt:
        """Upload one adapter file (shared/adapters.py). `digest` is its Content-Digest, if known.

        A `probe` serves a single /score request and is then retired; it has its own run_id.
        """
        return await self._call(
            SyncReceipt,
            "POST",
            "/sync_weights",
            content=_pieces(adapter),
            params={
                "activate": str(activate).lower(),
                "replace_run": str(replace_run).lower(),
                "in_flight": in_flight,
                "probe": str(probe).lower(),
            },
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Length": str(len(adapter)),
                "Content-Digest": digest or content_digest(hashlib.sha256(adapter).digest()),
            },
            timeout_s=timeout_s,
        )

    async def policies(self) -> PoliciesResponse:
        return await self._call(PoliciesResponse, "GET", "/policies", timeout_s=10)

    async def adapter(self, version: int) -> bytes:
        """The adapter file of a resident version, as the replica received it."""
        return await self._request("GET", f"/policies/{version}")

    async def status(self) -> RolloutStatus:
        return await self._call(RolloutStatus, "GET", "/status", timeout_s=10)

    async def drain(self) -> RolloutStatus:
        return await self._call(RolloutStatus, "POST", "/drain", timeout_s=10)


async def _pieces(content: bytes | memoryview) -> AsyncGenerator[bytes]:
    """The content in pieces, which avoids a second copy of the whole body."""
    view = memoryview(content)
    for start in range(0, len(view), _PIECE_BYTES):
        yield bytes(view[start : start + _PIECE_BYTES])
