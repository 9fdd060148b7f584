"""The critic of PPO: a second LoRA adapter and a value head on the policy's own 4-bit base.

TokenBatch ─▶ decoder with the adapter "critic" ─▶ head ─▶ values [N], each before its token
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from services.trainer.policy.samples import TokenBatch

_ADAPTER = "critic"


class Critic:
    """Values start at 0. While its adapter is active, the policy's is not."""

    def __init__(
        self, model: Any, lora: Any, hidden: Callable[[TokenBatch], Tensor], device: torch.device
    ) -> None:
        """`model`: the PEFT model of the policy, which gets a second adapter of the config `lora`;
        `hidden`: its final states [N, H] at the positions that predict a completion token."""
        self._model = model
        self._hidden = hidden
        model.add_adapter(_ADAPTER, lora)
        model.set_adapter("default")
        size = model.get_base_model().config.get_text_config().hidden_size
        self._head = nn.Linear(size, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self._head.weight)
        nn.init.zeros_(self._head.bias)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Forward and backward both belong inside: checkpointing computes layers again."""
        self._model.set_adapter(_ADAPTER)
        try:
            yield
        finally:
            self._model.set_adapter("default")

    def values(self, batch: TokenBatch) -> Tensor:
        """[N] float32; inside `active`."""
        values: Tensor = self._head(self._hidden(batch).float())
        return values.squeeze(-1)

    def tensors(self) -> dict[str, Tensor]:
        """All trainable tensors, by name."""
        lora = {
            name: parameter
            for name, parameter in self._model.named_parameters()
            if f".{_ADAPTER}." in name
        }
        return {**lora, "head.weight": self._head.weight, "head.bias": self._head.bias}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.tensors().items():
                parameter.copy_(tensors[name])
