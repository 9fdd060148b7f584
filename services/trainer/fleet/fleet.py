"""The replicas: find them, route to them, carry on where one stops, sync.

    names, registrations ─▶ members ─▶ route ─▶ stream ─▶ draft ─▶ groups
                               ▲                  │ ended early
                               └──────────────────┘ the rest goes to another member

Each member keeps itself proven and up to date (member.py); the fleet says what the goal is, and
waits. Every wait ends at a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from services.background import Background
from services.generation import Draft, Part
from services.trainer.fleet.discovery import addresses, replica_id
from services.trainer.fleet.member import Goal, Load, Member, Requirements, now, pause_s
from services.trainer.policy.adapter import PublishedAdapter
from shared.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServiceError,
    Unavailable,
    UnknownPolicy,
)
from shared.metrics import TrainerMetrics
from shared.rollout_client import RolloutClient
from shared.schemas import (
    CompletionGroup,
    GenerateRequest,
    PolicyId,
    ReplicaRegistration,
    ReplicaState,
    ReplicaStatus,
    SyncReceipt,
)

log = logging.getLogger(__name__)
_WAIT_S = 1.0  # How often a waiter looks again, even if nobody wakes it.
_GONE_SHOWN_S = 60.0
# A request that fails this often on different replicas is taken to be at fault itself.
_MAX_FAULTS = 3
_NO_PROGRESS_PAUSE_S = 0.05
_SAY_STALLED_EVERY_S = 30.0
_MIN_GRACE_S = 0.1  # Least time for stragglers of a sync; they get at least what the others took.


class Fleet:
    def __init__(
        self,
        urls: Sequence[str],
        *,
        connect: Callable[[str], RolloutClient],
        probe_interval_s: float = 1.0,
        probe_timeout_s: float = 5.0,
        metrics: TrainerMetrics | None = None,
        resolve: Callable[[str], Awaitable[set[str] | None]] = addresses,
    ) -> None:
        self._urls = urls
        self._connect = connect
        self._interval_s = probe_interval_s
        self._probe_timeout_s = probe_timeout_s
        self._metrics = metrics
        self._resolve = resolve
        self._members: dict[str, Member] = {}
        self._background = Background(
            lambda task: metrics.failures.labels(task).inc() if metrics else None
        )
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._nowhere: list[str] = []  # Configured names that have no address.
        self._goal: Goal | None = None
        self._changed = asyncio.Event()
        self._said_stalled_at = -math.inf  # On the clock of now().
        self.num_continued = 0  # Completions so far that took more than one stream.

    def __len__(self) -> int:
        return sum(member.state != "gone" for member in self._members.values())

    def status(self) -> tuple[ReplicaStatus, ...]:
        return tuple(member.status() for member in self._members.values())

    def num_serving(self, policy: PolicyId) -> int:
        return sum(member.serves(policy) for member in self._members.values())

    def seconds(self) -> tuple[float, float]:
        """(with a request, serving): totals over all replicas so far, whose difference is idle
        time."""
        seconds = [member.seconds() for member in self._members.values()]
        return sum(busy for busy, _ in seconds), sum(serving for _, serving in seconds)

    # --- who is in it ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start looking for replicas. Call from the event loop."""
        if self._looking is None:
            self._looking = self._background.repeat(
                "the search for replicas", self.look, pause_s=self._interval_s
            )

    async def aclose(self) -> None:
        await self._background.aclose()
        for member in self._members.values():
            await member.client.aclose()

    async def look(self) -> None:
        """Update the configured addresses, and drop members whose lease has ended."""
        found = await asyncio.gather(*map(self._resolve, self._urls))
        nowhere = [url for url, urls in zip(self._urls, found, strict=True) if urls == set()]
        if nowhere != self._nowhere:
            self._nowhere = nowhere
            if nowhere:
                log.warning("no address is known for %s: is the name right?", ", ".join(nowhere))
        if None not in found:  # Otherwise the resolver is away, and known replicas stay.
            listed = {url for urls in found if urls for url in urls}
            for url in listed:
                self._join(url, "configured")
            for member in self._members.values():
                member.is_configured = member.client.url in listed
        for member in list(self._members.values()):
            is_past = member.gone_at is not None and now() - member.gone_at > _GONE_SHOWN_S
            if is_past and not member.is_listed and not member.num_outstanding:
                await self._forget(member)

    def _join(self, url: str, source: str) -> Member:
        identity = replica_id(url)
        if member := self._members.get(identity):
            return member
        member = self._members[identity] = Member(
            self._connect(url),
            interval_s=self._interval_s,
            probe_timeout_s=self._probe_timeout_s,
            on_change=self._on_change,
            find_twin=self._find_twin,
        )
        log.info("replica %s is known: %s", identity, source)
        if self._metrics:
            self._metrics.record_replica(identity, member.state, member.state)
        member.assign(self._goal)
        self._keepers[identity] = self._background.repeat(
            "the care of a replica", member.keep, pause_s=self._interval_s
        )
        return member

    async def _forget(self, member: Member) -> None:
        self._keepers.pop(member.id).cancel()
        del self._members[member.id]
        await member.client.aclose()

    def register(self, registration: ReplicaRegistration) -> ReplicaStatus:
        """Add a replica that registers itself, or that an operator registers; a lease limits it in
        time."""
        url = registration.url.rstrip("/")
        member = self._join(url, "registered")
        member.lease_until = now() + (registration.lease_s or math.inf)
        # Renewing the same process is no reason to trust it again.
        known = (member.boot_id, member.announced_boot_id)
        member.announced_boot_id = registration.boot_id
        if registration.lease_s is None or registration.boot_id not in known:
            member.welcome()
        return member.status()

    def remove(self, identity: str) -> ReplicaStatus:
        """Take a replica out of the fleet; it finishes its requests. Raises NotFound."""
        if identity not in self._members:
            known = ", ".join(self._members) or "none"
            raise NotFound(f"there is no replica {identity!r}; known are: {known}")
        self._members[identity].remove()
        return self._members[identity].status()

    def _find_twin(self, member: Member, boot_id: str) -> Member | None:
        """Another member that is the same process under another address."""
        for other in self._members.values():
            is_twin = other is not member and other.boot_id == boot_id
            if is_twin and other.state in ("serving", "admitting"):
                return other
        return None

    # --- changes --------------------------------------------------------------------------------

    def _on_change(self, member: Member, old: ReplicaState) -> None:
        if self._metrics and member.state != old:
            self._metrics.record_replica(member.id, old, member.state)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self, deadline: float) -> None:
        """Wait until something changes, or for a moment."""
        wait_s = min(_WAIT_S, max(0.01, deadline - now()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._changed.wait()

    async def _stalled(self, policy: PolicyId, *, since: float, deadline: float) -> None:
        """Wait for replicas that serve `policy`, and log why when it takes long."""
        if now() - max(since, self._said_stalled_at) > _SAY_STALLED_EVERY_S:
            self._said_stalled_at = now()
            log.warning("waiting: %s", self._serving_report(policy))
        await self._change(deadline)

    def _serving_report(self, policy: PolicyId) -> str:
        assert self._goal
        num_needed = self._goal.requirements.min_ready_replicas
        return (
            f"{self.num_serving(policy)} of {num_needed} replicas that must serve policy {policy} "
            f"do ({self.details()})"
        )

    def obstacle(self) -> str | None:
        """Why too few replicas serve or load the newest policy; None while a sync makes
        progress."""
        if self._goal is None:
            return None
        num_needed, newest = self._goal.requirements.min_ready_replicas, self._goal.newest
        serving = [member for member in self._members.values() if member.state == "serving"]
        failed_sync = any(member.detail for member in serving)
        if len(serving) < num_needed or (failed_sync and self.num_serving(newest) < num_needed):
            return self._serving_report(newest)
        return None

    def details(self) -> str:
        """The state of each replica with its reason, and the names that have no address."""
        known = [f"{m.client.url} {m.state} {m.detail}".rstrip() for m in self._members.values()]
        known += [f"{url} has no address: is the name right?" for url in self._nowhere]
        return "; ".join(known) or (
            "no replica is known: set TRAINER_ROLLOUT_URLS, or start one with ROLLOUT_TRAINER_URL"
        )

    # --- a run ----------------------------------------------------------------------------------

    async def begin(
        self,
        requirements: Requirements,
        *,
        timeout_s: float,
        adapter: PublishedAdapter | None = None,
    ) -> None:
        """Start serving a run at `adapter`, or at its base; returns once enough replicas serve it.

        Raises what makes every replica unfit (BaseMismatch, InvalidRequest, RunConflict,
        ConformanceFailed), and Unavailable at the deadline.
        """
        newest = adapter.policy if adapter else requirements.run
        self._goal = Goal(requirements, newest, {newest: adapter} if adapter else {})
        if adapter and requirements.prover:
            requirements.prover.remember(adapter)
        for member in self._members.values():
            member.assign(self._goal)
        await self._wait_for_newest(deadline=now() + timeout_s)

    async def sync(self, adapter: PublishedAdapter, *, timeout_s: float) -> tuple[SyncReceipt, ...]:
        """Make `adapter` the goal of all replicas; returns once enough of them serve it.

        Slower replicas are not waited for: they get no requests for the new version until they have
        it. Raises Unavailable at the deadline, and the refusal when every replica refuses it.
        """
        assert self._goal, "begin() was not called"
        goal, started = self._goal, now()
        if prover := goal.requirements.prover:
            prover.remember(adapter)
        goal.adapters[adapter.policy] = adapter
        goal.newest = adapter.policy
        self._drop_unused(goal)
        for member in self._members.values():
            member.wake()
        await self._wait_for_newest(deadline=started + timeout_s)
        if self._metrics:
            self._metrics.syncs.observe(now() - started)
        serving = [m for m in self._members.values() if m.serves(adapter.policy)]
        return tuple(member.receipts[adapter.policy] for member in serving)

    @contextlib.asynccontextmanager
    async def beside(self, adapter: PublishedAdapter, *, timeout_s: float) -> AsyncIterator[None]:
        """Inside, replicas serve `adapter` as well: a version of the run that is not its newest.

        Entered once enough of them do. Raises as `sync` does.
        """
        assert self._goal, "begin() was not called"
        goal, policy = self._goal, adapter.policy
        if prover := goal.requirements.prover:
            prover.remember(adapter)
        goal.beside[policy] = adapter
        try:
            # Mark it used before waiting: another request may end meanwhile.
            with goal.using(policy):
                for member in self._members.values():
                    member.wake()
                await self._wait_for(policy, deadline=now() + timeout_s)
                yield
        finally:
            if not goal.in_use[policy]:  # No other request uses it.
                goal.beside.pop(policy, None)

    async def _wait_for(self, policy: PolicyId, *, deadline: float) -> None:
        """Wait until enough members serve `policy`."""
        assert self._goal
        num_replicas, started = self._goal.requirements.min_ready_replicas, now()
        while self.num_serving(policy) < num_replicas:
            errors = [member.error for member in self._members.values() if member.state != "gone"]
            if errors and all(errors) and errors[0]:
                raise errors[0]
            if now() > deadline:
                raise Unavailable(f"{self._serving_report(policy)}: start one, or see its log")
            await self._stalled(policy, since=started, deadline=deadline)

    async def _wait_for_newest(self, *, deadline: float) -> None:
        """Wait until enough members serve the goal, and a moment longer for those that almost
        do."""
        assert self._goal
        goal, started = self._goal, now()
        await self._wait_for(goal.newest, deadline=deadline)
        grace_until = now() + max(_MIN_GRACE_S, now() - started)
        while now() < grace_until and any(
            member.state in ("serving", "admitting") and not member.serves(goal.newest)
            for member in self._members.values()
        ):
            await self._change(grace_until)

    def _drop_unused(self, goal: Goal) -> None:
        for policy in list(goal.adapters):
            if policy != goal.newest and not goal.in_use[policy]:
                del goal.adapters[policy]

    # --- generate -------------------------------------------------------------------------------

    async def generate(
        self, requests: Sequence[GenerateRequest], *, timeout_s: float
    ) -> list[CompletionGroup]:
        """The groups of all requests, in order; each request goes to one replica.

        What a replica does not finish is continued on another. Raises Unavailable when that is not
        possible before the deadline.
        """
        deadline = now() + timeout_s
        tasks = [asyncio.ensure_future(self._generate(r, deadline)) for r in requests]
        try:
            return [group for groups in await asyncio.gather(*tasks) for group in groups]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _generate(self, request: GenerateRequest, deadline: float) -> list[CompletionGroup]:
        assert self._goal, "begin() was not called"
        draft, policy = Draft(request), request.policy or self._goal.newest
        faults: list[ServiceError] = []  # Errors that the request itself may have caused.
        with self._goal.using(policy):
            while not draft.is_complete:
                member, policy = await self._route(policy, deadline)
                num_tokens = draft.num_tokens
                errors = await self._attempt(member, draft, policy, deadline)
                for error in errors:
                    if self._learn_from(member, policy, error):
                        faults.append(error)
                if len(faults) >= _MAX_FAULTS:
                    raise faults[-1]
                if not errors:
                    member.num_failures = 0
                    if not draft.is_complete:  # Interrupted by a newer version or by a drain.
                        log.info("replica %s interrupted a request", member.id)
                        member.wake()
                        if self._goal.requirements.in_flight == "continue":
                            policy = self._goal.newest
                if draft.num_tokens == num_tokens:
                    await asyncio.sleep(_NO_PROGRESS_PAUSE_S)
        self.num_continued += draft.num_continued
        return draft.groups()

    async def _route(self, policy: PolicyId, deadline: float) -> tuple[Member, PolicyId]:
        """The member with the fewest outstanding tokens that serves `policy`.

        If none does, one that serves the newest version, unless `policy` is not of the same line.
        """
        assert self._goal
        started = now()
        while True:
            if now() > deadline:
                raise Unavailable(
                    f"a request for policy {policy} was not completed in time ({self.details()}): "
                    "start more replicas, or raise generate_timeout_s"
                )
            for wanted in (policy,) if policy in self._goal.beside else (policy, self._goal.newest):
                serving = [m for m in self._members.values() if m.serves(wanted)]
                free = [m for m in serving if m.busy_until <= now()]
                if free:
                    return min(free, key=lambda m: m.num_outstanding_tokens), wanted
                if serving:
                    break  # Some are only busy and become free again.
            if serving:
                await self._change(min(deadline, *(m.busy_until for m in serving)))
            else:
                await self._stalled(policy, since=started, deadline=deadline)

    async def _attempt(
        self, member: Member, draft: Draft, policy: PolicyId, deadline: float
    ) -> list[ServiceError]:
        """Stream what the draft lacks from one member; returns the errors that ended streams
        early."""
        parts, boot_id = draft.parts(policy), member.boot_id
        num_completions = sum(part.num_completions for part in parts)
        num_tokens = sum(part.num_tokens for part in parts)

        async def stream(part: Part, load: Load) -> None:
            records = member.client.stream(
                part.request,
                timeout_s=max(0.1, deadline - now()),
                silence_s=2 * self._probe_timeout_s,
            )
            async with contextlib.aclosing(records):
                async for record in records:
                    if record.kind == "tokens":
                        member.received(load, len(record.token_ids))
                    elif record.boot_id != boot_id:  # Nothing is proven about this process.
                        raise Unavailable(f"{member.client.url} restarted")
                    draft.add(part, record)

        with member.carrying(num_completions, num_tokens) as load:
            outcomes = await asyncio.gather(
                *(stream(part, load) for part in parts), return_exceptions=True
            )
        errors = []
        for outcome in outcomes:
            if isinstance(outcome, ServiceError):
                errors.append(outcome)
            elif outcome is not None:
                raise outcome
        return errors

    def _learn_from(self, member: Member, policy: PolicyId, error: ServiceError) -> bool:
        """Update the member from an error; True when the request itself may be at fault."""
        log.info("replica %s ended a request early: %s", member.id, error.detail)
        if self._metrics:
            self._metrics.request_errors.labels(type(error).__name__).inc()
        match error:
            case Overloaded():
                member.busy_until = now() + pause_s(error, _WAIT_S)
            case DeadlineExceeded():
                pass  # It hit our time limit or the replica's: continue the rest.
            case UnknownPolicy() if not policy.is_base:
                member.lacks(policy)
            case InvalidRequest():
                member.wake()
                return True
            case InternalError():
                member.fail(error)
                return True
            case _:
                member.fail(error)
        return False
