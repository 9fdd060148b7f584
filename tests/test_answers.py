"""Files that are being sent: few at a time, and none for ever (fault S11)."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest

from services.answers import Downloads
from shared.errors import Unavailable
from tests.slow_client import SlowClient

pytestmark = pytest.mark.anyio
CONTENT = bytes(range(256)) * 10_000  # Of three pieces.


def is_open(path: Path) -> bool:
    """Whether this process keeps the bytes of a file."""
    gc.collect()
    return str(path) in Path("/proc/self/maps").read_text()


async def test_a_file_that_is_deleted_meanwhile_is_sent_whole(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.write_bytes(CONTENT)
    response = Downloads().send_file(path)
    path.unlink()
    client = SlowClient()
    await client.get(response, "/file")
    assert client.body == CONTENT
    assert client.headers["content-length"] == "2560000"
    assert client.headers["content-type"] == "application/octet-stream"
    del response
    assert not is_open(path)


async def test_beyond_the_limit_a_download_is_refused_until_one_has_ended() -> None:
    downloads, clients = Downloads(max_open=2), [SlowClient(reads=False) for _ in range(2)]
    reading = [
        asyncio.ensure_future(client.get(downloads.send(memoryview(CONTENT)), "/file"))
        for client in clients
    ]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="2 files are being sent to others already") as refused:
        downloads.send(memoryview(CONTENT))
    assert refused.value.retry_after_s == 1.0
    clients[0].left.set()
    await reading[0]
    another = SlowClient()
    await another.get(downloads.send(memoryview(CONTENT)), "/file")
    assert another.body == CONTENT
    clients[1].left.set()
    await reading[1]


async def test_an_answer_that_is_never_sent_does_not_count() -> None:
    downloads = Downloads(max_open=1)
    for _ in range(3):
        downloads.send(memoryview(CONTENT))


async def test_a_client_that_does_not_read_is_left_and_the_file_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "adapter"
    path.write_bytes(CONTENT)
    downloads, client = Downloads(max_open=1, patience_s=0.05), SlowClient(reads=False)
    response = downloads.send_file(path)
    path.unlink()
    assert is_open(path)
    await client.get(response, "/file")
    assert client.body == b""
    assert "/file is left unfinished: its client did not read it within" in caplog.text
    assert not is_open(path)
    assert downloads.send(memoryview(CONTENT))
