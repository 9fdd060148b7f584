"""What happens to a run when replicas are killed, frozen, drained, cut off, filled up and swapped.

Real processes and the real engine: `make test-faults`. Every test injects its fault while replicas
stream completions, and then recounts groups.jsonl: nothing lost, nothing trained on twice, no
token of a version that it may not be of. What it measured is printed at the end.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from examples.demo.audit import Audit, audit
from examples.demo.processes import ServiceProcess, free_ports, wait_until_ready
from examples.demo.services import DemoServices
from services.trainer.run_config import RunConfig
from shared.rollout_client import RolloutClient
from shared.schemas import ReplicaStatus, StateRecord, StepRecord
from shared.trainer_client import TrainerClient
from tests.faulty_proxy import FaultyProxy

pytestmark = [pytest.mark.anyio, pytest.mark.faults, pytest.mark.timeout(240)]

_BOOT_TIMEOUT_S = 120.0
_WAIT_S = 60.0
_POLL_S = 0.05
_MAX_TOKENS = 160
RUN: dict[str, Any] = {
    "num_steps": 1000,  # it is stopped
    "prompts_per_step": 8,
    "sampling": {"n": 4, "max_tokens": _MAX_TOKENS, "ignore_eos": True},
    "dataset": {"type": "sort_digits", "num_prompts": 256},
    "rewards": [{"type": "regex", "pattern": "^[0-4]", "full": False}],
    "lora": {"rank": 8, "alpha": 16},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
    "generate_timeout_s": 120,
}

Note = Callable[[str, float], None]


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, float]]]:
    """(what, seconds), printed when all tests have ended."""
    rows: list[tuple[str, float]] = []
    yield rows
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture
    with capture.global_and_fixture_disabled():
        print()
        for what, seconds in rows:
            print(f"{seconds:8.2f} s  {what}")


@pytest.fixture
def note(figures: list[tuple[str, float]], record_property: Callable[[str, object], None]) -> Note:
    def note(what: str, seconds: float) -> None:
        figures.append((what, seconds))
        record_property(what, round(seconds, 3))

    return note


class Run:
    """A run that goes on until it is left, and when its steps came."""

    def __init__(self, client: TrainerClient) -> None:
        self.client = client
        self.step_times: list[float] = []  # monotonic seconds
        self.steps: list[StepRecord] = []
        self.end: StateRecord | None = None

    async def follow(self) -> None:
        async for event in self.client.events():
            if isinstance(event, StepRecord):
                self.steps.append(event)
                self.step_times.append(time.monotonic())
            elif isinstance(event, StateRecord):
                self.end = event

    async def next_step(self, *, count: int = 1) -> float:
        """Wait for `count` more steps; seconds until the last of them came."""
        started, wanted = time.monotonic(), len(self.steps) + count

        async def has_come() -> bool:
            assert self.end is None or self.end.state == "running", self.end
            return len(self.steps) >= wanted

        await until(has_come, timeout_s=_WAIT_S * count)
        return self.step_times[wanted - 1] - started

    @property
    def num_continued(self) -> int:
        return sum(step.num_continued or 0 for step in self.steps)


class Site:
    """A trainer and two replicas that register themselves, for all tests of this file."""

    def __init__(self, services: DemoServices, client: TrainerClient) -> None:
        self.services = services
        self.client = client

    @property
    def replicas(self) -> list[ServiceProcess]:
        return self.services.replicas

    def client_of(self, replica: ServiceProcess) -> RolloutClient:
        return RolloutClient(replica.url, api_key=self.services.api_key, timeout_s=30)

    async def status(self, url: str) -> ReplicaStatus | None:
        replicas = (await self.client.replicas()).replicas
        return next((status for status in replicas if status.url == url), None)

    @asynccontextmanager
    async def run(self, **changes: Any) -> AsyncIterator[Run]:
        """Both replicas serve it and one step has been done. On leaving it is stopped and must be
        clean."""
        for replica in self.replicas:
            if replica.ending:
                self.services.replace(replica)
        await wait_until_ready(
            self.replicas,
            api_key=self.services.api_key,
            timeout_s=_BOOT_TIMEOUT_S,
            on_wait=lambda _: None,
        )
        config = RunConfig.model_validate({**RUN, **changes})
        status = await self.client.start_run(config.model_dump(mode="json", exclude_unset=True))
        run = Run(self.client)
        following = asyncio.create_task(run.follow())
        try:
            for replica in self.replicas:
                await self.serves(replica.url)
            await run.next_step()
            yield run
        finally:
            await self.client.stop_run()
            await asyncio.wait_for(following, _WAIT_S)
        assert run.end
        assert run.end.state == "stopped", run.end.detail
        done = config.model_copy(update={"num_steps": len(run.steps)})
        found = audit(Path(status.run_dir), done)
        assert found == Audit(len(run.steps) * 32, 0, 0, 0, found.num_mixed)
        assert {step.num_samples for step in run.steps} == {32}

    async def serves(self, url: str, *, timeout_s: float = _BOOT_TIMEOUT_S) -> float:
        """Wait until the replica is proven to serve the current version; seconds."""
        started = time.monotonic()

        async def does() -> bool:
            status = await self.status(url)
            current = (await self.client.policy()).policy
            return bool(status and status.state == "serving" and status.policy == current)

        await until(does, timeout_s=timeout_s)
        return time.monotonic() - started

    async def mid_generation(self, url: str) -> None:
        """Return while the replica streams: some tokens have come, most have not."""

        async def is_streaming() -> bool:
            status = await self.status(url)
            assert status
            num_whole = status.num_outstanding_completions * _MAX_TOKENS
            return 0.4 * num_whole < status.num_outstanding_tokens < 0.9 * num_whole

        await until(is_streaming, timeout_s=_WAIT_S)


async def until(condition: Callable[[], Awaitable[bool]], *, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 (another process gives no event)
            await asyncio.sleep(_POLL_S)


@pytest.fixture(scope="module")
async def site(
    anyio_backend: str,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
    base_cache: Path,
) -> AsyncIterator[Site]:
    root = tmp_path_factory.mktemp("site")
    (root / "model").symlink_to(tiny_checkpoint)
    settings = {"CACHE_DIR": str(base_cache), "MAX_NUM_SEQS": "32", "STREAM_INTERVAL": "4"}
    with DemoServices(root, num_replicas=2, rollout_settings=settings) as services:
        await services.wait_until_ready(timeout_s=_BOOT_TIMEOUT_S)
        async with TrainerClient(services.trainer.url, api_key=services.api_key) as client:
            yield Site(services, client)


# --- replicas end, hang and return --------------------------------------------------------------


async def test_a_replica_that_is_killed_mid_generation_costs_nothing_and_another_joins(
    site: Site, note: Note
) -> None:
    """trl#7176: one failed generation killed the rollout worker."""
    async with site.run() as run:
        victim = site.replicas[0]
        await site.mid_generation(victim.url)
        victim.kill()
        note("kill -9 of a replica: until the step that it was part of", await run.next_step())
        assert run.num_continued > 0

        started = time.monotonic()
        new = site.services.replace(victim)
        await wait_until_ready(
            [new], api_key=site.services.api_key, timeout_s=_BOOT_TIMEOUT_S, on_wait=lambda _: None
        )
        ready = time.monotonic()
        await site.serves(new.url)
        note("a replica is added: from its start to serving the current version", since(started))
        note("  of that, after it was ready", since(ready))
        await run.next_step()
        assert run.steps[-1].num_serving_replicas == 2


async def test_a_frozen_replica_is_left_and_returns(site: Site, note: Note) -> None:
    """NeMo-RL#3589: whoever waited for a replica that hung waited for ever."""
    async with site.run() as run:
        victim = site.replicas[0]
        await site.mid_generation(victim.url)
        victim.freeze()
        try:
            note("SIGSTOP of a replica: until the step that it was part of", await run.next_step())
            await run.next_step()
            status = await site.status(victim.url)
            assert status
            assert status.state in ("discovered", "gone")  # gone: its lease ended meanwhile
        finally:
            victim.thaw()
        note("  after SIGCONT, until it serves the current version", await site.serves(victim.url))
        assert run.num_continued > 0


async def test_when_the_engine_core_is_killed_the_run_goes_on_elsewhere(
    site: Site, note: Note
) -> None:
    async with site.run() as run:
        victim = site.replicas[1]
        await site.mid_generation(victim.url)
        assert victim.kill_engine()
        note("kill -9 of an engine core: until the step it was part of", await run.next_step())
        assert run.num_continued > 0

        async def has_ended() -> bool:
            return victim.ending == "exited with 1"

        await until(has_ended, timeout_s=_WAIT_S)


async def test_every_replica_is_swapped_for_another_during_a_run(site: Site, note: Note) -> None:
    """Each is joined by its successor, then drained. A drained one finishes and exits 0."""
    async with site.run() as run:
        before = len(run.steps)
        started = time.monotonic()
        for old in list(site.replicas):
            new = site.services.replace(old)
            await site.serves(new.url)
            await site.mid_generation(old.url)
            asked = time.monotonic()
            async with site.client_of(old) as client:
                await client.drain()

            async def has_ended(old: ServiceProcess = old) -> bool:
                return old.ending is not None

            await until(has_ended, timeout_s=_WAIT_S)
            assert old.ending == "exited with 0"
            note("POST /drain of a busy replica: until it exits 0", since(asked))
        await run.next_step()
        note("rolling swap of both replicas", since(started))
        note("  longest step meanwhile", max(step.step_s for step in run.steps[before:]))
        urls = {status.url for status in (await site.client.replicas()).replicas}
        assert {replica.url for replica in site.replicas} <= urls


async def test_a_run_without_any_replica_waits_and_goes_on_when_one_returns(
    site: Site, note: Note
) -> None:
    """NeMo-RL#3613: a replacement was only taken in at the next refit."""
    async with site.run() as run:
        lost = list(site.replicas)
        await site.mid_generation(lost[0].url)
        for replica in lost:
            replica.kill()
        away = time.monotonic()
        await asyncio.sleep(15)
        statuses = (await site.client.replicas()).replicas
        assert not [status for status in statuses if status.state == "serving"]
        assert (await site.client.run()).state == "running"
        num_steps = len(run.steps)
        new = site.services.replace(lost[0])
        await site.serves(new.url)
        assert since(away) >= 20
        note("without any replica", since(away))
        assert len(run.steps) - num_steps <= 1  # one may have been sampled before
        note("  until the next step once one serves", await run.next_step())


# --- replicas that cannot take an adapter -------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


async def test_a_replica_without_space_for_an_adapter_waits_for_it_and_says_so(
    site: Site, note: Note, small_disk: Path
) -> None:
    """It keeps what it has, gets no request for the version that it lacks, and catches up."""
    async with site.run() as run:
        full = site.services.start_replica(
            TRAINER_URL=site.services.trainer.url, ADAPTER_DIR=str(small_disk)
        )
        await site.serves(full.url)
        await site.mid_generation(full.url)
        filler = small_disk / "filler"
        filler.write_bytes(bytes(free_bytes(small_disk)))

        async def is_behind() -> bool:
            status = await site.status(full.url)
            return status is not None and "no space for the adapter" in status.detail

        await until(is_behind, timeout_s=_WAIT_S)
        note("full adapter folder: until the next step, on the others", await run.next_step())
        assert run.steps[-1].num_serving_replicas == 2
        filler.unlink()
        note("  until it serves the current version with space", await site.serves(full.url))
        await asyncio.to_thread(full.stop, timeout_s=20)


def free_bytes(folder: Path) -> int:
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


async def test_a_replica_with_another_base_joins_in_vain(
    site: Site, tmp_path: Path, note: Note
) -> None:
    """axolotl: models that do not match "silently produce incorrect results"."""
    from examples.demo import model as demo

    other = tmp_path / "other"
    demo.save(demo.make_model(seed=1, max_position_embeddings=512), other)
    async with site.run() as run:
        stranger = site.services.start_replica(
            TRAINER_URL=site.services.trainer.url, MODEL=str(other)
        )

        async def is_refused() -> bool:
            status = await site.status(stranger.url)
            return status is not None and status.state == "quarantined"

        await until(is_refused, timeout_s=_BOOT_TIMEOUT_S)
        status = await site.status(stranger.url)
        assert status
        assert "another base" in status.detail
        assert "weights" in status.detail
        await run.next_step(count=2)
        assert stranger.ending is None
        await asyncio.to_thread(stranger.stop, timeout_s=20)


# --- connections that break ---------------------------------------------------------------------


async def test_an_upload_and_a_stream_that_are_cut_cost_nothing(site: Site, note: Note) -> None:
    """A replica behind a proxy that cuts its connections. Neither side is left with a half."""
    (port,) = free_ports(1)
    async with FaultyProxy(f"http://127.0.0.1:{port}") as proxy, site.run() as run:
        replica = site.services.start_replica(
            PORT=str(port), TRAINER_URL=site.services.trainer.url, ADVERTISE_URL=proxy.url
        )
        await site.serves(proxy.url)

        cut = proxy.cut("up", after_bytes=50_000, match="POST /sync_weights")
        await asyncio.wait_for(cut.made.wait(), _WAIT_S)
        started = time.monotonic()
        await site.serves(proxy.url)
        note("upload cut: until the replica serves the current version", since(started))
        assert proxy.traffic["/sync_weights"].num_requests >= 2

        num_continued = run.num_continued
        await site.mid_generation(proxy.url)
        cut = proxy.cut("down", after_bytes=8_000, match="POST /generate")
        await asyncio.wait_for(cut.made.wait(), _WAIT_S)
        note("stream cut: until the step that it was part of", await run.next_step())
        assert run.num_continued > num_continued
        await site.serves(proxy.url)
        async with site.client_of(replica) as client:
            assert (await client.status()).state == "ready"
        await asyncio.to_thread(replica.stop, timeout_s=20)


def since(started: float) -> float:
    return time.monotonic() - started
