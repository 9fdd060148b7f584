"""The events of a run and the summary printed at its end."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.schemas import EvalRecord, StepRecord


@dataclass(slots=True)
class History:
    """Steps and evaluations of a run; an accuracy is a mean exact-match reward, in [0, 1]."""

    steps: list[StepRecord] = field(default_factory=list)
    evals: list[EvalRecord] = field(default_factory=list)

    @property
    def sampled_rise_points(self) -> float:
        """Rise of the held-out sampled accuracy, last minus first, in percentage points."""
        return 100 * (self.evals[-1].sampled_reward - self.evals[0].sampled_reward)

    @property
    def syncs(self) -> list[StepRecord]:
        """The steps whose adapter went to the rollout service."""
        return [step for step in self.steps if step.adapter_bytes > 0]

    def summary(self) -> list[tuple[str, str]]:
        """(label, value) per line; needs two evaluations and one sync."""
        first, last, syncs = self.evals[0], self.evals[-1], self.syncs
        sync_ms = 1000 * statistics.median(step.sync_s for step in syncs)
        adapter_mb = syncs[-1].adapter_bytes / 1e6
        gap = self._token_mean(lambda step: step.logprob_gap)
        kl = self._token_mean(lambda step: step.sampler_kl)
        return [
            ("held-out accuracy, sampled", _change(first.sampled_reward, last.sampled_reward)),
            ("held-out accuracy, greedy", _change(first.greedy_reward, last.greedy_reward)),
            ("adapters pushed", f"{len(syncs)} of {adapter_mb:.2f} MB"),
            ("median sync time", f"{sync_ms:.1f} ms"),
            ("logprob gap, trainer to rollout", f"mean |Δ| {gap:.4f} nats, KL {kl:.6f} nats"),
        ]

    def _token_mean(self, value: Callable[[StepRecord], float | None]) -> float:
        """Mean of `value`, weighted by tokens, over the steps that have it."""
        known = [(v, step.num_tokens) for step in self.steps if (v := value(step)) is not None]
        num_tokens = sum(count for _, count in known)
        return sum(v * count for v, count in known) / max(num_tokens, 1)


def _change(before: float, after: float) -> str:
    return f"{before:.1%} → {after:.1%} ({100 * (after - before):+.1f} points)"
