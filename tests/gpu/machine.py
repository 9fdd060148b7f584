"""What these tests run on: one GPU of 80 GB, which all their services share, and a model for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a Qwen3. The widths are multiples of the 64 weights that share an NF4 scale."""

    hidden_size: int = 1024
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 128
    intermediate_size: int = 3072
    learning_rate: float = 3e-4  # of the supervised training


DEVICE = "cuda"
SHAPE = Shape()
CONTEXT = 2048  # tokens
NUM_LONG, LONG_TOKENS = 64, 1500  # completions that still run when a sync has come and gone
BOOT_TIMEOUT_S = 300.0


def obstacle() -> str | None:
    """Why the tests cannot run here."""
    return None if torch.cuda.is_available() else "needs an NVIDIA GPU: torch sees no CUDA here"


def num_gpus() -> int:
    return torch.cuda.device_count()
