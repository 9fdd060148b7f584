"""A TCP proxy in front of one service that cuts, stalls and counts traffic.

client ──▶ FaultyProxy ──▶ service          Content-Length frames requests, as in Tandem's clients
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, Self
from urllib.parse import urlsplit

_CHUNK_BYTES = 64 << 10


@dataclass(slots=True)
class Traffic:
    """Traffic of all requests for one path, including headers."""

    num_requests: int = 0
    up_bytes: int = 0
    down_bytes: int = 0


@dataclass(slots=True)
class Cut:
    """Closes the connections of the next matching requests once `after_bytes` of the request (`up`)
    or of its response (`down`) were forwarded."""

    direction: Literal["up", "down"]
    after_bytes: int
    match: re.Pattern[str]  # searched in the request line, such as `POST /generate HTTP/1.1`
    num_left: int
    made: asyncio.Event = field(default_factory=asyncio.Event)  # set when the last cut was made


@dataclass(slots=True)
class _Request:
    path: str
    line: str
    remaining_body_bytes: int
    up_bytes: int = 0
    down_bytes: int = 0


class _CutNow(Exception):
    """Ends a connection at the point of a cut."""


class FaultyProxy:
    """An async context manager that listens on a free loopback port while it is open."""

    def __init__(self, target_url: str) -> None:
        target = urlsplit(target_url)
        assert target.hostname
        assert target.port
        self._target = target.hostname, target.port
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)  # key: path without query
        self._cuts: list[Cut] = []
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        assert self._server, "the proxy is not open"
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    # --- faults ---------------------------------------------------------------------------------

    def cut(
        self,
        direction: Literal["up", "down"],
        *,
        after_bytes: int,
        match: str = "",
        times: int = 1,
    ) -> Cut:
        """Arm a cut of the next `times` requests whose request line matches the regex `match`."""
        cut = Cut(direction, after_bytes, re.compile(match), times)
        self._cuts.append(cut)
        return cut

    def stall(self) -> None:
        """Accept connections but forward nothing in either direction."""
        self._flowing.clear()

    def resume(self) -> None:
        """Forward again, beginning with what was held back."""
        self._flowing.set()

    # --- one connection -------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        writers = [writer]
        try:
            await self._flowing.wait()
            upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)
            writers.append(upstream_writer)
            await _Connection(self, reader, writer, upstream_reader, upstream_writer).run()
        except ConnectionError:  # the service is down, so the proxy acts as if it were down too
            pass
        finally:
            for writer in writers:
                writer.transport.abort()

    def allowed_bytes(self, request: _Request, direction: Literal["up", "down"], size: int) -> int:
        """How many of the next `size` bytes may pass; fewer than `size` means a cut after them."""
        passed = request.up_bytes if direction == "up" else request.down_bytes
        for cut in self._cuts:
            matches = cut.direction == direction and cut.num_left and cut.match.search(request.line)
            if matches and passed + size > cut.after_bytes:
                cut.num_left -= 1
                if not cut.num_left:
                    cut.made.set()
                return max(0, cut.after_bytes - passed)
        return size

    async def forward(
        self,
        data: bytes,
        request: _Request,
        direction: Literal["up", "down"],
        writer: asyncio.StreamWriter,
    ) -> None:
        """Forward `data`. Raises _CutNow when a cut falls into it."""
        await self._flowing.wait()
        passing = data[: self.allowed_bytes(request, direction, len(data))]
        writer.write(passing)
        await writer.drain()
        traffic = self.traffic[request.path]
        if direction == "up":
            request.up_bytes += len(passing)
            traffic.up_bytes += len(passing)
        else:
            request.down_bytes += len(passing)
            traffic.down_bytes += len(passing)
        if len(passing) < len(data):
            raise _CutNow


@dataclass(slots=True)
class _Connection:
    """Two pumps; the upstream pump records the request that the downstream pump answers."""

    proxy: FaultyProxy
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    upstream_reader: asyncio.StreamReader
    upstream_writer: asyncio.StreamWriter
    request: _Request | None = None

    async def run(self) -> None:
        """Pump both directions until either side closes or a cut is made."""
        pumps = [asyncio.ensure_future(self._run(pump)) for pump in (self._up, self._down)]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _run(self, pump: Callable[[], Awaitable[None]]) -> None:
        with contextlib.suppress(_CutNow, ConnectionError, asyncio.IncompleteReadError):
            await pump()

    async def _up(self) -> None:
        while True:
            head = await self.reader.readuntil(b"\r\n\r\n")
            request = self.request = _parse_head(head)
            self.proxy.traffic[request.path].num_requests += 1
            await self.proxy.forward(head, request, "up", self.upstream_writer)
            while request.remaining_body_bytes:
                size = min(_CHUNK_BYTES, request.remaining_body_bytes)
                if not (data := await self.reader.read(size)):
                    return
                request.remaining_body_bytes -= len(data)
                await self.proxy.forward(data, request, "up", self.upstream_writer)

    async def _down(self) -> None:
        while data := await self.upstream_reader.read(_CHUNK_BYTES):
            assert self.request, "an answer without a request"
            await self.proxy.forward(data, self.request, "down", self.writer)


def _parse_head(head: bytes) -> _Request:
    line, *headers = head.decode("latin-1").split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in _split(headers)}
    assert "chunked" not in fields.get("transfer-encoding", ""), "requests here know their length"
    target = line.split(" ")[1]
    return _Request(target.partition("?")[0], line, int(fields.get("content-length", 0)))


def _split(headers: list[str]) -> list[tuple[str, str, str]]:
    return [header.partition(":") for header in headers if header]
