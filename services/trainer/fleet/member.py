"""One replica of the fleet: keep it proven and up to date, or out of the way.

    discovered ─▶ admitting ─▶ serving ─▶ draining ─▶ gone
        ▲             │  │        │
        └── failed ───┘  └──▶ quarantined      until it restarts or is registered again

A member has one task, `keep`. Whatever happened before (it joined, it crashed and came back, it
missed a version), the task does the same: look at the replica, and bring it from there to the goal.
Only versions that it was proven to serve, since it was last lost, are routed to it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol

from services.trainer.fleet.discovery import replica_id
from services.trainer.policy.adapter import PublishedAdapter
from shared.errors import (
    BaseMismatch,
    Conflict,
    DeadlineExceeded,
    InternalError,
    InvalidAdapter,
    InvalidRequest,
    NoFreeSlot,
    NotReady,
    RunConflict,
    ServiceError,
    Unauthorized,
    Unavailable,
)
from shared.model_folder import identity_difference
from shared.rollout_client import RolloutClient
from shared.schemas import (
    BaseIdentity,
    PolicyId,
    ReplicaState,
    ReplicaStatus,
    RolloutStatus,
    SyncReceipt,
)

log = logging.getLogger(__name__)
_MAX_SILENT_PROBES = 2
_MAX_BACKOFF_S = 30.0


class Prover(Protocol):
    """Proves that a replica serves what it says (services/trainer/fleet/conformance.py)."""

    def remember(self, adapter: PublishedAdapter) -> None: ...

    async def admit(self, client: RolloutClient, *, run: PolicyId, timeout_s: float) -> float:
        """The noise floor between trainer and replica. Raises ConformanceFailed."""

    async def check(
        self,
        client: RolloutClient,
        adapter: PublishedAdapter,
        *,
        floor: float,
        timeout_s: float,
        scores_base: bool = True,
    ) -> float:
        """The gap under the adapter. Raises ConformanceFailed."""


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a run requires of its replicas."""

    run: PolicyId  # Version 0 of this incarnation of the run.
    base: BaseIdentity
    lora_rank: int
    num_context_tokens: int  # Longest prompt plus max_tokens.
    may_replace_run: Callable[[str], bool]  # Whether a replica may be taken from that run.
    prover: Prover | None = None
    min_ready_replicas: int = 1
    in_flight: Literal["finish", "continue"] = "finish"
    sync_timeout_s: float = 120.0


@dataclass(slots=True)
class Goal:
    """What every replica has to serve: the newest version, at admission the versions that running
    requests still use, and the adapters that were requested next to them."""

    requirements: Requirements
    newest: PolicyId
    adapters: dict[PolicyId, PublishedAdapter] = field(default_factory=dict)
    beside: dict[PolicyId, PublishedAdapter] = field(default_factory=dict)
    in_use: Counter[PolicyId] = field(default_factory=Counter)  # Running requests per version.

    @contextmanager
    def using(self, policy: PolicyId) -> Iterator[None]:
        """Inside, a replica that joins gets this version as well."""
        self.in_use[policy] += 1
        try:
            yield
        finally:
            self.in_use[policy] -= 1
            if not self.in_use[policy]:
                del self.in_use[policy]


def pause_s(error: ServiceError, default_s: float) -> float:
    """How long to leave a service alone after its error; bounded, whatever it asks for."""
    return min(error.retry_after_s or default_s, _MAX_BACKOFF_S)


def now() -> float:
    """Seconds of the event loop's clock."""
    return asyncio.get_running_loop().time()


class Stopwatch:
    def __init__(self) -> None:
        self._before_s = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self._since = now() if self._since is None else self._since

    def stop(self) -> None:
        self._before_s, self._since = self.total_s, None

    @property
    def total_s(self) -> float:
        return self._before_s + (0.0 if self._since is None else now() - self._since)


@dataclass(slots=True)
class Load:
    """Tokens that one attempt may still produce."""

    num_tokens: int


class Member:
    def __init__(
        self,
        client: RolloutClient,
        *,
        interval_s: float,
        probe_timeout_s: float,
        on_change: Callable[[Member, ReplicaState], None],
        find_twin: Callable[[Member, str], Member | None] = lambda *_: None,
    ) -> None:
        self.client = client
        self.id = replica_id(client.url)
        self.state: ReplicaState = "discovered"
        self.detail = "not asked yet"
        self.boot_id: str | None = None
        self.announced_boot_id: str | None = None  # From its last registration.
        self.error: ServiceError | None = None  # Why it is quarantined.
        self.is_configured = False  # Whether its address is currently configured.
        self.lease_until = -math.inf  # End of its registration, on the clock of now().
        self.is_removed = False  # Removed by an operator, until it restarts or registers again.
        self.gone_at: float | None = None
        self.num_failures = 0
        self.num_outstanding = 0  # In completions.
        self.num_outstanding_tokens = 0
        self.busy_until = 0.0  # It answered 429 until then, on the clock of now().
        self.receipts: dict[PolicyId, SyncReceipt] = {}  # Receipts of pushed versions.
        self._proven: dict[PolicyId, float] = {}  # Version -> its gap in nats.
        self._floor: float | None = None  # None before it is admitted to this run.
        self._merges = False  # Whether it merges adapters into its weights.
        self._last_sync_s: float | None = None
        self._interval_s = interval_s
        self._probe_timeout_s = probe_timeout_s
        self._on_change = on_change
        self._find_twin = find_twin
        self._goal: Goal | None = None
        self._wake = asyncio.Event()
        self._not_before = 0.0  # The circuit is open until then, on the clock of now().
        self._num_silent_probes = 0
        self._busy, self._serving = Stopwatch(), Stopwatch()

    # --- views ----------------------------------------------------------------------------------

    @property
    def is_listed(self) -> bool:
        """Whether it is configured or registered."""
        return self.is_configured or now() < self.lease_until

    def serves(self, policy: PolicyId) -> bool:
        """Whether requests pinned to `policy` may be sent here."""
        return self.state == "serving" and not self.is_removed and policy in self._proven

    @property
    def newest_proven(self) -> PolicyId | None:
        return max(self._proven, key=lambda policy: policy.age_key, default=None)

    def status(self) -> ReplicaStatus:
        newest = self.newest_proven
        return ReplicaStatus(
            id=self.id,
            url=self.client.url,
            source="configured" if self.is_configured else "registered",
            state=self.state,
            detail=self.detail,
            boot_id=self.boot_id,
            policy=newest,
            num_outstanding_completions=self.num_outstanding,
            num_outstanding_tokens=self.num_outstanding_tokens,
            logprob_gap=self._proven[newest] if newest else None,
            last_sync_s=self._last_sync_s,
            num_failures=self.num_failures,
        )

    def seconds(self) -> tuple[float, float]:
        """(with a request, serving): totals so far."""
        return self._busy.total_s, self._serving.total_s

    # --- what the fleet tells it ----------------------------------------------------------------

    def assign(self, goal: Goal | None) -> None:
        """Begin with a run: admission starts again, and earlier failures are forgotten."""
        self._goal, self._floor, self.error = goal, None, None
        self._forget_versions()
        if self.state not in ("draining", "gone"):
            self._move("discovered", "not admitted yet")
        self.close_circuit()

    def wake(self) -> None:
        """Look at the goal now."""
        self._wake.set()

    def close_circuit(self) -> None:
        """Ask the replica again now, whatever failed before."""
        self.num_failures, self._not_before = 0, 0.0
        self.wake()

    def welcome(self) -> None:
        """The replica registered (again), which ends an earlier removal or quarantine."""
        if self.is_removed or self.state in ("quarantined", "gone"):
            self.is_removed = False
            self._revoke()
            self._move("discovered", "registered")
            self.close_circuit()

    def remove(self) -> None:
        """Take no new requests; gone when the last one has ended."""
        self.is_removed = True
        if self.state != "gone":
            self._move("draining", "removed from the fleet")
        self.wake()

    def fail(self, error: ServiceError) -> None:
        """A request failed here: send nothing until the replica is proven again."""
        if self.state not in ("serving", "admitting"):
            return
        self.num_failures += 1
        doublings = min(self.num_failures - 1, 10)
        backoff_s = min(self._interval_s / 2 * 2.0**doublings, _MAX_BACKOFF_S)
        self._not_before = now() + backoff_s
        self._lose(error)
        self.wake()

    def lacks(self, policy: PolicyId) -> None:
        """The replica answered that it does not have this version."""
        self._proven.pop(policy, None)
        self.receipts.pop(policy, None)
        self.wake()

    @contextmanager
    def carrying(self, num_completions: int, num_tokens: int) -> Iterator[Load]:
        """Count what a request may produce while it runs here, less the tokens that arrived."""
        load = Load(num_tokens)
        self.num_outstanding += num_completions
        self.num_outstanding_tokens += num_tokens
        self._busy.start()
        try:
            yield load
        finally:
            self.num_outstanding -= num_completions
            self.num_outstanding_tokens -= load.num_tokens
            if self.num_outstanding == 0:
                self._busy.stop()
                self.wake()  # A removed one is gone now.

    def received(self, load: Load, num_tokens: int) -> None:
        num_tokens = min(num_tokens, load.num_tokens)
        load.num_tokens -= num_tokens
        self.num_outstanding_tokens -= num_tokens

    # --- its task -------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Bring the replica to the goal, again and again, until the task is cancelled."""
        while True:
            self._wake.clear()
            await self.advance()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._wake.wait()

    async def advance(self) -> None:
        """One look at the replica, and the action that follows from it."""
        if now() < self._not_before:
            return
        try:
            status = await self._probe()
            if status is not None:
                await self._advance(status)
        except Unauthorized:
            self._quarantine(
                Unauthorized(
                    f"replica {self.client.url} refuses the trainer's key: start both with the "
                    "same TANDEM_API_KEY"
                )
            )
        except (Conflict, InvalidAdapter, InvalidRequest) as error:
            self._quarantine(error)
        except ServiceError as error:
            self._fail_or_lose(error)
        except Exception as error:  # The task of a member must not end, whatever fails.
            log.error("looking at replica %s failed", self.id, exc_info=error)
            self._fail_or_lose(InternalError(f"{type(error).__name__}: {error}"))

    def _fail_or_lose(self, error: ServiceError) -> None:
        if self.state in ("serving", "admitting"):
            self.fail(error)
        else:
            self._lose(error)

    async def _probe(self) -> RolloutStatus | None:
        """The replica's status; None when it is slow to answer for the first time."""
        try:
            async with asyncio.timeout(self._probe_timeout_s):
                status = await self.client.status()
        except (TimeoutError, DeadlineExceeded):
            self._num_silent_probes += 1
            if self.state == "serving" and self._num_silent_probes < _MAX_SILENT_PROBES:
                return None
            raise DeadlineExceeded(
                f"{self.client.url}/status gave no answer within {self._probe_timeout_s:g} s"
            ) from None
        self._num_silent_probes = 0
        return status

    async def _advance(self, status: RolloutStatus) -> None:
        if status.boot_id != self.boot_id:
            self._restarted(status.boot_id)
        if self.is_removed:
            if self.num_outstanding == 0:
                self._move("gone", "removed from the fleet")
            return
        if self.state == "quarantined" or (self.state == "gone" and not self.is_listed):
            return
        if status.state == "draining":
            self._move("draining", status.detail)
            return
        if status.state != "ready":
            raise NotReady(f"{status.state}: {status.detail}")
        if twin := self._find_twin(self, status.boot_id):
            raise NotReady(f"it is the same process as {twin.id}, which is in the fleet")
        if (goal := self._goal) is None:
            self._move("discovered", "ready; there is no run")
            return
        try:
            if self.state != "serving":
                self._move("admitting", "checking that it fits the run")
                check_fit(status, goal.requirements)
                self._merges = status.serving_mode == "merged"
            if self._floor is None:
                await self._admit(goal)
            if goal is self._goal:
                await self._catch_up(goal, status)
        except ServiceError:
            if goal is self._goal:
                raise
            return  # The run has ended meanwhile.
        if goal is self._goal and self.state == "admitting":
            self._move("serving", "")

    async def _admit(self, goal: Goal) -> None:
        """Prove that the replica serves the base and applies adapters as the trainer does."""
        wanted, floor = goal.requirements, 0.0
        if wanted.prover:
            floor = await wanted.prover.admit(
                self.client, run=wanted.run, timeout_s=wanted.sync_timeout_s
            )
            log.info("replica %s: logprob gap to the trainer %.4f nats", self.id, floor)
        if goal is self._goal:
            self._floor = floor

    async def _catch_up(self, goal: Goal, status: RolloutStatus) -> None:
        """Push and prove what the replica lacks of the goal."""
        if self.state != "serving":
            self._move("admitting", f"getting policy {goal.newest}")
            # The base is proven by admission.
            self._proven.setdefault(goal.requirements.run, self._floor or 0.0)
            for policy in sorted(goal.adapters, key=lambda policy: policy.age_key):
                older = goal.adapters.get(policy)  # It may have been dropped meanwhile.
                if older and policy != goal.newest and policy not in self._proven:
                    await self._give_older(goal, older)
        else:
            self._drop_retired(status)
        newest = goal.adapters.get(goal.newest)
        if newest and goal.newest not in self._proven:
            try:
                await self._give(goal, newest, activate=True)
            except Unavailable as error:
                if self.state != "serving":
                    raise
                # It serves the versions it has and gets no requests for the one it lacks.
                self._not_before = now() + pause_s(error, self._interval_s)
                self._move("serving", f"has not policy {newest.policy} yet: {error.detail}")
                return
            if self.state == "serving":
                self._move("serving", "")
        for policy, adapter in list(goal.beside.items()):
            if policy not in self._proven:
                await self._give_older(goal, adapter)

    async def _give_older(self, goal: Goal, adapter: PublishedAdapter) -> None:
        try:
            await self._give(goal, adapter, activate=False)
        except NoFreeSlot:
            log.info("replica %s has no slot for policy %s, still in use", self.id, adapter.policy)

    async def _give(self, goal: Goal, adapter: PublishedAdapter, *, activate: bool) -> None:
        """Push one version and prove that it is served."""
        policy, wanted, floor, started = adapter.policy, goal.requirements, self._floor, now()
        if floor is None:  # Admission was revoked meanwhile.
            return
        if policy not in self.receipts:  # Otherwise only its proof failed.
            receipt = await self.client.sync_weights(
                adapter.content,
                digest=adapter.content_digest,
                activate=activate,
                # Allowed by its admission.
                replace_run=all(known.is_base for known in self._proven),
                in_flight=wanted.in_flight,
                timeout_s=wanted.sync_timeout_s,
            )
            if goal is not self._goal or receipt.boot_id != self.boot_id:
                return
            self.receipts[policy] = receipt
        gap = 0.0
        if wanted.prover:
            gap = await wanted.prover.check(
                self.client,
                adapter,
                floor=floor,
                timeout_s=wanted.sync_timeout_s,
                scores_base=not self._merges,
            )
        if goal is not self._goal or policy not in self.receipts:
            return
        self._last_sync_s = now() - started
        self._proven[policy] = gap
        log.info(
            "replica %s serves policy %s after %.3f s, gap %.4f nats",
            self.id,
            policy,
            self._last_sync_s,
            gap,
        )
        self._on_change(self, self.state)

    def _drop_retired(self, status: RolloutStatus) -> None:
        """Forget versions that the replica no longer holds."""
        resident = {item.policy for item in status.resident if item.accepts_requests}
        for policy in [p for p in self._proven if not p.is_base and p not in resident]:
            self.lacks(policy)

    # --- transitions ----------------------------------------------------------------------------

    def _restarted(self, boot_id: str) -> None:
        """Another process answers, so proofs of the previous one are void."""
        if self.boot_id is not None:
            log.warning("replica %s restarted: it is admitted again", self.id)
            self.is_removed = False
        self.boot_id = boot_id
        self._revoke()
        if self.state != "discovered":
            self._move("discovered", "restarted")

    def _lose(self, error: ServiceError) -> None:
        """The replica cannot be used now; it is gone if it is neither configured nor registered."""
        self._forget_versions()
        was_used = self.state in ("serving", "admitting")
        if self.is_removed or not self.is_listed:
            self._move("gone", error.detail)
        elif self.state != "quarantined":
            level = logging.WARNING if was_used else logging.INFO
            self._move("discovered", error.detail, level)

    def _quarantine(self, error: ServiceError) -> None:
        self._forget_versions()
        self.error = error
        self._move("quarantined", error.detail, logging.ERROR)

    def _revoke(self) -> None:
        self._floor, self.error = None, None
        self._forget_versions()

    def _forget_versions(self) -> None:
        self._proven.clear()
        self.receipts.clear()

    def _move(self, state: ReplicaState, detail: str, level: int = logging.INFO) -> None:
        """The only place where the state changes: logged, counted and reported to the fleet."""
        old, old_detail = self.state, self.detail
        self.state, self.detail = state, detail
        if state != old or (detail != old_detail and state != "admitting"):
            change = state if state == old else f"{old} -> {state}"
            log.log(level, "replica %s: %s %s", self.id, change, detail)
        if state == "serving":
            self._serving.start()
        else:
            self._serving.stop()
        if state != "gone":
            self.gone_at = None
        elif old != "gone":
            self.gone_at = now()
        self._on_change(self, old)


def check_fit(status: RolloutStatus, wanted: Requirements) -> None:
    """Refuse a replica that cannot serve the run, before anything is sent to it."""
    if status.base is None:
        raise NotReady("it says that it is ready, and names no base")
    if difference := identity_difference(status.base, wanted.base):
        raise BaseMismatch(
            f"the replica serves another base than the trainer trains ({difference}): set "
            "ROLLOUT_MODEL to TRAINER_MODEL, and ROLLOUT_BASE to nf4-exact for a 4-bit trainer"
        )
    if status.base.recipe is None and wanted.base.recipe:
        log.warning(
            "a replica serves the original 16-bit weights of a 4-bit policy: expect a larger "
            "logprob gap; ROLLOUT_BASE=nf4-exact serves what is trained"
        )
    if status.serving_mode == "merged" and wanted.in_flight == "finish":
        raise InvalidRequest(
            "the replica merges adapters into its weights and serves one version at a time: set "
            "in_flight: continue in the run config, or ROLLOUT_SERVING_MODE=lora; PolicyModel "
            "takes it with serving_mode='merged'"
        )
    if wanted.lora_rank > status.limits.max_lora_rank:
        raise InvalidRequest(
            f"lora.rank is {wanted.lora_rank}, the replica's maximum is "
            f"{status.limits.max_lora_rank}: lower it, or raise ROLLOUT_MAX_LORA_RANK"
        )
    if wanted.num_context_tokens > status.limits.max_model_len:
        raise InvalidRequest(
            f"the longest prompt and max_tokens make {wanted.num_context_tokens} tokens, the "
            f"replica's context has {status.limits.max_model_len}: lower sampling.max_tokens, "
            "or raise ROLLOUT_MAX_MODEL_LEN"
        )
    current = status.newest
    is_ours = current.is_base or current.run_id == wanted.run.run_id
    if not is_ours and not wanted.may_replace_run(current.run_id):
        raise RunConflict(
            f"a replica still serves run {current.run_id!r} of another trainer: if that has "
            "ended, set replace_run: true in the run config, or say it to PolicyModel"
        )
