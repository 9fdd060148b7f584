"""GRPO, RLOO, REINFORCE++ and PPO in an update: scores ─▶ advantages ─▶ the loss of a micro-batch.

The advantages differ, the loss is one of losses.py. Samples without a gradient are not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from services.trainer.algorithms.grpo import decoupled_advantages, group_advantages
from services.trainer.algorithms.kl import kl_estimate
from services.trainer.algorithms.losses import (
    LOSSES,
    high_entropy_threshold,
    off_policy_mask,
    policy_token_loss,
    sample_weights,
)
from services.trainer.algorithms.mismatch import mismatch_weights
from services.trainer.algorithms.ppo import generalized_advantages, value_loss
from services.trainer.algorithms.reinforce import baseline_returns, discounted_returns, whiten
from services.trainer.algorithms.rloo import leave_one_out_advantages
from services.trainer.learner.critic import Critic
from services.trainer.learner.forward import Forward, Seen, TokenScores
from services.trainer.policy.logprobs import TokenLogprobs
from services.trainer.policy.samples import group_indices
from services.trainer.policy.token_batch import TokenBatch
from services.trainer.run_config import (
    GrpoConfig,
    PolicyGradientConfig,
    PpoConfig,
    ReinforceConfig,
    RlooConfig,
)

# Nats. First tokens of a group differ in entropy by rounding only: keep all or none.
_ENTROPY_TIE = 1e-5


@dataclass(slots=True)
class PolicyGradient:
    """The objective of an update (update.py)."""

    forward: Forward
    config: PolicyGradientConfig
    critic: Critic | None
    max_completion_tokens: int | None
    reward_weights: Sequence[float]
    _old: TokenScores = field(
        default_factory=dict
    )  # Empty while the computing policy is the old one.
    _entropy: TokenScores = field(default_factory=dict)
    _reference: TokenScores = field(default_factory=dict)
    _advantages: TokenScores = field(default_factory=dict)
    _values: TokenScores = field(default_factory=dict)
    _returns: TokenScores = field(default_factory=dict)
    _lengths: Sequence[int] = ()  # Loss tokens per sample.
    _num_minibatches: int = 1
    may_split_groups: ClassVar[bool] = True
    weighs_tokens: ClassVar[bool] = True

    def prepare(self, num_steps: int, *, num_minibatches: int) -> None:
        self._num_minibatches = num_minibatches
        samples, config, forward = self.forward.samples, self.config, self.forward
        self._lengths = [
            0 if config.mask_truncated and s.is_truncated else s.num_tokens for s in samples
        ]
        with_loss = [i for i, length in enumerate(self._lengths) if length]
        if config.kl.in_reward:
            self._old, self._entropy = forward.old(range(len(samples)))
            self._reference = forward.reference(range(len(samples)))
        if isinstance(config, PpoConfig):
            assert self.critic, "the run was started for another algorithm"
            with self.critic.active():
                self._values = forward.score(range(len(samples)), self.critic.values)
        self._advantages = self._make_advantages()
        active = [i for i in with_loss if self._is_active(i)]
        if config.top_entropy_fraction < 1:  # The share is of all tokens of a step.
            active = with_loss
        if not self._old and (num_steps > 1 or config.top_entropy_fraction < 1):
            self._old, self._entropy = forward.old(active)
        if config.kl.in_loss:
            self._reference = forward.reference(active)
        if num_steps == 1:
            self._old = {}

    def _is_active(self, index: int) -> bool:
        """Whether the policy's loss of a sample has a gradient."""
        if not self._lengths[index]:
            return False
        has_own_term = self.config.kl.in_loss or self.config.entropy_bonus > 0
        return has_own_term or bool(self._advantages[index].any())

    # --- advantages -----------------------------------------------------------------------------

    def _make_advantages(self) -> dict[int, Tensor]:
        samples, config = self.forward.samples, self.config
        groups = group_indices(samples)
        match config:
            case GrpoConfig(reward_aggregation="normalize_then_sum"):
                by_reward = [[samples[i].rewards for i in group] for group in groups]
                weights = self.reward_weights or (1.0,) * len(samples[0].rewards)
                return self._spread(decoupled_advantages(by_reward, weights=weights))
            case GrpoConfig():
                rewards = self._penalized_rewards(groups)
                return self._spread(group_advantages(rewards, scale=config.scale_rewards))
            case RlooConfig():
                rewards = self._penalized_rewards(groups)
                return self._spread(
                    leave_one_out_advantages(rewards, whiten=config.whiten_advantages)
                )
            case ReinforceConfig(name="reinforce_pp_baseline"):
                advantages = baseline_returns(self._token_rewards(), [s.group for s in samples])
            case ReinforceConfig():
                advantages = discounted_returns(self._token_rewards(), discount=config.discount)
            case PpoConfig():
                values = [self._values[i] for i in range(len(samples))]
                advantages, returns = generalized_advantages(
                    self._token_rewards(),
                    values,
                    discount=config.discount,
                    gae_lambda=config.gae_lambda,
                )
                self._returns = dict(enumerate(returns))
            case _:
                raise AssertionError(f"no advantages for {config}")
        if config.whiten_advantages:
            advantages = whiten(advantages, is_masked=[not length for length in self._lengths])
        return dict(enumerate(advantages))

    def _penalty(self, index: int) -> Tensor:
        """What KL takes off the rewards of a sample's tokens, [R]."""
        kl = self.config.kl
        if not kl.in_reward:
            return torch.zeros(self.forward.samples[index].num_tokens)
        old, reference = self._old[index], self._reference[index]
        return kl.coefficient * kl_estimate(old, reference, estimator=kl.estimator)

    def _penalized_rewards(self, groups: Sequence[Sequence[int]]) -> list[list[float]]:
        samples, kl = self.forward.samples, self.config.kl
        return [
            [
                samples[i].reward - (float(self._penalty(i).sum()) if kl.in_reward else 0.0)
                for i in g
            ]
            for g in groups
        ]

    def _token_rewards(self) -> list[Tensor]:
        rewards = []
        for index, sample in enumerate(self.forward.samples):
            tokens = -self._penalty(index)
            tokens[-1] += sample.reward
            rewards.append(tokens)
        return rewards

    def _spread(self, advantages: Sequence[Sequence[float]]) -> dict[int, Tensor]:
        """One advantage per completion -> the same on all of its tokens."""
        flat = chain.from_iterable(advantages)
        return {
            index: torch.full((sample.num_tokens,), advantage)
            for (index, sample), advantage in zip(
                enumerate(self.forward.samples), flat, strict=True
            )
        }

    # --- loss -----------------------------------------------------------------------------------

    def step(self, minibatch: Sequence[int]) -> None:
        config = self.config
        weights = self._weights(minibatch)
        threshold = None
        tokens = [self._entropy[i] for i in minibatch if self._lengths[i] and i in self._entropy]
        if config.top_entropy_fraction < 1 and tokens:
            threshold = high_entropy_threshold(torch.cat(tokens), config.top_entropy_fraction)
            threshold -= _ENTROPY_TIE
        num_kept_tokens = sum(self._lengths[i] for i in minibatch)
        if threshold is not None:
            num_kept_tokens = sum(int((entropy >= threshold).sum()) for entropy in tokens)
        units = [[i for i in g if self._is_active(i)] for g in self._groups(minibatch)]
        for batch, rows in self.forward.micro_batches([unit for unit in units if unit]):
            out = self.forward.policy.logprobs(batch)
            loss = self._loss(batch, rows, out, weights, threshold, num_kept_tokens)
            loss.backward()
            self.forward.add(loss=loss)
        if isinstance(config, PpoConfig):
            self._step_critic(config, minibatch)

    def _groups(self, minibatch: Sequence[int]) -> list[list[int]]:
        chosen = [self.forward.samples[i] for i in minibatch]
        return [[minibatch[k] for k in group] for group in group_indices(chosen)]

    def _weights(self, minibatch: Sequence[int]) -> dict[int, Tensor]:
        """What a token of each sample weighs in the loss of the step."""
        weights = sample_weights(
            [self._lengths[i] for i in minibatch],
            normalization=LOSSES[self.config.loss].normalization,
            num_update_tokens=sum(self._lengths),
            num_minibatches=self._num_minibatches,
            max_tokens=self.max_completion_tokens or max(self._lengths),
        )
        return {
            i: torch.full((self.forward.samples[i].num_tokens,), weight)
            for i, weight in zip(minibatch, weights, strict=True)
        }

    def _loss(
        self,
        batch: TokenBatch,
        rows: Sequence[int],
        out: TokenLogprobs,
        weights: TokenScores,
        threshold: float | None,
        num_kept_tokens: int,
    ) -> Tensor:
        """The loss of one micro-batch, and what is recorded of its tokens."""
        config, forward = self.config, self.forward
        kind, correction = LOSSES[config.loss], config.correction
        logprobs, entropy = out
        old = forward.on_device(self._old, rows) if self._old else logprobs.detach()
        advantages = forward.on_device(self._advantages, rows)
        weight = forward.on_device(weights, rows)
        of_rows = (batch.rows, batch.num_rows)
        mismatch = mismatch_weights(
            old,
            batch.sampler_logprobs,
            *of_rows,
            level=correction.level,
            mode=correction.mode,
            max_ratio=correction.max_ratio,
            min_ratio=correction.min_ratio,
            geometric_band=correction.geometric_band,
            veto_ratio=correction.veto_ratio,
        )
        token = policy_token_loss(
            logprobs,
            old,
            advantages,
            *of_rows,
            objective=kind.objective,
            ratio=config.ratio or kind.ratio,
            clip_low=kind.clip_low if config.clip_low is None else config.clip_low,
            clip_high=kind.clip_high if config.clip_high is None else config.clip_high,
            delta=config.delta,
            sapo_temperature_positive=config.sapo_temperature_positive,
            sapo_temperature_negative=config.sapo_temperature_negative,
        )
        kept = torch.ones_like(weight)
        if threshold is not None:
            kept = (forward.on_device(self._entropy, rows) >= threshold).float()
        policy_loss = token.loss * mismatch.applied * kept
        if config.off_policy_mask is not None:
            policy_loss = policy_loss * off_policy_mask(
                logprobs,
                torch.where(batch.sampler_logprobs.isnan(), old, batch.sampler_logprobs),
                advantages,
                *of_rows,
                threshold=config.off_policy_mask,
            )
        loss = (policy_loss * weight).sum()
        if config.kl.coefficient > 0:
            reference = forward.on_device(self._reference, rows)
            if config.kl.in_loss:
                kl = kl_estimate(logprobs, reference, estimator=config.kl.estimator)
                ratio = token.ratio if config.kl.importance_weighted else 1.0
                loss = loss + config.kl.coefficient * (kl * ratio * weight).sum()
            forward.add(reference_kl=kl_estimate(old, reference, estimator="k3").sum())
        if config.entropy_bonus > 0:
            loss = loss - config.entropy_bonus * (entropy * kept).sum() / max(num_kept_tokens, 1)
        forward.add(tokens=len(old))
        forward.record(
            batch,
            policy_logprobs=old,
            entropy=entropy,
            weights=mismatch.applied,
            is_truncated=mismatch.is_truncated,
            is_masked=mismatch.is_masked,
            is_clipped=token.is_clipped,
        )
        return loss

    def _step_critic(self, config: PpoConfig, minibatch: Sequence[int]) -> None:
        forward, critic = self.forward, self.critic
        assert critic
        num_tokens = max(sum(self._lengths[i] for i in minibatch), 1)
        units = [[i for i in group if self._lengths[i]] for group in self._groups(minibatch)]
        with critic.active():
            for batch, rows in forward.micro_batches([unit for unit in units if unit]):
                returns = forward.on_device(self._returns, rows)
                old_values = forward.on_device(self._values, rows)
                result = value_loss(
                    critic.values(batch), old_values, returns, clip=config.value_clip
                )
                (result.loss.sum() / num_tokens).backward()
                forward.add(
                    value_loss=result.loss.sum(),
                    value_clipped=result.is_clipped.sum(),
                    value_tokens=len(returns),
                    returns=returns.double().sum(),
                    squared_returns=returns.double().square().sum(),
                    squared_errors=(returns - old_values).double().square().sum(),
                )

    def statistics(self, seen: Seen) -> dict[str, float | None]:
        return {
            "reference_kl": seen.mean("reference_kl", "tokens"),
            "value_loss": seen.mean("value_loss", "value_tokens"),
            "value_clip_fraction": seen.mean("value_clipped", "value_tokens"),
            "explained_variance": _explained_variance(seen),
        }


def _explained_variance(seen: Seen) -> float | None:
    mean = seen.mean("returns", "value_tokens")
    square = seen.mean("squared_returns", "value_tokens")
    error = seen.mean("squared_errors", "value_tokens")
    if mean is None or square is None or error is None:
        return None
    variance = square - mean**2
    return 1 - error / variance if variance > 1e-12 else None
