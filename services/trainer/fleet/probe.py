"""The probe that every replica of a run scores, and a synthetic adapter with a strong effect.

make_probe()  prompts ─▶ sequences ─▶ base logprobs ─▶ synthetic adapter ─▶ Probe
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from itertools import chain

import torch

from services.trainer.fleet.conformance import Logprobs, Probe, distance
from services.trainer.policy.adapter import PublishedAdapter
from services.trainer.policy.policy import Policy
from services.trainer.run_config import ConformanceConfig
from shared.schemas import PolicyId

_POOL_PROMPTS = 256  # Prompts whose tokens are drawn to fill the sequences.


_EFFECTS = (0.5, 2.0)  # Wanted effect of the synthetic adapter, in nats.


_MAX_STRENGTH = 2.0  # Largest ratio of the adapter's output to its input; effects saturate before.


_MAX_TRIALS = 16


def make_probe(
    policy: Policy, prompts: Sequence[Sequence[int]], config: ConformanceConfig, *, seed: int
) -> Probe:
    """The probe of a run that `policy` has started. Takes several forward passes."""
    sequences = probe_sequences(
        prompts or [policy.encoder.encode("")],
        policy.encoder.ordinary_token_ids,
        num_sequences=config.num_sequences,
        num_tokens=min(config.num_tokens, policy.max_positions - 1),
        seed=seed,
    )
    base_logprobs = policy.score(sequences, base=True)
    synthetic = _synthetic_adapter(policy, sequences, base_logprobs, seed=seed)
    return Probe(sequences, base_logprobs, synthetic)


def probe_sequences(
    prompts: Sequence[Sequence[int]],
    vocabulary: Sequence[int],
    *,
    num_sequences: int,
    num_tokens: int,
    seed: int,
) -> tuple[tuple[int, ...], ...]:
    """Prompts, each followed by tokens of other prompts: where a trained adapter acts.

    A long prompt keeps its first token, without which some models break down, and its last ones.
    Where prompts have no ordinary tokens, tokens of the vocabulary follow. Deterministic.
    """
    rng, num_last = random.Random(f"probe/{seed}"), num_tokens // 2 - 1
    sample = rng.sample(prompts, min(len(prompts), max(num_sequences, _POOL_PROMPTS)))
    ordinary = set(vocabulary)
    pool = [token for token in chain.from_iterable(sample) if token in ordinary] or vocabulary
    sequences = []
    for index in range(num_sequences):
        prompt = sample[index % len(sample)]
        start = (*prompt[:1], *prompt[1:][-num_last:])
        sequences.append((*start, *rng.choices(pool, k=num_tokens - len(start))))
    return tuple(sequences)


def _synthetic_adapter(
    policy: Policy, sequences: Sequence[Sequence[int]], base_logprobs: Logprobs, *, seed: int
) -> PublishedAdapter:
    """A random adapter with an effect of about 1 nat, or the strongest for a base that bends
    less."""
    name = hashlib.sha256(f"{policy.id.run_id}.{policy.id.incarnation}/{seed}".encode()).hexdigest()
    policy_id = PolicyId(run_id=f"probe-{name[:16]}", version=1)
    low, high = _EFFECTS
    strength, too_weak, too_strong = _MAX_STRENGTH / 8, 0.0, math.inf
    for _ in range(_MAX_TRIALS):
        tensors = _random_lora(policy, strength, seed=seed)
        with policy.replaced_lora(tensors):
            logprobs = policy.score(sequences)
            effect = distance(logprobs, base_logprobs)
            if low <= effect <= high or (effect < low and strength >= _MAX_STRENGTH):
                return policy.export(policy_id, logprobs)
        if effect < low:
            too_weak, strength = strength, min(2 * strength, math.sqrt(strength * too_strong))
        else:
            too_strong, strength = strength, max(strength / 2, math.sqrt(strength * too_weak))
    raise ValueError(
        f"no random adapter moves the logprobs of this base by {low:g} to {high:g} nats (the last "
        f"one by {effect:.3g}): its weights cannot be right, check the model"
    )


def _random_lora(policy: Policy, strength: float, *, seed: int) -> dict[str, torch.Tensor]:
    """LoRA tensors with |scaling · B · A · x| ≈ strength · |x| in every module."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in policy.lora_shapes().items():
        tensors[name] = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
        if name.endswith("lora_B.weight"):
            tensors[name] *= strength / policy.lora.scaling
    return tensors
