from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from services.trainer.algorithms.mismatch import MismatchWeights, mismatch_weights


# Ratios old / sampler of one completion of two tokens, and what multiplies their losses.
@pytest.mark.parametrize(
    ("level", "mode", "applied"),
    [
        ("token", "truncate", [3.0, 0.5]),
        ("token", "mask", [0.0, 0.5]),
        ("sequence", "truncate", [2.0, 2.0]),  # 4 · 0.5
        ("sequence", "mask", [2.0, 2.0]),
        ("none", "truncate", [1.0, 1.0]),
        ("none", "mask", [1.0, 1.0]),
    ],
)
def test_a_weight_above_the_bound_is_truncated_or_masked(
    level: str, mode: str, applied: list[float]
) -> None:
    """A dropped correction is silent: Liger-Kernel#1088."""
    weights = _weights([4.0, 0.5], level=level, mode=mode)
    assert weights.applied.tolist() == pytest.approx(applied)


@pytest.mark.parametrize(("mode", "applied"), [("truncate", [1.0, 0.8]), ("mask", [1.0, 0.0])])
def test_a_weight_below_the_lower_bound_is_truncated_or_masked(
    mode: str, applied: list[float]
) -> None:
    weights = _weights([1.0, 0.5], mode=mode, min_ratio=0.8)
    assert weights.applied.tolist() == pytest.approx(applied)


def test_ratios_are_reported_before_bounds() -> None:
    assert _weights([4.0, 0.5]).ratio.tolist() == pytest.approx([4.0, 0.5])
    assert _weights([4.0, 0.5], level="sequence").ratio.tolist() == pytest.approx([2.0, 2.0])
    assert _weights([4.0, 0.5], level="none").ratio.tolist() == pytest.approx([4.0, 0.5])


def test_what_was_truncated_and_what_was_masked_is_told_apart() -> None:
    truncated, masked = _weights([4.0, 0.5]), _weights([4.0, 0.5], mode="mask")
    assert truncated.is_truncated.tolist() == [True, False]
    assert truncated.is_masked.tolist() == [False, False]
    assert masked.is_truncated.tolist() == [False, False]
    assert masked.is_masked.tolist() == [True, False]


@pytest.mark.parametrize("level", ["token", "sequence", "none"])
@pytest.mark.parametrize(("ratio", "is_masked"), [(0.98, True), (1.0, False), (1.02, True)])
def test_a_completion_whose_geometric_mean_leaves_the_band_is_masked(
    level: str, ratio: float, is_masked: bool
) -> None:
    weights = _weights([2 * ratio, ratio / 2], level=level, geometric_band=(0.99, 1.01))
    assert weights.is_masked.tolist() == [is_masked] * 2


@pytest.mark.parametrize("level", ["token", "sequence", "none"])
@pytest.mark.parametrize(("ratio", "is_masked"), [(0.9e-4, True), (1.1e-4, False)])
def test_one_token_below_the_veto_masks_its_completion(
    level: str, ratio: float, is_masked: bool
) -> None:
    weights = _weights([1.0, ratio], level=level, veto_ratio=1e-4)
    assert weights.is_masked.tolist() == [is_masked] * 2
    assert bool(weights.applied[0] == 0) is is_masked


def test_completions_are_masked_one_by_one() -> None:
    weights = _weights([1.0, 1e-9, 1.0], rows=[0, 0, 1], veto_ratio=1e-4)
    assert weights.applied.tolist() == [0.0, 0.0, 1.0]


def test_a_token_that_the_sampler_could_not_score_has_ratio_1() -> None:
    assert _weights([math.nan, 2.0]).applied.tolist() == pytest.approx([1.0, 2.0])
    assert _weights([math.nan, 2.0], level="sequence").ratio.tolist() == pytest.approx([2.0] * 2)


def test_weights_have_no_gradient() -> None:
    old = torch.tensor([-1.0], requires_grad=True)
    weights = mismatch_weights(
        old,
        torch.tensor([-2.0]),
        torch.tensor([0]),
        1,
        level="token",
        mode="truncate",
        max_ratio=3.0,
    )
    assert not weights.applied.requires_grad


def _weights(
    ratios: list[float], *, rows: list[int] | None = None, **settings: Any
) -> MismatchWeights:
    old = torch.full((len(ratios),), -1.0)
    rows = rows or [0] * len(ratios)
    defaults: dict[str, Any] = {"level": "token", "mode": "truncate", "max_ratio": 3.0}
    return mismatch_weights(
        old,
        old - torch.tensor(ratios).log(),
        torch.tensor(rows),
        max(rows) + 1,
        **(defaults | settings),
    )
