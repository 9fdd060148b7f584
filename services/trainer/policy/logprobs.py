"""From hidden states to the logprobs of given tokens, without the [N, V] logits of all of them.

Logits of one chunk of positions exist at a time, accumulated in float32 like the sampler's head,
and are computed again in the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_LOGITS = 1 << 27  # 0.5 GiB of float32; on CUDA their 16-bit gradients come on top.


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
            hidden,
            head_weight.detach(),
            head_bias,
            labels.contiguous(),
            temperatures.contiguous(),
            num_positions,
        )
    )


class _ChunkedLogprobs(torch.autograd.Function):
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
        head = _Head(weight, bias, hidden)
        parts = [
            head.statistics(head.logits(hidden[chunk]), labels[chunk], temperatures[chunk])
            for chunk in _chunks(len(hidden), num_positions)
        ]
        logprobs, entropies, *log_sums = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, labels, temperatures, *log_sums, entropies)
        ctx.num_positions = num_positions
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> Any:
        hidden, weight, bias, *of_positions = ctx.saved_tensors
        entropies = of_positions[-1]
        for grad in (grad_logprobs, grad_entropies):
            of_positions.append(torch.zeros_like(entropies) if grad is None else grad.contiguous())
        head = _Head(weight, bias, hidden)

        def of_chunk(chunk: slice) -> Tensor:
            logits = head.logits(hidden[chunk])
            gradient = head.gradient(logits, *(part[chunk] for part in of_positions))
            del logits
            return head.hidden_gradient(gradient)

        gradient = torch.cat([of_chunk(c) for c in _chunks(len(hidden), ctx.num_positions)])
        return gradient, None, None, None, None, None


class _Head:
    """Products with the head. Half-precision operands on CUDA are multiplied as they are, into
    float32; elsewhere in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, hidden: Tensor) -> None:
        self._dtype = hidden.dtype
        self._in_half = hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32
        self._weight = weight if self._in_half else weight.float()
        self._bias = bias

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V] float32."""
        if self._in_half:
            logits = torch.mm(hidden, self._weight.t(), out_dtype=torch.float32)
        else:
            logits = torch.mm(hidden.float(), self._weight.t())
        if self._bias is not None:
            logits += self._bias
        return logits

    def statistics(self, logits: Tensor, *of_positions: Tensor) -> tuple[Tensor, ...]:
        """Logprobs, entropies and what `gradient` needs besides them, each [n]."""
        if not logits.is_cuda:
            return softmax_statistics(logits, *of_positions)
        from services.trainer.policy import head_kernels

        return head_kernels.softmax_statistics(logits, *of_positions)

    def gradient(self, logits: Tensor, *of_positions: Tensor) -> Tensor:
        """By the logits: [n, V]."""
        if not logits.is_cuda:
            return logits_gradient(logits, *of_positions)
        from services.trainer.policy import head_kernels

        return head_kernels.logits_gradient(logits, *of_positions, dtype=self._weight.dtype)

    def hidden_gradient(self, grad_logits: Tensor) -> Tensor:
        """[n, V] -> [n, H] in the dtype of the hidden states."""
        return torch.mm(grad_logits.to(self._weight.dtype), self._weight).to(self._dtype)


def softmax_statistics(
    logits: Tensor, labels: Tensor, temperatures: Tensor
) -> tuple[Tensor, Tensor]:
    """Of logits [n, V] float32, which are overwritten: the logprobs of `labels` and the entropies,
    each [n], where p is the softmax of logits / temperature."""
    log_p = logits.div_(temperatures[:, None]).log_softmax(-1)
    logprobs = log_p.gather(-1, labels[:, None]).squeeze(-1)
    return logprobs, -torch.einsum("nv,nv->n", log_p.exp(), log_p)


def logits_gradient(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor,
    entropies: Tensor,
    grad_logprobs: Tensor,
    grad_entropies: Tensor,
) -> Tensor:
    """The gradient by logits [n, V] float32, which are overwritten.

    With z = logits / temperature and p their softmax: ∂logp_y/∂z = 1_y - p and ∂H/∂z =
    -p (log p + H), so that the gradient by z is g_y 1_y - p (g_y + g_H (log p + H)).
    """
    grad_logprobs, grad_entropies = grad_logprobs / temperatures, grad_entropies / temperatures
    log_p = logits.div_(temperatures[:, None]).log_softmax(-1)
    weight_of_p: Tensor = grad_logprobs[:, None]
    if grad_entropies.any():
        weight_of_p = weight_of_p + grad_entropies[:, None] * (log_p + entropies[:, None])
    gradient = log_p.exp_().mul_(-weight_of_p)
    return gradient.scatter_add_(-1, labels[:, None], grad_logprobs[:, None])


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]
