"""A rollout service simulated in memory behind an httpx transport, for tests of fleet logic.

The id of a token shows which version sampled it: 1000 × version + its position in the completion. A
test can therefore tell from the completions alone whether one is attributed to the wrong policy or
repeats a token.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from services.trainer.policy.adapter import PublishedAdapter
from shared.errors import (
    ConformanceFailed,
    NotReady,
    Overloaded,
    ServiceError,
    StaleVersion,
    UnknownPolicy,
)
from shared.rollout_client import RolloutClient
from shared.schemas import (
    BASE_POLICY,
    AdapterManifest,
    BaseIdentity,
    CompletionGroup,
    GenerateRequest,
    PolicyId,
    ResidentPolicy,
    RolloutLimits,
    RolloutStatus,
    StreamEnd,
    StreamStart,
    StreamTokens,
    SyncReceipt,
    Wire,
)

BASE = BaseIdentity(weights="a" * 64, recipe=None, tokenizer="b" * 64, chat_template=None)
RUN = PolicyId(run_id="ours", version=0)
_LATENCY_S = 0.001
_boots = itertools.count(1)


def adapter_of(policy: PolicyId) -> PublishedAdapter:
    return PublishedAdapter(
        manifest=AdapterManifest(
            policy=policy, base=BASE, rank=16, scaling=1.0, target_modules=("q_proj",)
        ),
        content=policy.model_dump_json().encode(),
        content_digest="sha-256=:AAAA:",
    )


def policy_at(version: int) -> PolicyId:
    return RUN.model_copy(update={"version": version})


@dataclass
class FakeReplica:
    """A simulated replica.

    `crash`, `boot`, `hang`, `wake_up` and `drain` act as a process would; fields set the rest.
    """

    url: str
    token_s: float = 0.01
    upload_s: float = 0.01
    max_live: int = 2
    status_changes: dict[str, Any] = field(default_factory=dict)
    num_busy_answers: int = 0
    refusal: ServiceError | None = None  # raised for every adapter
    failure: ServiceError | None = None  # raised for every request to generate
    only_interrupts: bool = False
    lies: bool = False  # acknowledges a version but keeps serving the previous one
    state: Literal["down", "ready", "draining"] = "ready"
    boot_id: str = ""
    newest: PolicyId = BASE_POLICY
    resident: list[PolicyId] = field(default_factory=list)
    served: PolicyId = BASE_POLICY  # policy that requests for `newest` actually get
    proven: set[PolicyId] = field(default_factory=set)  # checked by FakeProver since the boot
    num_generated: int = 0  # requests to generate that were answered
    num_streams: int = 0
    replaced_run: bool = False
    uploads: list[PolicyId] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._num_interruptions = 0
        self._awake = asyncio.Event()
        self._awake.set()
        self.boot_id = f"boot-{next(_boots)}"

    # --- what happens to it ---------------------------------------------------------------------

    def crash(self) -> None:
        self.state = "down"
        self._awake.set()

    def boot(self) -> None:
        self._awake.set()
        self.state, self.boot_id = "ready", f"boot-{next(_boots)}"
        self.newest, self.served, self.resident, self.proven = BASE_POLICY, BASE_POLICY, [], set()

    def hang(self) -> None:
        self._awake.clear()

    def wake_up(self) -> None:
        self._awake.set()

    def drain(self) -> None:
        if self.state == "ready":
            self.state = "draining"

    # --- HTTP -----------------------------------------------------------------------------------

    def client(self) -> RolloutClient:
        return RolloutClient(self.url, transport=_Transport(self))

    async def answer(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(_LATENCY_S)
        await self._alive(self.boot_id)
        match request.url.path:
            case "/status":
                return _json(self._status())
            case "/generate":
                asked = GenerateRequest.model_validate_json(await request.aread())
                self._check_request(asked)
                return httpx.Response(200, stream=_Body(self._stream(asked)))
            case "/sync_weights":
                return _json(await self._sync(request))
            case path:
                raise AssertionError(path)

    async def _alive(self, boot_id: str) -> None:
        """Wait while the replica hangs; fail as a broken connection if that process has ended."""
        await self._awake.wait()
        if self.state == "down" or self.boot_id != boot_id:
            raise httpx.ReadError("connection reset")

    def _status(self) -> RolloutStatus:
        fields: dict[str, Any] = {
            "state": self.state,
            "detail": "",
            "boot_id": self.boot_id,
            "model": "m",
            "vllm_version": "0",
            "kv_cache_dtype": "auto",
            "base": BASE,
            "limits": RolloutLimits(
                max_model_len=64,
                max_lora_rank=16,
                max_live_policies=self.max_live,
                max_num_seqs=8,
                max_completions=64,
                max_adapter_bytes=1000,
                max_body_bytes=1000,
            ),
            "newest": self.newest,
            "resident": tuple(
                ResidentPolicy(
                    policy=policy, digest="c" * 64, num_bytes=1, num_leases=0, accepts_requests=True
                )
                for policy in self.resident
            ),
            "num_outstanding_completions": self.num_streams,
        }
        return RolloutStatus(**(fields | self.status_changes))

    def _check_request(self, asked: GenerateRequest) -> None:
        assert asked.policy, "the trainer pins"
        assert asked.stream
        if self.state == "draining":
            raise NotReady("draining")
        if self.num_busy_answers:
            self.num_busy_answers -= 1
            raise Overloaded("full", retry_after_s=0.5)
        if self.failure:
            raise self.failure
        if not asked.policy.is_base:
            if asked.policy not in self.resident:
                raise UnknownPolicy("not resident")
            assert asked.policy in self.proven, f"{asked.policy} was not proven in this process"
        self.num_generated += 1

    async def _stream(self, asked: GenerateRequest) -> AsyncIterator[Wire]:
        boot_id, policy = self.boot_id, asked.policy
        assert policy
        num_interruptions = self._num_interruptions
        sampling = asked.sampling
        self.num_streams += 1
        try:
            for group, prompt in enumerate(asked.prompts):
                yield StreamStart(
                    group=group,
                    prompt_token_ids=tuple(prompt),
                    sampling=sampling,
                    policy=policy,
                    boot_id=boot_id,
                )
            for completion in range(sampling.n if self.only_interrupts else 0):
                yield StreamTokens(
                    group=0,
                    completion=completion,
                    token_ids=(),
                    logprobs=(),
                    finish_reason="interrupted",
                )
            assert sampling.max_tokens
            for index in range(0 if self.only_interrupts else sampling.max_tokens):
                await asyncio.sleep(self.token_s)
                await self._alive(boot_id)
                place = len(asked.completion_prefix) + index
                actual = self.served if policy == self.newest else policy
                is_cut = self._num_interruptions != num_interruptions and policy != self.newest
                is_last = index + 1 == sampling.max_tokens
                for group in range(len(asked.prompts)):
                    for completion in range(sampling.n):
                        yield StreamTokens(
                            group=group,
                            completion=completion,
                            token_ids=(1000 * actual.version + place,),
                            logprobs=(-1.0,),
                            finish_reason="length"
                            if is_last
                            else "interrupted"
                            if is_cut
                            else None,
                        )
                if is_cut:
                    break
            yield StreamEnd(boot_id=boot_id)
        finally:
            self.num_streams -= 1

    async def _sync(self, request: httpx.Request) -> SyncReceipt:
        boot_id = self.boot_id
        content = await request.aread()
        await asyncio.sleep(self.upload_s)
        await self._alive(boot_id)
        if self.refusal:
            raise self.refusal
        policy = PolicyId.model_validate_json(content)
        activate = request.url.params["activate"] == "true"
        self.replaced_run = request.url.params["replace_run"] == "true"
        self.uploads.append(policy)
        is_ours = policy.run_id == self.newest.run_id
        if policy not in self.resident:
            if is_ours and activate and policy.age_key <= self.newest.age_key:
                raise StaleVersion("older")
            self.resident.append(policy)
        if activate or not is_ours:
            self.newest = policy
            if not self.lies:
                self.served = policy
            if request.url.params["in_flight"] == "continue":
                self._num_interruptions += 1
        del self.resident[: -self.max_live - 1]
        return SyncReceipt(
            policy=policy,
            digest="c" * 64,
            outcome="loaded",
            newest=self.newest,
            num_bytes=len(content),
            boot_id=self.boot_id,
        )


class FakeProver:
    """Knows what a replica really serves; the real prover finds out from logprobs."""

    def __init__(self, replicas: Sequence[FakeReplica]) -> None:
        self._replicas = {replica.url: replica for replica in replicas}

    def add(self, replica: FakeReplica) -> None:
        self._replicas[replica.url] = replica

    def remember(self, adapter: PublishedAdapter) -> None:
        pass

    async def admit(self, client: RolloutClient, *, run: PolicyId, timeout_s: float) -> float:
        await client.status()
        return 0.01

    async def check(
        self,
        client: RolloutClient,
        adapter: PublishedAdapter,
        *,
        floor: float,
        timeout_s: float,
        scores_base: bool = True,
    ) -> float:
        await client.status()
        replica = self._replicas[client.url]
        if replica.newest == adapter.policy != replica.served:
            raise ConformanceFailed(f"{client.url} serves {replica.served}")
        replica.proven.add(adapter.policy)
        return 0.01


class _Body(httpx.AsyncByteStream):
    def __init__(self, records: AsyncIterator[Wire]) -> None:
        self._records = records

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for record in self._records:
            yield record.model_dump_json().encode() + b"\n"

    async def aclose(self) -> None:
        await self._records.aclose()  # type: ignore[attr-defined]


class _Transport(httpx.AsyncBaseTransport):
    def __init__(self, replica: FakeReplica) -> None:
        self._replica = replica

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self._replica.state == "down":
            raise httpx.ConnectError("connection refused")
        await request.aread()
        try:
            return await self._replica.answer(request)
        except ServiceError as error:
            return httpx.Response(error.status, json=error.to_problem())


def _json(body: Wire) -> httpx.Response:
    return httpx.Response(200, content=body.model_dump_json())


def check_groups(groups: Sequence[CompletionGroup], *, n: int, max_tokens: int) -> None:
    """Assert that every completion is whole, repeats no token and attributes each correctly."""
    for group in groups:
        assert len(group.completions) == n
        for completion in group.completions:
            policies = [s.policy for s in completion.segments for _ in range(s.num_tokens)]
            assert completion.token_ids == tuple(
                1000 * policy.version + place for place, policy in enumerate(policies)
            )
            assert len(policies) == max_tokens
