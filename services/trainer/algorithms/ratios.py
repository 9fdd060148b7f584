"""Ratios of two policies' probabilities, per token or per completion.

    token             exp(d_t)                           d_t = log π_a(t) - log π_b(t)
    sequence          exp(mean of d over the row)        GSPO (Zheng et al. 2025, arXiv:2507.18071)
    sequence_product  exp(sum of d over the row)         of the whole completion, as RLOO's

The exponent is bounded, so that no ratio overflows float32: beyond the bound it has no gradient.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from services.trainer.algorithms.rows import row_means, row_sums

MAX_LOG_RATIO = 20.0  # Nats.
RatioLevel = Literal["token", "sequence", "sequence_product"]


def probability_ratios(
    log_ratios: Tensor, rows: Tensor, num_rows: int, *, level: RatioLevel
) -> Tensor:
    """log_ratios [N] in nats, rows [N] int64 -> ratios [N]; one of a row is on all its tokens."""
    if level == "sequence":
        log_ratios = row_means(log_ratios, rows, num_rows)[rows]
    elif level == "sequence_product":
        log_ratios = row_sums(log_ratios, rows, num_rows)[rows]
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
