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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from services.trainer.algorithms.dpo import preference_loss, ranked_pairs
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
from services.trainer.algorithms.rows import row_sums
from services.trainer.logprobs import TokenLogprobs
from services.trainer.run_config import (
    AlgorithmConfig,
    DpoConfig,
    GrpoConfig,
    GuardsConfig,
    OnlineDpoConfig,
    PolicyGradientConfig,
    PpoConfig,
    ReinforceConfig,
    RlooConfig,
)
from services.trainer.samples import (
    Sample,
    TokenBatch,
    Tree,
    collate,
    group_indices,
    make_trees,
    micro_batches,
)
from services.trainer.stats import (
    Columns,
    TokenRecords,
    UpdateStats,
    check_guards,
    join,
    peak_memory_bytes,
    update_stats,
)

if TYPE_CHECKING:
    from services.trainer.policy import Policy

# Nats. The first tokens of a group have one entropy but for rounding: all are kept, or none.
_ENTROPY_TIE = 1e-5
Scores = Mapping[int, Tensor]  # index of a sample -> numbers of its tokens, [R] on the CPU


def take_update(
    policy: Policy,
    samples: Sequence[Sample],
    algorithm: AlgorithmConfig,
    *,
    max_tokens_per_micro_batch: int,
    max_completion_tokens: int | None,
    reward_weights: Sequence[float],
    guards: GuardsConfig,
) -> UpdateStats:
    """Take the optimizer steps of one update; see Policy.update."""
    objective: Objective
    if isinstance(algorithm, OnlineDpoConfig | DpoConfig):
        forward = Forward(policy, _pairs(samples, algorithm), max_tokens_per_micro_batch)
        objective = Preferences(forward, algorithm)
    else:
        forward = Forward(policy, samples, max_tokens_per_micro_batch)
        objective = PolicyGradient(forward, algorithm, max_completion_tokens, reward_weights)
    progress = _Progress(policy, objective)
    minibatches = _minibatches(
        forward.samples, algorithm.num_minibatches, may_split=objective.may_split_groups
    )
    num_steps = algorithm.num_epochs * len(minibatches)
    objective.prepare(num_steps, num_minibatches=len(minibatches))
    ranks, optimizer = policy.ranks, policy.optimizer
    with optimizer.update(num_steps):
        for _ in range(algorithm.num_epochs):
            for minibatch in minibatches:
                objective.step(minibatch)
                seen = _Seen.of_all(ranks.gather(forward.take_seen()))
                check_guards(progress.stats([seen]), guards)
                progress.steps.append(seen)
                progress.grad_norms.append(optimizer.step(ranks))
    return progress.stats(progress.steps)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one optimizer step saw: its tokens, and sums over its micro-batches."""

    columns: Columns
    sums: Mapping[str, float]

    @classmethod
    def of_all(cls, parts: Sequence[_Seen]) -> _Seen:
        names = {name for part in parts for name in part.sums}
        sums = {name: sum(part.sums.get(name, 0.0) for part in parts) for name in names}
        return cls(join([part.columns for part in parts]), sums)


@dataclass(slots=True)
class _Progress:
    """The steps of an update that were taken so far."""

    policy: Policy
    objective: Objective
    started: float = field(default_factory=time.perf_counter)
    steps: list[_Seen] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    def stats(self, steps: Sequence[_Seen]) -> UpdateStats:
        seen = _Seen.of_all(steps)
        return update_stats(
            seen.columns,
            loss=_mean(seen.sums, "loss", "steps"),
            grad_norm=sum(self.grad_norms) / max(len(self.grad_norms), 1),
            learning_rate=self.policy.optimizer.learning_rate,
            seconds=time.perf_counter() - self.started,
            num_forward_tokens=int(seen.sums.get("positions", 0.0)),
            peak_memory_bytes=peak_memory_bytes(self.policy.device),
            **self.objective.means(seen.sums),
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


# --- forward ------------------------------------------------------------------------------------


class Forward:
    """The micro-batches of this rank, and what was seen in those of one optimizer step."""

    def __init__(self, policy: Policy, samples: Sequence[Sample], max_tokens: int) -> None:
        self.policy = policy
        self.samples = samples
        self.max_tokens = max_tokens
        self._records = TokenRecords()
        self._sums: dict[str, Tensor | float] = {}

    def micro_batches(
        self, units: Sequence[Sequence[int]], *, share: bool = True
    ) -> Iterator[tuple[TokenBatch, list[int]]]:
        """Batches of this rank's units, and the indices of their samples in the order of rows.

        The samples of a unit have one prompt. With `share` False a unit is a pair, which stays
        together and in its order.
        """
        policy = self.policy
        trees = self._trees(units, self.max_tokens)
        if (size := policy.ranks.size) > 1:  # a prompt shared by all of a group is work of one rank
            num_positions = sum(tree.num_positions for unit in trees for tree in unit)
            trees = self._trees(units, min(self.max_tokens, num_positions // size))
        whole = [[tree] for unit in trees for tree in unit] if share else trees
        mine = policy.ranks.share(whole, lambda unit: sum(tree.num_positions for tree in unit))
        for batch in micro_batches(mine, layout=policy.layout, max_tokens=self.max_tokens):
            tensors = collate(self.samples, batch, layout=policy.layout).to(policy.device)
            self.add(positions=sum(tree.num_positions for tree in batch))
            yield tensors, [index for tree in batch for index in tree.indices]

    def _trees(self, units: Sequence[Sequence[int]], max_tokens: int) -> list[list[Tree]]:
        return [
            make_trees(
                self.samples,
                unit,
                layout=self.policy.layout,
                max_tokens=max_tokens,
                hidden_size=self.policy.hidden_size,
            )
            for unit in units
        ]

    def score(
        self, indices: Sequence[int], compute: Callable[[TokenBatch], Tensor]
    ) -> dict[int, Tensor]:
        """What `compute` says of some samples, [..., N] of a batch -> [..., R] by sample; without a
        gradient, and on all ranks."""
        wanted = set(indices)
        units = [[i for i in group if i in wanted] for group in group_indices(self.samples)]
        mine: dict[int, Tensor] = {}
        with torch.no_grad():
            for batch, rows in self.micro_batches([unit for unit in units if unit]):
                parts = compute(batch).cpu().split([self.samples[i].num_tokens for i in rows], -1)
                # A view would carry its whole batch to the other ranks.
                mine.update((i, part.clone()) for i, part in zip(rows, parts, strict=True))
        return {i: part for scores in self.policy.ranks.gather(mine) for i, part in scores.items()}

    def old(self, indices: Sequence[int]) -> tuple[Scores, Scores]:
        """Logprobs and entropies under the policy before the update."""
        both = self.score(indices, lambda batch: torch.stack(self.policy.logprobs(batch)))
        return {i: b[0] for i, b in both.items()}, {i: b[1] for i, b in both.items()}

    def reference(self, indices: Sequence[int]) -> Scores:
        """Logprobs under the reference: the policy with its adapter off."""
        with self.policy.adapter_disabled():
            return self.score(indices, lambda batch: self.policy.logprobs(batch).logprobs)

    def on_device(self, scores: Scores, rows: Sequence[int]) -> Tensor:
        """[N] of the samples of a batch."""
        return torch.cat([scores[index] for index in rows]).to(self.policy.device)

    def record(self, batch: TokenBatch, **tokens: Tensor) -> None:
        self._records.add(
            sampler_logprobs=batch.sampler_logprobs,
            staleness=batch.staleness,
            rows=batch.rows,
            num_rows=batch.num_rows,
            **tokens,
        )

    def add(self, **sums: Tensor | float) -> None:
        for name, value in sums.items():
            detached = value.detach() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + detached

    def take_seen(self) -> _Seen:
        """What this rank has seen since the last call."""
        self.add(steps=1.0 / self.policy.ranks.size)
        seen = _Seen(self._records.columns(), {k: float(v) for k, v in self._sums.items()})
        self._records, self._sums = TokenRecords(), {}
        return seen


class Objective(Protocol):
    """What an algorithm adds: scores before the first step, and the gradient of every step."""

    may_split_groups: ClassVar[bool]

    def prepare(self, num_steps: int, *, num_minibatches: int) -> None:
        """`num_steps` optimizer steps are to come, in passes of `num_minibatches`."""
        ...

    def step(self, minibatch: Sequence[int]) -> None:
        """Accumulate the gradient of one optimizer step over some samples."""
        ...

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The numbers of UpdateStats that only this objective has."""
        ...


def _mean(sums: Mapping[str, float], name: str, count: str) -> float:
    return sums.get(name, 0.0) / max(sums.get(count, 0.0), 1.0)


# --- policy gradient ----------------------------------------------------------------------------


@dataclass(slots=True)
class PolicyGradient:
    """GRPO, RLOO, REINFORCE++ and PPO: advantages differ, the loss is one of losses.py."""

    forward: Forward
    config: PolicyGradientConfig
    max_completion_tokens: int | None
    reward_weights: Sequence[float]
    _old: Scores = field(default_factory=dict)  # empty: the policy that computes is the old one
    _entropy: Scores = field(default_factory=dict)
    _reference: Scores = field(default_factory=dict)
    _advantages: Scores = field(default_factory=dict)
    _values: Scores = field(default_factory=dict)
    _returns: Scores = field(default_factory=dict)
    _lengths: Sequence[int] = ()  # loss tokens by sample
    _num_minibatches: int = 1
    may_split_groups: ClassVar[bool] = True

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
            critic = forward.policy.critic
            assert critic, "the run was started for another algorithm"
            with critic.active():
                self._values = forward.score(range(len(samples)), critic.values)
        self._advantages = self._make_advantages()
        active = [i for i in with_loss if self._is_active(i)]
        if config.top_entropy_fraction < 1:  # a share of all tokens of a step
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
        weights: Scores,
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
        forward, critic = self.forward, self.forward.policy.critic
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

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        mean_return = _mean(sums, "returns", "value_tokens")
        variance = _mean(sums, "squared_returns", "value_tokens") - mean_return**2
        error = _mean(sums, "squared_errors", "value_tokens")
        return {
            "reference_kl": _mean(sums, "reference_kl", "tokens"),
            "value_loss": _mean(sums, "value_loss", "value_tokens"),
            "value_clip_fraction": _mean(sums, "value_clipped", "value_tokens"),
            "explained_variance": 1 - error / variance if variance > 1e-12 else 0.0,
        }


# --- preferences --------------------------------------------------------------------------------


def _pairs(samples: Sequence[Sample], config: OnlineDpoConfig | DpoConfig) -> list[Sample]:
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
    """Online and offline DPO. The samples are pairs: chosen, rejected, chosen, ..."""

    forward: Forward
    config: OnlineDpoConfig | DpoConfig
    _old: Scores = field(default_factory=dict)  # empty: nothing to compare with, or no other policy
    _reference: Scores = field(default_factory=dict)
    may_split_groups: ClassVar[bool] = False

    def prepare(self, num_steps: int, *, num_minibatches: int) -> None:
        samples = self.forward.samples
        self._reference = self.forward.reference(range(len(samples)))
        if num_steps > 1 and any(sample.sampler_logprobs for sample in samples):
            self._old, _ = self.forward.old(range(len(samples)))

    def step(self, minibatch: Sequence[int]) -> None:
        forward, num_pairs = self.forward, len(minibatch) // 2
        pairs = [minibatch[k : k + 2] for k in range(0, len(minibatch), 2)]
        for batch, rows in forward.micro_batches(pairs, share=False):
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

    def means(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {
            "reference_kl": _mean(sums, "reference_kl", "tokens"),
            "preference_accuracy": _mean(sums, "accurate", "pairs"),
            "preference_margin": _mean(sums, "margin", "pairs"),
        }
