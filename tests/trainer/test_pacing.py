"""Groups ahead of the trainer: the bound holds, nothing waits without need, nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.data import Consumed, ConsumedState, Prompt, PromptStream
from services.trainer.pacing import Ahead, Batch
from shared.errors import RewardFailed
from shared.schemas import (
    Completion,
    CompletionGroup,
    PolicyId,
    SamplingParams,
    ScoredCompletion,
    ScoredGroup,
    Segment,
)
from tests import virtual_clock
from tests.fake_replica import policy_at

PROMPTS = PromptStream([Prompt(str(i), (i,), {}) for i in range(7)], seed=0)


class Trainer:
    """Samples in `seconds[position]`, and trains `num_steps` updates of `update_s`."""

    def __init__(
        self, seconds: Sequence[float], *, batch_size: int, max_staleness: int, update_s: float = 1
    ) -> None:
        self.seconds = seconds
        self.update_s = update_s
        self.steps: list[Batch] = []
        self.idle_s: list[float] = []
        self.batch_sizes_scored: list[int] = []
        self.fails_at: int | None = None
        self.ahead = Ahead(
            prompts=PROMPTS,
            consumed=Consumed(),
            sample=self.sample,
            score=self.score,
            batch_size=batch_size,
            max_staleness=max_staleness,
            num_groups=len(seconds),
            policy=policy_at(0),
        )

    async def sample(self, position: int, prompt: Prompt, policy: PolicyId) -> CompletionGroup:
        await asyncio.sleep(self.seconds[position])
        if position == self.fails_at:
            raise RewardFailed("the judge is away")
        completion = Completion(
            token_ids=(1,),
            logprobs=(-1.0,),
            segments=(Segment(policy=policy, num_tokens=1),),
            finish_reason="stop",
        )
        return CompletionGroup(
            prompt_token_ids=(1,), completions=(completion,), sampling=SamplingParams()
        )

    async def score(
        self, prompts: Sequence[Prompt], groups: Sequence[CompletionGroup]
    ) -> list[ScoredGroup]:
        self.batch_sizes_scored.append(len(groups))
        await asyncio.sleep(0.01)
        return [
            ScoredGroup(
                prompt_token_ids=group.prompt_token_ids,
                sampling=group.sampling,
                completions=tuple(
                    ScoredCompletion(completion=c, reward=1.0) for c in group.completions
                ),
            )
            for group in groups
        ]

    async def train(self) -> None:
        clock = asyncio.get_running_loop().time
        num_steps = len(self.seconds) // self.ahead.batch_size
        async with self.ahead as ahead:
            for step in range(num_steps):
                started = clock()
                self.steps.append(await ahead.take())
                self.idle_s.append(clock() - started)
                await asyncio.sleep(self.update_s)
                ahead.release(policy_at(step + 1))

    def positions(self) -> list[list[int]]:
        return [[group.position for group in batch.groups] for batch in self.steps]

    def staleness(self) -> list[int]:
        return [
            version - segment.policy.version
            for version, batch in enumerate(self.steps)
            for scored in batch.scored
            for segment in scored.completions[0].completion.segments
        ]


def run(trainer: Trainer) -> Trainer:
    virtual_clock.run(trainer.train())
    return trainer


@given(
    seconds=st.lists(st.floats(0, 10), min_size=24, max_size=24),
    batch_size=st.sampled_from([1, 2, 3, 4, 6]),
    max_staleness=st.integers(0, 4),
    update_s=st.floats(0, 5),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_group_is_trained_once_within_the_bound_however_long_each_takes(
    seconds: list[float], batch_size: int, max_staleness: int, update_s: float
) -> None:
    """AReaL and tinker-cookbook#822 throw stale groups away; trl#7274 lost its place by one."""
    trainer = run(
        Trainer(seconds, batch_size=batch_size, max_staleness=max_staleness, update_s=update_s)
    )
    positions = [position for batch in trainer.positions() for position in batch]
    assert sorted(positions) == list(range(24))
    assert all(len(batch) == batch_size for batch in trainer.positions())
    assert max(trainer.staleness()) <= max_staleness
    assert trainer.ahead.consumed.state == ConsumedState(next=24)


def test_without_staleness_every_batch_is_the_next_prompts_under_the_newest_version() -> None:
    trainer = run(Trainer([3, 1, 2, 1, 1, 4], batch_size=2, max_staleness=0))
    assert trainer.positions() == [[0, 1], [2, 3], [4, 5]]
    assert set(trainer.staleness()) == {0}


def test_sampling_goes_on_while_the_trainer_learns() -> None:
    on_policy = run(Trainer([1.0] * 20, batch_size=2, max_staleness=0))
    ahead = run(Trainer([1.0] * 20, batch_size=2, max_staleness=1))
    assert sum(on_policy.idle_s) == pytest.approx(10, rel=0.1)
    assert sum(ahead.idle_s) == pytest.approx(1, rel=0.1)


def test_a_slow_group_does_not_hold_up_those_that_are_ready() -> None:
    seconds = [30.0 if position == 0 else 0.5 for position in range(20)]
    trainer = run(Trainer(seconds, batch_size=2, max_staleness=8))
    (late,) = [step for step, batch in enumerate(trainer.positions()) if 0 in batch]
    assert late == 8  # the last update that may have it
    assert trainer.positions()[0] == [1, 2]
    assert sum(trainer.idle_s[:8]) < 1


def test_rewards_of_groups_that_come_together_are_computed_together() -> None:
    trainer = run(Trainer([1.0] * 12, batch_size=6, max_staleness=0))
    assert sum(trainer.batch_sizes_scored) == 12
    assert len(trainer.batch_sizes_scored) <= 4


def test_positions_of_an_earlier_life_are_not_sampled_again() -> None:
    trainer = Trainer([1.0] * 8, batch_size=2, max_staleness=1)
    trainer.ahead.consumed = Consumed(ConsumedState(next=2, beyond=(4,)))
    trainer.ahead.num_groups = 4

    async def two_steps() -> None:
        async with trainer.ahead as ahead:
            for step in range(2):
                trainer.steps.append(await ahead.take())
                ahead.release(policy_at(step + 1))

    virtual_clock.run(two_steps())
    assert trainer.positions() == [[2, 3], [5, 6]]
    assert trainer.ahead.consumed.state == ConsumedState(next=7)


def test_what_fails_while_sampling_is_raised_to_the_trainer() -> None:
    trainer = Trainer([1.0] * 4, batch_size=2, max_staleness=0)
    trainer.fails_at = 3
    with pytest.raises(RewardFailed, match="judge"):
        run(trainer)
    assert len(trainer.steps) == 1
