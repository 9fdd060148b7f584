"""The batch on which the peers of benchmarks/policy_update.py train, and their record of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig
from torch import Tensor


@dataclass(frozen=True, slots=True)
class FixedBatch:
    """Rows of equal length, so that TRL adds no padding."""

    prompt_ids: Tensor  # [B, P] int64
    completion_ids: Tensor  # [B, R] int64
    advantages: Tensor  # [B] float32
    group_size: int


@dataclass(frozen=True, slots=True)
class Step:
    seconds: float
    loss: float
    grad_norm: float


def lora_config(rank: int, target_modules: Sequence[str]) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
