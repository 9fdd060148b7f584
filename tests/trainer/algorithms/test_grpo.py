from __future__ import annotations

import math

import pytest

from services.trainer.algorithms.grpo import decoupled_advantages, group_advantages


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
    assert (
        decoupled_advantages([[[0.1, 0.7]] * 3, [[0.0, 0.0], [1.0, 0.0]]], weights=(1.0, 1.0))[0]
        == [0.0] * 3
    )


def test_decoupled_rewards_count_alike_whatever_their_scale() -> None:
    """The first reward prefers the first completion, the second, 1000 times larger, the second."""
    rewards = [[[1.0, 0.0], [0.0, 1000.0]], [[1.0, 1000.0], [0.0, 0.0]]]
    undecided, decided = decoupled_advantages(rewards, weights=(1.0, 1.0))
    assert undecided == pytest.approx([0.0, 0.0], abs=1e-3)
    assert decided[0] > 1
    assert decided[0] == pytest.approx(-decided[1])


@pytest.mark.parametrize(("weight", "sign"), [(2.0, 1), (0.5, -1), (0.0, -1), (-1.0, -1)])
def test_decoupled_rewards_are_added_with_their_weights(weight: float, sign: int) -> None:
    """The first reward, of that weight, prefers the first completion; the second the second."""
    ((first, _),) = decoupled_advantages([[[weight, 0.0], [0.0, 1.0]]], weights=(weight, 1.0))
    assert math.copysign(1, first) == sign
