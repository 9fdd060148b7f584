"""ROLLOUT_SERVING_MODE=merged on the real engine: the adapter in the weights, one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from statistics import fmean

import pytest

from shared.errors import InvalidRequest, NoFreeSlot, UnknownPolicy
from shared.model_folder import linear_shapes
from shared.rollout_client import RolloutClient
from shared.schemas import StateRecord, StepRecord, StreamTokens
from shared.trainer_client import TrainerClient
from tests.integration.test_training import MANAGED, replacing
from tests.publisher import PROBE, Publisher
from tests.replica_process import ReplicaProcess, start_replica, wait_until_ready
from tests.trainer_in_process import booted_trainer, client_of, until_end

pytestmark = pytest.mark.anyio

NOISE = 0.03  # nats; merging rounds each weight once more. Adapters here move logprobs by 0.4
LONG = PROBE * 4  # more than one block of the prefix cache


@pytest.fixture(scope="module")
def merged_replica(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, base_cache: Path
) -> Iterator[ReplicaProcess]:
    replica = start_replica(
        tmp_path_factory.mktemp("merged"),
        tiny_checkpoint,
        base_cache,
        serving_mode="merged",
        max_num_seqs=8,
        stream_interval=1,
    )
    try:
        wait_until_ready(replica)
        yield replica
    finally:
        replica.end()


@pytest.fixture
async def merged(merged_replica: ReplicaProcess, tiny_checkpoint: Path) -> AsyncIterator[Publisher]:
    async with RolloutClient(merged_replica.url, timeout_s=60) as client:
        status = await client.status()
        assert status.base
        yield Publisher(client, status.base, linear_shapes(tiny_checkpoint))


def gap(some: tuple[float, ...], others: tuple[float, ...]) -> float:
    return fmean(abs(a - b) for a, b in zip(some, others, strict=True))


async def test_it_says_so_and_has_room_for_one_version(merged: Publisher) -> None:
    status = await merged.client.status()
    assert status.serving_mode == "merged"
    assert status.limits.max_live_policies == 1


async def test_a_merged_adapter_scores_as_one_beside_the_base(
    merged: Publisher, publisher: Publisher
) -> None:
    base = await merged.score(policy=merged.policy(0))
    policy = await merged.publish(1, in_flight="continue")
    beside = await publisher.publish(1)
    logprobs = await merged.score(policy=policy)
    assert gap(logprobs, base) > 0.2
    assert gap(logprobs, await publisher.score(policy=beside)) < NOISE


async def test_the_base_comes_back_exactly(merged: Publisher) -> None:
    before = await merged.score(policy=merged.policy(0))
    policies = [await merged.publish(version, in_flight="continue") for version in (1, 2)]
    assert await merged.score(policy=policies[-1]) != before
    assert await merged.score(policy=merged.policy(0)) == before


async def test_what_the_last_adapter_changed_does_not_stay(merged: Publisher) -> None:
    alone = merged.adapter(merged.policy(1), target_modules=("down_proj",))
    await merged.client.sync_weights(alone, replace_run=True, in_flight="continue")
    expected = await merged.score(policy=merged.policy(1))
    again = Publisher(merged.client, merged.base, merged.shapes)
    policy = await again.publish(1, in_flight="continue")  # of all linears
    assert gap(await again.score(policy=policy), expected) > NOISE
    third = Publisher(merged.client, merged.base, merged.shapes)
    adapter = third.adapter(third.policy(1), target_modules=("down_proj",))
    await third.client.sync_weights(adapter, replace_run=True, in_flight="continue")
    assert await third.score(policy=third.policy(1)) == expected


async def test_an_older_version_is_gone(merged: Publisher) -> None:
    old = await merged.publish(1, in_flight="continue")
    await merged.publish(2, in_flight="continue")
    with pytest.raises(UnknownPolicy):
        await merged.score(policy=old)


async def test_finish_and_a_second_version_are_refused(merged: Publisher) -> None:
    policy = await merged.publish(1, in_flight="continue")
    before = await merged.score(policy=policy)
    with pytest.raises(InvalidRequest, match=r"in_flight=continue .*ROLLOUT_SERVING_MODE=lora"):
        await merged.publish(2)
    with pytest.raises(NoFreeSlot, match="one version at a time"):
        await merged.publish(2, activate=False, in_flight="continue")
    assert await merged.score() == before


async def test_a_probe_is_scored_between_and_changes_nothing(merged: Publisher) -> None:
    policy = await merged.publish(1, in_flight="continue")
    before = await merged.score(policy=policy)
    other = Publisher(merged.client, merged.base, merged.shapes)
    probe = other.policy(1)
    await other.client.sync_weights(other.adapter(probe, seed=9), probe=True)
    assert gap(await other.score(policy=probe), before) > 0.1
    assert await merged.score(policy=policy) == before


async def test_no_policy_reads_the_prefix_cache_of_another(merged: Publisher) -> None:
    for version in (1, 0, 2, 0):
        policy = merged.policy(0)
        if version:
            policy = await merged.publish(version, in_flight="continue")
        answer = await merged.generate(LONG, policy=policy, max_tokens=8, ignore_eos=True)
        (completion,) = answer.groups[0].completions
        scored = await merged.score((*LONG, *completion.token_ids), policy=policy)
        assert gap(completion.logprobs, scored[-8:]) < NOISE


@pytest.mark.parametrize("start", [0, 1])
async def test_running_completions_go_on_under_the_new_version(
    merged: Publisher, start: int
) -> None:
    """Also those of the base, which runs beside adapters elsewhere."""
    if start:
        await merged.publish(start, in_flight="continue")
    first = merged.policy(start)
    received: list[StreamTokens] = []
    begun = asyncio.Event()

    async def sample() -> None:
        stream = merged.stream(PROBE, policy=first, max_tokens=400, n=2, ignore_eos=True)
        async for record in stream:
            if isinstance(record, StreamTokens):
                received.append(record)
                begun.set()

    sampling = asyncio.create_task(sample())
    await begun.wait()
    second = await merged.publish(start + 1, in_flight="continue")
    await sampling
    last = {record.completion: record.finish_reason for record in received}
    assert last == {0: "interrupted", 1: "interrupted"}
    for index in (0, 1):
        records = [record for record in received if record.completion == index]
        ids = tuple(token for record in records for token in record.token_ids)
        assert 0 < len(ids) < 400
        answer = await merged.generate(
            PROBE, policy=second, completion_prefix=ids, max_tokens=20, ignore_eos=True
        )
        (rest,) = answer.groups[0].completions
        assert {segment.policy for segment in rest.segments} == {second}
        scored = await merged.score((*PROBE, *ids, *rest.token_ids), policy=second)
        assert gap(rest.logprobs, scored[-20:]) < NOISE


async def test_a_reader_that_stops_reading_holds_up_no_version(merged: Publisher) -> None:
    """Nor does it look like an engine that hangs: all that it asked for is made."""
    first = await merged.publish(1, in_flight="continue")
    stream = merged.stream(PROBE, policy=first, max_tokens=400, n=4, ignore_eos=True)
    await anext(stream)  # and no more
    second = await merged.publish(2, in_flight="continue")
    async with asyncio.timeout(30):
        assert len(await merged.score(policy=second)) == len(PROBE) - 1
    await stream.aclose()


@pytest.fixture
async def runs(
    merged_replica: ReplicaProcess, tiny_checkpoint: Path, tmp_path: Path
) -> AsyncIterator[TrainerClient]:
    async with (
        booted_trainer(tiny_checkpoint, merged_replica.url, tmp_path) as trainer,
        client_of(trainer) as client,
    ):
        yield client


@pytest.mark.parametrize("max_staleness", [0, 1])
async def test_a_run_trains_and_every_version_is_proven(
    runs: TrainerClient, merged: Publisher, max_staleness: int
) -> None:
    config = replacing(MANAGED, num_steps=5, max_staleness=max_staleness, in_flight="continue")
    status = await runs.start_run(config)
    events = await until_end(runs)
    assert events[-1] == StateRecord(state="completed")
    steps = [event for event in events if isinstance(event, StepRecord)]
    assert [step.policy.version for step in steps] == [1, 2, 3, 4, 5]
    assert all((step.staleness_max or 0) <= max_staleness for step in steps)
    assert all((step.logprob_gap or 0) < 0.05 for step in steps)
    newest = (await merged.client.policies()).newest
    assert (newest.run_id, newest.version) == (status.run_id, 5)


async def test_a_run_that_lets_completions_finish_is_told_what_to_set(runs: TrainerClient) -> None:
    await runs.start_run(replacing(MANAGED))
    end = (await until_end(runs))[-1]
    assert isinstance(end, StateRecord)
    assert end.state == "failed"
    assert "set in_flight: continue in the run config, or ROLLOUT_SERVING_MODE=lora" in end.detail
