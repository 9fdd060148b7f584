"""From the records of several completions to the body of one answer, as they come.

    sources ─▶ merged() ─▶ batches ─▶ NdjsonResponse ─▶ one JSON line per record

Whatever ends a stream, its sources are closed before anything else happens: a client that leaves,
one that does not read, an error of one source, the end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Self, TypeVar

from services.answers import PiecewiseResponse
from shared.schemas import StreamAlive, StreamEnd, Wire

Item = TypeVar("Item")
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # Proxies must not buffer.
_MAX_WAITING = 64  # In items; a source without room waits, and the engine merges its deltas.


async def merged(
    sources: Sequence[AsyncGenerator[Item]], *, pause_s: float, timeout_s: float
) -> AsyncGenerator[list[Item]]:
    """The items of all sources as they come; an empty list when none came for `pause_s`.

    Raises the first error of a source, and TimeoutError after `timeout_s`.
    """
    queue: asyncio.Queue[Item] = asyncio.Queue(_MAX_WAITING)
    deadline = time.monotonic() + timeout_s
    tasks = [asyncio.ensure_future(_drain(source, queue)) for source in sources]
    ended = asyncio.gather(*tasks)
    next_item = asyncio.ensure_future(queue.get())
    waits: set[asyncio.Future[Any]]
    try:
        while True:
            if (left_s := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            waits = {next_item, ended}
            await asyncio.wait(
                waits, timeout=min(pause_s, left_s), return_when=asyncio.FIRST_COMPLETED
            )
            has_ended = ended.done()
            batch = [next_item.result()] if next_item.done() else []
            while not queue.empty():
                batch.append(queue.get_nowait())
            if next_item.done():
                next_item = asyncio.ensure_future(queue.get())
            if batch or not has_ended:
                yield batch
            if has_ended:
                ended.result()
                return
    finally:
        next_item.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, ended, next_item, return_exceptions=True)


async def _drain(source: AsyncGenerator[Item], queue: asyncio.Queue[Item]) -> None:
    async with aclosing(source):
        async for item in source:
            await queue.put(item)


class NdjsonResponse(PiecewiseResponse):
    """Sends batches of records, and closes `batches` however the connection ends."""

    media_type = "application/x-ndjson"

    def __init__(
        self, first: Sequence[Wire], rest: AsyncGenerator[Sequence[Wire]], *, timeout_s: float
    ) -> None:
        super().__init__(_UNBUFFERED, timeout_s=timeout_s)
        self._first = first
        self._rest = rest

    @classmethod
    async def opened(cls, batches: AsyncGenerator[Sequence[Wire]], *, timeout_s: float) -> Self:
        """Wait for the first batch: what is refused before it is answered as any refusal."""
        return cls(await anext(batches), batches, timeout_s=timeout_s)

    async def _pieces(self) -> AsyncGenerator[bytes]:
        yield b"".join(map(self._encoded, self._first))
        async for batch in self._rest:
            yield b"".join(map(self._encoded, batch))

    async def _close(self) -> None:
        await self._rest.aclose()

    def _encoded(self, record: Wire) -> bytes:
        return record.model_dump_json().encode() + b"\n"


class SseResponse(NdjsonResponse):
    """The records as server-sent events, `[DONE]` after the last: what OpenAI's clients read."""

    media_type = "text/event-stream"

    def _encoded(self, record: Wire) -> bytes:
        match record:
            case StreamAlive():
                return b": alive\n\n"
            case StreamEnd():
                return b"data: [DONE]\n\n"
        return b"data: " + record.model_dump_json().encode() + b"\n\n"
