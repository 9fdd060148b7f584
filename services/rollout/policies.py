"""Which policy versions are resident: admit, lease, retire.

    admit(adapter) ─▶ [slot] ─▶ newest ─▶ older ─▶ superseded ─▶ (no lease left) ─▶ retired

A version is an immutable adapter under an engine name and id of its own. A lease counts a running
request; a leased version is never unloaded, so the engine never evicts and reloads by itself.

A probe is an adapter that shows whether adapters work here. It belongs to no run, is scored under
once, and leaves: nothing that serves changes by it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from services.background import Background
from services.rollout.engine import Adapter, Engine
from shared.adapters import ADAPTER_WEIGHTS
from shared.errors import InvalidRequest, NoFreeSlot, RunConflict, StaleVersion, UnknownPolicy
from shared.schemas import BASE_POLICY, AdapterManifest, PolicyId, ResidentPolicy

log = logging.getLogger(__name__)
_INTERRUPT_ATTEMPTS, _INTERRUPT_PAUSE_S = 20, 0.02


@dataclass(frozen=True, slots=True)
class VerifiedAdapter:
    """An adapter file that passed every check and waits in `path` for a slot."""

    manifest: AdapterManifest
    digest: str  # SHA-256 in hex.
    path: Path
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Admission:
    outcome: Literal["loaded", "already_resident"]
    retired: tuple[PolicyId, ...]
    wait_s: float
    load_s: float


@dataclass(frozen=True, slots=True)
class Lease:
    policy: PolicyId
    adapter: Adapter | None  # None for the base.


@dataclass(frozen=True, slots=True)
class EngineCall:
    what: str  # As a past participle with its object.
    since: float  # On the monotonic clock.

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.since


@dataclass(slots=True, eq=False)
class _Resident:
    policy: PolicyId
    adapter: Adapter
    digest: str
    num_bytes: int
    is_probe: bool
    superseded: bool = False
    num_leases: int = 0
    interruptible: set[str] = field(default_factory=set)  # Ids of interruptible requests.


class PolicyStore:
    def __init__(
        self,
        engine: Engine,
        *,
        max_live_policies: int,
        wait_s: float,
        merges: bool = False,
        background: Background | None = None,
    ) -> None:
        """`merges`: the engine holds one version at a time (ROLLOUT_SERVING_MODE=merged)."""
        self.newest: PolicyId = BASE_POLICY
        self.engine_call: EngineCall | None = None  # What the engine is to do with an adapter.
        self._engine = engine
        self._max_live = max_live_policies
        self._num_slots = max_live_policies + 1
        self._wait_s = wait_s
        self._merges = merges
        self._on_the_base: set[str] = set()  # Ids of interruptible requests on the base.
        self._resident: list[_Resident] = []
        self._slot_ids = itertools.count(1)
        self._admitting = asyncio.Lock()
        self._released = asyncio.Condition()
        self._background = background or Background()

    def resident(self) -> tuple[ResidentPolicy, ...]:
        return tuple(
            ResidentPolicy(
                policy=item.policy,
                digest=item.digest,
                num_bytes=item.num_bytes,
                num_leases=item.num_leases,
                accepts_requests=not (item.superseded or item.is_probe),
            )
            for item in self._resident
        )

    def adapter_file(self, version: int) -> Path:
        """The file of a resident version of the current run. Raises UnknownPolicy."""
        policy = self.newest.model_copy(update={"version": version})
        return self._find(policy, probes=False).adapter.path / ADAPTER_WEIGHTS

    def holds(self, path: Path) -> bool:
        """True when a resident version lives in the folder `path`."""
        return any(item.adapter.path == path for item in self._resident)

    # --- lease ----------------------------------------------------------------------------------

    @contextmanager
    def lease(
        self, policy: PolicyId | None, request_id: str, *, interruptible: bool
    ) -> Iterator[Lease]:
        """Hold a version while a request runs under it; without `policy` the newest.

        Version 0 of any run is the base and needs no slot. A probe takes only what is not
        interruptible: scores. Raises UnknownPolicy.
        """
        policy = policy or self.newest
        if policy.is_base:
            if interruptible:
                self._on_the_base.add(request_id)
            try:
                yield Lease(policy, None)
            finally:
                self.ended(request_id)
            return
        item = self._find(policy, probes=not interruptible)
        item.num_leases += 1
        if interruptible:
            item.interruptible.add(request_id)
        try:
            yield Lease(policy, item.adapter)
        finally:
            item.num_leases -= 1
            item.interruptible.discard(request_id)
            if item.num_leases == 0:
                item.superseded |= item.is_probe
                self._background.run("retiring a version", self._after_release(item))

    def ended(self, request_id: str) -> None:
        """Nothing of a request runs any more, though its lease may still be held."""
        self._on_the_base.discard(request_id)
        for item in self._resident:
            item.interruptible.discard(request_id)

    def _find(self, policy: PolicyId, *, probes: bool) -> _Resident:
        item = self._current(policy)
        if item is None or (item.is_probe and not probes):
            resident = [str(i.policy) for i in self.resident() if i.accepts_requests]
            raise UnknownPolicy(
                f"policy {policy} is not resident here; resident are "
                f"{', '.join(resident) or 'none'} and version 0, the base",
                extra={"resident": resident},
            )
        return item

    def _current(self, policy: PolicyId) -> _Resident | None:
        """The one with that id that is not superseded; superseded ones may still be retiring."""
        found = [i for i in self._resident if i.policy == policy and not i.superseded]
        return found[0] if found else None

    async def _after_release(self, item: _Resident) -> None:
        async with self._released:
            self._released.notify_all()
        if item.superseded:
            async with self._admitting:
                if item.num_leases == 0 and item in self._resident:
                    await self._retire(item)

    # --- admit ----------------------------------------------------------------------------------

    async def admit(
        self,
        adapter: VerifiedAdapter,
        *,
        activate: bool = True,
        replace_run: bool = False,
        in_flight: Literal["finish", "continue"] = "finish",
        probe: bool = False,
    ) -> Admission:
        """Make a verified adapter resident, and with `activate` the newest version; a `probe` never
        is, whatever the other options.

        Raises RunConflict, StaleVersion, NoFreeSlot, or InvalidAdapter from the engine; the
        versions that served before then still serve. Not to be cancelled half-way: shield it.
        """
        async with self._admitting:
            policy = adapter.manifest.policy
            if self.is_resident(adapter, probe=probe):
                if activate and not probe and policy.age_key > self.newest.age_key:
                    await self._activate(policy, in_flight)
                return Admission("already_resident", (), 0.0, 0.0)
            if not probe:
                self.check_order(adapter, activate=activate, replace_run=replace_run)
            if self._merges and not probe:
                _check_merge(policy, activate=activate, in_flight=in_flight)
            started = time.perf_counter()
            retired = await self._free_slot()
            waited = time.perf_counter()
            item = await self._load(adapter, probe=probe)
            loaded = time.perf_counter()
            self._resident.append(item)
            if not probe:
                self._supersede(policy)
                if activate or self.newest.life != policy.life:
                    await self._activate(policy, in_flight)
                retired += await self._retire_surplus(keep=item)
            return Admission("loaded", tuple(retired), waited - started, loaded - waited)

    def is_resident(self, adapter: VerifiedAdapter, *, probe: bool = False) -> bool:
        """True when the same version with the same digest already serves."""
        item = self._current(adapter.manifest.policy)
        if item is None:
            return False
        if item.is_probe != probe:
            raise StaleVersion(
                f"policy {item.policy} is resident as {'a probe' if item.is_probe else 'a version'}"
                ": a probe needs a run_id of its own"
            )
        if item.digest != adapter.digest:
            raise StaleVersion(
                f"policy {item.policy} is resident with digest {item.digest[:12]}…, this adapter "
                f"has {adapter.digest[:12]}…: a version never changes, publish the next one"
            )
        return True

    def check_order(self, adapter: VerifiedAdapter, *, activate: bool, replace_run: bool) -> None:
        """Refuse another run, a lower incarnation, and an older version that would be newest."""
        policy, newest = adapter.manifest.policy, self.newest
        if newest.is_base or policy.run_id != newest.run_id:
            if not newest.is_base and not replace_run:
                raise RunConflict(
                    f"this replica serves run {newest.run_id!r} (policy {newest}), the adapter is "
                    f"of run {policy.run_id!r}: send ?replace_run=true to end the current run here",
                    extra={"current": newest.model_dump()},
                )
            return
        superseded = policy.incarnation < newest.incarnation
        if superseded or (activate and policy.age_key <= newest.age_key):
            raise StaleVersion(
                f"policy {policy} is older than {newest}, which serves here: versions only grow "
                "within an incarnation",
                extra={"current": newest.model_dump()},
            )

    async def _load(self, adapter: VerifiedAdapter, *, probe: bool) -> _Resident:
        policy, slot_id = adapter.manifest.policy, next(self._slot_ids)
        name = f"{policy}-{adapter.digest[:8]}-{slot_id}"
        engine_adapter = Adapter(slot_id=slot_id, name=name, path=adapter.path)
        with self._calling("loaded an adapter"):
            await self._engine.load_adapter(engine_adapter)
        return _Resident(policy, engine_adapter, adapter.digest, adapter.num_bytes, probe)

    def _supersede(self, policy: PolicyId) -> None:
        """Close the versions of another run or a lower incarnation to new requests."""
        for item in self._resident:
            if item.policy.life != policy.life and not item.is_probe:
                item.superseded = True

    async def _activate(self, policy: PolicyId, in_flight: Literal["finish", "continue"]) -> None:
        self.newest = policy
        if self._merges:
            for item in self._resident:
                item.superseded |= item.policy != policy and not item.is_probe
        if in_flight == "continue":
            await self._interrupt_all_but(policy)

    async def _interrupt_all_but(self, policy: PolicyId) -> None:
        """End the running completions of other versions; a request may still be on its way in."""
        for _ in range(_INTERRUPT_ATTEMPTS):
            others = [item for item in self._resident if item.policy != policy]
            request_ids = [request_id for item in others for request_id in item.interruptible]
            if self._merges:  # Otherwise the base runs next to the adapters.
                request_ids += self._on_the_base
            if not request_ids:
                return
            await self._engine.interrupt(request_ids)
            await asyncio.sleep(_INTERRUPT_PAUSE_S)
        log.warning("%d completions went on under their version", len(request_ids))

    # --- retire ---------------------------------------------------------------------------------

    async def _free_slot(self) -> list[PolicyId]:
        """Wait, bounded, until fewer versions are resident than there are slots.

        The newest stays: should the next one fail to load, it still serves.
        """
        retired: list[PolicyId] = []
        while len(self._resident) >= self._num_slots:
            try:
                async with asyncio.timeout(self._wait_s), self._released:
                    await self._released.wait_for(self._idle)
            except TimeoutError:
                leases = ", ".join(f"{i.policy} × {i.num_leases}" for i in self._by_age())
                raise NoFreeSlot(
                    f"all {self._num_slots} adapter slots are in use after {self._wait_s:g} s "
                    f"({leases}): send it again, or raise ROLLOUT_MAX_LIVE_POLICIES",
                    retry_after_s=1.0,
                ) from None
            retired.append(await self._retire(self._idle()[0]))
        return retired

    def _idle(self) -> list[_Resident]:
        """What could be retired now: probes first, then superseded versions, then the oldest."""
        return [i for i in self._by_age() if not i.num_leases and i.policy != self.newest]

    async def _retire_surplus(self, keep: _Resident) -> list[PolicyId]:
        """Keep one slot free for the next version where leases allow it, and `keep` resident."""
        retired = []
        for item in self._idle():
            if item is keep:
                continue
            if item.superseded or len(self._resident) > self._max_live:
                retired.append(await self._retire(item))
        return retired

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        """Show a call that the engine may never answer; the admission lock allows one at a time."""
        self.engine_call = EngineCall(what, time.monotonic())
        try:
            yield
        finally:
            self.engine_call = None

    def _by_age(self) -> list[_Resident]:
        return sorted(
            self._resident, key=lambda i: (not i.is_probe, not i.superseded, i.policy.age_key)
        )

    async def _retire(self, item: _Resident) -> PolicyId:
        assert item.num_leases == 0, f"{item.policy} is leased"
        self._resident.remove(item)
        with self._calling("removed an adapter"):
            await self._engine.unload_adapter(item.adapter)
        shutil.rmtree(item.adapter.path)
        log.info("retired policy %s", item.policy)
        return item.policy


def _check_merge(
    policy: PolicyId, *, activate: bool, in_flight: Literal["finish", "continue"]
) -> None:
    """Refuse what a replica cannot do whose weights hold one version at a time."""
    if not activate:
        raise NoFreeSlot(
            f"policy {policy} cannot be installed next to the newest: this replica merges adapters "
            "into its weights and serves one version at a time"
        )
    if in_flight == "finish":
        raise InvalidRequest(
            f"running completions cannot finish under their version while {policy} comes: this "
            "replica merges adapters into its weights and serves one version at a time; send "
            "?in_flight=continue (in_flight: continue in the run config), or start it with "
            "ROLLOUT_SERVING_MODE=lora"
        )
