"""Facts of the policy losses that can be checked by hand; test_parity.py has them against TRL's."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from services.trainer.algorithms.losses import (
    LOSSES,
    Normalization,
    TokenLoss,
    high_entropy_threshold,
    off_policy_mask,
    policy_token_loss,
    sample_weights,
)
from services.trainer.run_config import LossName


def test_every_loss_of_the_config_is_there() -> None:
    assert set(LOSSES) == set(get_args(LossName))


# --- weights of tokens ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("update_tokens", [1 / 5, 0.0, 1 / 5]),  # 10 tokens over 2 steps
        ("step_tokens", [1 / 4, 0.0, 1 / 4]),
        ("sequence_mean", [1 / 3, 0.0, 1 / 9]),
        ("sequence_sum", [1 / 3, 0.0, 1 / 3]),
        ("constant", [1 / 24, 0.0, 1 / 24]),
    ],
)
def test_a_masked_sample_weighs_nothing_and_is_still_a_row(
    normalization: Normalization, expected: list[float]
) -> None:
    weights = sample_weights(
        [1, 0, 3],
        normalization=normalization,
        num_update_tokens=10,
        num_minibatches=2,
        max_tokens=8,
    )
    assert weights == pytest.approx(expected)


@pytest.mark.parametrize("normalization", get_args(Normalization))
def test_a_step_of_masked_samples_has_no_weight(normalization: Normalization) -> None:
    weights = sample_weights(
        [0, 0], normalization=normalization, num_update_tokens=0, num_minibatches=1, max_tokens=8
    )
    assert weights == [0.0, 0.0]


# --- losses of tokens -------------------------------------------------------------------------


# One token each: ratio π/π_old, advantage, and what min(ρA, clip(ρ)A) is, clipped to [0.8, 1.28].
@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "has_gradient"),
    [
        (1.0, 2.0, 2.0, True),
        (1.5, 2.0, 2.56, False),  # too far up for a good token
        (0.5, 2.0, 1.0, True),  # a good token that became unlikely is pulled back
        (0.5, -2.0, -1.6, False),  # too far down for a bad token
        (1.5, -2.0, -3.0, True),  # a bad token that became likely is pushed down
    ],
)
def test_the_clip_stops_only_gains(
    ratio: float, advantage: float, gain: float, has_gradient: bool
) -> None:
    result, gradient = _one_token("dapo", ratio, advantage)
    assert result.loss.item() == pytest.approx(-gain)
    assert bool(gradient) is has_gradient
    assert result.is_clipped.item() is not has_gradient


@pytest.mark.parametrize(("ratio", "is_clipped"), [(3.9, False), (4.1, True)])
def test_delta_bounds_the_ratio_of_a_bad_token(ratio: float, is_clipped: bool) -> None:
    result, gradient = _one_token("dapo", ratio, -1.0, delta=4.0)
    assert result.loss.item() == pytest.approx(min(ratio, 4.0))
    assert result.is_clipped.item() is is_clipped
    assert bool(gradient) is not is_clipped


@pytest.mark.parametrize(("ratio", "factor"), [(0.1, 0.1), (3.0, 3.0), (9.0, 5.0)])
def test_cispo_weighs_the_gradient_of_every_token_with_its_bounded_ratio(
    ratio: float, factor: float
) -> None:
    result, gradient = _one_token("cispo", ratio, 2.0)
    assert gradient == pytest.approx(-2 * factor)
    assert result.is_clipped.item() is (factor < ratio)


def test_sapo_has_the_policy_gradient_on_policy_and_less_of_it_away_from_there() -> None:
    on_policy, near, far = (_one_token("sapo", ratio, 1.0)[1] for ratio in (1.0, 1.5, 3.0))
    assert on_policy == pytest.approx(-1.0)
    assert near / 1.5 > on_policy  # the gradient by the ratio, which falls on both sides
    assert abs(far / 3.0) < abs(near / 1.5)


def test_sapo_forgets_bad_tokens_sooner() -> None:
    good, bad = (_one_token("sapo", 2.0, advantage)[1] for advantage in (1.0, -1.0))
    assert abs(bad) < abs(good)


@pytest.mark.parametrize("name", ["gspo", "luspo", "rloo"])
def test_a_sequence_loss_gives_all_tokens_of_a_row_one_loss(name: LossName) -> None:
    loss = LOSSES[name]
    result = policy_token_loss(
        torch.tensor([-1.0, -2.0, -3.0]),
        torch.tensor([-1.0, -2.0001, -3.0001]),
        torch.tensor([1.0, 1.0, -1.0]),
        torch.tensor([0, 0, 1]),
        2,
        objective=loss.objective,
        ratio=loss.ratio,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
    )
    assert result.loss[0] == result.loss[1]
    assert result.loss[0] == pytest.approx(-1.0, abs=1e-3)


def test_on_policy_every_clipped_loss_has_the_policy_gradient() -> None:
    for name in ("dapo", "grpo", "bnpo", "dr_grpo", "gspo", "luspo", "cispo", "rloo", "sapo"):
        assert _one_token(name, 1.0, 0.7)[1] == pytest.approx(-0.7)


def _one_token(
    name: LossName, ratio: float, advantage: float, *, delta: float | None = None
) -> tuple[TokenLoss, float]:
    """The loss of one token, and its gradient by the policy's logprob."""
    loss = LOSSES[name]
    old = torch.tensor([-2.0])
    policy = (old + math.log(ratio)).requires_grad_()
    result = policy_token_loss(
        policy,
        old,
        torch.tensor([advantage]),
        torch.tensor([0]),
        1,
        objective=loss.objective,
        ratio=loss.ratio,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        delta=delta,
    )
    (gradient,) = torch.autograd.grad(result.loss.sum(), policy)
    return result, gradient.item()


# --- masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "threshold"), [(1.0, 1.0), (0.5, 3.0), (0.25, 4.0), (0.2, 4.2)]
)
def test_the_threshold_is_the_entropy_that_the_fraction_reaches(
    fraction: float, threshold: float
) -> None:
    entropies = torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])
    assert high_entropy_threshold(entropies, fraction) == pytest.approx(threshold, abs=2e-5)


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_quantile_of_torch(seed: int) -> None:
    entropies = torch.rand(997, generator=torch.Generator().manual_seed(seed))
    for fraction in (0.05, 0.2, 0.8):
        expected = torch.quantile(entropies, 1 - fraction).item()
        assert high_entropy_threshold(entropies, fraction) == pytest.approx(expected, abs=2e-5)


def test_the_off_policy_mask_drops_bad_tokens_of_rows_that_the_policy_left() -> None:
    """Rows: bad and left by 0.6 nats a token; good and left; bad and near."""
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    sampler = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    policy = torch.tensor([-2.0, -1.2, -2.0, -1.2, -1.1, -1.1])
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    kept = off_policy_mask(policy, sampler, advantages, rows, 3, threshold=0.5)
    assert kept.tolist() == [False, False, True, True, True, True]


def test_a_token_that_the_sampler_could_not_score_is_no_gap() -> None:
    rows, bad = torch.zeros(2, dtype=torch.int64), torch.tensor([-1.0, -1.0])
    kept = off_policy_mask(
        torch.tensor([-1.4, -9.0]), torch.tensor([-1.0, torch.nan]), bad, rows, 1, threshold=0.5
    )
    assert kept.tolist() == [True, True]
