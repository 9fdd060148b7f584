"""Facts of the loss and the advantages that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from services.trainer.algorithms.grpo import PolicyLoss, clipped_policy_loss, group_advantages
from services.trainer.samples import TokenBatch, collate
from tests.trainer.conftest import make_sample


def test_advantages_are_rewards_minus_the_group_mean_over_the_unbiased_deviation() -> None:
    (advantages,) = group_advantages([[1.0, 0.0, 0.0, 1.0]], scale="group")
    deviation = math.sqrt(4 * 0.25 / 3)
    assert advantages == pytest.approx([0.5 / (deviation + 1e-4) * sign for sign in (1, -1, -1, 1)])


def test_without_scaling_advantages_are_centred_rewards() -> None:
    assert group_advantages([[3.0, 1.0], [0.0, 4.0]], scale="none") == [[1.0, -1.0], [-2.0, 2.0]]


def test_batch_scaling_divides_every_group_by_the_deviation_of_all_rewards() -> None:
    rewards = [[3.0, 1.0], [0.0, 4.0]]
    deviation = math.sqrt(sum((r - 2.0) ** 2 for r in (3.0, 1.0, 0.0, 4.0)) / 3) + 1e-4
    expected = [[1 / deviation, -1 / deviation], [-2 / deviation, 2 / deviation]]
    for ours, theirs in zip(group_advantages(rewards, scale="batch"), expected, strict=True):
        assert ours == pytest.approx(theirs)


def test_a_constant_group_has_advantages_of_exactly_zero() -> None:
    assert group_advantages([[0.1] * 3], scale="group") == [[0.0] * 3]


# One token each: ratio π/π_old, advantage, and what min(ρA, clip(ρ)A) is, clipped to [0.8, 1.28].
@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "has_gradient"),
    [
        (1.0, 2.0, 2.0, True),
        (1.5, 2.0, 2.56, False),  # too far up for a good token
        (0.5, 2.0, 1.0, True),  # a good token that became unlikely is pulled back
        (0.5, -2.0, -1.6, False),  # too far down for a bad token
        (1.5, -2.0, -3.0, True),  # a bad token that became likely is pushed down
    ],
)
def test_the_clip_stops_only_gains(
    ratio: float, advantage: float, gain: float, has_gradient: bool
) -> None:
    result, gradient = _loss(ratio, advantage, sampler_gap=0.0)
    assert result.loss.item() == pytest.approx(-gain)
    assert bool(gradient.item()) is has_gradient
    assert result.is_clipped.item() is not has_gradient


@pytest.mark.parametrize(("weight", "applied"), [(0.5, 0.5), (2.0, 2.0), (9.0, 3.0)])
def test_the_weight_against_the_sampler_is_truncated_from_above(
    weight: float, applied: float
) -> None:
    """A dropped correction is silent: Liger-Kernel#1088."""
    result, gradient = _loss(1.0, 1.0, sampler_gap=math.log(weight))
    assert result.loss.item() == pytest.approx(-applied, rel=1e-5)
    assert gradient.item() == pytest.approx(-applied, rel=1e-5)
    assert result.importance_weights.item() == pytest.approx(weight, rel=1e-5)


def test_the_loss_is_divided_by_the_tokens_of_the_whole_step() -> None:
    batch = collate([make_sample(0, advantage=1.0, num_completion=4)])
    logprobs = batch.sampler_logprobs
    loss = clipped_policy_loss(
        logprobs, logprobs, batch, clip_low=0.2, clip_high=0.2, importance_clip=3.0, num_tokens=40
    ).loss
    assert loss.item() == pytest.approx(-4 / 40)


def _loss(ratio: float, advantage: float, *, sampler_gap: float) -> tuple[PolicyLoss, Tensor]:
    """The loss of one token, and its gradient by the policy's logprob."""
    batch = _one_token(advantage)
    old = batch.sampler_logprobs + sampler_gap
    policy_logprobs = (old + math.log(ratio)).requires_grad_()
    result = clipped_policy_loss(
        policy_logprobs, old, batch, clip_low=0.2, clip_high=0.28, importance_clip=3.0, num_tokens=1
    )
    (gradient,) = torch.autograd.grad(result.loss, policy_logprobs)
    return result, gradient


def _one_token(advantage: float) -> TokenBatch:
    return collate([make_sample(0, advantage=advantage, num_completion=1)])
