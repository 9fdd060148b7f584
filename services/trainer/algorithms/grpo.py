"""Group-relative advantages: GRPO (Shao et al. 2024, arXiv:2402.03300), and GDPO (Liu et al. 2026,
arXiv:2601.05242) for several rewards.

    GRPO  A_i = (r_i - mean r) / (std r + 1e-4)                 within the group of a prompt
    GDPO  a_i = Σ_k w_k (r_ik - mean r_k) / (std r_k + 1e-4)    within the group
          A_i = a_i / (std a + 1e-4)                            over the update

What differs: a group, or a reward in it, whose values are all equal counts as exactly 0, which
costs no forward; and GDPO does not subtract the mean of a, which is 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

_EPSILON = 1e-4


def group_advantages(
    rewards: Sequence[Sequence[float]], *, scale: Literal["group", "batch", "none"]
) -> list[list[float]]:
    """Rewards of groups -> advantages of the same shape: centred per group, then scaled.

    Standard deviations are unbiased. A group of equal rewards has advantages of exactly 0.
    """
    centred = [_centred(group) for group in rewards]
    if scale == "none":
        return centred
    batch_std = _std([reward for group in rewards for reward in group])
    return [
        [a / ((batch_std if scale == "batch" else _std(group)) + _EPSILON) for a in advantages]
        for group, advantages in zip(rewards, centred, strict=True)
    ]


def decoupled_advantages(
    rewards: Sequence[Sequence[Sequence[float]]], *, weights: Sequence[float]
) -> list[list[float]]:
    """Rewards [group][completion][reward] -> advantages [group][completion].

    The rewards are weighted already, and normalizing them takes that away: so it needs `weights`,
    one per reward. Standard deviations are unbiased.
    """
    sums = []
    for group in rewards:
        columns = [list(column) for column in zip(*group, strict=True)]
        terms = [_normalized(c, abs(w)) for c, w in zip(columns, weights, strict=True)]
        sums.append([sum(term) for term in zip(*terms, strict=True)])
    return scale_by_batch_deviation(sums)


def scale_by_batch_deviation(advantages: Sequence[Sequence[float]]) -> list[list[float]]:
    """Advantages of groups over the unbiased deviation of all of them + 1e-4."""
    deviation = _std([a for group in advantages for a in group]) + _EPSILON
    return [[a / deviation for a in group] for group in advantages]


def _normalized(weighted: Sequence[float], weight: float) -> list[float]:
    """w (r - mean r) / (std r + ε) from w·r; the sign of w is in w·r."""
    scale = weight / (_std(weighted) + weight * _EPSILON) if weight else 0.0
    return [a * scale for a in _centred(weighted)]


def _centred(group: Sequence[float]) -> list[float]:
    if len(set(group)) == 1:  # Their rounded mean may differ from them.
        return [0.0] * len(group)
    mean = statistics.fmean(group)
    return [reward - mean for reward in group]


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
