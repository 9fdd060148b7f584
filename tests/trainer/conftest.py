"""A real QLoRA policy on the tiny checkpoint, and samples to train it on."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from services.tokens import PromptEncoder
from services.trainer.learner.learner import Learner
from services.trainer.policy.policy import Policy
from services.trainer.policy.ranks import Ranks
from services.trainer.policy.samples import Sample
from services.trainer.run_config import GuardsConfig, LoraConfig, OptimizerConfig, ReinforceConfig
from shared.model_folder import base_identity
from shared.schemas import PolicyId, UpdateStats

VERSION_0 = PolicyId(run_id="test", version=0)


@pytest.fixture(scope="session")
def loaded_learner(tiny_checkpoint: Path) -> Learner:
    return Learner(Policy.load(str(tiny_checkpoint), device="cpu"))


@pytest.fixture
def learner(loaded_learner: Learner) -> Learner:
    """Version 0 of a run with a fresh rank-8 adapter."""
    loaded_learner.start(
        VERSION_0,
        LoraConfig(rank=8, alpha=16),
        OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
        seed=0,
    )
    return loaded_learner


@pytest.fixture
def policy(learner: Learner) -> Policy:
    """The policy of `learner`."""
    return learner.policy


# The advantage of a token is the reward of its completion: tests choose them freely.
PLAIN = ReinforceConfig(whiten_advantages=False)
NO_GUARDS = GuardsConfig(
    max_sampler_kl=None, min_sequence_ess=None, max_masked_fraction=None, max_handshake_kl=None
)


def make_sample(
    seed: int,
    *,
    advantage: float,
    num_prompt: int = 5,
    num_completion: int = 4,
    lag: int = 0,
    group: int | None = None,
) -> Sample:
    """A random completion with `advantage` under PLAIN; its prompt is that of its group."""
    group = seed if group is None else group
    prompts, rng = random.Random(f"prompt {group}"), random.Random(seed)
    return Sample(
        prompt_token_ids=tuple(prompts.randrange(3, 16) for _ in range(num_prompt)),
        token_ids=tuple(rng.randrange(3, 16) for _ in range(num_completion)),
        sampler_logprobs=tuple(-3 * rng.random() for _ in range(num_completion)),
        staleness=(lag,) * num_completion,
        temperature=1.0,
        group=group,
        rewards=(advantage,),
        is_truncated=False,
    )


def float32_policy(checkpoint: Path, ranks: Ranks | None = None) -> Policy:
    """The same model without quantization and rounding, where equal means equal to 1e-5."""
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return Policy(
        model.requires_grad_(False),
        PromptEncoder.load(checkpoint),
        base_identity(checkpoint, None),
        torch.device("cpu"),
        ranks=ranks,
    )


def repeatable(stats: UpdateStats) -> UpdateStats:
    """Without what depends on the machine."""
    return stats.model_copy(update={"update_tokens_per_s": 0.0, "peak_memory_bytes": 0})


@pytest.fixture
def samples() -> list[Sample]:
    """Eight samples of different lengths; two of them without advantage."""
    advantages = (1.0, -0.5, 0.0, 0.7, -1.2, 0.0, 0.3, -0.3)
    return [
        make_sample(i, advantage=a, num_prompt=3 + i, num_completion=2 + 3 * (i % 3))
        for i, a in enumerate(advantages)
    ]


@contextmanager
def no_file_longer_than(num_bytes: int) -> Iterator[None]:
    """A disk that takes no more, as a process sees it: a write fails with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
