"""Importance weights old / sampler: trainer and rollout engine are not the same policy.

    w = π_old / π_sampler        of a token, or the product over the tokens of a completion
    truncate: clip(w, min, max)  Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
                                 Off-Policy RL Training"
    mask:     w inside, else 0   Liu & Li 2025, "When Speed Kills Stability"

From the latter, too: whole completions are masked whose geometric mean ratio leaves a band, or that
have one token whose ratio is too small. What is masked still counts in the loss's denominator. A
token whose logprob the engine could not give (NaN) has ratio 1.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from services.trainer.algorithms.ratios import probability_ratios
from services.trainer.algorithms.rows import row_means, row_sums


class MismatchWeights(NamedTuple):
    applied: Tensor  # [N] float32: multiplies the policy loss of the token
    ratio: Tensor  # [N] float32, before bounds, at the level; per token at level none
    is_truncated: Tensor  # [N] bool
    is_masked: Tensor  # [N] bool


@torch.no_grad()
def mismatch_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    rows: Tensor,
    num_rows: int,
    *,
    level: Literal["token", "sequence", "none"],
    mode: Literal["truncate", "mask"],
    max_ratio: float,
    min_ratio: float | None = None,
    geometric_band: tuple[float, float] | None = None,
    veto_ratio: float | None = None,
) -> MismatchWeights:
    """Weights of all tokens, without gradient; logprobs [N] in nats, rows [N] int64.

    Level none weighs nothing; `geometric_band` and `veto_ratio` mask completions at every level.
    """
    log_ratios = (old_logprobs - sampler_logprobs).nan_to_num(nan=0.0)
    ratio = probability_ratios(
        log_ratios, rows, num_rows, level="sequence_product" if level == "sequence" else "token"
    )
    bounded = ratio.clamp(min_ratio, max_ratio)
    is_outside = (bounded != ratio) & (level != "none")
    is_truncated = is_outside & (mode == "truncate")
    is_masked = is_outside & (mode == "mask")
    if geometric_band is not None:
        low, high = map(math.log, geometric_band)
        mean = row_means(log_ratios, rows, num_rows)
        is_masked |= ((mean < low) | (mean > high))[rows]
    if veto_ratio is not None:
        is_unlikely = (log_ratios < math.log(veto_ratio)).float()
        is_masked |= (row_sums(is_unlikely, rows, num_rows) > 0)[rows]
    weights = torch.ones_like(ratio) if level == "none" else bounded
    return MismatchWeights(weights.masked_fill(is_masked, 0.0), ratio, is_truncated, is_masked)
