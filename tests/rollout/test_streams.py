"""The items of several sources as they come, and the body that they make."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from starlette.types import Message

from services.rollout.streams import NdjsonResponse, merged
from shared.schemas import StreamEnd

pytestmark = pytest.mark.anyio


class Source:
    """Yields `items` with a pause between them, then fails with `error` if it has one."""

    def __init__(self, *items: int, pause_s: float = 0.0, error: Exception | None = None) -> None:
        self.items = items
        self.pause_s = pause_s
        self.error = error
        self.num_yielded = 0
        self.is_closed = False

    async def run(self) -> AsyncGenerator[int]:
        try:
            for item in self.items:
                self.num_yielded += 1
                yield item
                await asyncio.sleep(self.pause_s)
            if self.error:
                raise self.error
        finally:
            self.is_closed = True


async def batches(
    *sources: Source, pause_s: float = 5.0, timeout_s: float = 5.0
) -> list[list[int]]:
    running = [source.run() for source in sources]
    return [batch async for batch in merged(running, pause_s=pause_s, timeout_s=timeout_s)]


async def test_every_item_comes_once_and_those_of_a_source_in_order() -> None:
    sources = [Source(*range(100 * i, 100 * i + 100)) for i in range(5)]
    items = [item for batch in await batches(*sources) for item in batch]
    assert sorted(items) == list(range(500))
    for i in range(5):
        assert [item for item in items if item // 100 == i] == list(range(100 * i, 100 * i + 100))


async def test_sources_without_items_end_at_once() -> None:
    assert await batches(Source(), Source()) == []


async def test_a_pause_is_an_empty_batch() -> None:
    found = await batches(Source(1, 2, pause_s=0.25), pause_s=0.1)
    assert [item for batch in found for item in batch] == [1, 2]
    assert found.count([]) == 4


async def test_what_came_before_an_error_comes_before_it_and_the_others_are_closed() -> None:
    slow, failing = Source(1, 2, 3, pause_s=60), Source(7, 8, error=ValueError("broken"))
    found: list[int] = []

    async def take() -> None:
        async for batch in merged([slow.run(), failing.run()], pause_s=5, timeout_s=5):
            found.extend(batch)

    with pytest.raises(ValueError, match="broken"):
        await take()
    assert sorted(found) == [1, 7, 8]
    assert slow.is_closed


async def test_after_the_deadline_it_is_a_timeout_and_the_sources_are_closed() -> None:
    slow = Source(1, 2, pause_s=60)
    with pytest.raises(TimeoutError):
        await batches(slow, timeout_s=0.05)
    assert slow.is_closed


async def test_a_consumer_that_does_not_take_stops_the_source_after_a_bounded_number() -> None:
    source = Source(*range(1000))
    async with aclosing(merged([source.run()], pause_s=5, timeout_s=5)) as items:
        await anext(items)
        await asyncio.sleep(0.05)
        assert source.num_yielded < 200
    assert source.is_closed


# --- NdjsonResponse -----------------------------------------------------------------------------


class Connection:
    """One request as a server hands it to the app; its client may leave, or not read."""

    def __init__(self, *, reads: bool = True) -> None:
        self.body = b""
        self.left = asyncio.Event()
        self._reads = reads

    async def answer(self, response: NdjsonResponse) -> None:
        async with asyncio.timeout(5):
            await response({"type": "http"}, self._receive, self._send)

    async def _receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if not self._reads:
            await asyncio.Event().wait()
        self.body += message.get("body", b"")


async def records(source: Source) -> AsyncGenerator[list[StreamEnd]]:
    async with aclosing(source.run()) as items:
        async for item in items:
            yield [StreamEnd(boot_id=str(item))] * 2


async def test_every_record_is_a_json_line() -> None:
    connection, source = Connection(), Source(1, 2)
    await connection.answer(await NdjsonResponse.opened(records(source), timeout_s=5))
    lines = connection.body.decode().splitlines()
    assert [json.loads(line)["boot_id"] for line in lines] == ["1", "1", "2", "2"]
    assert source.is_closed


async def test_an_error_before_the_first_record_is_raised_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match="refused"):
        await NdjsonResponse.opened(records(Source(error=ValueError("refused"))), timeout_s=5)


async def test_a_client_that_leaves_closes_the_source() -> None:
    connection, source = Connection(), Source(1, 2, pause_s=60)
    response = await NdjsonResponse.opened(records(source), timeout_s=60)
    asyncio.get_running_loop().call_later(0.05, connection.left.set)
    await connection.answer(response)
    assert source.is_closed


async def test_a_client_that_does_not_read_is_left_after_the_timeout() -> None:
    connection, source = Connection(reads=False), Source(1, 2)
    await connection.answer(await NdjsonResponse.opened(records(source), timeout_s=0.05))
    assert source.is_closed
    assert connection.body == b""
