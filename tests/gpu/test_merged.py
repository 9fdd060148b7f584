"""One version at a time in the weights themselves: as the LoRA mode serves it, and exactly back."""

from __future__ import annotations

import asyncio

import pytest

from services.trainer.policy.policy import Policy
from shared.errors import InvalidRequest
from tests.gpu import machine
from tests.gpu.conftest import Report
from tests.gpu.replicas import Replicas, gap, run_on
from tests.gpu.swap import NOISE, OTHER, Piece, check_sampled, go_on, start_long
from tests.gpu.test_exact_base import last, push, sample, trainer_logprobs
from tests.publisher import PROBE

pytestmark = pytest.mark.anyio


async def test_a_version_in_the_weights_samples_as_one_beside_them_and_leaves_no_trace(
    replicas: Replicas,
) -> None:
    """Versions 1 and 2 of both runs are the same tensors: the other replica knows whose a token
    is."""
    merged, lora = replicas["merged"], replicas["exact-bf16"]
    async with run_on(merged) as run, run_on(lora) as beside:
        base = await run.score(policy=run.policy(0))
        first = await run.publish(1, in_flight="continue")
        running = await start_long(merged, run)
        second = await run.publish(2, in_flight="continue")
        known = [await beside.publish(version) for version in (1, 2)]

        parts = (await running).groups[0].completions
        rests = await asyncio.gather(
            *(go_on(run, part, second, seed=seed) for seed, part in enumerate(parts))
        )
        for part, rest in zip(parts, rests, strict=True):
            assert part.finish_reason == "interrupted"
            assert [segment.policy for segment in part.segments] == [first]
            assert [segment.policy for segment in rest.segments] == [second]
            assert len(part.token_ids) + len(rest.token_ids) == machine.LONG_TOKENS
        old = [Piece.of(part, after=PROBE) for part in parts]
        new = [
            Piece.of(rest, after=(*PROBE, *part.token_ids))
            for part, rest in zip(parts, rests, strict=True)
        ]
        await check_sampled(old, beside, by=known[0], not_by=known[1])
        await check_sampled(new, beside, by=known[1], not_by=known[0])

        assert await run.score(policy=run.policy(0)) == base  # to the last bit
        served = await run.score(policy=second)
        assert gap(served, await beside.score(policy=known[1])) < NOISE
        assert gap(served, base) > OTHER


async def test_completions_cannot_finish_under_a_version_that_leaves_the_weights(
    replicas: Replicas,
) -> None:
    async with run_on(replicas["merged"]) as run:
        status = await run.client.status()
        assert (status.serving_mode, status.limits.max_live_policies) == ("merged", 1)
        first = await run.publish(1, in_flight="continue")
        with pytest.raises(InvalidRequest, match="in_flight=continue"):
            await run.publish(2, in_flight="finish")
        assert (await run.client.policies()).newest == first


async def test_merging_costs_about_as_much_precision_as_the_kernels_of_the_lora_mode(
    replicas: Replicas,
    policy: Policy,
    report: Report,
) -> None:
    gaps = {}
    async with run_on(replicas["exact-bf16"]) as run:
        sequences = await sample(run, policy, 1)
    trainer = trainer_logprobs(policy, sequences, 1)
    for name in ("exact-bf16", "merged"):
        async with run_on(replicas[name]) as run:
            await push(run, 1)
            gaps[name] = gap(last(await run.scores(sequences, run.policy(1))), trainer)
    report("mean |Δlogprob| to the trainer, adapters beside the weights and in them", gaps)
    assert gaps["merged"] < 0.05
