"""An update on two GPUs over NCCL computes what one GPU computes.

The test starts this file under torchrun, for `main`.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.trainer.learner.learner import Learner
from services.trainer.policy.policy import Policy
from services.trainer.run_config import OptimizerConfig
from shared.schemas import PolicyId
from tests.gpu import machine
from tests.gpu.conftest import LORA
from tests.gpu.replicas import TRAINED, lora_tensors
from tests.trainer.conftest import NO_GUARDS, PLAIN, make_sample
from tests.trainer.policy.test_ranks import torchrun

VERSION_1 = PolicyId(run_id="test", version=1)
NUM_SAMPLES, MAX_TOKENS = 64, 512  # several micro-batches for each rank


@dataclass(frozen=True, slots=True)
class Update:
    gradient: Tensor  # float32, the sum over ranks
    loss: float
    grad_norm: float


def update(learner: Learner) -> Update:
    """Of a policy whose adapter is not fresh: neither half of its gradient is 0."""
    learner.start(VERSION_1, LORA, OptimizerConfig(warmup_steps=0), seed=0)
    snapshot = learner.snapshot()
    shapes = {name: tuple(tensor.shape) for name, tensor in snapshot.lora.items()}
    lora = lora_tensors(shapes, LORA.scaling, seed=1, strength=TRAINED)
    floats = {name: tensor.float() for name, tensor in lora.items()}
    learner.restore(VERSION_1, dataclasses.replace(snapshot, lora=floats))
    gradients: list[Tensor] = []
    add_gradients = learner.ranks.add_gradients

    def add_and_look(parameters: Sequence[Tensor]) -> None:
        add_gradients(parameters)
        gradients.extend(p.grad.flatten().float().cpu() for p in parameters if p.grad is not None)

    learner.ranks.add_gradients = add_and_look  # type: ignore[method-assign]
    samples = [
        make_sample(
            i,
            advantage=1.0 if i % 3 else -1.0,
            num_prompt=8 + i % 50,
            num_completion=8 + 7 * i % 90,
        )
        for i in range(NUM_SAMPLES)
    ]
    stats = learner.update(samples, PLAIN, max_tokens_per_micro_batch=MAX_TOKENS, guards=NO_GUARDS)
    return Update(torch.cat(gradients), stats.loss, stats.grad_norm)


def main(checkpoint: str, device: str, results: str) -> None:
    """Both ranks; the first writes what came out."""
    learner = Learner(Policy.load(checkpoint, device=device))
    if learner.ranks.rank == 0:
        torch.save(dataclasses.asdict(update(learner)), results)
        return
    while learner.ranks.obey(learner):
        pass


@pytest.mark.skipif(machine.num_gpus() < 2, reason="needs two GPUs")
def test_two_gpus_compute_the_gradient_of_one(wide_checkpoint: Path, tmp_path: Path) -> None:
    results = tmp_path / "update.pt"
    ended = subprocess.run(
        [*torchrun("tests.gpu.test_data_parallel"), wide_checkpoint, machine.DEVICE, results],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert results.exists(), ended.stdout
    two = Update(**torch.load(results))
    one = update(Learner(Policy.load(str(wide_checkpoint), device=machine.DEVICE)))
    # bf16 in micro-batches that are cut otherwise.
    assert (two.gradient - one.gradient).norm() <= 0.02 * one.gradient.norm()
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=0.02)
    assert two.loss == pytest.approx(one.loss, rel=0.02)


if __name__ == "__main__":
    main(*sys.argv[1:])
