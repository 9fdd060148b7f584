"""Routing, failover and sync, against replicas that are played by a transport."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from services.trainer.fleet import Fleet, Requirements
from services.trainer.policy import PublishedAdapter
from shared.errors import (
    BaseMismatch,
    InvalidRequest,
    Overloaded,
    RunConflict,
    ServiceError,
    Unauthorized,
    Unavailable,
)
from shared.rollout_client import RolloutClient
from shared.schemas import (
    BASE_POLICY,
    AdapterManifest,
    BaseIdentity,
    Completion,
    CompletionGroup,
    GenerateRequest,
    GenerateResponse,
    PolicyId,
    RolloutLimits,
    RolloutStatus,
    SamplingParams,
    Segment,
    SyncReceipt,
)

pytestmark = pytest.mark.anyio
BASE = BaseIdentity(weights="a" * 64, recipe=None, tokenizer="b" * 64, chat_template=None)
VERSION_1 = PolicyId(run_id="ours", version=1)


class FakeReplica:
    """A rollout service that answers at once, until told otherwise."""

    def __init__(self, **status: Any) -> None:
        self.is_down = False
        self.noticed = asyncio.Event()  # that it is down
        self.num_busy_answers = 0
        self.refusal: ServiceError | None = None  # of every adapter
        self.finish_reasons = ["stop"]  # of the coming answers; the last one stays
        self.newest = BASE_POLICY
        self.num_generated = 0
        self.num_synced = 0
        self.replaced_run = False
        self.status = status

    async def generate(self, request: httpx.Request) -> GenerateResponse:
        if self.num_busy_answers:
            self.num_busy_answers -= 1
            raise Overloaded("full", retry_after_s=0.01)
        self.num_generated += 1
        asked = GenerateRequest.model_validate_json(await request.aread())
        reason = self.finish_reasons.pop(0) if len(self.finish_reasons) > 1 else None
        completion = Completion(
            token_ids=(4,),
            logprobs=(-1.0,),
            segments=(Segment(policy=asked.policy or self.newest, num_tokens=1),),
            finish_reason=reason or self.finish_reasons[0],
        )
        groups = tuple(
            CompletionGroup(
                prompt_token_ids=prompt,
                completions=(completion,) * asked.sampling.n,
                sampling=asked.sampling,
            )
            for prompt in asked.prompts
        )
        return GenerateResponse(groups=groups, boot_id="boot")

    async def sync_weights(self, request: httpx.Request) -> SyncReceipt:
        if self.refusal:
            raise self.refusal
        self.num_synced += 1
        self.newest = VERSION_1
        self.replaced_run = request.url.params["replace_run"] == "true"
        return SyncReceipt(
            policy=VERSION_1,
            digest="c" * 64,
            outcome="loaded",
            newest=VERSION_1,
            num_bytes=len(await request.aread()),
            boot_id="boot",
        )


class _Transport(httpx.AsyncBaseTransport):
    """The replica's answers and errors as HTTP."""

    def __init__(self, replica: FakeReplica) -> None:
        self.replica = replica

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        replica = self.replica
        await request.aread()
        await asyncio.sleep(0.01)  # requests overlap, as over a network
        if replica.is_down:
            replica.noticed.set()
            raise httpx.ConnectError("connection refused")
        try:
            match request.url.path:
                case "/status":
                    body: Any = _status(replica)
                case "/generate":
                    body = await replica.generate(request)
                case _:
                    body = await replica.sync_weights(request)
        except ServiceError as error:
            return httpx.Response(error.status, json=error.to_problem())
        return httpx.Response(200, content=body.model_dump_json())


def _status(replica: FakeReplica) -> RolloutStatus:
    fields: dict[str, Any] = {
        "state": "ready",
        "detail": "",
        "boot_id": "boot",
        "model": "m",
        "vllm_version": "0",
        "kv_cache_dtype": "auto",
        "base": BASE,
        "limits": RolloutLimits(
            max_model_len=64,
            max_lora_rank=16,
            max_live_policies=2,
            max_num_seqs=8,
            max_completions=64,
            max_adapter_bytes=1000,
            max_body_bytes=1000,
        ),
        "newest": replica.newest,
        "resident": (),
        "num_outstanding_completions": 0,
    }
    return RolloutStatus(**(fields | replica.status))


def make_fleet(*replicas: FakeReplica) -> Fleet:
    return Fleet(
        [
            RolloutClient(f"http://replica-{i}", transport=_Transport(replica))
            for i, replica in enumerate(replicas)
        ]
    )


def requirements(**changes: Any) -> Requirements:
    fields: dict[str, Any] = {
        "run_id": "ours",
        "base": BASE,
        "lora_rank": 16,
        "num_context_tokens": 64,
        "may_replace_run": lambda _: False,
    }
    return Requirements(**(fields | changes))


def requests(count: int) -> list[GenerateRequest]:
    sampling = SamplingParams(n=2)
    return [GenerateRequest(prompts=((3 + i,),), sampling=sampling) for i in range(count)]


def states(fleet: Fleet) -> list[str]:
    return [replica.state for replica in fleet.status()]


ADAPTER = PublishedAdapter(
    manifest=AdapterManifest(
        policy=VERSION_1, base=BASE, rank=16, scaling=1.0, target_modules=("q_proj",)
    ),
    content=b"adapter",
    content_digest="sha-256=:AAAA:",
)


async def test_groups_come_back_in_order_and_load_is_spread() -> None:
    replicas = [FakeReplica(), FakeReplica()]
    fleet = make_fleet(*replicas)
    await fleet.begin(requirements(), timeout_s=1)
    await fleet.sync(ADAPTER, timeout_s=1)
    groups = await fleet.generate(requests(20), timeout_s=5)
    assert [group.prompt_token_ids for group in groups] == [(3 + i,) for i in range(20)]
    assert [replica.num_generated for replica in replicas] == [10, 10]


async def test_a_replica_that_is_down_loses_no_group() -> None:
    lost, alive = FakeReplica(), FakeReplica()
    fleet = make_fleet(lost, alive)
    await fleet.begin(requirements(), timeout_s=1)
    lost.is_down = True
    assert len(await fleet.generate(requests(6), timeout_s=5)) == 6
    assert alive.num_generated == 6
    assert states(fleet) == ["failed", "serving"]
    assert "ConnectError" in fleet.status()[0].detail


async def test_a_replica_that_returns_gets_the_newest_adapter_before_any_request() -> None:
    replica = FakeReplica()
    fleet = make_fleet(replica)
    await fleet.begin(requirements(), timeout_s=1)
    await fleet.sync(ADAPTER, timeout_s=1)
    replica.is_down = True
    waiting = asyncio.ensure_future(fleet.generate(requests(1), timeout_s=10))
    await replica.noticed.wait()
    replica.is_down, replica.newest = False, BASE_POLICY  # restarted: it forgot the adapter
    await waiting
    assert replica.num_synced == 2
    assert fleet.status()[0].policy == VERSION_1


async def test_a_full_replica_is_asked_again_after_its_retry_after() -> None:
    replica = FakeReplica()
    replica.num_busy_answers = 3
    fleet = make_fleet(replica)
    await fleet.begin(requirements(), timeout_s=1)
    assert len(await fleet.generate(requests(1), timeout_s=5)) == 1
    assert states(fleet) == ["serving"]


async def test_an_interrupted_completion_is_sampled_again() -> None:
    replica = FakeReplica()
    replica.finish_reasons = ["interrupted", "stop"]
    fleet = make_fleet(replica)
    await fleet.begin(requirements(), timeout_s=1)
    (group,) = await fleet.generate(requests(1), timeout_s=5)
    assert {completion.finish_reason for completion in group.completions} == {"stop"}


async def test_waiting_for_replicas_ends_at_the_deadline_with_what_was_seen() -> None:
    """NeMo-RL#3589: a dead engine parked rollouts for ever."""
    replica = FakeReplica()
    replica.is_down = True
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"no replica is ready .*replica-0.*ConnectError"):
        await make_fleet(replica).begin(requirements(), timeout_s=0.2)
    assert time.monotonic() - started < 3


async def test_a_run_goes_on_with_the_replicas_that_took_the_adapter() -> None:
    alive, lost = FakeReplica(), FakeReplica()
    fleet = make_fleet(alive, lost)
    await fleet.begin(requirements(), timeout_s=1)
    lost.is_down = True
    receipts = await fleet.sync(ADAPTER, timeout_s=5)
    assert [receipt.policy for receipt in receipts] == [VERSION_1]
    assert states(fleet) == ["serving", "failed"]


@pytest.mark.parametrize(
    ("status", "asked", "error", "message"),
    [
        ({"base": BASE.model_copy(update={"weights": "f" * 64})}, {}, BaseMismatch, "weights"),
        ({"base": BASE.model_copy(update={"tokenizer": "f" * 64})}, {}, BaseMismatch, "tokenizer"),
        ({"base": BASE.model_copy(update={"recipe": "f" * 64})}, {}, BaseMismatch, "recipe"),
        ({}, {"lora_rank": 17}, InvalidRequest, "lora.rank is 17"),
        ({}, {"num_context_tokens": 65}, InvalidRequest, "65 tokens"),
        ({"newest": PolicyId(run_id="theirs", version=4)}, {}, RunConflict, "'theirs'"),
    ],
)
async def test_a_replica_that_does_not_fit_the_run_is_refused_at_once(
    status: dict[str, Any], asked: dict[str, Any], error: type[Exception], message: str
) -> None:
    """axolotl: models that do not match "silently produce incorrect results"."""
    fleet = make_fleet(FakeReplica(**status))
    with pytest.raises(error, match=message):
        await fleet.begin(requirements(**asked), timeout_s=60)
    assert message.strip("'") in fleet.status()[0].detail


async def test_another_run_is_replaced_only_when_that_is_allowed() -> None:
    replica = FakeReplica(newest=PolicyId(run_id="theirs", version=4))
    fleet = make_fleet(replica)
    await fleet.begin(requirements(may_replace_run=lambda run: run == "theirs"), timeout_s=1)
    await fleet.sync(ADAPTER, timeout_s=1)
    assert replica.replaced_run
    await fleet.sync(ADAPTER, timeout_s=1)
    assert not replica.replaced_run


async def test_a_replica_that_refuses_the_adapter_does_not_end_the_run_of_the_others() -> None:
    good, refusing = FakeReplica(), FakeReplica()
    fleet = make_fleet(good, refusing)
    await fleet.begin(requirements(), timeout_s=5)
    refusing.refusal = BaseMismatch("restarted with another base")
    assert len(await fleet.sync(ADAPTER, timeout_s=5)) == 1
    assert states(fleet) == ["serving", "failed"]


async def test_a_replica_that_refuses_the_key_is_named() -> None:
    async def refuse(_: httpx.Request) -> httpx.Response:
        error = Unauthorized("send the key")
        return httpx.Response(error.status, json=error.to_problem())

    client = RolloutClient("http://replica-0", transport=httpx.MockTransport(refuse))
    with pytest.raises(Unauthorized, match=r"http://replica-0 refuses the trainer's key"):
        await Fleet([client]).begin(requirements(), timeout_s=60)
