"""One policy update, of a managed run or of POST /train: learn, publish, and its record."""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from services.trainer.fleet.fleet import Fleet
from services.trainer.learner.stats import UpdateRefused
from services.trainer.policy.adapter import PublishedAdapter
from services.trainer.policy.samples import Sample, group_indices
from services.trainer.run.guards import check_handshake, refused
from services.trainer.run.pacing import GroupBatch
from services.trainer.run.run import Run
from services.trainer.run_config import RunConfig
from shared.schemas import StepRecord, UpdateStats

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Learned:
    """What one policy update consumed and made."""

    step: int
    samples: Sequence[Sample]
    stats: UpdateStats
    adapter: PublishedAdapter


async def learn(run: Run, samples: Sequence[Sample], *, step: int, clock: Clock) -> Learned:
    """One policy update: the next version and its adapter.

    Raises UnsuitableForTraining for an update that the guards refuse; nothing of it was applied.
    """
    policy, config = run.policy, run.config
    if config.algorithm.compares_within_groups and all(constant_groups(config, samples)):
        log.warning(
            "step %d: all %d groups have equal rewards (mean %.3f): there is nothing to learn from",
            step,
            len(group_indices(samples)),
            statistics.fmean(sample.reward for sample in samples),
        )
    if config.managed and step == run.first_step + 1:
        await asyncio.to_thread(check_handshake, policy, samples, config.guards)
    with clock.measure("update_s"):
        try:
            stats = await asyncio.to_thread(
                run.learner.update,
                samples,
                config.algorithm,
                max_tokens_per_micro_batch=config.max_tokens_per_micro_batch,
                max_completion_tokens=config.sampling.max_tokens,
                reward_weights=config.reward_weights,
                guards=config.guards,
            )
        except (UpdateRefused, FloatingPointError) as refusal:
            run.log.count_refusal()
            raise await asyncio.to_thread(
                refused, run.log.run_dir, step, samples, refusal
            ) from refusal
    run.watch.see(step, stats, config.guards)
    with clock.measure("publish_s"):
        adapter = await asyncio.to_thread(policy.publish)
    return Learned(step, samples, stats, adapter)


def constant_groups(config: RunConfig, samples: Sequence[Sample]) -> list[bool]:
    """For each group, whether it has several completions and comparing them teaches nothing."""
    groups = [[samples[index] for index in group] for group in group_indices(samples)]
    return [
        len(group) > 1
        and config.algorithm.is_constant(
            [s.rewards for s in group], [s.is_truncated for s in group]
        )
        for group in groups
    ]


def step_record(
    config: RunConfig,
    learned: Learned,
    clock: Clock,
    meter: Meter,
    sampled: GroupBatch | None = None,
) -> StepRecord:
    """What a step did; `sampled` are its groups if this service sampled them."""
    samples, step_s = learned.samples, clock.total_s
    num_tokens = sum(sample.num_tokens for sample in samples)
    wait_s = clock.seconds.get("wait_s")
    return StepRecord(
        step=learned.step,
        policy=learned.adapter.policy,
        num_groups=len(group_indices(samples)),
        num_samples=len(samples),
        num_tokens=num_tokens,
        completion_tokens_mean=num_tokens / len(samples),
        step_s=step_s,
        tokens_per_s=num_tokens / step_s,
        trainer_idle_fraction=None if wait_s is None else wait_s / step_s,
        rollout_idle_fraction=meter.rollout_idle_fraction,
        num_serving_replicas=meter.fleet.num_serving(learned.adapter.policy),
        adapter_bytes=len(learned.adapter.content),
        **dict(learned.stats),
        **clock.seconds,
        **({} if config.algorithm.learns_from_pairs else _of_groups(config, samples)),
        **(_of_sampling(config, sampled, meter) if sampled else {}),
    )


def _of_groups(config: RunConfig, samples: Sequence[Sample]) -> dict[str, Any]:
    """The statistics of completions that were sampled and scored."""
    rewards = [sample.reward for sample in samples]
    staleness = [max(sample.staleness, default=0) for sample in samples]
    return {
        "num_constant_groups": sum(constant_groups(config, samples)),
        "reward_mean": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "truncated_fraction": statistics.fmean(sample.is_truncated for sample in samples),
        "staleness_mean": statistics.fmean(staleness),
        "staleness_max": max(staleness),
        "staleness_histogram": dict(sorted(Counter(staleness).items())),
    }


def _of_sampling(config: RunConfig, batch: GroupBatch, meter: Meter) -> dict[str, Any]:
    """The statistics of groups that this service sampled itself."""
    return {
        "num_constant_groups_set_aside": len(batch.set_aside) if config.dynamic_sampling else None,
        "num_continued": meter.num_continued,
        "num_ready_groups": batch.num_ready_groups,
        "num_in_flight_groups": batch.num_in_flight_groups,
        "generate_s": batch.generate_s,
        "reward_s": batch.reward_s,
    }


@dataclass(slots=True)
class Clock:
    """Wall time of a step and of its parts."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self.started


class Meter:
    """What the fleet has done since the meter was made."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._busy_s, self._serving_s = fleet.seconds()
        self._num_continued = fleet.num_continued

    @property
    def num_continued(self) -> int:
        return self.fleet.num_continued - self._num_continued

    @property
    def rollout_idle_fraction(self) -> float | None:
        """None when no replica served."""
        busy_s, serving_s = self.fleet.seconds()
        if serving_s <= self._serving_s:
            return None
        return max(0.0, 1 - (busy_s - self._busy_s) / (serving_s - self._serving_s))
