"""A whole run, top to bottom.

    prompts ─▶ fleet.generate ─▶ rewards ─▶ samples ─▶ advantages ─▶ update ─▶ adapter ─▶ fleet.sync
       ▲                                                                                     │
       └──────────────── groups start under it, max_staleness updates ahead (pacing.py) ◀────┘

With max_staleness 0 every group is sampled from the version that the step before made. Offline DPO
takes its samples from the pairs of its dataset instead, and generates nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, TypeVar

from services.trainer.data.rows import Prompt
from services.trainer.policy.samples import Sample, make_samples, pair_samples
from services.trainer.rewards.scorer import punish_overlong
from services.trainer.run.evaluation import derived_seed, evaluate, needs_eval
from services.trainer.run.pacing import GroupBatch, GroupQueue
from services.trainer.run.pairs import PairBatch, PairsInOrder
from services.trainer.run.run import Run
from services.trainer.run.step import Clock, Meter, learn, step_record
from services.trainer.run_config import RunConfig
from shared.schemas import CompletionGroup, GenerateRequest, PolicyId, ScoredGroup

log = logging.getLogger(__name__)
_LAST_SYNC_S = 5.0  # How long a stopped run waits for replicas, which may be stopping as well.
Result = TypeVar("Result")


async def run_steps(run: Run) -> None:
    """All steps of a managed run. Once `stop` is set, it returns without another update."""
    config, num_steps = run.config, run.config.num_steps
    assert num_steps
    if needs_eval(config, run.first_step, run.log.last_eval):  # A stop may have cut it short.
        await unless_stopped(run, evaluate(run, run.first_step))
    async with batches(run) as source:
        for step in range(run.first_step + 1, num_steps + 1):
            clock, meter = Clock(), Meter(run.fleet)
            with clock.measure("wait_s"):
                take: Coroutine[Any, Any, GroupBatch | PairBatch] = source.take()
                batch = await unless_stopped(run, take)
            if batch is None:
                return
            if isinstance(batch, GroupBatch):
                run.recent.add(step, batch.scored)
            learned = await learn(run, to_samples(run, batch), step=step, clock=clock)
            run.consumed.add(batch.positions)
            with clock.measure("sync_s"):
                # sync_timeout_s bounds one upload, but a replica may first have to return.
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
            sampled = batch if isinstance(batch, GroupBatch) else None
            await run.log.emit(step_record(config, learned, clock, meter, sampled))
            if needs_eval(config, step, run.log.last_eval):
                await unless_stopped(run, evaluate(run, step))
            await run.save_if_due(step)


def batches(run: Run) -> AbstractAsyncContextManager[GroupQueue | PairsInOrder]:
    """What the coming steps learn from: pairs of the dataset, or groups sampled ahead."""
    if run.config.algorithm.learns_from_pairs:
        return nullcontext(PairsInOrder(run.pairs, run.consumed, run.config.prompts_per_step))
    return groups_ahead(run)


def to_samples(run: Run, batch: GroupBatch | PairBatch) -> list[Sample]:
    if isinstance(batch, PairBatch):
        return pair_samples(batch.pairs)
    return make_samples(batch.scored, run.policy.id)


def groups_ahead(run: Run) -> GroupQueue:
    """The groups of the coming steps, sampled and scored as far ahead as the config allows."""
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
        return config.algorithm.is_constant(
            [scored.rewards or (scored.reward,) for scored in group.completions],
            [scored.completion.finish_reason == "length" for scored in group.completions],
        )

    return GroupQueue(
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
    """The result of `work`, or None when the run is stopped first and `work` is cancelled.

    After a stop `work` gets `grace_s` more to finish.
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


def train_request(
    config: RunConfig, position: int, prompt: Prompt, policy: PolicyId
) -> GenerateRequest:
    """The request of one group, pinned to a version, with a seed of its own."""
    seed = derived_seed(config.seed, f"train/{position}")
    return GenerateRequest(
        prompts=(prompt.token_ids,),
        sampling=config.sampling.model_copy(update={"seed": seed, "detokenize": False}),
        policy=policy,
        purpose="train",
    )
