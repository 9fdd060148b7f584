"""Online and offline DPO in an update: groups ─▶ pairs ─▶ the loss of a micro-batch of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from services.trainer.algorithms.dpo import preference_loss, ranked_pairs
from services.trainer.algorithms.kl import kl_estimate
from services.trainer.algorithms.rows import row_sums
from services.trainer.learner.forward import Forward, Seen, TokenScores
from services.trainer.policy.samples import Sample, group_indices
from services.trainer.run_config import DpoConfig, OnlineDpoConfig


def preference_pairs(
    samples: Sequence[Sample], config: OnlineDpoConfig | DpoConfig
) -> list[Sample]:
    """Of every group that has a preference the chosen completion and the rejected one.

    DPO is of the distribution at temperature 1; of another one the sampler's logprobs say nothing.
    """
    penalty = config.missing_eos_penalty if isinstance(config, OnlineDpoConfig) else 0.0
    groups = group_indices(samples)
    rewards = [[samples[i].reward - penalty * samples[i].is_truncated for i in g] for g in groups]
    chosen = [
        samples[group[place]]
        for group, pair in zip(groups, ranked_pairs(rewards), strict=True)
        for place in pair or ()
    ]
    return [
        replace(
            sample,
            temperature=1.0,
            sampler_logprobs=sample.sampler_logprobs if sample.temperature == 1 else (),
        )
        for sample in chosen
    ]


@dataclass(slots=True)
class Preferences:
    """The objective of an update (update.py). Samples are pairs: chosen, rejected, chosen, ..."""

    forward: Forward
    config: OnlineDpoConfig | DpoConfig
    _old: TokenScores = field(
        default_factory=dict
    )  # Empty when there is no older policy to compare with.
    _reference: TokenScores = field(default_factory=dict)
    may_split_groups: ClassVar[bool] = False
    weighs_tokens: ClassVar[bool] = False

    def prepare(self, num_steps: int, *, num_minibatches: int) -> None:
        samples = self.forward.samples
        self._reference = self.forward.reference(range(len(samples)))
        if num_steps > 1 and any(sample.sampler_logprobs for sample in samples):
            self._old, _ = self.forward.old(range(len(samples)))

    def step(self, minibatch: Sequence[int]) -> None:
        forward, num_pairs = self.forward, len(minibatch) // 2
        pairs = [minibatch[k : k + 2] for k in range(0, len(minibatch), 2)]
        for batch, rows in forward.micro_batches(pairs, keep_units=True):
            logprobs, entropy = forward.policy.logprobs(batch)
            old = forward.on_device(self._old, rows) if self._old else logprobs.detach()
            reference = forward.on_device(self._reference, rows)
            result = preference_loss(
                row_sums(logprobs, batch.rows, batch.num_rows),
                row_sums(reference, batch.rows, batch.num_rows),
                loss=self.config.loss,
                beta=self.config.beta,
            )
            loss = result.loss.sum() / num_pairs
            loss.backward()
            forward.add(
                loss=loss,
                pairs=len(result.margin),
                accurate=(result.margin > 0).sum(),
                margin=result.margin.sum(),
                tokens=len(logprobs),
                reference_kl=kl_estimate(old, reference, estimator="k3").sum(),
            )
            no = torch.zeros_like(batch.rows, dtype=torch.bool)
            forward.record(
                batch,
                policy_logprobs=old,
                entropy=entropy,
                weights=torch.ones_like(logprobs),
                is_truncated=no,
                is_masked=no,
                is_clipped=no,
            )

    def statistics(self, seen: Seen) -> dict[str, float | None]:
        return {
            "reference_kl": seen.mean("reference_kl", "tokens"),
            "preference_accuracy": seen.mean("accurate", "pairs"),
            "preference_margin": seen.mean("margin", "pairs"),
        }
