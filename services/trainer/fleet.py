"""The replicas: admit, route, fail over, sync.

    failed ──admit (base, limits, adapter)──▶ serving ──error──▶ failed

Replicas come from a fixed list of URLs. One that fails takes no traffic until it has been admitted
again and holds the newest adapter; its unanswered requests are sampled again elsewhere. Every wait
ends at a deadline.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from services.trainer.policy import PublishedAdapter
from shared.checkpoints import identity_difference
from shared.errors import (
    BaseMismatch,
    InternalError,
    InvalidRequest,
    NotReady,
    Overloaded,
    RunConflict,
    ServiceError,
    Unauthorized,
    Unavailable,
    UnknownPolicy,
)
from shared.rollout_client import RolloutClient
from shared.schemas import (
    BaseIdentity,
    CompletionGroup,
    GenerateRequest,
    PolicyId,
    ReplicaStatus,
    RolloutStatus,
    SyncReceipt,
)

log = logging.getLogger(__name__)
_RETRY_S = 0.5
_ASK_AGAIN_S = 10.0
_MAX_ENGINE_FAILURES = 3  # of one request, before it counts as the request's fault


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a run asks of a replica before it may serve."""

    run_id: str
    base: BaseIdentity
    lora_rank: int
    num_context_tokens: int  # the longest prompt + max_tokens
    may_replace_run: Callable[[str], bool]  # another run that a replica may serve now


@dataclass(slots=True)
class _Replica:
    client: RolloutClient
    state: Literal["serving", "failed"] = "failed"
    detail: str = "not asked yet"
    policy: PolicyId | None = None  # the newest of this run that it confirmed
    num_outstanding: int = 0
    asked_at: float = -math.inf  # monotonic seconds


class Fleet:
    def __init__(self, clients: Sequence[RolloutClient]) -> None:
        self._replicas = [_Replica(client) for client in clients]
        self._requirements: Requirements | None = None
        self._adapter: PublishedAdapter | None = None
        self._admitting = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._replicas)

    def status(self) -> tuple[ReplicaStatus, ...]:
        return tuple(
            ReplicaStatus(
                id=replica.client.url.partition("://")[2],
                url=replica.client.url,
                state=replica.state,
                detail=replica.detail,
                policy=replica.policy,
                num_outstanding_completions=replica.num_outstanding,
            )
            for replica in self._replicas
        )

    async def aclose(self) -> None:
        for replica in self._replicas:
            await replica.client.aclose()

    # --- admission ------------------------------------------------------------------------------

    async def begin(self, requirements: Requirements, *, timeout_s: float) -> None:
        """Start serving a run: wait until one replica is ready and fits it.

        Raises what makes a replica unfit (BaseMismatch, InvalidRequest, RunConflict), and
        Unavailable at the deadline.
        """
        self._requirements, self._adapter = requirements, None
        for replica in self._replicas:
            replica.state, replica.detail, replica.policy = "failed", "not admitted yet", None
        if self._replicas:
            await self._wait_for_serving(time.monotonic() + timeout_s)

    async def _wait_for_serving(self, deadline: float) -> list[_Replica]:
        """The serving replicas; when there are none, admit until there is one."""
        while True:
            if serving := [r for r in self._replicas if r.state == "serving"]:
                return serving
            await self._admit_failed()
            if any(r.state == "serving" for r in self._replicas):
                continue
            if time.monotonic() > deadline:
                details = "; ".join(f"{r.client.url}: {r.detail}" for r in self._replicas)
                raise Unavailable(f"no replica is ready ({details}): start one, or see its log")
            await asyncio.sleep(_RETRY_S)

    async def _admit_failed(self, *, due_only: bool = False) -> None:
        """Ask failed replicas again. Raises when all replicas are unfit for the run.

        With `due_only` those that were asked a moment ago are left out: while others serve, a
        replica that hangs must not slow every step.
        """
        async with self._admitting:
            now = time.monotonic()
            failed = [r for r in self._replicas if r.state == "failed"]
            if due_only:
                failed = [r for r in failed if now - r.asked_at > _ASK_AGAIN_S]
            for replica in failed:
                replica.asked_at = now
            unfit = [e for e in await asyncio.gather(*map(self._admit, failed)) if e is not None]
        if unfit and len(unfit) == len(self._replicas):
            raise unfit[0]

    async def _admit(self, replica: _Replica) -> ServiceError | None:
        """Make one replica serving, or say in its detail why not; returns a permanent reason."""
        try:
            status = await replica.client.status()
            if status.state != "ready":
                raise NotReady(f"{status.state}: {status.detail}")
            self._check_fit(status)
            replica.policy = None
            if self._adapter is not None:
                await self._push(replica, self._adapter, timeout_s=60.0)
        except Unavailable as error:
            if replica.detail != error.detail:
                log.warning("replica %s is not ready: %s", replica.client.url, error.detail)
            replica.detail = error.detail
            return None
        except Unauthorized:
            replica.detail = "it refuses the trainer's key"
            return Unauthorized(
                f"replica {replica.client.url} refuses the trainer's key: start both with the same "
                "TANDEM_API_KEY"
            )
        except ServiceError as error:
            if replica.detail != error.detail:
                log.error("replica %s cannot serve: %s", replica.client.url, error.detail)
            replica.detail = error.detail
            return error
        replica.state, replica.detail = "serving", ""
        log.info("replica %s serves policy %s", replica.client.url, replica.policy or "base")
        return None

    def _check_fit(self, status: RolloutStatus) -> None:
        wanted = self._requirements
        assert wanted, "begin() was not called"
        assert status.base, "a ready replica knows its base"
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
        is_ours = current.is_base or current.run_id == wanted.run_id
        if not is_ours and not wanted.may_replace_run(current.run_id):
            raise RunConflict(
                f"a replica still serves run {current.run_id!r} of another trainer: if that has "
                "ended, set replace_run: true in the run config"
            )

    def _fail(self, replica: _Replica, error: ServiceError) -> None:
        if replica.state == "serving":
            log.warning("replica %s failed: %s", replica.client.url, error.detail)
        replica.state, replica.detail = "failed", error.detail

    # --- generate -------------------------------------------------------------------------------

    async def generate(
        self, requests: Sequence[GenerateRequest], *, timeout_s: float
    ) -> list[CompletionGroup]:
        """The groups of all requests, in order. A lost request is sampled again elsewhere.

        Raises Unavailable when no replica answers before the deadline.
        """
        deadline = time.monotonic() + timeout_s
        tasks = [asyncio.ensure_future(self._generate(r, deadline)) for r in requests]
        try:
            return [group for groups in await asyncio.gather(*tasks) for group in groups]
        finally:
            for task in tasks:
                task.cancel()

    async def _generate(
        self, request: GenerateRequest, deadline: float
    ) -> tuple[CompletionGroup, ...]:
        num_completions = len(request.prompts) * request.sampling.n
        num_engine_failures = 0
        while True:
            serving = await self._wait_for_serving(deadline)
            replica = min(serving, key=lambda r: r.num_outstanding)
            remaining_s = max(0.1, deadline - time.monotonic())
            replica.num_outstanding += num_completions
            try:
                groups = (await replica.client.generate(request, timeout_s=remaining_s)).groups
            except Overloaded as error:
                await asyncio.sleep(error.retry_after_s or _RETRY_S)
            except (Unavailable, UnknownPolicy) as error:
                self._fail(replica, error)
            except InternalError as error:
                self._fail(replica, error)
                num_engine_failures += 1
                if num_engine_failures == _MAX_ENGINE_FAILURES:
                    raise
            else:
                if not any(c.finish_reason == "interrupted" for g in groups for c in g.completions):
                    return groups
                log.warning("replica %s interrupted a request", replica.client.url)
            finally:
                replica.num_outstanding -= num_completions
            if time.monotonic() > deadline:
                raise Unavailable(f"no replica answered a request in time: {replica.detail}")

    # --- sync -----------------------------------------------------------------------------------

    async def sync(self, adapter: PublishedAdapter, *, timeout_s: float) -> tuple[SyncReceipt, ...]:
        """Push an adapter to every serving replica at once, and to failed ones as they return.

        At least one replica has it on return. Raises Unavailable at the deadline, and the refusal
        when every replica refuses it.
        """
        deadline = time.monotonic() + timeout_s
        self._adapter = adapter
        serving = [r for r in self._replicas if r.state == "serving"]
        pushes = await asyncio.gather(*(self._try_push(r, adapter, timeout_s) for r in serving))
        await self._admit_failed(due_only=True)
        if self._replicas:
            await self._wait_for_serving(deadline)
        return tuple(receipt for receipt in pushes if receipt is not None)

    async def _try_push(
        self, replica: _Replica, adapter: PublishedAdapter, timeout_s: float
    ) -> SyncReceipt | None:
        try:
            return await self._push(replica, adapter, timeout_s)
        except ServiceError as error:  # whether for ever, its next admission says
            self._fail(replica, error)
            return None

    async def _push(
        self, replica: _Replica, adapter: PublishedAdapter, timeout_s: float
    ) -> SyncReceipt:
        receipt = await replica.client.sync_weights(
            adapter.content,
            digest=adapter.content_digest,
            replace_run=replica.policy is None,  # admission allowed it; later a conflict is one
            timeout_s=timeout_s,
        )
        replica.policy = receipt.policy
        return receipt
