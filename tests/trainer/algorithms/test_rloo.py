from __future__ import annotations

import pytest

from services.trainer.algorithms.rloo import leave_one_out_advantages


def test_the_baseline_of_a_completion_is_the_mean_of_the_others() -> None:
    ((first, second, third),) = leave_one_out_advantages([[6.0, 2.0, 1.0]])
    assert (first, second, third) == pytest.approx((6 - 1.5, 2 - 3.5, 1 - 4.0))


def test_a_constant_group_has_advantages_of_exactly_zero() -> None:
    assert leave_one_out_advantages([[0.1] * 3]) == [[0.0] * 3]


def test_a_group_of_one_has_nothing_to_compare() -> None:
    assert leave_one_out_advantages([[5.0]]) == [[0.0]]


def test_whitened_advantages_have_a_deviation_of_1_over_all_groups() -> None:
    first, second = leave_one_out_advantages([[3.0, 1.0], [0.0, 0.0]], whiten=True)
    assert first == pytest.approx([2 / ((8 / 3) ** 0.5 + 1e-4), -2 / ((8 / 3) ** 0.5 + 1e-4)])
    assert second == [0.0, 0.0]
