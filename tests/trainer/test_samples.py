"""From groups to tensors: every number lands at the token it belongs to."""

from __future__ import annotations

import torch

from services.trainer.samples import Sample, collate, make_samples, micro_batches
from shared.schemas import (
    Completion,
    PolicyId,
    SamplingParams,
    ScoredCompletion,
    ScoredGroup,
    Segment,
)
from tests.trainer.conftest import make_sample


def test_staleness_counts_versions_token_by_token() -> None:
    policies = [PolicyId(run_id="r", version=version) for version in (3, 5)]
    completion = Completion(
        token_ids=(4, 5, 6),
        logprobs=(-1.0, -1.0, -1.0),
        segments=tuple(
            Segment(policy=policy, num_tokens=n) for policy, n in zip(policies, (1, 2), strict=True)
        ),
        finish_reason="stop",
    )
    group = ScoredGroup(
        prompt_token_ids=(1,),
        sampling=SamplingParams(temperature=0.7),
        completions=(ScoredCompletion(completion=completion, reward=1.0),),
    )
    (sample,) = make_samples([group], [[0.5]], PolicyId(run_id="r", version=5))
    assert sample.staleness == (2, 0, 0)
    assert (sample.temperature, sample.advantage) == (0.7, 0.5)


def test_a_position_predicts_the_token_after_it() -> None:
    first = Sample((1, 2), (3, 4, 5), (-0.1, -0.2, -0.3), (0, 0, 1), 1.0, 2.0)
    second = Sample((6,), (7,), (-0.4,), (0,), 0.5, -1.0)
    batch = collate([first, second])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.predicts.nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [1, 0]]
    assert batch.labels.tolist() == [3, 4, 5, 7]
    assert batch.advantages.tolist() == [2.0, 2.0, 2.0, -1.0]
    assert batch.temperatures.tolist() == [1.0, 1.0, 1.0, 0.5]
    assert batch.is_fresh.tolist() == [True, True, False, True]
    torch.testing.assert_close(batch.sampler_logprobs, torch.tensor([-0.1, -0.2, -0.3, -0.4]))


def test_micro_batches_hold_every_sample_once_within_the_budget() -> None:
    samples = [make_sample(i, advantage=1.0, num_prompt=1 + i % 7) for i in range(40)]
    batches = list(micro_batches(samples, max_tokens=64))
    assert sorted(id(sample) for batch in batches for sample in batch) == sorted(map(id, samples))
    assert all(len(batch) * max(s.length for s in batch) <= 64 for batch in batches)


def test_a_sample_over_the_budget_is_a_batch_of_its_own() -> None:
    samples = [make_sample(0, advantage=1.0, num_prompt=90), make_sample(1, advantage=1.0)]
    assert [len(batch) for batch in micro_batches(samples, max_tokens=64)] == [1, 1]
