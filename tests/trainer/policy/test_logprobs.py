"""The chunked head against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from services.trainer.policy.logprobs import token_logprobs


@pytest.mark.parametrize("chunk_positions", [1, 7, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_logprobs_entropy_and_gradient_are_those_of_the_tempered_softmax(
    chunk_positions: int, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=generator).requires_grad_()
    weight = torch.randn(11, 8, generator=generator)
    bias = torch.randn(11, generator=generator) if with_bias else None
    labels = torch.randint(11, (20,), generator=generator)
    temperatures = 0.5 + torch.rand(20, generator=generator)

    ours = token_logprobs(
        hidden, weight, labels, temperatures, head_bias=bias, chunk_positions=chunk_positions
    )
    scale_p, scale_h = torch.randn(2, 20, generator=generator)
    loss = (scale_p * ours.logprobs + scale_h * ours.entropy).sum()
    (our_gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)

    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    distribution = torch.distributions.Categorical(logits=logits / temperatures[:, None])
    expected = distribution.log_prob(labels)
    expected_loss = (scale_p * expected + scale_h * distribution.entropy()).sum()
    (expected_gradient,) = torch.autograd.grad(expected_loss, hidden, retain_graph=True)

    torch.testing.assert_close(ours.logprobs.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.entropy.double(), distribution.entropy(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_gradient, expected_gradient, atol=1e-5, rtol=1e-5)

    (alone,) = torch.autograd.grad(ours.logprobs.sum(), hidden)
    (expected_alone,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(alone, expected_alone, atol=1e-5, rtol=1e-5)
