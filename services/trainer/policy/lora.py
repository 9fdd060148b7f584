"""LoRA on a frozen linear, 4-bit or not, as one differentiable function.

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ          A [r, in] and B [out, r] float32 masters (Hu et al. 2021,
    ∂A = s (∂y B)ᵀ x,   ∂B = s ∂yᵀ (x Aᵀ)                                    arXiv:2106.09685)
    ∂x = ∂y W + s (∂y B) A

PEFT makes the layers, names their weights and switches adapters; this is what they compute. All
products are in the dtype of x, as the replicas compute them. The adapter's part is added within the
matrix product, where PEFT copies, scales and adds whole activations, and W is dequantized again in
the backward pass. (bitsandbytes' own forward in eval mode repacks weights on CPUs with AVX512-BF16
for a kernel without backward; gradients after it are silently wrong. Here it is not called.)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def use_fused_lora(model: Any) -> None:
    """Let every LoRA layer of a PEFT model compute by `lora_linear`."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = partial(lora_linear, module)


def lora_linear(layer: Any, x: Tensor) -> Tensor:
    """x [..., in] -> [..., out] of a PEFT layer, with its one active adapter or without."""
    base, a, b, scaling = layer.base_layer, None, None, 0.0
    if not layer.disable_adapters:
        (name,) = layer.active_adapters
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        scaling = layer.scaling[name]
    return _LoraLinear.apply(x, base.weight, base.bias, a, b, scaling)  # type: ignore[no-any-return, no-untyped-call]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
    ) -> Tensor:
        flat, dense, low = x.reshape(-1, x.shape[-1]), _dense(weight, x.dtype), None
        if a is None or b is None:
            y = linear(flat, dense, bias)
        else:
            low = flat @ a.to(x.dtype).t()
            up = b.to(x.dtype)
            if _is_faster_joined(flat, low, len(dense), scaling):
                y = linear(torch.cat((flat, low), 1), torch.cat((dense, up * scaling), 1), bias)
            else:
                y = linear(flat, dense, bias).addmm_(low, up.t(), alpha=scaling)
        ctx.save_for_backward(flat, low, a, b)
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        flat, low, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_a = grad_b = grad_low = None
        if low is not None:
            grad_low = (grad @ b.to(grad.dtype)).mul_(ctx.scaling)
            grad_a = (grad_low.t() @ flat).to(a.dtype)
            grad_b = (grad.t() @ low).to(b.dtype).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            dense = _dense(ctx.weight, grad.dtype)
            if grad_low is None:
                grad_x = grad @ dense
            elif _is_faster_joined(grad, grad_low, dense.shape[1]):
                joined = torch.cat((dense, a.to(grad.dtype)), 0)
                grad_x = torch.cat((grad, grad_low), 1) @ joined
            else:
                grad_x = (grad @ dense).addmm_(grad_low, a.to(grad.dtype))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None


def _is_faster_joined(x: Tensor, low: Tensor, width: int, scaling: float = 1.0) -> bool:
    """Whether it is faster to join x [T, in] and the weight [in, `width`] with LoRA's and multiply
    once than to read and write the result [T, `width`] again for the second product.

    On a GPU, where memory's bandwidth bounds both; if `scaling` rounds nothing in 16 bits, and a
    row of both stays aligned.
    """
    num_rows, num_in = x.shape
    moves_less = num_rows * (width - num_in) > width * num_in
    is_power_of_two = math.frexp(scaling)[0] == 0.5
    return x.is_cuda and moves_less and is_power_of_two and low.shape[1] % 8 == 0


def _dense(weight: Any, dtype: torch.dtype) -> Tensor:
    """A weight as [out, in] in `dtype`; one of bitsandbytes is dequantized."""
    if (state := getattr(weight, "quant_state", None)) is None:
        dense: Tensor = weight.to(dtype)
        return dense
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state).to(dtype)  # type: ignore[no-any-return]
