from __future__ import annotations

import math

import pytest
import torch

from services.trainer.algorithms.kl import KlEstimator, kl_estimate

LOG_2 = math.log(2)


@pytest.mark.parametrize(
    ("estimator", "twice_as_likely", "half_as_likely"),
    [
        ("k1", LOG_2, -LOG_2),
        ("k2", LOG_2**2 / 2, LOG_2**2 / 2),
        ("k3", 0.5 + LOG_2 - 1, 2 - LOG_2 - 1),
    ],
)
def test_estimates_of_a_token_twice_and_half_as_likely_as_under_the_reference(
    estimator: KlEstimator, twice_as_likely: float, half_as_likely: float
) -> None:
    policy = torch.tensor([-1.0 + LOG_2, -1.0 - LOG_2, -1.0])
    kl = kl_estimate(policy, torch.full((3,), -1.0), estimator=estimator)
    assert kl.tolist() == pytest.approx([twice_as_likely, half_as_likely, 0.0], abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_an_unbiased_estimate_averages_to_the_kl(estimator: KlEstimator) -> None:
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    estimates = kl_estimate(policy.log(), reference.log(), estimator=estimator)
    kl = (policy * (policy / reference).log()).sum()
    assert (policy * estimates).sum().item() == pytest.approx(kl.item())


def test_k3_of_a_token_that_the_policy_all_but_forbids_is_finite() -> None:
    kl = kl_estimate(torch.tensor([-200.0]), torch.tensor([-1.0]), estimator="k3")
    assert torch.isfinite(kl).all()
