"""REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740).

    A_i = r_i - mean of the other rewards of its group = n / (n - 1) · (r_i - mean r)

Its loss is "rloo" of losses.py: the ratio is that of the whole completion.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.trainer.algorithms.grpo import group_advantages, scale_by_batch_deviation


def leave_one_out_advantages(
    rewards: Sequence[Sequence[float]], *, whiten: bool = False
) -> list[list[float]]:
    """Rewards of groups -> advantages of the same shape; a group of one has 0.

    `whiten` divides all of them by their unbiased deviation + 1e-4; their mean is 0 anyway.
    """
    centred = group_advantages(rewards, scale="none")
    advantages = [[a * len(group) / max(len(group) - 1, 1) for a in group] for group in centred]
    return scale_by_batch_deviation(advantages) if whiten else advantages
