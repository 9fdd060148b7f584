"""The losses and advantages are TRL's: loss, and gradient by every logprob, on random ragged
batches. `python -m tests.trainer.learner.test_parity` prints how far they are apart.

The loss of a step is put together from the pieces as services/trainer/learner/update.py does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor

from services.trainer.algorithms.dpo import preference_loss, ranked_pairs
from services.trainer.algorithms.grpo import decoupled_advantages, group_advantages
from services.trainer.algorithms.kl import kl_estimate
from services.trainer.algorithms.losses import (
    LOSSES,
    Loss,
    high_entropy_threshold,
    off_policy_mask,
    policy_token_loss,
    sample_weights,
)
from services.trainer.algorithms.mismatch import mismatch_weights
from services.trainer.algorithms.ppo import generalized_advantages, value_loss
from services.trainer.algorithms.reinforce import whiten
from services.trainer.algorithms.rloo import leave_one_out_advantages
from services.trainer.algorithms.rows import row_sums
from services.trainer.run_config import LossName
from tests.trainer.learner import trl_reference as trl
from tests.trainer.learner.trl_reference import Batch, random_batch

TOLERANCE = 1e-5  # of the largest value, in float32
SEEDS = range(3)
MAX_TOKENS = 64
GROUP_SIZE = 4
Level = Literal["token", "sequence"]
Mode = Literal["truncate", "mask"]
Scale = Literal["group", "batch", "none"]
LEVELS: tuple[Level, ...] = get_args(Level)
MODES: tuple[Mode, ...] = get_args(Mode)
SCALES: tuple[Scale, ...] = get_args(Scale)

# The losses of TRL that ours are, where the names differ.
TRL_NAMES: Mapping[str, str] = {"gspo": "grpo"}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value."""
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0
    return float((ours - theirs).abs().max() / theirs.abs().max())


def loss_error(batch: Batch, ours: Tensor, theirs: Tensor) -> float:
    """The larger error of two losses and of their gradients."""
    our_gradient, their_gradient = (
        torch.autograd.grad(loss, batch.policy_logprobs)[0] for loss in (ours, theirs)
    )
    return max(relative_error(ours, theirs), relative_error(our_gradient, their_gradient))


def step_loss(
    batch: Batch,
    loss: Loss,
    *,
    level: Literal["token", "sequence", "sequence_product"],
    kl_coefficient: float = 0.0,
    importance_weighted: bool = True,
    delta: float | None = None,
    top_entropy_fraction: float = 1.0,
    off_policy_threshold: float | None = None,
    correction: Tensor | None = None,
    num_update_tokens: int | None = None,
    num_minibatches: int = 1,
) -> Tensor:
    weights = sample_weights(
        batch.lengths,
        normalization=loss.normalization,
        num_update_tokens=num_update_tokens or sum(batch.lengths),
        num_minibatches=num_minibatches,
        max_tokens=MAX_TOKENS,
    )
    advantages = batch.advantages[batch.rows]
    rows = (batch.rows, batch.num_rows)
    token = policy_token_loss(
        batch.policy_logprobs,
        batch.old_logprobs,
        advantages,
        *rows,
        objective=loss.objective,
        ratio=level,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        delta=delta,
    )
    losses = token.loss
    if off_policy_threshold is not None:
        sampled = (batch.policy_logprobs, batch.sampler_logprobs)
        losses = losses * off_policy_mask(
            *sampled, advantages, *rows, threshold=off_policy_threshold
        )
    if top_entropy_fraction < 1:
        threshold = high_entropy_threshold(batch.entropies, top_entropy_fraction)
        losses = losses * (batch.entropies >= threshold)
    if correction is not None:
        losses = losses * correction
    if kl_coefficient:
        kl = kl_estimate(batch.policy_logprobs, batch.reference_logprobs, estimator="k3")
        losses = losses + kl_coefficient * (kl * token.ratio if importance_weighted else kl)
    return (torch.tensor(weights)[batch.rows] * losses).sum()


def trl_loss(batch: Batch, name: LossName, level: Level, **settings: object) -> Tensor:
    loss = LOSSES[name]
    return trl.grpo_loss(
        batch,
        loss_type=TRL_NAMES.get(name, name),
        level=level,
        epsilon_low=loss.clip_low,
        epsilon_high=loss.clip_high,
        max_completion_length=MAX_TOKENS,
        **settings,  # type: ignore[arg-type]
    )


# --- the cases: each measures the largest relative error ---------------------------------------


def policy_loss(name: LossName, level: Level) -> float:
    return max(
        loss_error(
            batch,
            step_loss(
                batch,
                LOSSES[name],
                level=level,
                kl_coefficient=beta,
                importance_weighted=weighted,
            ),
            trl_loss(batch, name, level, beta=beta, use_bias_correction_kl=weighted),
        )
        for batch in map(random_batch, SEEDS)
        for beta, weighted in ((0.0, True), (0.1, True), (0.1, False))
    )


def rloo_loss() -> float:
    """TRL adds the advantage of a masked completion to the loss, which has no gradient: it is 0."""
    errors = []
    for batch in map(random_batch, SEEDS):
        has_loss = torch.tensor(batch.lengths) > 0
        batch = replace(batch, advantages=batch.advantages * has_loss)
        ours = step_loss(batch, LOSSES["rloo"], level="sequence_product")
        errors.append(loss_error(batch, ours, trl.rloo_loss(batch, epsilon=0.2)))
    return max(errors)


def first_of_two_steps() -> float:
    """A step of an update of two steps, which has 700 tokens in all."""
    return max(
        loss_error(
            batch,
            step_loss(
                batch, LOSSES["dapo"], level="token", num_update_tokens=700, num_minibatches=2
            ),
            trl_loss(batch, "dapo", "token", num_items_in_batch=700, steps_per_generation=2),
        )
        for batch in map(random_batch, SEEDS)
    )


def upper_bound_of_bad_ratios() -> float:
    return max(
        loss_error(
            batch,
            step_loss(batch, LOSSES["dapo"], level="token", delta=1.4),
            trl_loss(batch, "dapo", "token", delta=1.4),
        )
        for batch in map(random_batch, SEEDS)
    )


def high_entropy_tokens() -> float:
    return max(
        loss_error(
            batch,
            step_loss(
                batch, LOSSES["dapo"], level="token", top_entropy_fraction=f, kl_coefficient=0.1
            ),
            trl_loss(batch, "dapo", "token", top_entropy_quantile=f, beta=0.1),
        )
        for batch in map(random_batch, SEEDS)
        for f in (0.2, 0.5)
    )


def off_policy_masking() -> float:
    return max(
        loss_error(
            batch,
            step_loss(
                batch, LOSSES["grpo"], level="token", off_policy_threshold=t, kl_coefficient=0.1
            ),
            trl_loss(batch, "grpo", "token", off_policy_mask_threshold=t, beta=0.1),
        )
        for batch in map(random_batch, SEEDS)
        for t in (0.0, 0.02)
    )


def importance_weighting(level: Level, mode: Mode) -> float:
    """Of the weights, and of a loss that is multiplied with them."""
    errors = []
    for batch in map(random_batch, SEEDS):
        for max_ratio, min_ratio in ((1.2, None), (1.3, 0.8)):
            ours = mismatch_weights(
                batch.old_logprobs,
                batch.sampler_logprobs,
                batch.rows,
                batch.num_rows,
                level=level,
                mode=mode,
                max_ratio=max_ratio,
                min_ratio=min_ratio,
            )
            theirs = trl.importance_weights(
                batch, mode=f"{level}_{mode}", max_ratio=max_ratio, min_ratio=min_ratio
            )
            their_tokens = theirs.expand(batch.num_rows, max(batch.lengths))[batch.mask.bool()]
            errors.append(relative_error(ours.applied, their_tokens))
            our_loss = step_loss(
                batch, LOSSES["dapo"], level="token", correction=ours.applied, kl_coefficient=0.1
            )
            their_loss = trl_loss(
                batch, "dapo", "token", importance_sampling_ratio=theirs, beta=0.1
            )
            errors.append(loss_error(batch, our_loss, their_loss))
    return max(errors)


def group_relative(scale: Scale) -> float:
    weights = (1.0, 0.5)
    errors = []
    for rewards in map(random_rewards, SEEDS):
        summed = (rewards * torch.tensor(weights)).sum(1)
        ours = group_advantages(groups(summed), scale=scale)
        theirs = trl.grpo_advantages(
            rewards,
            group_size=GROUP_SIZE,
            weights=weights,
            scale=scale,
            aggregation="sum_then_normalize",
        )
        errors.append(relative_error(torch.tensor(ours).flatten(), torch.tensor(theirs)))
    return max(errors)


def decoupled() -> float:
    errors = []
    for rewards in map(random_rewards, SEEDS):
        for weights in ((1.0, 1.0), (2.0, -0.5), (1.0, 0.0)):
            ours = decoupled_advantages(groups(rewards * torch.tensor(weights)), weights=weights)
            theirs = trl.grpo_advantages(
                rewards,
                group_size=GROUP_SIZE,
                weights=weights,
                scale="group",
                aggregation="normalize_then_sum",
            )
            errors.append(relative_error(torch.tensor(ours).flatten(), torch.tensor(theirs)))
    return max(errors)


def leave_one_out(*, beta: float, whiten: bool) -> float:
    errors = []
    for seed in SEEDS:
        batch, rewards = random_batch(seed), random_rewards(seed)[:, 0]
        kl = kl_estimate(batch.old_logprobs, batch.reference_logprobs, estimator="k1")
        penalized = rewards - beta * row_sums(kl, batch.rows, batch.num_rows)
        ours = leave_one_out_advantages(groups(penalized), whiten=whiten)
        theirs = trl.rloo_advantages(
            rewards, batch, group_size=GROUP_SIZE, beta=beta, normalize=whiten
        )
        errors.append(relative_error(torch.tensor(ours).flatten(), torch.tensor(theirs)))
    return max(errors)


def online_preference(loss: Literal["sigmoid", "ipo"]) -> float:
    errors = []
    for seed in SEEDS:
        batch, rewards = random_batch(seed), random_rewards(seed)[:, 0]
        half = batch.num_rows // 2
        pairs = ranked_pairs(rewards.view(2, half).T.tolist())
        order = [i + half * place for i, pair in enumerate(pairs) for place in pair or ()]
        ours = preference_loss(
            row_sums(batch.policy_logprobs, batch.rows, batch.num_rows)[order],
            row_sums(batch.reference_logprobs, batch.rows, batch.num_rows)[order],
            loss=loss,
            beta=0.1,
        ).loss.mean()
        theirs = trl.online_dpo_loss(batch, rewards, loss_type=loss, beta=0.1)
        errors.append(loss_error(batch, ours, theirs))
    return max(errors)


def estimated_advantages() -> float:
    """Against the sums of the papers, written out in float64."""
    errors = []
    for batch in map(random_batch, SEEDS):
        rewards, values = (
            [part for part in tensor.split(batch.lengths) if len(part)]
            for tensor in (batch.entropies, batch.old_logprobs)
        )
        ours, our_returns = generalized_advantages(rewards, values, discount=0.97, gae_lambda=0.9)
        theirs = [
            torch.tensor(_advantages_of_the_paper(r.tolist(), v.tolist(), 0.97, 0.9))
            for r, v in zip(rewards, values, strict=True)
        ]
        errors.append(relative_error(torch.cat(ours), torch.cat(theirs)))
        returns = torch.cat(theirs) + torch.cat(values)
        errors.append(relative_error(torch.cat(our_returns), returns))
    return max(errors)


def _advantages_of_the_paper(
    rewards: Sequence[float], values: Sequence[float], discount: float, gae_lambda: float
) -> list[float]:
    after = [*values[1:], 0.0]
    deltas = [r + discount * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [
        sum((discount * gae_lambda) ** (s - t) * deltas[s] for s in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


def critic_loss() -> float:
    """Against the formula of the paper's code, written out in float64."""
    errors = []
    for batch in map(random_batch, SEEDS):
        values, old, returns = batch.policy_logprobs, batch.old_logprobs, batch.reference_logprobs
        v, o, r = (tensor.double() for tensor in (values, old, returns))
        clipped = torch.min(torch.max(v, o - 0.2), o + 0.2)
        theirs = 0.5 * torch.max((v - r) ** 2, (clipped - r) ** 2).mean()
        ours = value_loss(values, old, returns, clip=0.2).loss.mean()
        errors.append(loss_error(batch, ours.double(), theirs))
    return max(errors)


def whitening() -> float:
    """Against (A - μ) / √(σ² + 1e-8) with the unbiased variance, in float64."""
    errors = []
    for batch in map(random_batch, SEEDS):
        parts = batch.entropies.split(batch.lengths)
        values = batch.entropies.double()
        theirs = (values - values.mean()) * torch.rsqrt(values.var(correction=1) + 1e-8)
        ours = whiten(parts, is_masked=[False] * len(parts))
        errors.append(relative_error(torch.cat(ours).double(), theirs))
    return max(errors)


def random_rewards(seed: int) -> Tensor:
    """[24, 2]: two rewards of 24 completions."""
    return torch.rand(24, 2, generator=torch.Generator().manual_seed(seed))


def groups(rewards: Tensor) -> list[list[Any]]:
    grouped: list[list[Any]] = rewards.unflatten(0, (-1, GROUP_SIZE)).tolist()
    return grouped


CASES: Mapping[str, Callable[[], float]] = {
    **{
        f"loss {name}, {level} ratio, KL 0 and 0.1": partial(policy_loss, name, level)
        for name in LOSSES
        if name != "rloo"
        for level in LEVELS
    },
    "loss rloo": rloo_loss,
    "loss dapo, one of two steps": first_of_two_steps,
    "loss dapo, bound on bad ratios (delta)": upper_bound_of_bad_ratios,
    "loss dapo, high-entropy tokens": high_entropy_tokens,
    "loss grpo, off-policy mask": off_policy_masking,
    **{
        f"importance weights, {level} {mode}": partial(importance_weighting, level, mode)
        for level in LEVELS
        for mode in MODES
    },
    **{f"advantages grpo, scale {scale}": partial(group_relative, scale) for scale in SCALES},
    "advantages grpo, normalize then sum": decoupled,
    "advantages rloo": partial(leave_one_out, beta=0.0, whiten=False),
    "advantages rloo, KL in the reward": partial(leave_one_out, beta=0.05, whiten=False),
    "advantages rloo, KL in the reward, whitened": partial(leave_one_out, beta=0.05, whiten=True),
    "loss online DPO, sigmoid": partial(online_preference, "sigmoid"),
    "loss online DPO, ipo": partial(online_preference, "ipo"),
    "advantages PPO (float64 reference)": estimated_advantages,
    "value loss PPO (float64 reference)": critic_loss,
    "whitening REINFORCE++ (float64 reference)": whitening,
}


def measured_parity() -> dict[str, float]:
    """The largest relative error of every case, of losses with their gradients."""
    return {case: measure() for case, measure in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_advantages_are_those_of_trl(case: str) -> None:
    assert CASES[case]() <= TOLERANCE


if __name__ == "__main__":
    print("| case | largest relative error |\n| --- | --- |")
    for case, error in measured_parity().items():
        print(f"| {case} | {error:.1e} |")
