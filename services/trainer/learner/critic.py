"""The critic of PPO: a second LoRA adapter and a value head on the policy's own 4-bit base.

TokenBatch ─▶ decoder with the adapter "critic" ─▶ head ─▶ values [N], each before its token
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from services.trainer.policy.policy import Policy
from services.trainer.policy.token_batch import TokenBatch

_ADAPTER = "critic"


class Critic:
    """Values start at 0. While its adapter is active, the policy's is not."""

    def __init__(self, policy: Policy) -> None:
        """Give the policy's model a second adapter of the same shape."""
        self._model, self._hidden = policy.model, policy.hidden
        self._model.add_adapter(_ADAPTER, self._model.peft_config["default"])
        self._model.set_adapter("default")
        self._head = nn.Linear(policy.hidden_size, 1, device=policy.device, dtype=torch.float32)
        nn.init.zeros_(self._head.weight)
        nn.init.zeros_(self._head.bias)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Both the forward and the backward pass belong inside, because checkpointing recomputes
        layers."""
        self._model.set_adapter(_ADAPTER)
        try:
            yield
        finally:
            self._model.set_adapter("default")

    def values(self, batch: TokenBatch) -> Tensor:
        """Values [N] float32; call inside `active`."""
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
