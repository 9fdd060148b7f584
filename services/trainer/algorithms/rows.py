"""Sums and means over the rows of a micro-batch; `rows` names the completion of every token."""

from __future__ import annotations

from torch import Tensor


def row_sums(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """values [N], rows [N] int64 -> [num_rows]; a row without tokens has 0. Differentiable."""
    return values.new_zeros(num_rows).index_add(0, rows, values)


def row_means(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """values [N], rows [N] int64 -> [num_rows]; a row without tokens has 0. Differentiable."""
    lengths = rows.bincount(minlength=num_rows).clamp(min=1)
    return row_sums(values, rows, num_rows) / lengths
