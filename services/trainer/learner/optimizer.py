"""AdamW over the LoRA weights: a step of all ranks' gradients, or none at all.

Parameters come in sets (the policy's, and the critic's when there is one), each with a learning
rate and a gradient norm of its own.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from services.trainer.policy.ranks import Ranks
from services.trainer.run_config import OptimizerConfig


class Optimizer:
    """AdamW with a schedule. `num_updates` counts the updates taken, which the schedule follows."""

    def __init__(
        self, config: OptimizerConfig, sets: Sequence[tuple[Sequence[Tensor], float]]
    ) -> None:
        """`sets`: parameters and their learning rate; the policy's come first."""
        self.num_updates = 0
        self.learning_rate = 0.0  # Rate of the policy in the latest update.
        self._config = config
        self._learning_rates = [learning_rate for _, learning_rate in sets]
        groups = [{"params": list(parameters)} for parameters, _ in sets]
        options: dict[str, Any] = {"betas": config.betas, "weight_decay": config.weight_decay}
        if config.name == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            self._optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options)
        else:
            self._optimizer = torch.optim.AdamW(groups, **options)

    @property
    def parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    @contextlib.contextmanager
    def update(self, num_steps: int) -> Iterator[None]:
        """Inside, the `num_steps` steps of one update are taken. One that fails leaves nothing: its
        steps are undone and its gradients dropped."""
        weights, state = [], {}
        # A single step of a single set is all or nothing.
        if num_steps > 1 or len(self._learning_rates) > 1:
            weights = [parameter.detach().clone() for parameter in self.parameters]
            state = copy.deepcopy(self._optimizer.state_dict())
        share = min(1.0, (self.num_updates + 1) / max(self._config.warmup_steps, 1))
        for group, rate in zip(self._optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = rate * share
        self.learning_rate = self._learning_rates[0] * share
        try:
            yield
        except Exception:  # Half an update is no version, whatever failed.
            self._optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for parameter, weight in zip(self.parameters, weights, strict=False):
                    parameter.copy_(weight)
            if state:
                self._optimizer.load_state_dict(state)
            raise
        self.num_updates += 1

    def step(self, ranks: Ranks) -> float:
        """Add up the ranks' gradients, clip each set, step and zero them; the norm of the policy's
        gradient before clipping. Raises FloatingPointError when a gradient is not finite."""
        for parameter in self.parameters:
            if parameter.grad is None:  # No sample had an advantage: step by momentum alone.
                parameter.grad = torch.zeros_like(parameter)
        ranks.add_gradients(self.parameters)
        norms = [
            float(torch.nn.utils.clip_grad_norm_(group["params"], self._config.max_grad_norm))
            for group in self._optimizer.param_groups
        ]
        if not all(map(math.isfinite, norms)):
            raise FloatingPointError("the gradient is not finite: lower optimizer.learning_rate")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norms[0]

    def state(self) -> dict[str, Any]:
        """A copy of the state, on the CPU."""
        copied = _on_cpu(self._optimizer.state_dict())
        assert isinstance(copied, dict)
        return copied

    def restore(self, state: dict[str, Any], *, num_updates: int) -> None:
        # The optimizer keeps what it is given.
        self._optimizer.load_state_dict(copy.deepcopy(state))
        self.num_updates = num_updates


def _on_cpu(value: Any) -> Any:
    """A copy of what state dicts are made of."""
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return copy.deepcopy(value)
