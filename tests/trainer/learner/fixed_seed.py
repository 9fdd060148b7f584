"""What fixed seeds make of three updates: `python -m tests.trainer.learner.fixed_seed`.

    start ─▶ update ─▶ update ─▶ snapshot ─▶ update ─▶ other seed, restore ─▶ the same update again

Prints for every algorithm the losses, and the digests of the trained parameters and of the adapter
file after the third update. A change that must not alter numbers prints, on the same machine, what
the commit before it prints.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from services.trainer.learner.learner import Learner
from services.trainer.policy.policy import Policy
from services.trainer.policy.samples import Sample
from services.trainer.run_config import AlgorithmConfig, LoraConfig, OptimizerConfig
from tests.conftest import save_tiny_checkpoint
from tests.trainer.conftest import NO_GUARDS, VERSION_0, make_sample
from tests.trainer.learner.test_update import ALGORITHMS

_ADVANTAGES = (1.0, -0.5, 0.0, 0.7, -1.2, 0.0, 0.3, -0.3)


def batch(number: int) -> list[Sample]:
    """Four groups of two completions, of different lengths."""
    return [
        make_sample(
            100 * number + index,
            advantage=advantage,
            num_completion=2 + 3 * (index % 3),
            group=group,
        )
        for index, advantage in enumerate(_ADVANTAGES)
        for group in [index // 2]
    ]


def start(learner: Learner, algorithm: AlgorithmConfig, *, seed: int) -> None:
    lora, optimizer = LoraConfig(rank=8), OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
    learner.start(VERSION_0, lora, optimizer, seed=seed, algorithm=algorithm)


def update(learner: Learner, algorithm: AlgorithmConfig, number: int) -> str:
    stats = learner.update(
        batch(number), algorithm, max_tokens_per_micro_batch=64, guards=NO_GUARDS
    )
    return f"{stats.loss:.12e}"


def digests(learner: Learner) -> str:
    weights = hashlib.sha256()
    for parameter in learner.optimizer.parameters:
        weights.update(parameter.detach().numpy().tobytes())
    adapter = hashlib.sha256(learner.policy.publish().content)
    return f"weights {weights.hexdigest()[:16]} adapter {adapter.hexdigest()[:16]}"


def lines(learner: Learner, name: str, algorithm: AlgorithmConfig) -> Iterator[str]:
    start(learner, algorithm, seed=0)
    losses = [update(learner, algorithm, number) for number in (0, 1)]
    policy_id, snapshot = learner.policy.id, learner.snapshot()
    losses.append(update(learner, algorithm, 2))
    yield f"{name}: losses {' '.join(losses)} {digests(learner)}"
    start(learner, algorithm, seed=1)
    learner.restore(policy_id, snapshot)
    yield f"{name}, restored: loss {update(learner, algorithm, 2)} {digests(learner)}"


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "tiny"
        save_tiny_checkpoint(checkpoint)
        learner = Learner(Policy.load(str(checkpoint), device="cpu"))
        for name, algorithm in ALGORITHMS.items():
            # In the first optimizer step every ratio is 1, and most losses have the same gradient.
            two_steps = algorithm.model_copy(update={"num_minibatches": 2})
            for line in lines(learner, name, two_steps):
                print(line, flush=True)


if __name__ == "__main__":
    main()
