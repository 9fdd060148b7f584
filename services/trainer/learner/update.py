"""One policy update: what is learned from samples, and the optimizer steps that learn it.

    samples ─▶ scores (no gradient, only what is needed) ─▶ advantages ─▶ for every optimizer step:
               micro-batches of this rank ─▶ loss, backward ─▶ guards ─▶ sum over ranks ─▶ step

Three policies are kept apart: the sampler (the engine that sampled, at the version that sampled),
old (the trainer's policy before this update) and the current one. With one optimizer step old is
the current policy, and no pass is spent on it. Rows without a gradient are not computed: they count
in what the loss is divided by, so the gradient is the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import ClassVar, Protocol

from services.trainer.learner.critic import Critic
from services.trainer.learner.forward import Forward, Seen
from services.trainer.learner.optimizer import Optimizer
from services.trainer.learner.policy_gradient import PolicyGradient
from services.trainer.learner.preferences import Preferences, preference_pairs
from services.trainer.learner.stats import check_guards, peak_memory_bytes, update_stats
from services.trainer.policy.policy import Policy
from services.trainer.policy.samples import Sample, group_indices
from services.trainer.run_config import AlgorithmConfig, DpoConfig, GuardsConfig, OnlineDpoConfig
from shared.schemas import UpdateStats


class Objective(Protocol):
    """What an algorithm adds (policy_gradient.py, preferences.py): scores before the first step,
    and the gradient of every step."""

    may_split_groups: ClassVar[bool]
    weighs_tokens: ClassVar[bool]  # Whether it clips, and weighs tokens by importance.

    def prepare(self, num_steps: int, *, num_minibatches: int) -> None:
        """`num_steps` optimizer steps are to come, in passes of `num_minibatches`."""
        ...

    def step(self, minibatch: Sequence[int]) -> None:
        """Accumulate the gradient of one optimizer step over some samples."""
        ...

    def statistics(self, seen: Seen) -> dict[str, float | None]:
        """The numbers of UpdateStats that only this objective has."""
        ...


def take_update(
    policy: Policy,
    optimizer: Optimizer,
    critic: Critic | None,
    samples: Sequence[Sample],
    algorithm: AlgorithmConfig,
    *,
    max_tokens_per_micro_batch: int,
    max_completion_tokens: int | None,
    reward_weights: Sequence[float],
    guards: GuardsConfig,
) -> UpdateStats:
    """Take the optimizer steps of one update; see Learner.update."""
    objective: Objective
    if isinstance(algorithm, OnlineDpoConfig | DpoConfig):
        forward = Forward(policy, preference_pairs(samples, algorithm), max_tokens_per_micro_batch)
        objective = Preferences(forward, algorithm)
    else:
        forward = Forward(policy, samples, max_tokens_per_micro_batch)
        objective = PolicyGradient(
            forward, algorithm, critic, max_completion_tokens, reward_weights
        )
    progress = _Progress(policy, optimizer, objective)
    minibatches = _minibatches(
        forward.samples, algorithm.num_minibatches, may_split=objective.may_split_groups
    )
    num_steps = algorithm.num_epochs * len(minibatches)
    objective.prepare(num_steps, num_minibatches=len(minibatches))
    ranks = policy.ranks
    with optimizer.update(num_steps):
        for _ in range(algorithm.num_epochs):
            for minibatch in minibatches:
                objective.step(minibatch)
                seen = Seen.of_all(ranks.gather(forward.take_seen()))
                check_guards(progress.stats([seen]), guards)
                progress.steps.append(seen)
                progress.grad_norms.append(optimizer.step(ranks))
    return progress.stats(progress.steps)


@dataclass(slots=True)
class _Progress:
    """The steps of an update that were taken so far."""

    policy: Policy
    optimizer: Optimizer
    objective: Objective
    started: float = field(default_factory=time.perf_counter)
    steps: list[Seen] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    def stats(self, steps: Sequence[Seen]) -> UpdateStats:
        seen = Seen.of_all(steps)
        num_forward_tokens = int(seen.sums.get("positions", 0.0))
        return update_stats(
            seen.columns,
            weighs_tokens=self.objective.weighs_tokens,
            loss=seen.mean("loss", "steps") or 0.0,
            grad_norm=sum(self.grad_norms) / max(len(self.grad_norms), 1),
            learning_rate=self.optimizer.learning_rate,
            num_forward_tokens=num_forward_tokens,
            update_tokens_per_s=num_forward_tokens / (time.perf_counter() - self.started),
            peak_memory_bytes=peak_memory_bytes(self.policy.device),
            **self.objective.statistics(seen),
        )


def _minibatches(samples: Sequence[Sample], num_parts: int, *, may_split: bool) -> list[list[int]]:
    """At most `num_parts` contiguous parts of whole groups, or of single samples when there are
    fewer groups and they may be split; their sizes differ by at most one."""
    units = group_indices(samples)
    if len(units) < num_parts and may_split:
        units = [[index] for index in range(len(samples))]
    bounds = [len(units) * part // num_parts for part in range(num_parts + 1)]
    parts = (units[start:end] for start, end in pairwise(bounds))
    return [list(chain.from_iterable(part)) for part in parts if part]
