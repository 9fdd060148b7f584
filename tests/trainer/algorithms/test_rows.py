from __future__ import annotations

import torch

from services.trainer.algorithms.rows import row_means, row_sums

VALUES = torch.tensor([1.0, 2.0, 6.0])
ROWS = torch.tensor([0, 0, 2])


def test_a_row_without_tokens_sums_and_averages_to_0() -> None:
    assert row_sums(VALUES, ROWS, 3).tolist() == [3.0, 0.0, 6.0]
    assert row_means(VALUES, ROWS, 3).tolist() == [1.5, 0.0, 6.0]


def test_the_gradient_of_a_mean_is_shared_by_the_tokens_of_the_row() -> None:
    values = VALUES.clone().requires_grad_()
    row_means(values, ROWS, 3).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.5, 1.0]
