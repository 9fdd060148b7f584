"""A whole run, top to bottom.

    prompts ─▶ fleet.generate ─▶ rewards ─▶ advantages ─▶ samples ─▶ update ─▶ adapter ─▶ fleet.sync
       ▲                                                                                     │
       └──────────────── groups start under it, max_staleness updates ahead (pacing.py) ◀────┘

With max_staleness 0 every group is sampled from the version that the step before made. Offline DPO
takes its samples from the pairs of its dataset instead, and generates nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import statistics
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from services.trainer.data.datasets import Consumed, PairBatch, PairsInOrder, Prompt, RowStream
from services.trainer.fleet.fleet import Fleet
from services.trainer.learner.stats import UpdateRefused, UpdateStats
from services.trainer.policy.policy import Policy, PublishedAdapter
from services.trainer.policy.samples import Sample, group_indices, make_samples, pair_samples
from services.trainer.rewards.scorer import Scorer, punish_overlong
from services.trainer.run.checkpoints import Checkpoints
from services.trainer.run.guards import GuardWatch, check_handshake, refused
from services.trainer.run.log import RunLog
from services.trainer.run.pacing import Ahead, Batch
from services.trainer.run.recent import RecentGroups
from services.trainer.run_config import RunConfig
from shared.schemas import (
    CompletionGroup,
    EvalRecord,
    GenerateRequest,
    PolicyId,
    PreferencePair,
    SamplingParams,
    ScoredGroup,
    StepRecord,
)

log = logging.getLogger(__name__)
_EVAL_PROMPTS_PER_REQUEST = 32
_LAST_SYNC_S = 5.0  # a stopped run waits no longer for replicas, which may be told to stop, too
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Run:
    """Everything one run needs; built by trainer.py."""

    config: RunConfig
    policy: Policy
    fleet: Fleet
    log: RunLog
    prompts: RowStream[Prompt]
    pairs: RowStream[PreferencePair]  # what `dpo` learns from instead of groups
    consumed: Consumed  # positions of either
    checkpoints: Checkpoints
    first_step: int  # steps that an earlier life of the run did
    scorer: Scorer
    held_out: Sequence[Prompt]
    stop: asyncio.Event
    watch: GuardWatch = field(default_factory=GuardWatch)
    recent: RecentGroups = field(default_factory=RecentGroups)


@dataclass(frozen=True, slots=True)
class Learned:
    """What one policy update consumed and made."""

    step: int
    samples: Sequence[Sample]
    stats: UpdateStats
    adapter: PublishedAdapter


async def train(run: Run) -> None:
    """All steps of a managed run. Once `stop` is set, it returns without another update."""
    config, num_steps = run.config, run.config.num_steps
    assert num_steps
    if needs_eval(config, run.first_step, run.log.last_eval):  # a stop may have cut it short
        await unless_stopped(run, evaluate(run, run.first_step))
    async with batches(run) as source:
        for step in range(run.first_step + 1, num_steps + 1):
            clock, meter = Clock(), Meter(run.fleet)
            with clock.measure("wait_s"):
                take: Coroutine[Any, Any, Batch | PairBatch] = source.take()
                batch = await unless_stopped(run, take)
            if batch is None:
                return
            if isinstance(batch, Batch):
                run.recent.add(step, batch.scored)
            learned = await learn(run, to_samples(run, batch), step=step, clock=clock)
            run.consumed.add(batch.positions)
            with clock.measure("sync_s"):
                # One upload is bounded by sync_timeout_s; a replica may first have to come back.
                timeout_s = max(config.generate_timeout_s, config.sync_timeout_s)
                sync = run.fleet.sync(learned.adapter, timeout_s=timeout_s)
                if await unless_stopped(run, sync, grace_s=_LAST_SYNC_S) is None:
                    log.info(
                        "stopped before the replicas had policy %s: they get it when the run goes "
                        "on",
                        learned.adapter.policy,
                    )
            if not run.stop.is_set():
                source.release(learned.adapter.policy)
            run.log.emit_batch(step, batch)
            sampled = batch if isinstance(batch, Batch) else None
            await run.log.emit(step_record(config, learned, clock, meter, sampled))
            if needs_eval(config, step, run.log.last_eval):
                await unless_stopped(run, evaluate(run, step))
            await run.checkpoints.save_if_due(run, step)


def needs_eval(config: RunConfig, step: int, last: EvalRecord | None) -> bool:
    """True when an evaluation after `step` is due and has not been made."""
    if config.eval is None or (last and last.step == step):
        return False
    return step % config.eval.every_steps == 0 or step == config.num_steps


def batches(run: Run) -> AbstractAsyncContextManager[Ahead | PairsInOrder]:
    """What the steps to come learn from: pairs of the dataset, or groups that are sampled ahead."""
    if run.config.learns_from_pairs:
        return nullcontext(PairsInOrder(run.pairs, run.consumed, run.config.prompts_per_step))
    return groups_ahead(run)


def to_samples(run: Run, batch: Batch | PairBatch) -> list[Sample]:
    if isinstance(batch, PairBatch):
        return pair_samples(batch.pairs)
    return make_samples(batch.scored, run.policy.id)


def groups_ahead(run: Run) -> Ahead:
    """The groups of the steps to come, sampled and scored as far ahead as the config allows."""
    config = run.config
    assert config.num_steps

    async def sample(position: int, prompt: Prompt, policy: PolicyId) -> CompletionGroup:
        request = train_request(config, position, prompt, policy)
        (group,) = await run.fleet.generate([request], timeout_s=config.generate_timeout_s)
        return group

    async def score(
        prompts: Sequence[Prompt], groups: Sequence[CompletionGroup]
    ) -> Sequence[ScoredGroup]:
        scored = await run.scorer.score(prompts, groups)
        if config.overlong is None:
            return scored
        assert config.sampling.max_tokens, "the config was refused else"
        return punish_overlong(scored, config.overlong, max_tokens=config.sampling.max_tokens)

    def is_constant(group: ScoredGroup) -> bool:
        return config.is_constant(
            [scored.rewards or (scored.reward,) for scored in group.completions],
            [scored.completion.finish_reason == "length" for scored in group.completions],
        )

    return Ahead(
        prompts=run.prompts,
        consumed=run.consumed,
        sample=sample,
        score=score,
        batch_size=config.prompts_per_step,
        max_staleness=config.max_staleness,
        num_groups=(config.num_steps - run.first_step) * config.prompts_per_step,
        policy=run.policy.id,
        max_set_aside=config.max_set_aside,
        is_constant=is_constant,
    )


async def unless_stopped(
    run: Run, work: Coroutine[Any, Any, Result], *, grace_s: float = 0.0
) -> Result | None:
    """The result of `work`; None when the run was stopped first, and `work` is cancelled.

    Once the run is stopped, `work` has `grace_s` more to be done.
    """
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(run.stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if run.stop.is_set():
            await asyncio.wait({task}, timeout=grace_s)
            return task.result() if grace_s and task.done() else None
        return await task
    finally:
        task.cancel()
        stopped.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


async def learn(run: Run, samples: Sequence[Sample], *, step: int, clock: Clock) -> Learned:
    """One policy update: the next version and its adapter.

    Raises UnsuitableForTraining for an update that the guards refuse: nothing of it was applied.
    """
    policy, config = run.policy, run.config
    if config.compares_within_groups and all(constant_groups(config, samples)):
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
                policy.update,
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
        and config.is_constant([s.rewards for s in group], [s.is_truncated for s in group])
        for group in groups
    ]


async def evaluate(run: Run, step: int) -> None:
    """Mean reward on held-out prompts, sampled and greedy, one completion each."""
    if not run.config.eval:
        return
    started = time.perf_counter()
    sampling = run.config.sampling.model_copy(update={"n": 1, "detokenize": False})
    seed = derived_seed(run.config.seed, "eval")
    sampled = await _mean_reward(run, sampling.model_copy(update={"seed": seed}))
    greedy = await _mean_reward(run, sampling.model_copy(update={"temperature": 0.0}))
    await run.log.emit(
        EvalRecord(
            step=step,
            policy=run.policy.id,
            num_prompts=len(run.held_out),
            sampled_reward=sampled,
            greedy_reward=greedy,
            eval_s=time.perf_counter() - started,
        )
    )


async def _mean_reward(run: Run, sampling: SamplingParams) -> float:
    requests = [
        GenerateRequest(
            prompts=tuple(prompt.token_ids for prompt in chunk),
            sampling=sampling.model_copy(
                update={"seed": None if sampling.seed is None else sampling.seed + start}
            ),
            policy=run.policy.id,
            purpose="eval",
        )
        for start, chunk in _chunks(run.held_out, _EVAL_PROMPTS_PER_REQUEST)
    ]
    groups = await run.fleet.generate(requests, timeout_s=run.config.generate_timeout_s)
    scored = await run.scorer.score(run.held_out, groups)
    return statistics.fmean(c.reward for group in scored for c in group.completions)


def train_request(
    config: RunConfig, position: int, prompt: Prompt, policy: PolicyId
) -> GenerateRequest:
    """The request of one group, pinned to a version, with noise of its own."""
    seed = derived_seed(config.seed, f"train/{position}")
    return GenerateRequest(
        prompts=(prompt.token_ids,),
        sampling=config.sampling.model_copy(update={"seed": seed, "detokenize": False}),
        policy=policy,
        purpose="train",
    )


def step_record(
    config: RunConfig, learned: Learned, clock: Clock, meter: Meter, sampled: Batch | None = None
) -> StepRecord:
    """What a step did; `sampled` says how its groups came when this service sampled them."""
    samples, stats = learned.samples, learned.stats
    is_constant = constant_groups(config, samples)
    rewards = [sample.reward for sample in samples]
    num_tokens = sum(sample.num_tokens for sample in samples)
    staleness = [max(sample.staleness, default=0) for sample in samples]
    step_s = clock.total_s
    return StepRecord(
        step=learned.step,
        policy=learned.adapter.policy,
        num_groups=len(is_constant),
        num_constant_groups=sum(is_constant),
        num_constant_groups_set_aside=len(sampled.set_aside) if sampled else 0,
        num_samples=len(samples),
        num_tokens=num_tokens,
        reward_mean=statistics.fmean(rewards),
        reward_std=statistics.pstdev(rewards),
        completion_tokens_mean=num_tokens / len(samples),
        truncated_fraction=statistics.fmean(sample.is_truncated for sample in samples),
        staleness_mean=statistics.fmean(staleness),
        staleness_max=max(staleness),
        staleness_histogram=dict(sorted(Counter(staleness).items())),
        num_continued=meter.num_continued,
        num_ready_groups=sampled.num_ready_groups if sampled else 0,
        num_in_flight_groups=sampled.num_in_flight_groups if sampled else 0,
        generate_s=sampled.generate_s if sampled else 0.0,
        reward_s=sampled.reward_s if sampled else 0.0,
        step_s=step_s,
        tokens_per_s=num_tokens / step_s,
        trainer_idle_fraction=clock.seconds.get("wait_s", 0.0) / step_s,
        rollout_idle_fraction=meter.rollout_idle_fraction,
        num_serving_replicas=meter.fleet.num_serving(learned.adapter.policy),
        adapter_bytes=len(learned.adapter.content),
        **asdict(stats),
        **clock.seconds,
    )


def derived_seed(seed: int, name: str) -> int:
    """A sampling seed for one named draw of a run; adjacent draws have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7])


@dataclass(slots=True)
class Clock:
    """Wall time of the parts of a step, and of all of it."""

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
    """What the fleet did since the meter was made."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._busy_s, self._serving_s = fleet.seconds()
        self._num_continued = fleet.num_continued

    @property
    def num_continued(self) -> int:
        return self.fleet.num_continued - self._num_continued

    @property
    def rollout_idle_fraction(self) -> float:
        busy_s, serving_s = self.fleet.seconds()
        if serving_s <= self._serving_s:
            return 0.0
        return max(0.0, 1 - (busy_s - self._busy_s) / (serving_s - self._serving_s))


def _chunks(items: Sequence[Prompt], size: int) -> Iterator[tuple[int, Sequence[Prompt]]]:
    for start in range(0, len(items), size):
        yield start, items[start : start + size]
