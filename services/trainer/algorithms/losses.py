"""The policy losses: what one token loses, and what it weighs in the loss of an optimizer step.

    loss of a step = Σ_t weight(t) · token_loss(t)

    clip   -min(min(ρ, δ) A, clip(ρ, 1 - ε_low, 1 + ε_high) A)    PPO, arXiv:1707.06347; δ bounds
                                                                  ρ of bad tokens, arXiv:1912.09729
    cispo  -min(ρ, ε_high) A log π, no gradient through ρ
    sapo   -(4 / τ) σ(τ (ρ - 1)) A, τ by the sign of A

    loss     objective  ratio ρ           weight of a token          paper
    dapo     clip       token             1 / tokens of an update's  Yu et al. 2025, 2503.14476
                                          steps, on average
    grpo     clip       token             1 / (rows · its row's)     Shao et al. 2024, 2402.03300
    bnpo     clip       token             1 / tokens of the step     PPO's mean over tokens
    dr_grpo  clip       token             1 / (rows · max_tokens)    Liu et al. 2025, 2503.20783
    gspo     clip       sequence          1 / (rows · its row's)     Zheng et al. 2025, 2507.18071
    luspo    clip       sequence          1 / rows                   2026, arXiv:2602.05261
    cispo    cispo      token             as dapo                    MiniMax-M1 2025, 2506.13585
    sapo     sapo       token             1 / (rows · its row's)     2025, arXiv:2511.20347
    rloo     clip       sequence_product  1 / (rows · its row's)     Ahmadian et al., 2402.14740

Weights count the whole step, so the gradient does not depend on how it is cut into micro-batches.
What differs from the papers: ratios are bounded (ratios.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, assert_never

import torch
from torch import Tensor

from services.trainer.algorithms.ratios import RatioLevel, probability_ratios
from services.trainer.algorithms.rows import row_means
from services.trainer.run_config import LossName

Objective = Literal["clip", "cispo", "sapo"]
Normalization = Literal["update_tokens", "step_tokens", "sequence_mean", "sequence_sum", "constant"]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss with the settings of its paper."""

    objective: Objective
    ratio: RatioLevel
    normalization: Normalization
    clip_low: float = 1.0  # the lower bound of the ratio is 1 - clip_low
    clip_high: float = math.inf  # the upper one is 1 + clip_high; for cispo it is clip_high


LOSSES: Mapping[LossName, Loss] = MappingProxyType(
    {
        "dapo": Loss("clip", "token", "update_tokens", 0.2, 0.28),
        "grpo": Loss("clip", "token", "sequence_mean", 0.2, 0.2),
        "bnpo": Loss("clip", "token", "step_tokens", 0.2, 0.2),
        "dr_grpo": Loss("clip", "token", "constant", 0.2, 0.2),
        "gspo": Loss("clip", "sequence", "sequence_mean", 3e-4, 4e-4),
        "luspo": Loss("clip", "sequence", "sequence_sum", 2e-3, 2.5e-3),
        "cispo": Loss("cispo", "token", "update_tokens", clip_high=5.0),
        "sapo": Loss("sapo", "token", "sequence_mean"),
        "rloo": Loss("clip", "sequence_product", "sequence_mean", 0.2, 0.2),
    }
)


def sample_weights(
    lengths: Sequence[int],
    *,
    normalization: Normalization,
    num_update_tokens: int,
    num_minibatches: int,
    max_tokens: int,
) -> list[float]:
    """The weight of every token of each sample of one optimizer step.

    `lengths` are loss tokens; a masked sample has 0 of them, weighs 0, and still is a row.
    `num_update_tokens` counts the tokens of all `num_minibatches` steps of a pass.
    """
    num_rows = len(lengths)

    def denominator(length: int) -> float:
        match normalization:
            case "update_tokens":
                return num_update_tokens / num_minibatches
            case "step_tokens":
                return sum_of_lengths
            case "sequence_mean":
                return num_rows * length
            case "sequence_sum":
                return num_rows
            case "constant":
                return num_rows * max_tokens
            case _:
                assert_never(normalization)

    sum_of_lengths = sum(lengths)
    return [1 / denominator(length) if length else 0.0 for length in lengths]


class TokenLoss(NamedTuple):
    loss: Tensor  # [N] float32, with gradient
    ratio: Tensor  # [N] float32, with gradient: policy / old, before any clip
    is_clipped: Tensor  # [N] bool: a bound changed this token's loss


def policy_token_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    rows: Tensor,
    num_rows: int,
    *,
    objective: Objective,
    ratio: RatioLevel,
    clip_low: float,
    clip_high: float,
    delta: float | None = None,
    sapo_temperature_positive: float = 1.0,
    sapo_temperature_negative: float = 1.05,
) -> TokenLoss:
    """The loss of every token, not weighted yet; all tensors are [N], `rows` is int64.

    `policy_logprobs` has the gradient; `old_logprobs` are of the policy before this update.
    """
    log_ratios = policy_logprobs - old_logprobs
    ratios = probability_ratios(log_ratios, rows, num_rows, level=ratio)
    match objective:
        case "clip":
            bounded = ratios if delta is None else ratios.clamp(max=delta)
            clipped = ratios.clamp(1 - clip_low, 1 + clip_high)
            gain = torch.minimum(bounded * advantages, clipped * advantages)
            is_clipped = gain != ratios * advantages
        case "cispo":
            gain = ratios.clamp(max=clip_high).detach() * advantages * policy_logprobs
            is_clipped = (ratios > clip_high) & (advantages != 0)
        case "sapo":
            temperatures = torch.where(
                advantages > 0, sapo_temperature_positive, sapo_temperature_negative
            )
            gain = (temperatures * (ratios - 1)).sigmoid() * 4 / temperatures * advantages
            is_clipped = torch.zeros_like(rows, dtype=torch.bool)
        case _:
            assert_never(objective)
    return TokenLoss(-gain, ratios, is_clipped)


def high_entropy_threshold(entropies: Tensor, fraction: float) -> float:
    """The entropy that `fraction` of the step's tokens reach; those with at least it are kept.

    Wang et al. 2025, "Beyond the 80/20 Rule", arXiv:2506.01939. entropies [tokens of the step] in
    nats, at least one; between two tokens the quantile is interpolated.
    """
    ordered = entropies.float().sort().values
    position = (1 - fraction) * (len(ordered) - 1)
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    return float(torch.lerp(below, above, position - math.floor(position)))


@torch.no_grad()
def off_policy_mask(
    policy_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    rows: Tensor,
    num_rows: int,
    *,
    threshold: float,
) -> Tensor:
    """[N] bool: the token is kept. Bad tokens of rows that the policy left far behind are not.

    DeepSeek-V3.2 (2025, arXiv:2512.02556): a token is kept when A >= 0 or the row's mean of
    log π_sampler - log π is at most `threshold`, in nats. NaN of the sampler counts as no gap.
    """
    gaps = (sampler_logprobs - policy_logprobs).nan_to_num(nan=0.0)
    return (advantages >= 0) | (row_means(gaps, rows, num_rows)[rows] <= threshold)
