"""From hidden states to the logprobs of given tokens, without the [N, V] logits of all of them.

Logits of one chunk of positions exist at a time, in float32 like the sampler's head, and are
computed again in the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_POSITIONS = 2048  # 1.2 GB of float32 logits at a vocabulary of 150k


class TokenLogprobs(NamedTuple):
    logprobs: Tensor  # [N] float32, of the labels under the tempered distribution
    entropy: Tensor  # [N] float32, nats, of that distribution; carries no gradient


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    temperatures: Tensor,
    *,
    head_bias: Tensor | None = None,
    chunk_positions: int = _CHUNK_POSITIONS,
) -> TokenLogprobs:
    """log softmax((hidden · head_weightᵀ + bias) / temperature)[label] at every position.

    hidden [N, H], head_weight [V, H] frozen, labels [N] int64, temperatures [N] float32.
    """
    weight = head_weight.detach().float()
    bias = None if head_bias is None else head_bias.detach().float()
    parts = [
        checkpoint(
            _chunk_logprobs, *chunk, weight, bias, use_reentrant=False, preserve_rng_state=False
        )
        for chunk in zip(
            hidden.split(chunk_positions),
            labels.split(chunk_positions),
            temperatures.split(chunk_positions),
            strict=True,
        )
    ]
    return TokenLogprobs(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


def _chunk_logprobs(
    hidden: Tensor, labels: Tensor, temperatures: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.nn.functional.linear(hidden.float(), weight, bias) / temperatures[:, None]
        log_softmax = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        return log_softmax.gather(-1, labels[:, None]).squeeze(-1), entropy
