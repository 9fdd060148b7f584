"""What an update computes otherwise on CUDA, against what defines it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from services.trainer.policy import logprobs, lora
from tests.trainer.policy.test_lora import Layer, computed

VOCABULARY = 151_936


@pytest.fixture
def head_kernels() -> ModuleType:
    """Needs Triton, which comes with torch for CUDA alone."""
    from services.trainer.policy import head_kernels

    return head_kernels


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 4_097, 11])
def test_the_softmax_in_one_pass_is_the_softmax(head_kernels: ModuleType, vocabulary: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    logits = 6 * draw(100, vocabulary)
    labels = torch.randint(vocabulary, (100,), generator=generator, device="cuda")
    temperatures = 0.5 + draw(100).abs()
    logprob, entropy, log_sum = head_kernels.softmax_statistics(logits, labels, temperatures)
    exact = torch.distributions.Categorical(logits=logits.double() / temperatures[:, None])
    torch.testing.assert_close(logprob.double(), exact.log_prob(labels), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), exact.entropy(), atol=1e-5, rtol=1e-5)

    grads = draw(2, 100)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8)):
        gradient = head_kernels.logits_gradient(
            logits, labels, temperatures, log_sum, entropy, *grads, dtype=dtype
        )
        defined = logprobs.logits_gradient(logits.clone(), labels, temperatures, entropy, *grads)
        torch.testing.assert_close(gradient.float(), defined, atol=1e-5, rtol=tolerance)


def test_a_logit_that_is_not_finite_is_not_hidden(head_kernels: ModuleType) -> None:
    logits = torch.zeros(2, 5000, device="cuda")
    logits[1, 4999] = torch.nan
    labels, temperatures = torch.zeros(2, dtype=torch.int64).cuda(), torch.ones(2).cuda()
    for result in head_kernels.softmax_statistics(logits, labels, temperatures):
        assert result.isfinite().tolist() == [True, False]


def test_a_label_outside_of_the_vocabulary_has_no_logprob(head_kernels: ModuleType) -> None:
    logits, temperatures = torch.zeros(3, 11, device="cuda"), torch.ones(3, device="cuda")
    labels = torch.tensor([-1, 10, 11], device="cuda")
    logprobs, entropies, _ = head_kernels.softmax_statistics(logits, labels, temperatures)
    assert logprobs.isfinite().tolist() == [False, True, False]
    assert entropies.isfinite().all()


@pytest.mark.parametrize(("num_in", "num_out"), [(256, 1024), (1024, 256)])
def test_a_joined_product_rounds_no_more_than_the_sum_of_two(
    monkeypatch: pytest.MonkeyPatch, num_in: int, num_out: int
) -> None:
    """Each within what bfloat16 leaves of the result in float32."""
    torch.manual_seed(0)
    layer = Layer(num_in, num_out, 2.0, torch.bfloat16)
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        module.cuda()
    x = torch.randn(3, 64, num_in, device="cuda", dtype=torch.bfloat16).requires_grad_()
    errors = []
    for joins in (True, False):
        monkeypatch.setattr(lora, "_is_faster_joined", lambda *_, joins=joins: joins)
        found = computed(layer, x)
        layer.base_layer.float()
        exact = computed(layer, x.detach().float().requires_grad_())
        layer.base_layer.bfloat16()
        errors.append(
            [(f.float() - e).norm() / e.norm() for f, e in zip(found, exact, strict=True)]
        )
    for joined, summed in zip(*errors, strict=True):
        assert joined < max(1.1 * summed, 4e-3)
