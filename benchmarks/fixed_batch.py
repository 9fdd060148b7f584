"""What the peers of benchmarks/policy_update.py train on, and what they tell of each step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class FixedBatch:
    """Rows of equal lengths, so that TRL pads nothing."""

    prompt_ids: Tensor  # [B, P] int64
    completion_ids: Tensor  # [B, R] int64
    advantages: Tensor  # [B] float32
    group_size: int


@dataclass(frozen=True, slots=True)
class Step:
    seconds: float
    loss: float
    grad_norm: float
