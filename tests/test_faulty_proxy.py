"""The proxy itself, in front of a toy server that reports what it received."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.faulty_proxy import FaultyProxy

pytestmark = pytest.mark.anyio
_LINES = 20


class Toy:
    """Answers with the length of the body, as one answer or, for /stream, as chunked lines."""

    def __init__(self) -> None:
        self.received: list[int] = []  # Bytes of each body, complete or not.
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except ConnectionError:  # The proxy cut the connection.
            pass
        finally:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await _head(reader):
            length = 0
            for line in head.decode().split("\r\n"):
                if line.lower().startswith("content-length:"):
                    length = int(line.partition(":")[2])
            body = b""
            while len(body) < length and (data := await reader.read(length - len(body))):
                body += data
            self.received.append(len(body))
            if len(body) < length:
                break
            if b"/stream" in head:
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                for _ in range(_LINES):
                    writer.write(b"a\r\n123456789\n\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.001)
                writer.write(b"0\r\n\r\n")
            else:
                answer = str(length).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer))
                writer.write(answer)
            await writer.drain()


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


@pytest.fixture
async def toy() -> AsyncIterator[Toy]:
    toy = Toy()
    async with await asyncio.start_server(toy.serve, "127.0.0.1", 0) as server:
        toy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield toy


@pytest.fixture
async def proxy(toy: Toy) -> AsyncIterator[FaultyProxy]:
    async with FaultyProxy(toy.url) as proxy:
        yield proxy


@pytest.fixture
async def http(proxy: FaultyProxy) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=proxy.url, timeout=5, trust_env=False) as http:
        yield http


async def test_traffic_is_counted_by_path_in_both_directions(
    proxy: FaultyProxy, http: httpx.AsyncClient
) -> None:
    assert (await http.post("/a?x=1", content=bytes(200_000))).text == "200000"
    assert (await http.post("/a", content=bytes(10))).text == "10"
    assert (await http.get("/b")).text == "0"
    a, b = proxy.traffic["/a"], proxy.traffic["/b"]
    assert (a.num_requests, b.num_requests) == (2, 1)
    assert 200_010 < a.up_bytes < 201_000
    assert 0 < b.down_bytes < a.down_bytes < 1000


async def test_an_upload_is_cut_after_the_requested_bytes_and_the_next_one_passes(
    toy: Toy, proxy: FaultyProxy, http: httpx.AsyncClient
) -> None:
    cut = proxy.cut("up", after_bytes=50_000, match="POST /upload")
    assert (await http.post("/other", content=bytes(100_000))).text == "100000"
    with pytest.raises(httpx.TransportError):
        await http.post("/upload", content=bytes(100_000))
    async with asyncio.timeout(5):
        await cut.made.wait()
    assert (await http.post("/upload", content=bytes(100_000))).text == "100000"
    assert toy.received[0] == toy.received[2] == 100_000
    assert toy.received[1] < 50_000
    assert proxy.traffic["/upload"].up_bytes < 151_000


async def test_a_stream_is_cut_after_the_requested_bytes(
    proxy: FaultyProxy, http: httpx.AsyncClient
) -> None:
    proxy.cut("down", after_bytes=150, match="/stream")
    lines: list[str] = []

    async def read() -> None:
        async with http.stream("GET", "/stream") as answer:
            async for line in answer.aiter_lines():
                lines.append(line)

    with pytest.raises(httpx.RemoteProtocolError):
        await read()
    assert 0 < len(lines) < _LINES
    assert proxy.traffic["/stream"].down_bytes == 150
    lines.clear()
    await read()
    assert len(lines) == _LINES


async def test_a_cut_may_hit_several_requests(proxy: FaultyProxy, http: httpx.AsyncClient) -> None:
    proxy.cut("down", after_bytes=0, times=2)
    for _ in range(2):
        with pytest.raises(httpx.TransportError):
            await http.get("/a")
    assert (await http.get("/a")).text == "0"


async def test_a_stalled_proxy_accepts_and_forwards_nothing_until_it_is_resumed(
    toy: Toy, proxy: FaultyProxy, http: httpx.AsyncClient
) -> None:
    await http.get("/a")
    proxy.stall()
    # One request takes the kept connection, the other a new one.
    waiting = [asyncio.ensure_future(http.get("/a")) for _ in range(2)]
    with pytest.raises(httpx.ReadTimeout):
        await http.get("/a", timeout=0.2)
    assert len(toy.received) == 1
    proxy.resume()
    assert [answer.text for answer in await asyncio.gather(*waiting)] == ["0", "0"]


async def test_a_proxy_without_its_service_closes_the_connection() -> None:
    async with FaultyProxy("http://127.0.0.1:1") as proxy, httpx.AsyncClient() as http:
        with pytest.raises(httpx.TransportError):
            await http.get(proxy.url)
