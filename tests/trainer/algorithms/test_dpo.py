from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from services.trainer.algorithms.dpo import preference_loss, ranked_pairs


def test_a_pair_is_the_first_best_and_the_first_worst_of_a_group() -> None:
    assert ranked_pairs([[0.0, 1.0], [2.0, 0.0, 2.0, 0.0], [1.0, 5.0, -1.0]]) == [
        (1, 0),
        (0, 1),
        (1, 2),
    ]


def test_equal_rewards_make_no_pair() -> None:
    assert ranked_pairs([[1.0, 1.0], [0.0]]) == [None, None]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("sigmoid", -math.log(1 / (1 + math.exp(-0.5 * 3)))),
        ("ipo", (3 - 1 / (2 * 0.5)) ** 2),
    ],
)
def test_a_pair_loses_by_how_much_more_the_chosen_gained_over_the_reference(
    loss: Literal["sigmoid", "ipo"], expected: float
) -> None:
    """The chosen became e² times as likely as under the reference, the rejected 1/e times."""
    result = preference_loss(
        torch.tensor([-8.0, -11.0]), torch.tensor([-10.0, -10.0]), loss=loss, beta=0.5
    )
    assert result.loss.tolist() == pytest.approx([expected])
    assert result.margin.tolist() == pytest.approx([0.5 * 3])


def test_the_sigmoid_loss_of_the_reference_itself_is_log_2() -> None:
    sums = torch.tensor([-8.0, -11.0, -3.0, -1.0])
    result = preference_loss(sums, sums, loss="sigmoid", beta=0.1)
    assert result.loss.tolist() == pytest.approx([math.log(2)] * 2)
