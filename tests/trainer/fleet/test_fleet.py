"""Discovery, admission, routing, failover and sync, against replicas that are played in memory."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from services.trainer.fleet.fleet import Fleet
from services.trainer.fleet.member import Requirements
from shared.errors import (
    BaseMismatch,
    ConformanceFailed,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    RunConflict,
    Unauthorized,
    Unavailable,
)
from shared.metrics import TrainerMetrics
from shared.rollout_client import RolloutClient
from shared.schemas import GenerateRequest, PolicyId, ReplicaRegistration, SamplingParams
from tests import virtual_clock
from tests.fake_replica import (
    BASE,
    RUN,
    FakeProver,
    FakeReplica,
    adapter_of,
    check_groups,
    policy_at,
)

N, MAX_TOKENS = 2, 20
THEIRS = PolicyId(run_id="theirs", version=4)


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        virtual_clock.run(test(**arguments))

    return run


class World:
    """Some replicas, at http://10.0.0.<number>:8000, and a fleet that knows them."""

    def __init__(self, num_replicas: int = 2, **settings: Any) -> None:
        self.replicas = [FakeReplica(f"http://10.0.0.{i}:8000") for i in range(num_replicas)]
        self.addresses = {replica.url for replica in self.replicas}
        self.metrics = TrainerMetrics()
        self.fleet = Fleet(
            settings.pop("urls", ["http://rollout:8000"]),
            connect=self.connect,
            metrics=self.metrics,
            resolve=self.resolve,
            **settings,
        )
        self.fleet.start()

    def __getitem__(self, index: int) -> FakeReplica:
        return self.replicas[index]

    def connect(self, url: str) -> RolloutClient:
        found = [replica for replica in self.replicas if replica.url == url]
        return found[0].client() if found else FakeReplica(url, state="down").client()

    async def resolve(self, url: str) -> set[str] | None:
        return set(self.addresses)

    def add(self, **fields: Any) -> FakeReplica:
        replica = FakeReplica(f"http://10.0.0.{len(self.replicas)}:8000", **fields)
        self.replicas.append(replica)
        return replica

    def prover(self, joiner: FakeReplica) -> None:
        """Let the prover of the run know a replica that came after its begin."""
        assert self.fleet._goal
        prover = self.fleet._goal.requirements.prover
        assert isinstance(prover, FakeProver)
        prover.add(joiner)

    async def begin(self, *, timeout_s: float = 5.0, version: int = 0, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "run": RUN,
            "base": BASE,
            "lora_rank": 16,
            "num_context_tokens": 64,
            "may_replace_run": lambda _: False,
            "prover": FakeProver(self.replicas),
            "min_ready_replicas": sum(replica.state == "ready" for replica in self.replicas),
        }
        adapter = adapter_of(policy_at(version)) if version else None
        requirements = Requirements(**(fields | changes))
        await self.fleet.begin(requirements, timeout_s=timeout_s, adapter=adapter)

    async def sync(self, version: int, timeout_s: float = 5.0) -> set[PolicyId]:
        receipts = await self.fleet.sync(adapter_of(policy_at(version)), timeout_s=timeout_s)
        return {receipt.policy for receipt in receipts}

    def generate(
        self, count: int, version: int = 0, timeout_s: float = 60.0
    ) -> asyncio.Task[list[Any]]:
        sampling = SamplingParams(n=N, max_tokens=MAX_TOKENS, seed=1)
        requests = [
            GenerateRequest(prompts=((3 + i,),), sampling=sampling, policy=policy_at(version))
            for i in range(count)
        ]
        return asyncio.ensure_future(self.fleet.generate(requests, timeout_s=timeout_s))

    def states(self) -> list[str]:
        by_url = {status.url: status.state for status in self.fleet.status()}
        return [by_url.get(replica.url, "unknown") for replica in self.replicas]

    def detail(self, index: int) -> str:
        (detail,) = [s.detail for s in self.fleet.status() if s.url == self[index].url]
        return detail


# --- routing ------------------------------------------------------------------------------------


@in_virtual_time
async def test_groups_come_back_in_order_whole_and_spread_over_the_replicas() -> None:
    world = World()
    await world.begin()
    assert await world.sync(1) == {policy_at(1)}
    groups = await world.generate(20, version=1)
    check_groups(groups, n=N, max_tokens=MAX_TOKENS)
    assert [group.prompt_token_ids for group in groups] == [(3 + i,) for i in range(20)]
    assert [replica.num_generated for replica in world.replicas] == [10, 10]
    assert world.fleet.num_continued == 0


@in_virtual_time
async def test_a_faster_replica_gets_more() -> None:
    world = World()
    world[0].token_s /= 4
    await world.begin()

    async def one_after_another() -> None:
        for _ in range(10):
            await world.generate(1)

    await asyncio.gather(*(one_after_another() for _ in range(6)))
    assert world[0].num_generated > 2 * world[1].num_generated


@in_virtual_time
async def test_a_full_replica_is_left_alone_until_its_retry_after() -> None:
    world = World(1)
    world[0].num_busy_answers = 3
    await world.begin()
    started = asyncio.get_running_loop().time()
    check_groups(await world.generate(1), n=N, max_tokens=MAX_TOKENS)
    assert 1.5 < asyncio.get_running_loop().time() - started < 2.5
    assert world.states() == ["serving"]


@in_virtual_time
async def test_a_request_that_no_replica_can_serve_is_raised_and_costs_no_replica() -> None:
    world = World()
    await world.begin()
    world[0].failure = world[1].failure = InvalidRequest("over the context")
    with pytest.raises(InvalidRequest, match="over the context"):
        await world.generate(1)
    assert world.states() == ["serving", "serving"]


@in_virtual_time
async def test_a_request_that_breaks_every_engine_ends_after_a_few() -> None:
    world = World()
    await world.begin()
    world[0].failure = world[1].failure = InternalError("logprobs are not finite")
    with pytest.raises(InternalError, match="not finite"):
        await world.generate(1)


# --- failover -----------------------------------------------------------------------------------


@in_virtual_time
async def test_completions_of_a_dead_replica_go_on_elsewhere_with_the_tokens_they_have() -> None:
    """trl#7176: one failed generation killed the worker. NeMo-RL#3589: it became a reward of 0."""
    world = World()
    await world.begin(version=1)
    groups = world.generate(6, version=1)
    await asyncio.sleep(0.1)
    world[0].crash()
    check_groups(await groups, n=N, max_tokens=MAX_TOKENS)
    assert world.fleet.num_continued == 3 * N
    assert world.states() == ["discovered", "serving"]
    assert "ReadError" in world.detail(0) or "ConnectError" in world.detail(0)


@in_virtual_time
async def test_a_replica_that_hangs_is_noticed_and_its_completions_go_on_elsewhere() -> None:
    """NeMo-RL#3589: a request without a deadline parks its rollout for ever."""
    world = World()
    await world.begin(version=1)
    groups = world.generate(6, version=1)
    await asyncio.sleep(0.1)
    world[0].hang()
    started = asyncio.get_running_loop().time()
    check_groups(await groups, n=N, max_tokens=MAX_TOKENS)
    assert asyncio.get_running_loop().time() - started < 15
    assert world.states()[0] == "discovered"
    world[0].wake_up()
    await asyncio.sleep(5)
    assert world.states() == ["serving", "serving"]


@in_virtual_time
async def test_a_draining_replica_finishes_what_it_has_and_gets_nothing_new() -> None:
    world = World()
    await world.begin(version=1)
    groups = world.generate(6, version=1)
    await asyncio.sleep(0.1)
    world[0].drain()
    await asyncio.sleep(1.5)
    assert world.states() == ["draining", "serving"]
    num_generated = world[0].num_generated
    check_groups(await groups + await world.generate(4, version=1), n=N, max_tokens=MAX_TOKENS)
    assert world.fleet.num_continued == 0
    assert world[0].num_generated == num_generated


@in_virtual_time
async def test_without_any_replica_a_request_waits_until_one_returns() -> None:
    world = World(1)
    await world.begin(version=1)
    groups = world.generate(2, version=1)
    await asyncio.sleep(0.1)
    world[0].crash()
    await asyncio.sleep(20)
    world[0].boot()
    check_groups(await groups, n=N, max_tokens=MAX_TOKENS)
    assert world[0].uploads == [policy_at(1), policy_at(1)]


@in_virtual_time
async def test_waiting_for_a_replica_ends_at_the_deadline_with_what_was_seen() -> None:
    """tinker-cookbook#234: "no progress made" without a diagnosis."""
    world = World(1)
    world[0].crash()
    with pytest.raises(Unavailable, match=r"10\.0\.0\.0:8000 discovered .*ConnectError"):
        await world.begin(timeout_s=3, min_ready_replicas=1)


@in_virtual_time
async def test_a_version_that_nobody_has_any_more_is_continued_under_the_newest() -> None:
    world = World()
    await world.begin(version=1)
    groups = world.generate(2, version=1)
    await asyncio.sleep(0.1)
    world[0].boot()
    world[1].boot()
    world.fleet._goal.adapters.clear()  # type: ignore[union-attr]  # nobody kept the old file
    await world.sync(2)
    for group in await groups:
        check_groups([group], n=N, max_tokens=MAX_TOKENS)
        for completion in group.completions:
            assert [segment.policy.version for segment in completion.segments] == [1, 2]


@in_virtual_time
async def test_a_version_in_use_is_given_to_a_replica_that_joins() -> None:
    world = World(1, urls=[])
    world.fleet.register(ReplicaRegistration(url=world[0].url))
    await world.begin(version=1, min_ready_replicas=1)
    world[0].token_s = 1.0
    groups = world.generate(1, version=1)
    await asyncio.sleep(3)
    await world.sync(2)
    joiner = world.add()
    world.prover(joiner)
    world.fleet.register(ReplicaRegistration(url=joiner.url))
    await asyncio.sleep(2)
    assert joiner.uploads == [policy_at(1), policy_at(2)]
    assert joiner.newest == policy_at(2)
    world[0].crash()
    (group,) = await groups
    assert {s.policy.version for c in group.completions for s in c.segments} == {1}


@in_virtual_time
async def test_one_request_that_takes_too_long_ends_alone() -> None:
    """Its deadline says nothing about the replica: the requests of others go on there."""
    world = World()
    await world.begin(version=1)
    patient = world.generate(4, version=1)
    world[0].token_s = world[1].token_s = 1.0
    with pytest.raises(Unavailable, match="not completed in time"):
        await world.generate(1, version=1, timeout_s=2.5)
    assert world.states() == ["serving", "serving"]
    check_groups(await patient, n=N, max_tokens=MAX_TOKENS)
    assert world.fleet.num_continued == 0


@in_virtual_time
async def test_a_replica_that_only_interrupts_is_not_asked_for_ever() -> None:
    world = World(1)
    await world.begin(version=1, in_flight="continue")
    world[0].only_interrupts = True
    with pytest.raises(Unavailable, match="not completed in time"):
        await world.generate(1, version=1, timeout_s=5)
    assert world[0].num_generated < 120


@in_virtual_time
async def test_a_process_that_took_the_place_of_a_proven_one_is_not_trusted() -> None:
    """Between two looks at it: version 0 needs no adapter, so any process would serve it."""
    world = World(1)
    await world.begin()
    world[0].crash()
    world[0].boot()
    world[0].status_changes = {"base": BASE.model_copy(update={"weights": "f" * 64})}
    with pytest.raises(Unavailable):
        await world.generate(1, timeout_s=5)
    assert world.states() == ["quarantined"]


@in_virtual_time
async def test_a_key_that_one_replica_refuses_does_not_end_the_run() -> None:
    world = World()
    await world.begin()
    world[0].failure = Unauthorized("another key")
    check_groups(await world.generate(4), n=N, max_tokens=MAX_TOKENS)


# --- admission ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "asked", "error", "message"),
    [
        ({"base": BASE.model_copy(update={"weights": "f" * 64})}, {}, BaseMismatch, "weights"),
        ({"base": BASE.model_copy(update={"tokenizer": "f" * 64})}, {}, BaseMismatch, "tokenizer"),
        ({"base": BASE.model_copy(update={"recipe": "f" * 64})}, {}, BaseMismatch, "recipe"),
        ({}, {"lora_rank": 17}, InvalidRequest, "lora.rank is 17"),
        ({}, {"num_context_tokens": 65}, InvalidRequest, "65 tokens"),
        ({"newest": THEIRS}, {}, RunConflict, "'theirs'"),
    ],
)
@in_virtual_time
async def test_a_replica_that_does_not_fit_the_run_is_refused_at_once(
    status: dict[str, Any], asked: dict[str, Any], error: type[Exception], message: str
) -> None:
    """axolotl: models that do not match "silently produce incorrect results"."""
    world = World(1)
    world[0].status_changes = status
    with pytest.raises(error, match=message):
        await world.begin(**asked, timeout_s=600)
    assert asyncio.get_running_loop().time() < 10
    assert world.states() == ["quarantined"]
    assert message.strip("'") in world.detail(0)


@in_virtual_time
async def test_an_unfit_replica_does_not_hold_up_the_run_of_the_others() -> None:
    world = World()
    world[1].status_changes = {"base": BASE.model_copy(update={"weights": "f" * 64})}
    await world.begin(min_ready_replicas=1)
    assert await world.sync(1) == {policy_at(1)}
    assert world.states() == ["serving", "quarantined"]


@in_virtual_time
async def test_a_replica_that_does_not_serve_what_it_says_is_quarantined_until_it_restarts() -> (
    None
):
    """ms-swift#9855: rollouts kept sampling the base, and nothing said so."""
    world = World()
    await world.begin(min_ready_replicas=1)
    world[1].lies = True
    await world.sync(1)
    assert world.states() == ["serving", "quarantined"]
    check_groups(await world.generate(4, version=1), n=N, max_tokens=MAX_TOKENS)
    assert world[1].num_generated == 0
    await asyncio.sleep(30)
    assert world.states() == ["serving", "quarantined"]
    world[1].lies = False
    world[1].boot()
    await asyncio.sleep(3)
    assert world.states() == ["serving", "serving"]


@in_virtual_time
async def test_a_fleet_of_liars_ends_the_run_with_the_reason() -> None:
    world = World(1)
    await world.begin()
    world[0].lies = True
    with pytest.raises(ConformanceFailed, match=r"serves base.*@0"):
        await world.sync(1)


@in_virtual_time
async def test_another_run_is_replaced_only_when_that_is_allowed() -> None:
    world = World(1)
    world[0].newest = THEIRS
    await world.begin(may_replace_run=lambda run: run == "theirs")
    await world.sync(1)
    assert world[0].replaced_run
    await world.sync(2)
    assert not world[0].replaced_run


@in_virtual_time
async def test_a_restart_between_two_looks_is_noticed_by_the_boot_id() -> None:
    """A process that came back within a second holds nothing of what the last one was proven."""
    world = World(1)
    await world.begin(version=1)
    world[0].crash()
    world[0].boot()
    await asyncio.sleep(3)
    assert world[0].uploads == [policy_at(1)] * 2
    check_groups(await world.generate(1, version=1), n=N, max_tokens=MAX_TOKENS)


@in_virtual_time
async def test_a_replica_that_refuses_the_key_is_named() -> None:
    async def refuse(_: httpx.Request) -> httpx.Response:
        error = Unauthorized("send the key")
        return httpx.Response(error.status, json=error.to_problem())

    world = World(1)
    world.connect = lambda url: RolloutClient(  # type: ignore[method-assign]
        url, transport=httpx.MockTransport(refuse)
    )
    world.fleet._connect = world.connect
    with pytest.raises(Unauthorized, match=r"10\.0\.0\.0:8000 refuses the trainer's key"):
        await world.begin(timeout_s=60)


# --- sync ---------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_slow_replica_is_caught_up_later_and_takes_no_traffic_for_what_it_lacks() -> None:
    world = World()
    await world.begin(min_ready_replicas=1)
    world[1].upload_s = 10.0
    started = asyncio.get_running_loop().time()
    await world.sync(1, timeout_s=60)
    assert asyncio.get_running_loop().time() - started < 1
    check_groups(await world.generate(4, version=1), n=N, max_tokens=MAX_TOKENS)
    assert [replica.num_generated for replica in world.replicas] == [4, 0]
    await asyncio.sleep(12)
    assert world[1].newest == policy_at(1)
    check_groups(await world.generate(4, version=1), n=N, max_tokens=MAX_TOKENS)
    assert world[1].num_generated == 2


@in_virtual_time
async def test_a_version_that_was_skipped_is_never_sent() -> None:
    world = World()
    await world.begin(min_ready_replicas=1)
    world[1].upload_s = 10.0
    for version in range(1, 6):
        await world.sync(version)
        await asyncio.sleep(4)
    await asyncio.sleep(30)
    assert world[1].newest == policy_at(5)
    assert world[1].uploads == [policy_at(1), policy_at(3), policy_at(5)]


@in_virtual_time
async def test_a_replica_without_room_for_the_version_goes_on_with_those_it_has() -> None:
    world = World()
    await world.begin(min_ready_replicas=1)
    world[1].refusal = Unavailable("no space for the adapter")
    await world.sync(1)
    await asyncio.sleep(5)
    assert world.states() == ["serving", "serving"]
    assert "no space" in world.detail(1)
    world[1].refusal = None
    await asyncio.sleep(3)
    assert world[1].newest == policy_at(1)
    assert world.detail(1) == ""


@in_virtual_time
async def test_a_replica_that_refuses_the_adapter_does_not_end_the_run_of_the_others() -> None:
    world = World()
    await world.begin(min_ready_replicas=1)
    world[1].refusal = BaseMismatch("restarted with another base")
    assert await world.sync(1) == {policy_at(1)}
    assert world.states() == ["serving", "quarantined"]


@in_virtual_time
async def test_an_adapter_that_every_replica_refuses_ends_the_run_at_once() -> None:
    world = World()
    await world.begin()
    world[0].refusal = world[1].refusal = BaseMismatch("NaN")
    with pytest.raises(BaseMismatch, match="NaN"):
        await world.sync(1, timeout_s=600)
    assert asyncio.get_running_loop().time() < 10


@in_virtual_time
async def test_a_run_that_begins_while_a_replica_still_takes_the_last_one_s_adapter() -> None:
    world = World()
    await world.begin(min_ready_replicas=1)
    world[1].upload_s = 5.0
    await world.sync(1)
    again = RUN.model_copy(update={"incarnation": 2})
    await world.begin(run=again, min_ready_replicas=2, timeout_s=30)
    assert world.states() == ["serving", "serving"]


@in_virtual_time
async def test_a_version_that_is_dropped_while_a_joiner_takes_another_is_left_out() -> None:
    world = World(1, urls=[])
    world.fleet.register(ReplicaRegistration(url=world[0].url))
    await world.begin(version=1, min_ready_replicas=1)
    world[0].token_s = 1.0
    groups = [world.generate(1, version=1)]
    await asyncio.sleep(1)
    await world.sync(2)
    joiner = world.add(upload_s=4.0)
    world.prover(joiner)
    world.fleet.register(ReplicaRegistration(url=joiner.url))
    await asyncio.sleep(2)
    await world.sync(3)
    await asyncio.sleep(15)
    assert joiner.uploads == [policy_at(1), policy_at(3)]
    assert world.states() == ["serving", "serving"]
    check_groups(await groups[0], n=N, max_tokens=MAX_TOKENS)


@in_virtual_time
async def test_a_replica_is_looked_at_again_whatever_looking_at_it_raised() -> None:
    class Broken(FakeProver):
        async def admit(self, client: RolloutClient, *, run: PolicyId, timeout_s: float) -> float:
            if asyncio.get_running_loop().time() < 10:
                raise ZeroDivisionError
            return await super().admit(client, run=run, timeout_s=timeout_s)

    world = World(1)
    await world.begin(prover=Broken(world.replicas), timeout_s=60)
    assert world.states() == ["serving"]


@in_virtual_time
async def test_an_upload_whose_proof_failed_for_the_moment_is_not_sent_again() -> None:
    class Busy(FakeProver):
        num_refused = 0

        async def check(self, *arguments: Any, **options: Any) -> float:
            if self.num_refused < 3:
                self.num_refused += 1
                raise Overloaded("full", retry_after_s=3600)
            return await super().check(*arguments, **options)

    world = World(1)
    await world.begin(prover=Busy(world.replicas))
    await world.sync(1, timeout_s=300)
    assert world[0].uploads == [policy_at(1)]


# --- membership ---------------------------------------------------------------------------------


@in_virtual_time
async def test_replicas_are_found_behind_a_name_as_they_come_and_go() -> None:
    world = World(1)
    await world.begin(version=1, min_ready_replicas=1)
    joiner = world.add()
    world.prover(joiner)
    world.addresses.add(joiner.url)
    await asyncio.sleep(3)
    assert world.states() == ["serving", "serving"]
    world.addresses.discard(world[0].url)
    world[0].crash()
    await asyncio.sleep(3)
    assert world.states() == ["gone", "serving"]
    await asyncio.sleep(90)
    assert world.states() == ["unknown", "serving"]


@in_virtual_time
async def test_a_replica_that_left_the_name_but_still_answers_is_kept() -> None:
    world = World()
    await world.begin()
    world.addresses.clear()  # the name server restarts
    await asyncio.sleep(60)
    assert world.states() == ["serving", "serving"]


@in_virtual_time
async def test_a_lease_that_is_not_renewed_ends() -> None:
    world = World(1, urls=[])
    registration = ReplicaRegistration(url=world[0].url, lease_s=10, boot_id=world[0].boot_id)
    world.fleet.register(registration)
    await world.begin(version=1)
    for _ in range(5):
        await asyncio.sleep(5)
        world.fleet.register(registration)
    assert world.states() == ["serving"]
    world[0].crash()
    await asyncio.sleep(5)
    assert world.states() == ["discovered"]
    await asyncio.sleep(10)
    assert world.states() == ["gone"]


@in_virtual_time
async def test_a_configured_name_without_an_address_is_named() -> None:
    world = World(0)
    with pytest.raises(Unavailable, match="http://rollout:8000 has no address"):
        await world.begin(timeout_s=3, min_ready_replicas=1)


@in_virtual_time
async def test_a_renewal_does_not_end_the_quarantine_of_a_process_that_refuses_the_key() -> None:
    async def refuse(_: httpx.Request) -> httpx.Response:
        error = Unauthorized("send the key")
        return httpx.Response(error.status, json=error.to_problem())

    world = World(1, urls=[])
    world.fleet._connect = lambda url: RolloutClient(url, transport=httpx.MockTransport(refuse))
    registration = ReplicaRegistration(url=world[0].url, lease_s=10, boot_id="its own")
    world.fleet.register(registration)
    await asyncio.sleep(3)
    for _ in range(3):
        assert world.fleet.register(registration).state == "quarantined"
        await asyncio.sleep(3)


@in_virtual_time
async def test_a_removed_replica_finishes_its_requests_and_stays_out() -> None:
    world = World()
    await world.begin(version=1)
    groups = world.generate(4, version=1)
    await asyncio.sleep(0.1)
    status = world.fleet.remove("10.0.0.0:8000")
    assert status.state == "draining"
    check_groups(await groups, n=N, max_tokens=MAX_TOKENS)
    assert world.fleet.num_continued == 0
    await asyncio.sleep(5)
    world.fleet.register(  # it renews its lease: that does not bring it back
        ReplicaRegistration(url=world[0].url, lease_s=10, boot_id=world[0].boot_id)
    )
    await asyncio.sleep(5)
    assert world.states() == ["gone", "serving"]
    world.fleet.register(ReplicaRegistration(url=world[0].url))
    await asyncio.sleep(5)
    assert world.states() == ["serving", "serving"]
    with pytest.raises(NotFound, match="known are: 10"):
        world.fleet.remove("nobody:1")


@in_virtual_time
async def test_a_process_with_two_addresses_is_one_replica() -> None:
    world = World(1)
    twin = world.add()
    twin.boot_id = world[0].boot_id
    await world.begin(min_ready_replicas=1)
    world.addresses.add(twin.url)
    await asyncio.sleep(3)
    assert world.states() == ["serving", "discovered"]
    assert "same process as 10.0.0.0:8000" in world.detail(1)


@in_virtual_time
async def test_every_transition_is_counted() -> None:
    world = World(1)
    await world.begin()
    world[0].crash()
    await asyncio.sleep(3)
    world[0].boot()
    await asyncio.sleep(3)

    def count(state: str) -> float:
        value = world.metrics.registry.get_sample_value(
            "tandem_trainer_replica_transitions_total", {"state": state}
        )
        assert value is not None
        return value

    assert count("serving") == 2
    assert count("discovered") >= 1
    assert (
        world.metrics.registry.get_sample_value("tandem_trainer_replicas", {"state": "serving"})
        == 1
    )


# --- beside the newest --------------------------------------------------------------------------


@in_virtual_time
async def test_an_adapter_beside_the_newest_answers_those_who_name_it_and_nobody_else() -> None:
    world = World()
    await world.begin()
    await world.sync(1)
    async with world.fleet.beside(adapter_of(policy_at(5)), timeout_s=5):
        named, newest = await world.generate(8, version=5), await world.generate(8, version=1)
    assert sampled_by(named) == {policy_at(5)}
    assert sampled_by(newest) == {policy_at(1)}
    assert {replica.newest for replica in world.replicas} == {policy_at(1)}
    assert await world.sync(6) == {policy_at(6)}


@in_virtual_time
async def test_a_replica_that_restarts_gets_what_is_beside_the_newest_after_it() -> None:
    world = World(1)
    await world.begin()
    await world.sync(1)
    async with world.fleet.beside(adapter_of(policy_at(5)), timeout_s=5):
        world[0].crash()
        waiting = world.generate(4, version=5)
        await asyncio.sleep(2)
        world[0].uploads.clear()
        world[0].boot()
        assert sampled_by(await waiting) == {policy_at(5)}  # and not the newest, which came first
    assert world[0].uploads == [policy_at(1), policy_at(5)]


@in_virtual_time
async def test_what_two_have_beside_the_newest_stays_when_one_has_ended() -> None:
    world = World(1)
    await world.begin()
    await world.sync(1)
    adapter = adapter_of(policy_at(5))
    async with world.fleet.beside(adapter, timeout_s=5):
        async with world.fleet.beside(adapter, timeout_s=5):
            pass
        world[0].crash()
        waiting = world.generate(4, version=5)
        await asyncio.sleep(2)
        world[0].boot()
        assert sampled_by(await waiting) == {policy_at(5)}


@in_virtual_time
async def test_an_adapter_that_no_replica_takes_in_is_given_up_at_the_deadline() -> None:
    world = World(1)
    await world.begin()
    world[0].crash()
    with pytest.raises(Unavailable, match=r"0 of 1 replicas that must serve policy \S+@5 do"):
        async with world.fleet.beside(adapter_of(policy_at(5)), timeout_s=3):
            raise AssertionError("nobody serves it")


def sampled_by(groups: list[Any]) -> set[PolicyId]:
    return {
        segment.policy
        for group in groups
        for completion in group.completions
        for segment in completion.segments
    }
