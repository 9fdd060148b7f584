"""A policy that learns: samples ─▶ optimizer steps (update.py) ─▶ the next version.

    start(run)   fresh LoRA, optimizer and, for PPO, critic: version 0
    update()     the optimizer steps of one update
    snapshot()   everything that the next update depends on ─▶ restore()

Methods that are `mirrored` are called on every GPU that trains (policy/ranks.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from services.boot import settle_memory
from services.trainer.learner.critic import Critic
from services.trainer.learner.optimizer import Optimizer
from services.trainer.learner.update import take_update
from services.trainer.policy.policy import Policy
from services.trainer.policy.ranks import Ranks, mirrored
from services.trainer.policy.samples import Sample
from services.trainer.run_config import (
    AlgorithmConfig,
    GrpoConfig,
    GuardsConfig,
    LoraConfig,
    OptimizerConfig,
    PpoConfig,
)
from services.trainer.settings import TrainerSettings
from shared.schemas import AdapterManifest, PolicyId, UpdateStats

_GRPO, _GUARDS = GrpoConfig(), GuardsConfig()


@dataclass(frozen=True, slots=True)
class PolicySnapshot:
    """Everything an update depends on besides its samples, on the CPU."""

    manifest: AdapterManifest
    lora: Mapping[str, Tensor]  # float32, by name in the adapter file
    optimizer: dict[str, Any]  # torch's state dict
    num_updates: int
    rng: Mapping[str, Tensor]  # states of torch's generators, by device type
    critic: Mapping[str, Tensor] = field(default_factory=dict)  # float32; empty without a critic


class Learner:
    """The optimizer of a policy, and its critic when the run's algorithm has one."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.critic: Critic | None = None
        self._optimizer: Optimizer | None = None

    @property
    def ranks(self) -> Ranks:
        return self.policy.ranks

    @property
    def optimizer(self) -> Optimizer:
        assert self._optimizer, "no run was started"
        return self._optimizer

    @mirrored
    def start(
        self,
        policy_id: PolicyId,
        lora: LoraConfig,
        optimizer: OptimizerConfig,
        *,
        seed: int,
        algorithm: AlgorithmConfig = _GRPO,
    ) -> None:
        """Begin a run at `policy_id` (version 0) with a fresh adapter and optimizer.

        Raises ValueError for a config that does not fit the base; the last run's state then stays.
        """
        self.policy.start(policy_id, lora, seed=seed)
        self.critic = None
        sets = [(list(self.policy.lora_tensors().values()), optimizer.learning_rate)]
        if isinstance(algorithm, PpoConfig):
            self.critic = Critic(self.policy)
            learning_rate = algorithm.critic_learning_rate or optimizer.learning_rate
            sets.append((list(self.critic.tensors().values()), learning_rate))
        self._optimizer = Optimizer(optimizer, sets)

    @mirrored
    def update(
        self,
        samples: Sequence[Sample],
        algorithm: AlgorithmConfig,
        *,
        max_tokens_per_micro_batch: int,
        max_completion_tokens: int | None = None,
        reward_weights: Sequence[float] = (),
        guards: GuardsConfig = _GUARDS,
    ) -> UpdateStats:
        """Take the optimizer steps of one update; the policy is the next version afterwards.

        `max_completion_tokens` is the divisor of dr_grpo, by default the longest completion.
        `reward_weights` are the factors already in `Sample.rewards`, by default ones. Raises
        UpdateRefused when a guard is violated, FloatingPointError when a gradient is not finite.
        Whatever is raised, the policy keeps its version: a failed update leaves no gradient and no
        step behind.
        """
        stats = take_update(
            self.policy,
            self.optimizer,
            self.critic,
            samples,
            algorithm,
            max_tokens_per_micro_batch=max_tokens_per_micro_batch,
            max_completion_tokens=max_completion_tokens,
            reward_weights=reward_weights,
            guards=guards,
        )
        self.policy.set_version(self.policy.id.next())
        return stats

    def fingerprint(self) -> list[int]:
        """One number per trained tensor, over all its bits: equal weights have equal numbers."""
        bits = [p.detach().view(torch.int32).sum() for p in self.optimizer.parameters]
        return [int(number) for number in torch.stack(bits).tolist()]

    # --- snapshot -------------------------------------------------------------------------------

    def snapshot(self) -> PolicySnapshot:
        """A copy of everything an update depends on, and the manifest of the current version."""
        policy, rng = self.policy, {"cpu": torch.get_rng_state()}
        if policy.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(policy.device)
        return PolicySnapshot(
            manifest=policy.manifest,
            lora=_on_cpu(policy.lora_tensors()),
            optimizer=self.optimizer.state(),
            num_updates=self.optimizer.num_updates,
            rng=rng,
            critic=_on_cpu(self.critic.tensors()) if self.critic else {},
        )

    @mirrored
    def restore(self, policy_id: PolicyId, snapshot: PolicySnapshot) -> None:
        """Continue as `policy_id` from a snapshot. Call after start() with the config of its run.

        The next update is, bit for bit, the one that the snapshot's policy would have taken.
        Raises ValueError when the tensors do not fit this base and run config.
        """
        if bool(self.critic) != bool(snapshot.critic):
            raise ValueError(
                f"the snapshot of {snapshot.manifest.policy} has "
                f"{'a' if snapshot.critic else 'no'} critic: continue the run with the algorithm "
                "that it began with"
            )
        self.policy.restore(policy_id, snapshot.lora)
        if self.critic:
            self.critic.restore(snapshot.critic)
        self.optimizer.restore(snapshot.optimizer, num_updates=snapshot.num_updates)
        torch.set_rng_state(snapshot.rng["cpu"])
        if self.policy.device.type == "cuda" and "cuda" in snapshot.rng:
            torch.cuda.set_rng_state(snapshot.rng["cuda"], self.policy.device)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def load_learner(settings: TrainerSettings) -> Learner:
    """A learner on the base that the settings name. Raises what Policy.load raises."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = Policy.load(
        settings.model,
        device=device,
        load_in_4bit=settings.load_in_4bit,
        gradient_checkpointing=settings.gradient_checkpointing,
        offload_activations=settings.offload_activations,
        kept_adapters=settings.kept_adapters,
    )
    settle_memory()
    return Learner(policy)
