"""Deliberate faults during a run: replicas are killed, frozen, drained and replaced.

every few seconds: a replica that others can stand in for ──▶ kill · kill_engine · freeze · drain
whenever one has ended: a new process on a new port, which registers itself with the trainer
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from examples.demo.processes import ServiceProcess
from examples.demo.services import DemoServices
from shared.errors import ServiceError, Unavailable
from shared.rollout_client import RolloutClient
from shared.trainer_client import TrainerClient

FaultKind = Literal["kill", "kill_engine", "freeze", "drain", "blackout"]
FAULT_MEANINGS: dict[FaultKind, str] = {
    "kill": "kill -9 of the service",
    "kill_engine": "kill -9 of its engine core",
    "freeze": "SIGSTOP of both, SIGCONT some seconds later",
    "drain": "POST /drain, after which the service exits with 0",
    "blackout": "kill -9 of every replica at once",
}
DEFAULT_KINDS: tuple[FaultKind, ...] = ("kill", "kill_engine", "freeze", "drain")
FREEZE_S = (3.0, 15.0)  # range of durations: the trainer notices long freezes, not short ones
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Fault:
    kind: FaultKind
    replica: str  # name of the replica; "all" for a blackout
    at_s: float  # seconds since fault injection began
    freeze_s: float | None = None  # duration of a freeze; None for every other kind

    def __str__(self) -> str:
        duration = f" for {self.freeze_s:.0f} s" if self.freeze_s else ""
        return f"{self.kind} {self.replica}{duration} at {self.at_s:.0f} s"


class Chaos:
    """Injects one fault after another until `run` is cancelled, and records them in `faults`.

    The kinds take turns in shuffled order, so that even a short run sees each of them. Except for a
    blackout, a fault waits until the trainer reports another serving replica that is not frozen.
    """

    def __init__(
        self,
        services: DemoServices,
        *,
        seed: int,
        pause_s: tuple[float, float] = (2.0, 6.0),  # range of pauses before a fault
        kinds: Sequence[FaultKind] = DEFAULT_KINDS,
    ) -> None:
        assert set(kinds) <= set(get_args(FaultKind))
        self.faults: list[Fault] = []
        self.num_replaced = 0
        self._services = services
        self._random = random.Random(seed)
        self._pause_s = pause_s
        self._kinds = kinds
        self._hit: set[ServiceProcess] = set()  # unusable until thawed or replaced
        self._thawing: dict[ServiceProcess, asyncio.Task[None]] = {}

    def summary(self) -> str:
        if not self.faults:
            return "none"
        counts = Counter(fault.kind for fault in self.faults)
        kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(counts.items()))
        return f"{len(self.faults)} ({kinds}), {self.num_replaced} replicas started again"

    async def run(self) -> None:
        """Inject and replace until cancelled, then thaw every frozen replica."""
        tasks = [asyncio.ensure_future(self._inject_all()), asyncio.ensure_future(self._replace())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in (*tasks, *self._thawing.values()):
                task.cancel()
            for replica in self._thawing:
                replica.thaw()

    async def _inject_all(self) -> None:
        started = time.monotonic()
        services = self._services
        async with TrainerClient(services.trainer.url, api_key=services.api_key) as trainer:
            for kind in self._endless_kinds():
                await asyncio.sleep(self._random.uniform(*self._pause_s))
                victim = None if kind == "blackout" else await self._victim(trainer)
                await self._inject(kind, victim, time.monotonic() - started)

    def _endless_kinds(self) -> Iterator[FaultKind]:
        while True:
            yield from self._random.sample(self._kinds, len(self._kinds))

    async def _victim(self, trainer: TrainerClient) -> ServiceProcess:
        """Wait for two serving replicas, then pick one of them."""
        while True:
            serving = await _serving_urls(trainer)
            candidates = [
                replica
                for replica in self._services.replicas
                if replica.url in serving and not replica.ending and replica not in self._hit
            ]
            if len(candidates) > 1:
                return self._random.choice(candidates)
            await asyncio.sleep(_POLL_S)

    async def _inject(self, kind: FaultKind, victim: ServiceProcess | None, at_s: float) -> None:
        freeze_s = None
        match kind, victim:
            case "blackout", _:
                for replica in self._services.replicas:
                    replica.kill()
            case "kill", ServiceProcess():
                victim.kill()
            case "kill_engine", ServiceProcess():
                if not victim.kill_engine():  # it has just ended on its own
                    return
            case "freeze", ServiceProcess():
                freeze_s = self._random.uniform(*FREEZE_S)
                victim.freeze()
                self._thawing[victim] = asyncio.create_task(self._thaw_later(victim, freeze_s))
            case "drain", ServiceProcess():
                async with RolloutClient(victim.url, api_key=self._services.api_key) as client:
                    try:
                        await client.drain()
                    except ServiceError:  # it has just ended on its own
                        return
        self._hit |= {victim} if victim else set(self._services.replicas)
        self.faults.append(Fault(kind, victim.name if victim else "all", at_s, freeze_s))

    async def _thaw_later(self, replica: ServiceProcess, freeze_s: float) -> None:
        await asyncio.sleep(freeze_s)
        replica.thaw()
        self._hit.discard(replica)
        del self._thawing[replica]

    async def _replace(self) -> None:
        """Start a new replica for each one that has ended, for whatever reason."""
        while True:
            for replica in [r for r in self._services.replicas if r.ending]:
                self._services.replace(replica)
                self.num_replaced += 1
            await asyncio.sleep(_POLL_S)


async def _serving_urls(trainer: TrainerClient) -> set[str]:
    try:
        statuses = (await trainer.replicas()).replicas
    except Unavailable:  # busy; the demo itself notices if the trainer has ended
        return set()
    return {status.url for status in statuses if status.state == "serving"}
