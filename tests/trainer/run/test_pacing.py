"""Groups ahead of the trainer: the bound holds, nothing waits without need, nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.data.rows import Consumed, ConsumedState, Prompt, RowStream
from services.trainer.run.pacing import GroupBatch, GroupQueue
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

PROMPTS = RowStream([Prompt(str(i), (i,), {}) for i in range(7)], seed=0)


class Trainer:
    """Samples in `seconds[position]`, and trains `num_steps` updates of `update_s`.

    Groups at `constant` positions have equal rewards; those set aside make positions go on beyond
    `seconds`, which begin again.
    """

    def __init__(
        self,
        seconds: Sequence[float],
        *,
        batch_size: int,
        max_staleness: int,
        update_s: float = 1,
        constant: Collection[int] = (),
        max_set_aside: int = 0,
    ) -> None:
        self.constant = constant
        self.seconds = seconds
        self.update_s = update_s
        self.steps: list[GroupBatch] = []
        self.idle_s: list[float] = []
        self.batch_sizes_scored: list[int] = []
        self.fails_at: int | None = None
        self.started: list[int] = []
        self.ahead = GroupQueue(
            prompts=PROMPTS,
            consumed=Consumed(),
            sample=self.sample,
            score=self.score,
            batch_size=batch_size,
            max_staleness=max_staleness,
            num_groups=len(seconds),
            policy=policy_at(0),
            max_set_aside=max_set_aside,
        )

    async def sample(self, position: int, prompt: Prompt, policy: PolicyId) -> CompletionGroup:
        self.started.append(position)
        await asyncio.sleep(self.seconds[position % len(self.seconds)])
        if position == self.fails_at:
            raise RewardFailed("the judge is away")
        completion = Completion(
            token_ids=(position,),
            logprobs=(-1.0,),
            segments=(Segment(policy=policy, num_tokens=1),),
            finish_reason="stop",
        )
        return CompletionGroup(
            prompt_token_ids=(1,), completions=(completion,) * 2, sampling=SamplingParams()
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
                    ScoredCompletion(completion=completion, reward=reward)
                    for completion, reward in zip(
                        group.completions, self.rewards(group), strict=True
                    )
                ),
            )
            for group in groups
        ]

    def rewards(self, group: CompletionGroup) -> tuple[float, float]:
        (position,) = group.completions[0].token_ids
        return (1.0, 1.0) if position in self.constant else (1.0, 0.0)

    async def train(self) -> None:
        clock = asyncio.get_running_loop().time
        num_steps = len(self.seconds) // self.ahead.batch_size
        async with self.ahead as ahead:
            for step in range(num_steps):
                started = clock()
                batch = await ahead.take()
                self.steps.append(batch)
                self.idle_s.append(clock() - started)
                await asyncio.sleep(self.update_s)
                ahead.consumed.add(batch.positions)
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
                ahead.consumed.add(trainer.steps[-1].positions)
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


# --- dynamic sampling ---------------------------------------------------------------------------


@given(
    seconds=st.lists(st.floats(0, 10), min_size=24, max_size=24),
    batch_size=st.sampled_from([1, 2, 3, 4, 6]),
    max_staleness=st.integers(0, 4),
    update_s=st.floats(0, 5),
    constant=st.sets(st.integers(0, 60)) | st.just(range(10_000)),
    factor=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_groups_set_aside_loosen_no_bound_lose_no_position_and_end_no_run(
    seconds: list[float],
    batch_size: int,
    max_staleness: int,
    update_s: float,
    constant: Collection[int],
    factor: int,
) -> None:
    max_set_aside = (factor - 1) * batch_size
    trainer = run(
        Trainer(
            seconds,
            batch_size=batch_size,
            max_staleness=max_staleness,
            update_s=update_s,
            constant=constant,
            max_set_aside=max_set_aside,
        )
    )
    assert [len(batch.groups) for batch in trainer.steps] == [batch_size] * (24 // batch_size)
    assert max(trainer.staleness()) <= max_staleness
    consumed = [position for batch in trainer.steps for position in batch.positions]
    assert sorted(consumed) == sorted(trainer.started)  # none twice, and none is left over
    assert trainer.ahead.consumed.state == ConsumedState(next=len(consumed))
    for batch in trainer.steps:
        set_aside = [group.position for group in batch.set_aside]
        assert len(set_aside) <= max_set_aside
        assert all(position in constant for position in set_aside)
        if any(group.position in constant for group in batch.groups):
            assert len(set_aside) == max_set_aside


def test_a_batch_has_only_groups_that_vary_while_there_are_any() -> None:
    trainer = run(
        Trainer([1.0] * 4, batch_size=2, max_staleness=0, constant=(0, 2, 3, 6), max_set_aside=6)
    )
    assert trainer.positions() == [[1, 4], [5, 7]]
    assert [[g.position for g in batch.set_aside] for batch in trainer.steps] == [[0, 2, 3], [6]]


def test_a_run_whose_groups_are_all_constant_goes_on_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a factor of 4, a batch of 2 is made of no more than 8 groups."""
    trainer = run(
        Trainer([1.0] * 4, batch_size=2, max_staleness=0, constant=range(99), max_set_aside=6)
    )
    assert trainer.positions() == [[6, 7], [14, 15]]
    assert "2 of the 2 groups of this update have equal rewards: 6 were set aside" in caplog.text


def test_a_long_update_sets_aside_no_more_than_one_batch_may() -> None:
    """Else an update of an hour would sample the whole dataset for nothing."""
    trainer = run(
        Trainer(
            [0.1] * 4,
            batch_size=2,
            max_staleness=1,
            update_s=1000,
            constant=range(999),
            max_set_aside=6,
        )
    )
    assert [len(batch.set_aside) for batch in trainer.steps] == [6, 6]
    assert len(trainer.started) == 16
