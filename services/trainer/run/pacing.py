"""Groups ahead of the trainer: sampled and scored while it learns, never too far ahead.

    prompts ─▶ [start] ─▶ fleet.generate ─▶ rewards ─▶ ready ─▶ [take] ─▶ one update ─▶ [release]
                  ▲                              │                                          │
                  ├──── set aside: constant ◀────┘                                          │
                  └──────────────── places: batch_size × (max_staleness + 1) ◀──────────────┘

A group starts under the newest served version only when there is a place for it, so in the order of
their start all groups can be trained within the bound. The trainer may take younger ones first as
long as that stays so: it waits for a slow group only when the bound says that it must. Nothing is
thrown away.

Dynamic sampling (DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.2) is the exception that the
user asks for: a group of equal rewards gives its place to a new one at the end of the queue. Those
behind it only move forward, so the bound holds. The paper samples until a batch is full; here at
most `max_set_aside` groups are set aside per batch, so that a run without varied groups continues.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

from services.trainer.data.rows import Consumed, Prompt, RowStream
from shared.schemas import CompletionGroup, PolicyId, ScoredGroup

log = logging.getLogger(__name__)
SampleGroup = Callable[[int, Prompt, PolicyId], Awaitable[CompletionGroup]]


def has_equal_rewards(group: ScoredGroup) -> bool:
    return len({scored.reward for scored in group.completions}) == 1


ScoreGroups = Callable[
    [Sequence[Prompt], Sequence[CompletionGroup]], Awaitable[Sequence[ScoredGroup]]
]


@dataclass(slots=True, eq=False)
class PendingGroup:
    """A group on its way to the trainer. Times are seconds of `perf_counter`."""

    position: int  # Position in the stream of prompts.
    prompt: Prompt
    # The version it started under, which is the oldest that any of its tokens has.
    policy: PolicyId
    started_at: float
    sampled: CompletionGroup | None = None
    sampled_at: float = 0.0
    scored: ScoredGroup | None = None
    scored_at: float = 0.0
    is_constant: bool = False  # Set when it is scored.

    @property
    def is_ready(self) -> bool:
        return self.scored is not None


def choose_batch(
    groups: Sequence[PendingGroup], *, version: int, batch_size: int, max_staleness: int
) -> list[PendingGroup] | None:
    """The oldest ready groups, for the update of `version`; None when the trainer has to wait.

    It waits when fewer than `batch_size` are ready, or when the remaining ones would become too
    stale. `groups` are in the order of their start.
    """
    chosen = [group for group in groups if group.is_ready][:batch_size]
    if len(chosen) < batch_size:
        return None
    left = [group for group in groups if group not in chosen]
    for place, group in enumerate(left):
        trained_at = version + 1 + place // batch_size
        if trained_at - group.policy.version > max_staleness:
            return None
    return chosen


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """What one update learns from, in the order of the prompts."""

    groups: Sequence[PendingGroup]
    set_aside: Sequence[PendingGroup]  # Constant groups set aside since the batch before.
    num_ready_groups: int  # When it was taken, its own groups included.
    num_in_flight_groups: int

    @property
    def positions(self) -> list[int]:
        """The positions that the run has consumed once it has learned from this batch."""
        return [group.position for group in (*self.groups, *self.set_aside)]

    @property
    def scored(self) -> list[ScoredGroup]:
        return [group.scored for group in self.groups if group.scored]

    @property
    def generate_s(self) -> float:
        return sum(g.sampled_at - g.started_at for g in self.groups) / len(self.groups)

    @property
    def reward_s(self) -> float:
        return sum(g.scored_at - g.sampled_at for g in self.groups) / len(self.groups)


@dataclass(slots=True)
class GroupQueue:
    """Starts groups, keeps them, and hands them out. Use as an async context manager.

    Positions come from `prompts`, except those in `consumed`. It starts at most `num_groups`
    groups, plus one for each that is set aside. `take` raises errors of sampling and scoring.
    """

    prompts: RowStream[Prompt]
    consumed: Consumed
    sample: SampleGroup
    score: ScoreGroups
    batch_size: int
    max_staleness: int
    num_groups: int
    policy: PolicyId  # The version that new groups start under.
    max_set_aside: int = 0  # Constant groups that may be replaced per batch.
    is_constant: Callable[[ScoredGroup], bool] = has_equal_rewards
    _groups: list[PendingGroup] = field(default_factory=list)  # In the order of their start.
    # Set aside since the last batch was taken.
    _set_aside: list[PendingGroup] = field(default_factory=list)
    _num_taken: int = 0  # Groups of the last batch, until its version is served.
    _next_position: int = 0
    _sampled: asyncio.Event = field(default_factory=asyncio.Event)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _error: Exception | None = None

    async def __aenter__(self) -> Self:
        self._spawn(self._score_what_comes)
        self._start_groups()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def take(self) -> GroupBatch:
        """The groups of the next update, as soon as enough may be trained."""
        while True:
            if self._error:
                raise self._error
            groups = choose_batch(
                self._groups,
                version=self.policy.version,
                batch_size=self.batch_size,
                max_staleness=self.max_staleness,
            )
            if groups:
                break
            self._changed.clear()
            await self._changed.wait()
        num_ready = sum(group.is_ready for group in self._groups)
        batch = GroupBatch(
            sorted(groups, key=lambda group: group.position),
            set_aside=self._set_aside,
            num_ready_groups=num_ready,
            num_in_flight_groups=len(self._groups) - num_ready,
        )
        self._groups = [group for group in self._groups if group not in groups]
        self._num_taken, self._set_aside = len(groups), []
        num_constant = sum(group.is_constant for group in groups)
        if num_constant and self.max_set_aside:
            log.warning(
                "%d of the %d groups of this update have equal rewards: %d were set aside before, "
                "and no more may be; give prompts that are neither too easy nor too hard",
                num_constant,
                len(groups),
                len(batch.set_aside),
            )
        self._set_aside_constant()  # Those that the batch before could not set aside.
        return batch

    def release(self, policy: PolicyId) -> None:
        """The last batch made `policy`, which is served now: its places are free."""
        self._num_taken = 0
        self.policy = policy
        self._start_groups()

    # --- start ----------------------------------------------------------------------------------

    def _start_groups(self) -> None:
        num_places = self.batch_size * (self.max_staleness + 1)
        while self.num_groups > 0 and len(self._groups) + self._num_taken < num_places:
            while self._next_position in self.consumed:
                self._next_position += 1
            position = self._next_position
            self._next_position += 1
            self.num_groups -= 1
            prompt = self.prompts.at(position)
            group = PendingGroup(position, prompt, self.policy, time.perf_counter())
            self._groups.append(group)
            self._spawn(partial(self._sample, group))

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        async def work_or_fail() -> None:
            try:
                await work()
            except Exception as error:  # `take` raises it, whatever it is.
                self._error = error
                self._changed.set()

        task = asyncio.create_task(work_or_fail())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _sample(self, group: PendingGroup) -> None:
        group.sampled = await self.sample(group.position, group.prompt, group.policy)
        group.sampled_at = time.perf_counter()
        self._sampled.set()

    async def _score_what_comes(self) -> None:
        """Score all groups together that arrived while the last ones were scored.

        A reward is never called twice at the same time, and a slow one gets larger batches.
        """
        while True:
            waiting = [group for group in self._groups if group.sampled and not group.is_ready]
            if not waiting:
                self._sampled.clear()
                await self._sampled.wait()
                continue
            groups = [group.sampled for group in waiting if group.sampled]
            scored = await self.score([group.prompt for group in waiting], groups)
            for group, result in zip(waiting, scored, strict=True):
                group.scored, group.scored_at = result, time.perf_counter()
                group.is_constant = self.is_constant(result)
            self._set_aside_constant()
            self._changed.set()

    def _set_aside_constant(self) -> None:
        """Replace constant groups by new ones, oldest first, as far as allowed."""
        num_left = self.max_set_aside - len(self._set_aside)
        constant = [group for group in self._groups if group.is_constant][:num_left]
        self._set_aside += constant
        self._groups = [group for group in self._groups if group not in constant]
        self.num_groups += len(constant)
        self._start_groups()
