"""A client that may not read what it asked for, as the server of an app sees it."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message


class SlowClient:
    """One GET. What has been received so far is in `status`, `headers` and `body`."""

    def __init__(self, *, reads: bool = True) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = b""
        self.left = asyncio.Event()  # Set it to close the connection.
        self._reads = reads
        self._request: Message | None = {"type": "http.request", "body": b"", "more_body": False}

    async def get(self, app: ASGIApp, path: str) -> None:
        """Returns when the app has ended its answer."""
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
        async with asyncio.timeout(20):
            await app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        message, self._request = self._request, None
        if message is None:
            await self.left.wait()
            return {"type": "http.disconnect"}
        return message

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        elif not self._reads:
            await self.left.wait()
        else:
            self.body += message["body"]
