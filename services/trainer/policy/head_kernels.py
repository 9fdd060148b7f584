"""The softmax over a vocabulary on CUDA: one pass over the logits forward, one backward.

What logprobs.py defines with torch, which reads and writes them eight times forward and backward
and needs three times their memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # Logits per program and step.


def softmax_statistics(
    logits: Tensor, labels: Tensor, temperatures: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As logprobs.softmax_statistics, and the logs of the sums of e^z; all contiguous. The logits
    stay as they are. A label that is none of their columns has the logprob NaN, so that an update
    with it is refused."""
    num_rows, num_columns = logits.shape
    results = torch.empty(3, num_rows, dtype=torch.float32, device=logits.device)
    is_column = (labels >= 0) & (labels < num_columns)
    _statistics_kernel[(num_rows,)](
        logits,
        labels.where(is_column, 0),
        temperatures,
        *results,
        num_columns,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    logprobs, entropies, log_sums = results
    return logprobs.where(is_column, torch.nan), entropies, log_sums


def logits_gradient(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor,
    log_sums: Tensor,
    entropies: Tensor,
    grad_logprobs: Tensor,
    grad_entropies: Tensor,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """As logprobs.logits_gradient, in `dtype`; all contiguous. The logits stay as they are."""
    num_rows, num_columns = logits.shape
    gradient = torch.empty(num_rows, num_columns, dtype=dtype, device=logits.device)
    _gradient_kernel[(num_rows, triton.cdiv(num_columns, _BLOCK))](
        logits,
        labels,
        temperatures,
        log_sums,
        entropies,
        grad_logprobs,
        grad_entropies,
        gradient,
        num_columns,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return gradient


@triton.jit  # type: ignore[untyped-decorator]
def _statistics_kernel(  # type: ignore[no-untyped-def]
    logits, labels, temperatures, logprobs, entropies, log_sums, num_columns, BLOCK: tl.constexpr
):
    """A row. Of what was seen of it: its largest z, the sum of e^(z - largest), and that of
    e^(z - largest) (z - largest), which the entropy is made of."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * num_columns
    temperature = tl.load(temperatures + row)
    largest, total, weighted = -1e30, 0.0, 0.0
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z = tl.load(logits + columns, mask=inside, other=-float("inf")) / temperature
        new_largest = tl.maximum(largest, tl.max(z, 0))
        share = tl.exp(largest - new_largest)
        exponentials = tl.exp(z - new_largest)
        weighted = share * (weighted + (largest - new_largest) * total)
        weighted += tl.sum(tl.where(inside, exponentials * (z - new_largest), 0.0), 0)
        total = share * total + tl.sum(exponentials, 0)
        largest = new_largest
    log_total = tl.log(total)
    z_label = tl.load(logits + tl.load(labels + row)) / temperature
    tl.store(logprobs + row, (z_label - largest) - log_total)
    tl.store(entropies + row, log_total - weighted / total)
    tl.store(log_sums + row, largest + log_total)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    temperatures,
    log_sums,
    entropies,
    grad_logprobs,
    grad_entropies,
    gradient,
    num_columns,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    temperature = tl.load(temperatures + row)
    grad_logprob = tl.load(grad_logprobs + row)
    z = tl.load(logits + row * num_columns + columns, mask=inside, other=0.0) / temperature
    log_p = z - tl.load(log_sums + row)
    surprise = log_p + tl.load(entropies + row)
    result = -tl.exp(log_p) * (grad_logprob + tl.load(grad_entropies + row) * surprise)
    result += tl.where(columns == tl.load(labels + row), grad_logprob, 0.0)
    target = gradient + row * num_columns + columns
    tl.store(target, (result / temperature).to(gradient.dtype.element_ty), mask=inside)
