"""PPO's critic side: generalized advantages (Schulman et al. 2016, arXiv:1506.02438) and the
clipped value loss (Schulman et al. 2017, arXiv:1707.06347, as in its published code).

    δ_t = r_t + γ V_(t+1) - V_t,   A_t = Σ_{s≥t} (γλ)^(s-t) δ_s,   returns = A + V
    value loss = ½ max((V - R)², (clip(V, V_old ± c) - R)²)

A completion has ended: nothing is bootstrapped behind its last token. Its policy loss is one of
losses.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from services.trainer.algorithms.reinforce import reverse_discounted_sum


def generalized_advantages(
    token_rewards: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    discount: float,
    gae_lambda: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Rewards and values of the tokens, [R] per sample -> (advantages, returns), [R] per sample."""
    advantages = []
    for rewards, value in zip(token_rewards, values, strict=True):
        value_after = torch.cat([value[1:], value.new_zeros(1)])
        deltas = rewards + discount * value_after - value
        advantages.append(reverse_discounted_sum(deltas, discount * gae_lambda))
    return advantages, [a + value for a, value in zip(advantages, values, strict=True)]


class ValueLoss(NamedTuple):
    loss: Tensor  # [N] float32, with gradient
    is_clipped: Tensor  # [N] bool: the clip removed this token's gradient


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None
) -> ValueLoss:
    """The critic's loss of every token, not weighted yet; all tensors are [N].

    `old_values` are of the critic before this update; without `clip` they do not matter.
    """
    loss = (values - returns).square()
    if clip is None:
        return ValueLoss(loss / 2, torch.zeros_like(loss, dtype=torch.bool))
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    clipped_loss = (clipped - returns).square()
    return ValueLoss(torch.maximum(loss, clipped_loss) / 2, clipped_loss > loss)
