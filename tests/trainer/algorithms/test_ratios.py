from __future__ import annotations

import math

import pytest
import torch

from services.trainer.algorithms.ratios import MAX_LOG_RATIO, RatioLevel, probability_ratios

TWO, EIGHT = math.log(2), math.log(8)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [2.0, 8.0, 0.5]),
        ("sequence", [4.0, 4.0, 0.5]),  # the geometric mean
        ("sequence_product", [16.0, 16.0, 0.5]),
    ],
)
def test_a_ratio_of_a_row_is_on_all_its_tokens(level: RatioLevel, expected: list[float]) -> None:
    log_ratios, rows = torch.tensor([TWO, EIGHT, -TWO]), torch.tensor([0, 0, 1])
    ratios = probability_ratios(log_ratios, rows, 2, level=level)
    assert ratios.tolist() == pytest.approx(expected)


def test_a_ratio_that_would_overflow_is_bounded() -> None:
    log_ratios = torch.tensor([1e4, -1e4])
    ratios = probability_ratios(log_ratios, torch.tensor([0, 1]), 2, level="token")
    bound = math.exp(MAX_LOG_RATIO)
    assert ratios.tolist() == pytest.approx([bound, 1 / bound])
