"""Attention of packed trees: each completion sees its prompt, which is computed once, and itself.

`PackedAttention` (samples.py) ─▶ every attention layer of a Transformers model, on CUDA, through
torch's variable-length flash attention. Keys and values of a prompt are gathered once for each of
its completions. Whoever calls the model as Transformers does, does so inside `plain_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from services.trainer.policy.token_batch import PackedAttention

# torch 2.11 shares keys among query heads by default, later versions on request.
_GROUPED_QUERIES: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
)
NAME = "tandem_packed"  # An attn_implementation for which Transformers makes no mask.
_PLAIN = "sdpa"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    packed: PackedAttention | None = None,
    kernel: Callable[..., Any] = varlen_attn,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, H_kv, T, D] in 16 bits -> [1, T, H, D].

    Without `packed` a layer of a plain call is computed again, in the backward pass after
    `plain_attention` has ended: with the mask that was made there.
    """
    if packed is None:
        from transformers import AttentionInterface

        plain: Callable[..., tuple[Tensor, None]] = AttentionInterface()[_PLAIN]
        return plain(module, query, key, value, attention_mask, scaling=scaling, **others)
    assert attention_mask is None
    key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    if packed.kv_index is not None:
        key, value = key.index_select(0, packed.kv_index), value.index_select(0, packed.kv_index)
    out: Tensor = kernel(
        query[0].transpose(0, 1),
        key,
        value,
        packed.cu_q,
        packed.cu_k,
        packed.max_q,
        packed.max_k,
        scale=scaling,
        window_size=(-1, 0),  # Causal.
        **_GROUPED_QUERIES,
    )
    return out[None], None


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Inside, a model whose attention is packed may be called with ids and a padding mask."""
    if model.config._attn_implementation != NAME:
        yield
        return
    model.set_attn_implementation(_PLAIN)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)
