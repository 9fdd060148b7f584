"""torch's variable-length attention by its formula, on any device and in any precision."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """query [T, H, D], key and value [K, H_kv, D] -> [T, H, D]; causal from the end of both."""
    assert window_size == (-1, 0)
    assert enable_gqa
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    assert max_q == max(b - a for a, b in pairwise(starts_q))
    assert max_k == max(b - a for a, b in pairwise(starts_k))
    parts = []
    for (q0, q1), (k0, k1) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        q = query[q0:q1].transpose(0, 1)  # [H, Q, D]
        k, v = (
            x[k0:k1].repeat_interleave(len(q) // x.shape[1], 1).transpose(0, 1)
            for x in (key, value)
        )
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)
