"""From hidden states to the logprobs of given tokens, without the [N, V] logits of all of them.

Logits of one chunk of positions exist at a time, accumulated in float32 like the sampler's head,
and are computed again in the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_LOGITS = 1 << 27  # 0.5 GiB of float32, of which two or three exist at a time


class TokenLogprobs(NamedTuple):
    logprobs: Tensor  # [N] float32, of the labels under the tempered distribution
    entropy: Tensor  # [N] float32, nats, of that distribution


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    temperatures: Tensor,
    *,
    head_bias: Tensor | None = None,
    chunk_positions: int | None = None,
) -> TokenLogprobs:
    """log softmax((hidden · head_weightᵀ + bias) / temperature)[label] at every position.

    hidden [N, H], head_weight [V, H] frozen, labels [N] int64, temperatures [N] float32. Both
    results carry a gradient.
    """
    num_positions = chunk_positions or max(1, _CHUNK_LOGITS // head_weight.shape[0])
    return TokenLogprobs(
        *_ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden, head_weight.detach(), head_bias, labels, temperatures, num_positions
        )
    )


class _ChunkedLogprobs(torch.autograd.Function):
    """With z the tempered logits and p their softmax: ∂logp_y/∂z = 1_y - p and
    ∂H/∂z = -p (log p + H), so that the gradient by z is g_y 1_y - p (g_y + g_H (log p + H))."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor,
        num_positions: int,
    ) -> tuple[Tensor, Tensor]:
        head, logprobs, entropies = _Head(weight, bias, hidden), [], []
        for chunk in _chunks(len(hidden), num_positions):
            log_p = head.logits(hidden[chunk], temperatures[chunk]).log_softmax(-1)
            logprobs.append(log_p.gather(-1, labels[chunk, None]).squeeze(-1))
            entropies.append(-torch.einsum("nv,nv->n", log_p.exp(), log_p))
        entropy = torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, bias, labels, temperatures, entropy)
        ctx.num_positions = num_positions
        ctx.set_materialize_grads(False)
        return torch.cat(logprobs), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        hidden, weight, bias, labels, temperatures, entropy = ctx.saved_tensors
        head, grads = _Head(weight, bias, hidden), []
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        grad_logprobs = grad_logprobs / temperatures
        for chunk in _chunks(len(hidden), ctx.num_positions):
            log_p = head.logits(hidden[chunk], temperatures[chunk]).log_softmax(-1)
            weight_of_p = -grad_logprobs[chunk, None]
            if grad_entropy is not None:
                surprise = log_p + entropy[chunk, None]
                weight_of_p = weight_of_p - (grad_entropy / temperatures)[chunk, None] * surprise
            grad = log_p.exp_().mul_(weight_of_p)
            grad.scatter_add_(-1, labels[chunk, None], grad_logprobs[chunk, None])
            grads.append(head.hidden_gradient(grad))
        return torch.cat(grads), None, None, None, None, None


class _Head:
    """Products with the head. Half-precision operands on CUDA are multiplied as they are, into
    float32; elsewhere in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, hidden: Tensor) -> None:
        self._dtype = hidden.dtype
        self._in_half = hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32
        self._weight = weight if self._in_half else weight.float()
        self._bias = bias

    def logits(self, hidden: Tensor, temperatures: Tensor) -> Tensor:
        """[n, H] -> [n, V] float32."""
        if self._in_half:
            logits = torch.mm(hidden, self._weight.t(), out_dtype=torch.float32)
        else:
            logits = torch.mm(hidden.float(), self._weight.t())
        if self._bias is not None:
            logits += self._bias
        return logits.div_(temperatures[:, None])

    def hidden_gradient(self, grad_logits: Tensor) -> Tensor:
        """[n, V] float32 -> [n, H] in the dtype of the hidden states."""
        return torch.mm(grad_logits.to(self._weight.dtype), self._weight).to(self._dtype)


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]
