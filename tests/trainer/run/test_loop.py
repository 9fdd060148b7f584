"""What the loop decides without a model or a replica."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import cast

import pytest

from services.trainer.run.evaluation import needs_eval
from services.trainer.run.loop import unless_stopped
from services.trainer.run.run import Run
from services.trainer.run_config import RunConfig
from shared.schemas import EvalRecord, PolicyId

CONFIG = RunConfig.model_validate(
    {
        "num_steps": 25,
        "dataset": {"type": "sort_digits"},
        "rewards": [{"type": "exact_match"}],
        "eval": {"dataset": {"type": "sort_digits"}, "every_steps": 10},
    }
)


def evaluated(step: int) -> EvalRecord:
    return EvalRecord(
        step=step,
        policy=PolicyId(run_id="r", version=step),
        num_prompts=1,
        sampled_reward=0.0,
        greedy_reward=0.0,
        eval_s=0.0,
    )


@pytest.mark.parametrize(
    ("step", "last", "due"),
    [
        (0, None, True),
        (9, 0, False),
        (10, 0, True),
        (10, 10, False),  # resumed after it
        (20, 10, True),  # resumed: a stop cut the evaluation of step 20 short
        (25, 20, True),  # the last step
    ],
)
def test_an_evaluation_is_made_once_after_every_step_that_is_due(
    step: int, last: int | None, due: bool
) -> None:
    record = None if last is None else evaluated(last)
    assert needs_eval(CONFIG, step, record) is due


def test_a_run_without_eval_needs_none() -> None:
    assert not needs_eval(CONFIG.model_copy(update={"eval": None}), 0, None)


@dataclass
class Stoppable:
    stop: asyncio.Event


@pytest.mark.anyio
async def test_a_stopped_run_waits_for_a_sync_only_a_moment() -> None:
    """Replicas may be told to stop with it, and then none takes the version."""
    run, go_on = Stoppable(asyncio.Event()), asyncio.Event()

    async def work() -> str:
        await go_on.wait()
        return "done"

    run.stop.set()
    assert await unless_stopped(cast(Run, run), work(), grace_s=0.01) is None
    asyncio.get_running_loop().call_later(0.01, go_on.set)
    assert await unless_stopped(cast(Run, run), work(), grace_s=20.0) == "done"
    assert await unless_stopped(cast(Run, run), work()) is None
