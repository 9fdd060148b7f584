from __future__ import annotations

import pytest
import torch

from services.trainer.algorithms.ppo import generalized_advantages, value_loss

REWARDS = torch.tensor([0.0, 0.0, 1.0])
VALUES = torch.tensor([0.5, 0.25, 0.5])


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        (1.0, [0.5, 0.75, 0.5]),  # the return minus the value
        (0.0, [-0.25, 0.25, 0.5]),  # one step ahead
    ],
)
def test_lambda_goes_from_one_step_ahead_to_the_whole_return(
    gae_lambda: float, expected: list[float]
) -> None:
    (advantages,), (returns,) = generalized_advantages(
        [REWARDS], [VALUES], discount=1.0, gae_lambda=gae_lambda
    )
    assert advantages.tolist() == pytest.approx(expected)
    assert returns.tolist() == pytest.approx((advantages + VALUES).tolist())


def test_behind_the_last_token_nothing_is_bootstrapped() -> None:
    (advantages,), _ = generalized_advantages([REWARDS], [VALUES], discount=0.9, gae_lambda=0.95)
    assert advantages[-1].item() == pytest.approx(1.0 - 0.5)


def test_a_perfect_critic_leaves_no_advantage() -> None:
    (advantages,), _ = generalized_advantages(
        [REWARDS], [torch.ones(3)], discount=1.0, gae_lambda=0.95
    )
    assert advantages.tolist() == [0.0, 0.0, 0.0]


# A value that was 0 and should be 1, bounded to ±0.2: what it loses, and whether it may go on.
@pytest.mark.parametrize(
    ("value", "loss", "is_clipped"),
    [
        (0.1, 0.9**2 / 2, False),
        (0.5, 0.8**2 / 2, True),  # it went far enough in one update
        (-0.5, 1.5**2 / 2, False),  # the wrong way: pulled back
    ],
)
def test_the_clip_stops_a_value_that_goes_too_far_at_once(
    value: float, loss: float, is_clipped: bool
) -> None:
    values = torch.tensor([value], requires_grad=True)
    result = value_loss(values, torch.zeros(1), torch.ones(1), clip=0.2)
    (gradient,) = torch.autograd.grad(result.loss.sum(), values)
    assert result.loss.item() == pytest.approx(loss)
    assert result.is_clipped.item() is is_clipped
    assert bool(gradient.item()) is not is_clipped


def test_without_a_clip_the_loss_is_half_the_square() -> None:
    result = value_loss(torch.tensor([3.0]), torch.zeros(1), torch.ones(1), clip=None)
    assert result.loss.item() == 2.0
    assert not result.is_clipped.item()
