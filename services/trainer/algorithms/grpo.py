"""GRPO (Shao et al. 2024, arXiv:2402.03300) with the token-level normalization and the higher upper
clip of DAPO (Yu et al. 2025, arXiv:2503.14476), and truncated importance sampling against the
sampler (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy").

    A_i  = (r_i - mean r) / (std r + 1e-4)                     within the group of a prompt
    ρ_t  = π_θ(t) / π_old(t),   w_t = min(π_old(t) / π_sampler(t), C)
    loss = Σ_t -min(ρ_t A, clip(ρ_t, 1 - ε_low, 1 + ε_high) A) · w_t / (tokens of the whole step)

Left out: the KL term towards a reference policy, which is off by default in the field.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from services.trainer.samples import TokenBatch

_EPSILON = 1e-4
MAX_LOG_RATIO = 20.0  # of policy over sampler, in nats; exp() of more may overflow float32


def group_advantages(
    rewards: Sequence[Sequence[float]], *, scale: Literal["group", "batch", "none"]
) -> list[list[float]]:
    """Rewards of groups -> advantages of the same shape: centred per group, then scaled.

    Standard deviations are unbiased. A group of equal rewards has advantages of exactly 0.
    """
    centred = [[reward - statistics.fmean(group) for reward in group] for group in rewards]
    batch_std = _std([reward for group in rewards for reward in group])
    return [
        [0.0] * len(group)
        if len(set(group)) == 1
        else [a / (_scale(group, batch_std, scale)) for a in advantages]
        for group, advantages in zip(rewards, centred, strict=True)
    ]


def _scale(
    group: Sequence[float], batch_std: float, scale: Literal["group", "batch", "none"]
) -> float:
    if scale == "none":
        return 1.0
    return (batch_std if scale == "batch" else _std(group)) + _EPSILON


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


class PolicyLoss(NamedTuple):
    loss: Tensor  # [] float32
    importance_weights: Tensor  # [N] old / sampler, before truncation
    is_clipped: Tensor  # [N] bool: the clip removed this token's gradient


def clipped_policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    batch: TokenBatch,
    *,
    clip_low: float,
    clip_high: float,
    importance_clip: float,
    num_tokens: int,
) -> PolicyLoss:
    """The loss of one micro-batch; micro-batches of a step add up to the step's loss.

    policy_logprobs [N] with gradient, old_logprobs [N]: the policy before this update.
    `num_tokens` counts the completion tokens of the whole step, those without advantage included.
    """
    weights = (old_logprobs - batch.sampler_logprobs).clamp(max=MAX_LOG_RATIO).exp()
    ratio = (policy_logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    loss = -(gain * weights.clamp(max=importance_clip)).sum() / num_tokens
    is_clipped = ratio * batch.advantages > clipped * batch.advantages
    return PolicyLoss(loss, weights, is_clipped.detach())
