"""What the loop decides without a model or a replica."""

from __future__ import annotations

import pytest

from services.trainer.loop import needs_eval
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
