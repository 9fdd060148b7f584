"""Layer inputs that go to pinned host memory and back on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

from services.trainer.learner.learner import Learner
from services.trainer.policy.offload import inputs_on_host
from services.trainer.policy.token_batch import Tree, collate
from tests.trainer.conftest import make_sample

NUM_SAMPLES, LENGTH = 16, 512


def test_they_come_back_as_they_left(
    learner: Learner, report: Callable[[str, object], None]
) -> None:
    """Three times, each from memory that the last one has freed."""
    policy = learner.policy
    samples = [
        make_sample(i, advantage=1.0, num_prompt=LENGTH // 2, num_completion=LENGTH // 2)
        for i in range(NUM_SAMPLES)
    ]
    trees = [Tree((i,), sample.length - 1) for i, sample in enumerate(samples)]
    batch = collate(samples, trees, layout=policy.layout).to(policy.device)
    parameters = learner.optimizer.parameters

    def gradient(*, parks: bool) -> tuple[torch.Tensor, float]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with inputs_on_host(policy.hidden_size) if parks else nullcontext():
            loss = policy.logprobs(batch).logprobs.sum()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        policy.model.zero_grad()
        return found, kept

    usual, usually_kept = gradient(parks=False)
    for _ in range(3):
        parked, kept = gradient(parks=True)
        assert (parked - usual).norm() < 1e-2 * usual.norm()
        inputs = 2 * policy.hidden_size * batch.input_ids.numel()
        num_layers = policy.model.config.num_hidden_layers
        assert usually_kept - kept > (num_layers - 3) * inputs
    report("bytes kept between the passes, on the device and parked", (usually_kept, kept))
