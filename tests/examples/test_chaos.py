"""Which replicas the fault injector hits and spares, with fake processes and a fake trainer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import pytest

from examples.demo import chaos as chaos_module
from examples.demo.chaos import DEFAULT_KINDS, Chaos, FaultKind
from examples.demo.processes import ServiceProcess
from examples.demo.services import DemoServices

pytestmark = pytest.mark.anyio


class FakeReplica(ServiceProcess):
    """Records faults instead of running a process."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url
        self.is_frozen = False
        self.end: str | None = None

    @property
    def ending(self) -> str | None:
        return self.end

    @property
    def is_up(self) -> bool:
        return self.end is None and not self.is_frozen

    def kill(self) -> None:
        self.end = "was ended by SIGKILL"

    def kill_engine(self) -> bool:
        self.end = "exited with 1"
        return True

    def freeze(self) -> None:
        self.is_frozen = True

    def thaw(self) -> None:
        self.is_frozen = False


class FakeServices(DemoServices):
    """The trainer is a server that reports all running replicas as serving, and records the lowest
    number of them."""

    def __init__(self, num_replicas: int) -> None:
        super().__init__(Path("unused"), num_replicas=num_replicas)
        self._names = map("r{}".format, count())
        self.fewest_up = num_replicas

    async def open(self) -> asyncio.Server:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self._url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.trainer = FakeReplica("trainer", self._url)
        self.replicas = [self._new() for _ in range(self.num_replicas)]
        return server

    def replace(self, ended: ServiceProcess) -> ServiceProcess:
        new = self.replicas[self.replicas.index(ended)] = self._new()
        return new

    def _new(self) -> FakeReplica:
        name = next(self._names)
        return FakeReplica(name, f"{self._url}/{name}")

    @property
    def fakes(self) -> list[FakeReplica]:
        return [replica for replica in self.replicas if isinstance(replica, FakeReplica)]

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (await reader.readline()).strip():
                pass
            self.fewest_up = min(self.fewest_up, sum(fake.is_up for fake in self.fakes))
            body = json.dumps({"replicas": [_status(f) for f in self.fakes if f.is_up]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        finally:
            writer.close()


def _status(replica: FakeReplica) -> dict[str, object]:
    return {
        "id": replica.name,
        "url": replica.url,
        "source": "registered",
        "state": "serving",
        "detail": "",
        "boot_id": None,
        "policy": None,
        "num_outstanding_completions": 0,
        "num_outstanding_tokens": 0,
        "logprob_gap": None,
        "last_sync_s": None,
        "num_failures": 0,
    }


@pytest.fixture
async def services() -> AsyncIterator[FakeServices]:
    services = FakeServices(3)
    async with await services.open():
        yield services


async def injected(
    services: FakeServices, num_faults: int, *, kinds: tuple[FaultKind, ...] = DEFAULT_KINDS
) -> Chaos:
    """Run the fault injection until it has injected `num_faults` faults."""
    chaos = Chaos(services, seed=1, pause_s=(0.0, 0.01), kinds=kinds)
    running = asyncio.create_task(chaos.run())
    async with asyncio.timeout(60):
        while len(chaos.faults) < num_faults and not running.done():  # noqa: ASYNC110 (a list)
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    return chaos


async def test_who_ended_is_replaced_and_another_always_serves(services: FakeServices) -> None:
    chaos = await injected(services, 6, kinds=("kill", "kill_engine"))
    assert [fault.kind for fault in chaos.faults[:2]] in (
        ["kill", "kill_engine"],
        ["kill_engine", "kill"],
    )
    assert chaos.num_replaced >= 4  # six ended, and at most two await a replacement
    assert services.fewest_up >= 1
    assert "kill" in chaos.summary()


async def test_nobody_stays_frozen_when_it_ends(services: FakeServices) -> None:
    chaos = await injected(services, 2, kinds=("freeze",))
    assert len({fault.replica for fault in chaos.faults}) == 2
    assert all(chaos_module.FREEZE_S[0] <= (f.freeze_s or 0) for f in chaos.faults)
    assert not any(fake.is_frozen for fake in services.fakes)


async def test_only_a_blackout_takes_them_all(services: FakeServices) -> None:
    chaos = await injected(services, 1, kinds=("blackout",))
    assert {fault.replica for fault in chaos.faults} == {"all"}
    assert str(chaos.faults[0]).startswith("blackout all at 0 s")
