"""The summary that the demo prints at its end."""

from __future__ import annotations

from typing import Any

import pytest

from examples.demo.history import History
from shared.schemas import PolicyId, StepRecord


def step(**fields: Any) -> StepRecord:
    numbers = dict.fromkeys((n for n, f in StepRecord.model_fields.items() if f.is_required()), 0)
    policy = PolicyId(run_id="r", version=1)
    return StepRecord.model_validate({**numbers, "policy": policy, "num_groups": 2, **fields})


def test_a_step_without_a_logprob_gap_counts_in_no_mean_of_it() -> None:
    learned = step(num_tokens=10, logprob_gap=0.02)
    constant = step(num_tokens=30, num_constant_groups=2)
    history = History(steps=[learned, constant])
    assert history._token_mean(lambda record: record.logprob_gap) == pytest.approx(0.02)
