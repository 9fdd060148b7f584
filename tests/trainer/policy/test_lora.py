"""The LoRA layer against its formula, in both ways to add the two products."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from services.trainer.policy import lora


class Layer:
    """What `lora_linear` reads of a PEFT layer."""

    disable_adapters = False
    active_adapters = ("default",)

    def __init__(self, num_in: int, num_out: int, scaling: float, dtype: torch.dtype) -> None:
        self.base_layer = nn.Linear(num_in, num_out).to(dtype).requires_grad_(False)
        self.scaling = {"default": scaling}
        self.lora_A = {"default": nn.Linear(num_in, 8, bias=False)}
        self.lora_B = {"default": nn.Linear(8, num_out, bias=False)}

    @property
    def parameters(self) -> list[Tensor]:
        return [self.lora_A["default"].weight, self.lora_B["default"].weight]


def computed(layer: Layer, x: Tensor) -> list[Tensor]:
    """The output, and the gradients by x, A and B of a sum of it."""
    y = lora.lora_linear(layer, x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters])]


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), [(16, 80), (80, 16)])
def test_output_and_gradients_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, num_in: int, num_out: int, joins: bool
) -> None:
    monkeypatch.setattr(lora, "_is_faster_joined", lambda *_: joins)
    torch.manual_seed(0)
    layer = Layer(num_in, num_out, 2.0, torch.float32)
    x = torch.randn(2, 5, num_in).requires_grad_()
    found = computed(layer, x)

    a, b = layer.parameters
    base = layer.base_layer
    y = x @ base.weight.T + base.bias + 2.0 * (x @ a.T) @ b.T
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    expected = [y, *torch.autograd.grad((y * weights).sum(), [x, a, b])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@dataclass(frozen=True)
class OnGpu:
    shape: tuple[int, int]
    is_cuda: bool = True


@pytest.mark.parametrize(
    ("num_rows", "num_in", "width", "rank", "scaling", "joins"),
    [
        (4096, 2560, 9728, 32, 2.0, True),
        (3400, 2560, 9728, 32, 2.0, False),  # to copy the weight takes longer
        (4096, 9728, 2560, 32, 2.0, False),
        (4096, 2560, 9728, 32, 1.5, False),
        (4096, 2560, 9728, 32, 0.0, False),
        (4096, 2560, 9728, 4, 2.0, False),
    ],
)
def test_products_are_joined_where_that_moves_less_and_rounds_nothing(
    num_rows: int, num_in: int, width: int, rank: int, scaling: float, joins: bool
) -> None:
    x, low = OnGpu((num_rows, num_in)), OnGpu((num_rows, rank))
    assert lora._is_faster_joined(x, low, width, scaling) == joins  # type: ignore[arg-type]
