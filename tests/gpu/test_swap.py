"""A new version comes while completions run: every token is of the version that it says."""

from __future__ import annotations

import asyncio

import pytest

from tests.gpu import machine
from tests.gpu.conftest import Report
from tests.gpu.replicas import Replicas, run_on
from tests.gpu.swap import Piece, check_sampled, go_on, start_long
from tests.publisher import PROBE

pytestmark = pytest.mark.anyio


async def test_running_completions_finish_under_their_version(
    replicas: Replicas, report: Report
) -> None:
    replica = replicas["exact-bf16"]
    async with run_on(replica) as run:
        first = await run.publish(1)
        running = await start_long(replica, run)
        second = await run.publish(2)
        later = await run.generate(PROBE, n=8, max_tokens=100, seed=5, ignore_eos=True)
        assert not running.done()
        assert replica.num_leases(first) == 1

        old, new = (await running).groups[0].completions, later.groups[0].completions
        assert {(len(c.token_ids), c.finish_reason) for c in old} == {
            (machine.LONG_TOKENS, "length")
        }
        for completions, policy in ((old, first), (new, second)):
            for completion in completions:
                assert [segment.policy for segment in completion.segments] == [policy]
        gaps = await check_sampled(
            [Piece.of(c, after=PROBE) for c in old], run, by=first, not_by=second
        )
        report("largest gap to the own version, and smallest to the other", gaps)
        await check_sampled([Piece.of(c, after=PROBE) for c in new], run, by=second, not_by=first)


async def test_interrupted_completions_go_on_under_the_new_version(replicas: Replicas) -> None:
    replica = replicas["exact-bf16"]
    async with run_on(replica) as run:
        first = await run.publish(1)
        running = await start_long(replica, run)
        second = await run.publish(2, in_flight="continue")
        parts = (await running).groups[0].completions
        rests = await asyncio.gather(
            *(go_on(run, part, second, seed=seed) for seed, part in enumerate(parts))
        )
        for part, rest in zip(parts, rests, strict=True):
            assert (part.finish_reason, rest.finish_reason) == ("interrupted", "length")
            assert [segment.policy for segment in part.segments] == [first]
            assert [segment.policy for segment in rest.segments] == [second]
            assert len(part.token_ids) + len(rest.token_ids) == machine.LONG_TOKENS
        old = [Piece.of(part, after=PROBE) for part in parts]
        new = [
            Piece.of(rest, after=(*PROBE, *part.token_ids))
            for part, rest in zip(parts, rests, strict=True)
        ]
        await check_sampled(old, run, by=first, not_by=second)
        await check_sampled(new, run, by=second, not_by=first)
