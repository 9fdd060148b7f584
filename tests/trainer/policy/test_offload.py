"""Layer inputs that wait in host memory: the same gradient, and nothing of them on the device."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from services.trainer.learner.learner import Learner
from services.trainer.policy.offload import inputs_on_host
from services.trainer.policy.samples import Sample
from services.trainer.policy.token_batch import Tree, collate
from tests.trainer.conftest import make_sample


@pytest.fixture
def samples() -> list[Sample]:
    return [make_sample(seed, advantage=1.0) for seed in range(3)]


class Passes:
    """A forward and a backward pass, and what is left of the layers' inputs between them."""

    def __init__(
        self, learner: Learner, samples: list[Sample], inside: AbstractContextManager[None]
    ) -> None:
        trees = [Tree((i,), sample.length - 1) for i, sample in enumerate(samples)]
        batch = collate(samples, trees, layout="padded")
        inputs: list[weakref.ref[Tensor]] = []
        layers = learner.policy.model.get_base_model().get_decoder().layers
        handles = [
            layer.register_forward_pre_hook(
                lambda _, arguments: inputs.append(weakref.ref(arguments[0]))
            )
            for layer in layers
        ]
        with inside:
            loss = learner.policy.logprobs(batch).logprobs.sum()
        for handle in handles:
            handle.remove()
        self.num_layers = len(layers)
        self.num_kept = sum(reference() is not None for reference in inputs)
        loss.backward()
        parameters = learner.optimizer.parameters
        self.gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        learner.policy.model.zero_grad()


@pytest.fixture
def trained(learner: Learner) -> Learner:
    """B is not zero: every LoRA weight has a gradient."""
    generator = torch.Generator().manual_seed(0)
    for parameter in learner.optimizer.parameters:
        parameter.data.normal_(std=0.02, generator=generator)
    return learner


def test_the_gradient_is_the_same_and_all_inputs_but_the_first_leave(
    trained: Learner, samples: list[Sample]
) -> None:
    usual = Passes(trained, samples, nullcontext())
    parked = Passes(trained, samples, inputs_on_host(trained.policy.hidden_size, min_bytes=0))
    torch.testing.assert_close(parked.gradient, usual.gradient, atol=0, rtol=0)
    assert usual.num_kept == usual.num_layers
    assert parked.num_kept == 1  # the first layer's, a leaf of the graph


def test_what_is_small_or_of_another_width_stays_where_it_is(
    trained: Learner, samples: list[Sample]
) -> None:
    width = trained.policy.hidden_size
    small = Passes(trained, samples, inputs_on_host(width))
    other = Passes(trained, samples, inputs_on_host(width + 1, min_bytes=0))
    assert small.num_kept == other.num_kept == small.num_layers
