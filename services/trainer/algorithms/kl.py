"""Estimates of KL(π_θ || π_ref) from sampled tokens (Schulman 2020, "Approximating KL Divergence").

    d = log π_θ(t) - log π_ref(t)
    k1 = d                unbiased, either sign; the one to take off a reward
    k2 = d² / 2           its gradient as a loss is that of the KL
    k3 = e^-d + d - 1     unbiased, never negative; GRPO's

As a loss k1 has no gradient in expectation, and all of them are of the sampler's tokens: times
π_θ / π_old they are unbiased after the first step, too (DeepSeek-V3.2, arXiv:2512.02556).
"""

from __future__ import annotations

from typing import Literal, assert_never

from torch import Tensor

from services.trainer.algorithms.ratios import MAX_LOG_RATIO

KlEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    policy_logprobs: Tensor, reference_logprobs: Tensor, *, estimator: KlEstimator
) -> Tensor:
    """The estimate of every token, [N] in nats. For k3 |d| is bounded (ratios.py)."""
    difference = policy_logprobs - reference_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3":
            difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            return (-difference).exp() + difference - 1
        case _:
            assert_never(estimator)
