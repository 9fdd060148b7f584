from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from services.trainer.algorithms.reinforce import baseline_returns, discounted_returns, whiten


@pytest.mark.parametrize(("discount", "expected"), [(1.0, [6.0, 5.0, 4.0]), (0.5, [2.5, 3.0, 4.0])])
def test_a_return_is_the_discounted_sum_of_what_follows(
    discount: float, expected: list[float]
) -> None:
    (returns,) = discounted_returns([torch.tensor([1.0, 1.0, 4.0])], discount=discount)
    assert returns.tolist() == pytest.approx(expected)


def test_the_baseline_is_the_mean_of_the_rewards_of_a_group() -> None:
    rewards = [torch.tensor([1.0, 2.0]), torch.tensor([1.0]), torch.tensor([5.0, 0.0, 0.0])]
    assert _lists(baseline_returns(rewards, [7, 7, 8])) == [[1.0, 1.0], [-1.0], [0.0, 0.0, 0.0]]


def test_whitening_is_over_the_tokens_of_all_samples() -> None:
    whitened = whiten([torch.tensor([1.0]), torch.tensor([2.0, 3.0])], is_masked=[False, False])
    assert _lists(whitened) == [[pytest.approx(-1.0)], [0.0, pytest.approx(1.0)]]


def test_masked_samples_do_not_count_and_get_0() -> None:
    values = [torch.tensor([1.0, 3.0]), torch.tensor([900.0])]
    whitened, masked = whiten(values, is_masked=[False, True])
    assert whitened.tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])
    assert masked.tolist() == [0.0]


def test_a_single_token_is_not_whitened() -> None:
    values = [torch.tensor([4.0]), torch.tensor([9.0])]
    assert _lists(whiten(values, is_masked=[False, True])) == [[4.0], [0.0]]
    assert _lists(whiten(values, is_masked=[True, True])) == [[0.0], [0.0]]


def test_advantages_that_are_all_equal_become_0() -> None:
    assert _lists(whiten([torch.tensor([2.0, 2.0])], is_masked=[False])) == [[0.0, 0.0]]


def _lists(tensors: list[Tensor]) -> list[list[float]]:
    return [tensor.tolist() for tensor in tensors]
