"""Attention of packed trees: each completion sees its prompt, which is computed once, and itself.

`PackedAttention` (samples.py) ─▶ every attention layer of a Transformers model, on CUDA, through
torch's variable-length flash attention. Keys and values of a prompt are gathered once for each of
its completions.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from services.trainer.samples import PackedAttention

# torch 2.11 shares keys among query heads unasked, later ones on request.
_GROUPED_QUERIES: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
)
NAME = "tandem_packed"  # attn_implementation; Transformers then makes no mask


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    packed: PackedAttention,
    kernel: Callable[..., Any] = varlen_attn,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, H_kv, T, D] in 16 bits -> [1, T, H, D]."""
    assert attention_mask is None
    out: Tensor = kernel(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1).index_select(0, packed.kv_index),
        value[0].transpose(0, 1).index_select(0, packed.kv_index),
        packed.cu_q,
        packed.cu_k,
        packed.max_q,
        packed.max_k,
        scale=scaling,
        window_size=(-1, 0),  # causal
        **_GROUPED_QUERIES,
    )
    return out[None], None
