"""Answers that are sent in pieces, to clients that may read slowly or not at all.

adapter file ─▶ Downloads ─▶ PiecewiseResponse ─▶ pieces ─▶ client
"""

from __future__ import annotations

import asyncio
import logging
import mmap
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from weakref import WeakSet

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shared.errors import Unavailable

log = logging.getLogger(__name__)
_PIECE_BYTES = 1 << 20
_MIN_BYTES_PER_S = 1 << 20  # A download that is slower on average is ended.


class PiecewiseResponse(Response, ABC):
    """Sends pieces of a body, and lets go of their source however the connection ends.

    A client that does not read is left after `timeout_s`.
    """

    def __init__(self, headers: Mapping[str, str], *, timeout_s: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(headers)
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            done, _ = await asyncio.wait(
                {sending, leaving}, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                log.warning(
                    "%s is left unfinished: its client did not read it within %.0f s",
                    scope.get("path", "an answer"),
                    self._timeout_s,
                )
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._close()
        if not sending.cancelled():
            sending.result()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @abstractmethod
    def _pieces(self) -> AsyncGenerator[bytes]: ...

    @abstractmethod
    async def _close(self) -> None:
        """Let go of the source of the pieces, of which some may not have been taken."""


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Downloads:
    """Files that are being sent. Until its client has read it, a file takes memory, though it may
    be deleted: so there are few at a time, and each has a time limit.
    """

    def __init__(self, *, max_open: int = 4, patience_s: float = 30.0) -> None:
        """`patience_s` is the time limit of a file without bytes; _MIN_BYTES_PER_S adds to it."""
        self._max_open = max_open
        self._patience_s = patience_s
        self._open: WeakSet[_Download] = WeakSet()

    def send_file(self, path: Path) -> Response:
        """The content of a file, which may be deleted while it is sent. Raises Unavailable."""
        self._check_room()
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self.send(memoryview(content))

    def send(self, content: memoryview, headers: Mapping[str, str] = {}) -> Response:
        """Raises Unavailable while the largest number of files is being sent."""
        self._check_room()
        timeout_s = self._patience_s + content.nbytes / _MIN_BYTES_PER_S
        download = _Download(content, headers, self._open, timeout_s=timeout_s)
        self._open.add(download)
        return download

    def _check_room(self) -> None:
        if len(self._open) >= self._max_open:
            raise Unavailable(
                f"{self._max_open} files are being sent to others already: try again later",
                retry_after_s=1.0,
            )


class _Download(PiecewiseResponse):
    media_type = "application/octet-stream"

    def __init__(
        self,
        content: memoryview,
        headers: Mapping[str, str],
        opened: WeakSet[_Download],
        *,
        timeout_s: float,
    ) -> None:
        super().__init__({"Content-Length": str(content.nbytes), **headers}, timeout_s=timeout_s)
        self._content = content
        self._opened = opened

    async def _pieces(self) -> AsyncGenerator[bytes]:
        for start in range(0, self._content.nbytes, _PIECE_BYTES):
            yield bytes(self._content[start : start + _PIECE_BYTES])

    async def _close(self) -> None:
        self._content = memoryview(b"")
        self._opened.discard(self)
