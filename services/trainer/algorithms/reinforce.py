"""REINFORCE++ and its baseline variant (Hu et al. 2025, arXiv:2501.03262), without a critic.

    reinforce_pp           A_t = whiten(Σ_{s≥t} γ^(s-t) r_s)
    reinforce_pp_baseline  A_t = whiten(R - mean R of its group), R = Σ_s r_s, on every token

r_s is the KL penalty of token s, and the completion's reward besides on its last one. Whitening is
over the tokens of all completions of the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from services.trainer.algorithms.grpo import group_advantages


def discounted_returns(token_rewards: Sequence[Tensor], *, discount: float) -> list[Tensor]:
    """Rewards of the tokens, [R] per sample -> the discounted sum from every token on, [R]."""
    return [reverse_discounted_sum(rewards, discount) for rewards in token_rewards]


def reverse_discounted_sum(values: Tensor, discount: float) -> Tensor:
    """[R] -> [R] of out_t = values_t + discount · out_(t+1), summed in float64."""
    sums = list(accumulate(reversed(values.tolist()), lambda after, now: now + discount * after))
    return values.new_tensor(sums[::-1])


def baseline_returns(token_rewards: Sequence[Tensor], groups: Sequence[int]) -> list[Tensor]:
    """The sum of a sample's rewards minus the mean of such sums in its group, on all tokens, [R].

    `groups` has the group of every sample; groups are contiguous.
    """
    totals = zip(groups, (rewards.sum().item() for rewards in token_rewards), strict=True)
    grouped = [[total for _, total in group] for _, group in groupby(totals, lambda pair: pair[0])]
    centred = [a for group in group_advantages(grouped, scale="none") for a in group]
    return [torch.full_like(rewards, a) for rewards, a in zip(token_rewards, centred, strict=True)]


def whiten(advantages: Sequence[Tensor], *, is_masked: Sequence[bool]) -> list[Tensor]:
    """[R] per sample -> [R] of mean 0 and deviation 1 over all tokens: (A - μ) / √(σ² + 1e-8).

    The variance is unbiased; fewer than two tokens are left as they are. Masked samples, which have
    no loss, do not count and get 0.
    """
    kept = [a for a, masked in zip(advantages, is_masked, strict=True) if not masked]
    num_tokens = sum(len(a) for a in kept)
    mean, scale = 0.0, 1.0
    if num_tokens > 1:
        flat = torch.cat(kept).double()
        mean, scale = flat.mean().item(), (flat.var() + 1e-8).rsqrt().item()
    return [
        torch.zeros_like(a) if masked else (a - mean) * scale
        for a, masked in zip(advantages, is_masked, strict=True)
    ]
