"""What an update's gradient must not depend on, for every algorithm: how the batch was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.trainer.learner.learner import Learner
from services.trainer.policy.attention import packed_attention
from services.trainer.policy.samples import Sample
from services.trainer.policy.token_batch import Layout
from services.trainer.run_config import (
    AlgorithmConfig,
    CorrectionConfig,
    DpoConfig,
    GrpoConfig,
    KlConfig,
    LoraConfig,
    OnlineDpoConfig,
    OptimizerConfig,
    PpoConfig,
    ReinforceConfig,
    RewardKlConfig,
    RlooConfig,
)
from tests.trainer.conftest import NO_GUARDS, VERSION_0, float32_policy, make_sample
from tests.trainer.policy.reference_attention import varlen_attention
from tests.trainer.policy.test_policy import WHOLE_BATCH, gradient, weights

ALGORITHMS: dict[str, AlgorithmConfig] = {
    "dapo": GrpoConfig(),
    "grpo": GrpoConfig(loss="grpo"),
    "dr_grpo": GrpoConfig(loss="dr_grpo", scale_rewards="none"),
    "gspo": GrpoConfig(loss="gspo"),
    "luspo": GrpoConfig(loss="luspo"),
    "cispo": GrpoConfig(loss="cispo", scale_rewards="batch"),
    "sapo": GrpoConfig(loss="sapo"),
    "several rewards": GrpoConfig(reward_aggregation="normalize_then_sum"),
    "kl in the loss": GrpoConfig(kl=KlConfig(coefficient=0.1)),
    "entropy": GrpoConfig(entropy_bonus=0.01, top_entropy_fraction=0.3),
    "off-policy mask": GrpoConfig(off_policy_mask=0.5, mask_truncated=True),
    "sequence correction": GrpoConfig(
        correction=CorrectionConfig(level="sequence", mode="mask", geometric_band=(0.3, 3.0))
    ),
    "rloo": RlooConfig(kl=RewardKlConfig(coefficient=0.05)),
    "reinforce_pp": ReinforceConfig(kl=RewardKlConfig(coefficient=0.05), discount=0.9),
    "reinforce_pp_baseline": ReinforceConfig(name="reinforce_pp_baseline"),
    "ppo": PpoConfig(num_epochs=1, kl=RewardKlConfig(coefficient=0.05)),
    "online_dpo": OnlineDpoConfig(missing_eos_penalty=0.5),
    "ipo": DpoConfig(loss="ipo"),
}


@pytest.fixture(scope="module")
def exact_base(tiny_checkpoint: Path) -> Learner:
    """The same model without rounding, where equal means equal to 1e-5."""
    return Learner(float32_policy(tiny_checkpoint))


def begin(learner: Learner, algorithm: AlgorithmConfig) -> Learner:
    """A policy whose adapter, and critic, say something."""
    learner.start(
        VERSION_0,
        LoraConfig(rank=8),
        OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        seed=0,
        algorithm=algorithm,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learner.optimizer.parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return learner


@pytest.fixture
def groups() -> list[Sample]:
    """Three groups of four, of different prompts and lengths, and one of equal rewards."""
    samples = [
        make_sample(
            10 * group + k,
            advantage=((3 * group + 2 * k) % 5) / 2 if group < 3 else 1.0,
            num_prompt=(20, 3, 9, 5)[group],
            num_completion=1 + (5 * k + group) % 8,
            group=group,
            lag=k % 2,
        )
        for group in range(4)
        for k in range(4)
    ]
    return [
        replace(s, rewards=(*s.rewards, float(i % 3)), is_truncated=i % 5 == 0, temperature=0.8)
        for i, s in enumerate(samples)
    ]


def reordered(samples: Sequence[Sample]) -> list[Sample]:
    """The groups in another order, and their completions, too."""
    return sorted(reversed(samples), key=lambda s: (s.group * 3) % 4)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(
    exact_base: Learner, groups: list[Sample], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches, padding, packing, shared prompts and order change rounding alone."""
    algorithm = ALGORITHMS[name]
    learner = begin(exact_base, algorithm)
    monkeypatch.setattr(learner.policy, "layout", "padded")
    expected = gradient(learner, groups, WHOLE_BATCH, algorithm)
    assert expected.norm() > 0

    def check(samples: Sequence[Sample], max_tokens: int, layout: Layout) -> None:
        monkeypatch.setattr(learner.policy, "layout", layout)
        found = gradient(learner, samples, max_tokens, algorithm)
        error = (found - expected).norm() / expected.norm()
        assert error < 1e-5, (max_tokens, layout)

    is_ranked = isinstance(algorithm, OnlineDpoConfig | DpoConfig)  # first best and first worst
    for layout in ("padded", "masked"):
        for max_tokens in (1, 30, 60, WHOLE_BATCH):
            check(groups, max_tokens, layout)
        if not is_ranked:
            check(reordered(groups), 60, layout)


def test_prompts_are_shared_where_it_pays(exact_base: Learner, groups: list[Sample]) -> None:
    learner = begin(exact_base, GrpoConfig())
    shared = learner.update(
        groups, GrpoConfig(), max_tokens_per_micro_batch=WHOLE_BATCH, guards=NO_GUARDS
    )
    assert learner.policy.layout == "masked"
    num_unshared = sum(s.length - 1 for s in groups if s.group < 3)
    assert shared.num_forward_tokens < 0.75 * num_unshared


@pytest.mark.parametrize("max_tokens", [60, WHOLE_BATCH])
def test_the_packed_attention_of_gpus_gives_the_same_gradient(
    tiny_checkpoint: Path, groups: list[Sample], max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but torch's kernel, which a formula stands for: it needs CUDA."""
    from transformers import AttentionInterface

    learner = begin(Learner(float32_policy(tiny_checkpoint)), GrpoConfig())
    expected = gradient(learner, groups, WHOLE_BATCH, GrpoConfig())
    AttentionInterface.register("packed_by_formula", _packed_by_formula)
    learner.policy.model.get_base_model().set_attn_implementation("packed_by_formula")
    monkeypatch.setattr(learner.policy, "layout", "packed")
    found = gradient(learner, groups, max_tokens, GrpoConfig())
    assert (found - expected).norm() / expected.norm() < 1e-5


def _packed_by_formula(*args: object, **kwargs: object) -> tuple[Tensor, None]:
    return packed_attention(*args, **kwargs, kernel=varlen_attention)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dapo", "kl in the loss", "ppo", "ipo"])
def test_several_steps_train_on_the_logprobs_of_before_the_update(
    exact_base: Learner, groups: list[Sample], name: str
) -> None:
    """The ratio moves with the steps, so the clip engages: it is against the old policy."""
    algorithm = ALGORITHMS[name].model_copy(update={"num_epochs": 3, "num_minibatches": 2})
    learner = begin(exact_base, algorithm)
    before = weights(learner)
    stats = learner.update(groups, algorithm, max_tokens_per_micro_batch=60, guards=NO_GUARDS)
    assert learner.policy.id.version == 1
    assert not torch.equal(weights(learner), before)
    if name == "ipo":
        assert stats.clip_fraction is None
    else:
        assert stats.clip_fraction
        assert stats.clip_fraction > 0


def test_the_critic_learns_the_rewards(exact_base: Learner, groups: list[Sample]) -> None:
    algorithm = PpoConfig(num_epochs=1, value_clip=None)
    learner = begin(exact_base, algorithm)
    first, *_, last = [
        learner.update(
            groups, algorithm, max_tokens_per_micro_batch=60, guards=NO_GUARDS
        ).value_loss
        for _ in range(12)
    ]
    assert first
    assert last
    assert last < 0.5 * first


def test_a_policy_with_a_critic_publishes_the_policy_alone(
    exact_base: Learner, groups: list[Sample]
) -> None:
    learner = begin(exact_base, PpoConfig())
    names = {name for name in learner.policy.lora_shapes()}
    assert len(names) == 2 * 4 * 7
    assert not any("critic" in name for name in names)
    learner.update(groups, PpoConfig(), max_tokens_per_micro_batch=60, guards=NO_GUARDS)
    assert len(learner.policy.publish().content) < 2.1 * sum(
        s.numel() for s in learner.policy.lora_shapes().values()
    )


def test_kl_that_is_off_computes_no_reference(
    exact_base: Learner, groups: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = begin(exact_base, GrpoConfig())

    def refuse() -> None:
        raise AssertionError("a reference was computed")

    monkeypatch.setattr(learner.policy, "adapter_disabled", refuse)
    learner.update(groups, GrpoConfig(), max_tokens_per_micro_batch=60, guards=NO_GUARDS)
    assert learner.policy.id.version == 1


def test_groups_without_a_preference_make_no_pair_and_still_a_version(exact_base: Learner) -> None:
    algorithm = OnlineDpoConfig()
    learner = begin(exact_base, algorithm)
    same = [make_sample(k, advantage=1.0, group=0) for k in range(4)]
    before = weights(learner)
    learner.update(same, algorithm, max_tokens_per_micro_batch=60, guards=NO_GUARDS)
    assert learner.policy.id.version == 1
    assert torch.equal(weights(learner), before)


@pytest.mark.parametrize("num_minibatches", [2, 5])
def test_pairs_stay_together_however_many_minibatches_there_are(
    exact_base: Learner, groups: list[Sample], num_minibatches: int
) -> None:
    algorithm = OnlineDpoConfig(num_minibatches=num_minibatches)
    learner = begin(exact_base, algorithm)
    stats = learner.update(groups, algorithm, max_tokens_per_micro_batch=60, guards=NO_GUARDS)
    assert stats.preference_accuracy is not None
    assert 0 <= stats.preference_accuracy <= 1
    assert learner.policy.id.version == 1


def test_what_an_update_has_learned_is_no_drift_of_the_sampler(exact_base: Learner) -> None:
    """Later steps of an update compare the policy of before it with the sampler."""
    algorithm = OnlineDpoConfig(num_epochs=6)
    learner = begin(exact_base, algorithm)
    pairs = [
        make_sample(10 * group + k, advantage=float(k), num_completion=20, group=group)
        for group in range(16)
        for k in range(2)
    ]
    logprobs = learner.policy.sample_logprobs(pairs)
    sampled = [
        replace(s, sampler_logprobs=tuple(row)) for s, row in zip(pairs, logprobs, strict=True)
    ]
    stats = learner.update(sampled, algorithm, max_tokens_per_micro_batch=WHOLE_BATCH)
    assert stats.num_fresh_tokens >= 256
    assert stats.sampler_kl is not None
    assert stats.sampler_kl < 1e-6


def test_positions_that_are_only_scored_count_as_computed(
    exact_base: Learner, groups: list[Sample]
) -> None:
    computed = []
    for coefficient in (0.0, 0.1):
        algorithm = RlooConfig(kl=RewardKlConfig(coefficient=coefficient))
        learner = begin(exact_base, algorithm)
        stats = learner.update(groups, algorithm, max_tokens_per_micro_batch=60, guards=NO_GUARDS)
        computed.append(stats.num_forward_tokens)
    assert computed[1] > 2.5 * computed[0]
