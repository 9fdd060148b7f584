"""Probe adapters on the real engine: they show that adapters work here, and change nothing."""

from __future__ import annotations

import secrets
from pathlib import Path
from statistics import mean

import pytest

from shared.errors import (
    BaseMismatch,
    DigestMismatch,
    InvalidAdapter,
    ServiceError,
    StaleVersion,
    UnknownPolicy,
)
from shared.schemas import PolicyId
from tests.publisher import PROBE, Publisher
from tests.reference_model import ReferenceModel
from tests.replica_process import ReplicaProcess, until

pytestmark = pytest.mark.anyio

KERNEL_NOISE = 0.05  # bf16 in another order of summation; the probe moves logprobs by far more


def probe_policy() -> PolicyId:
    return PolicyId(run_id=f"probe-{secrets.token_hex(4)}", version=1)


async def send(publisher: Publisher, policy: PolicyId) -> None:
    await publisher.client.sync_weights(publisher.adapter(policy, seed=77), probe=True)


async def test_a_probe_moves_the_score_as_peft_says_and_what_served_before_serves_on(
    replica: ReplicaProcess, publisher: Publisher, tmp_path: Path
) -> None:
    """ms-swift#9855: an adapter that is "loaded" and never applied."""
    older, newest = await publisher.publish(1), await publisher.publish(2)
    served = (publisher.policy(0), older, newest)
    before = {policy: await publisher.score(policy=policy) for policy in served}
    probe = probe_policy()
    adapter = publisher.adapter(probe, seed=77)
    receipt = await publisher.client.sync_weights(adapter, probe=True)
    assert (receipt.policy, receipt.newest, receipt.retired) == (probe, newest, ())
    moved = await publisher.score(policy=probe)
    expected = ReferenceModel(replica.base_dir(), adapter, tmp_path).of_tokens(PROBE)
    assert moved == pytest.approx(expected, abs=KERNEL_NOISE)
    for policy, scored in before.items():
        assert mean(abs(a - b) for a, b in zip(moved, scored, strict=True)) > 3 * KERNEL_NOISE
        assert await publisher.score(policy=policy) == scored
    answer = await publisher.generate([1, 3], max_tokens=2, ignore_eos=True)
    assert answer.groups[0].completions[0].segments[0].policy == newest


async def test_a_probe_leaves_when_its_first_score_has_ended(
    replica: ReplicaProcess, publisher: Publisher
) -> None:
    policy, probe = await publisher.publish(1), probe_policy()
    await send(publisher, probe)
    resident = (await publisher.client.policies()).resident
    assert [(item.policy, item.accepts_requests) for item in resident] == [
        (policy, True),
        (probe, False),
    ]
    await publisher.score(policy=probe)
    with pytest.raises(UnknownPolicy):
        await publisher.score(policy=probe)
    await until(lambda: len(replica.adapter_files()) == 2)  # the weights and config of one version
    (item,) = (await publisher.client.policies()).resident
    assert item.policy == policy


async def test_a_probe_samples_nothing(publisher: Publisher) -> None:
    policy, probe = await publisher.publish(1), probe_policy()
    await send(publisher, probe)
    with pytest.raises(UnknownPolicy) as refused:
        await publisher.generate([1, 3], policy=probe, max_tokens=1)
    assert refused.value.extra == {"resident": [str(policy)]}
    await publisher.score(policy=probe)


async def test_a_probe_that_nobody_scores_makes_room_before_a_version_does(
    publisher: Publisher,
) -> None:
    first, probe = await publisher.publish(1), probe_policy()
    await send(publisher, probe)
    second = await publisher.publish(2)
    resident = (await publisher.client.policies()).resident
    assert [item.policy for item in resident] == [first, second]


async def test_a_probe_is_checked_as_any_adapter_is(publisher: Publisher) -> None:
    policy = await publisher.publish(1)
    probe = probe_policy()
    adapter = publisher.adapter(probe)
    other_base = publisher.base.model_copy(update={"weights": "0" * 64})
    stranger = Publisher(publisher.client, other_base, publisher.shapes)
    refusals: list[tuple[bytes, dict[str, str], type[ServiceError]]] = [
        (adapter, {"digest": "sha-256=:" + "A" * 43 + "=:"}, DigestMismatch),
        (stranger.adapter(probe), {}, BaseMismatch),
        (publisher.adapter(probe, strength=float("nan")), {}, InvalidAdapter),
        (publisher.adapter(probe, rank=64), {}, InvalidAdapter),
        (b"not an adapter", {}, InvalidAdapter),
        (publisher.adapter(policy), {}, StaleVersion),  # the id of a version that serves
    ]
    for content, options, error in refusals:
        with pytest.raises(error):
            await publisher.client.sync_weights(content, probe=True, **options)  # type: ignore[arg-type]
    (item,) = (await publisher.client.policies()).resident
    assert item.policy == policy
