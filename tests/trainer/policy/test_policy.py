"""The real 4-bit policy: what an update must and must not depend on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load
from torch import Tensor

from services.trainer.learner.learner import Learner
from services.trainer.learner.stats import UpdateRefused
from services.trainer.policy.logprobs import TokenLogprobs
from services.trainer.policy.ranks import Ranks
from services.trainer.policy.samples import Sample
from services.trainer.policy.token_batch import TokenBatch, Tree, collate
from services.trainer.run_config import AlgorithmConfig, LoraConfig, OptimizerConfig, PpoConfig
from shared.adapters import LINEAR_MODULES, check_tensors, read_header
from shared.model_folder import linear_shapes
from shared.schemas import UpdateStats
from tests.trainer.conftest import (
    NO_GUARDS,
    PLAIN,
    VERSION_0,
    float32_policy,
    make_sample,
    repeatable,
)

WHOLE_BATCH = 100_000


def gradient(
    learner: Learner,
    samples: Sequence[Sample],
    max_tokens: int = WHOLE_BATCH,
    algorithm: AlgorithmConfig = PLAIN,
) -> Tensor:
    """The flat gradient of the one step of an update, which is not taken; leaves no trace."""
    seen: list[Tensor] = []

    def look(ranks: Ranks) -> float:
        parameters = learner.optimizer.parameters
        seen.append(
            torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
            )
        )
        raise Looked

    class Looked(Exception):
        pass

    step, learner.optimizer.step = learner.optimizer.step, look  # type: ignore[method-assign]
    try:
        with pytest.raises(Looked):
            learner.update(samples, algorithm, max_tokens_per_micro_batch=max_tokens)
    finally:
        learner.optimizer.step = step  # type: ignore[method-assign]
    return seen[0]


def train_a_little(learner: Learner, samples: Sequence[Sample], **options: int) -> UpdateStats:
    algorithm = PLAIN.model_copy(update=options)
    return learner.update(samples, algorithm, max_tokens_per_micro_batch=WHOLE_BATCH)


def whole(samples: Sequence[Sample]) -> TokenBatch:
    """One padded batch of all samples, in their order."""
    trees = [Tree((i,), sample.length - 1) for i, sample in enumerate(samples)]
    return collate(samples, trees, layout="padded")


def weights(learner: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner.optimizer.parameters])


def test_every_linear_of_the_decoder_is_nf4_and_the_head_is_not(learner: Learner) -> None:
    linears = [m for m in learner.policy.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linears) == 4 * 7
    assert {linear.weight.quant_state.quant_type for linear in linears} == {"nf4"}
    assert all(linear.weight.quant_state.nested for linear in linears)
    assert learner.policy.model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_a_fresh_adapter_is_the_base(learner: Learner, samples: list[Sample]) -> None:
    batch = whole(samples)
    with torch.no_grad():
        adapted = learner.policy.logprobs(batch).logprobs
        with learner.policy.adapter_disabled():
            base = learner.policy.logprobs(batch).logprobs
    torch.testing.assert_close(adapted, base, atol=0, rtol=0)


@pytest.mark.parametrize("target_modules", [LINEAR_MODULES, ("q_proj",)])
def test_an_eval_forward_leaves_the_gradient_as_it_was(
    learner: Learner, samples: list[Sample], target_modules: tuple[str, ...]
) -> None:
    """bitsandbytes repacks a weight in the first eval forward on some CPUs, for a kernel without a
    gradient: neither a linear with LoRA may do so, nor one without."""
    lora = LoraConfig(rank=8, target_modules=target_modules)
    learner.start(VERSION_0, lora, OptimizerConfig(), seed=0)
    before = gradient(learner, samples)
    learner.policy.model.eval()
    with torch.no_grad():
        learner.policy.logprobs(whole(samples))
    learner.policy.model.train()
    torch.testing.assert_close(gradient(learner, samples), before, atol=0, rtol=0)


@pytest.fixture
def exact_learner(tiny_checkpoint: Path) -> Learner:
    learner = Learner(float32_policy(tiny_checkpoint))
    learner.start(VERSION_0, LoraConfig(rank=8), OptimizerConfig(), seed=0)
    return learner


@pytest.mark.parametrize("max_tokens", [1, 25, 40])
def test_the_gradient_does_not_depend_on_micro_batches_or_order(
    exact_learner: Learner, samples: list[Sample], max_tokens: int
) -> None:
    whole = gradient(exact_learner, samples)
    cut = gradient(exact_learner, samples[::-1], max_tokens)
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-5)


def test_samples_without_advantage_count_as_tokens_and_change_nothing_else(
    exact_learner: Learner, samples: list[Sample]
) -> None:
    """The skipped rows carry no gradient: computing them gives the same one."""
    expected = torch.linalg.norm(gradient(exact_learner, samples)).item()
    stats = exact_learner.update(samples, PLAIN, max_tokens_per_micro_batch=30)
    assert stats.grad_norm == pytest.approx(expected, rel=1e-5)


def test_gradient_checkpointing_computes_every_layer_again_in_the_backward(
    learner: Learner, samples: list[Sample]
) -> None:
    calls = []
    layers = learner.policy.model.get_base_model().get_decoder().layers
    handle = layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append("attention"))
    try:
        learner.policy.logprobs(whole(samples)).logprobs.sum().backward()
    finally:
        handle.remove()
        learner.policy.model.zero_grad()
    assert len(calls) == 2


def test_an_update_makes_the_next_version_and_raises_what_was_rewarded(learner: Learner) -> None:
    good, bad = make_sample(1, advantage=1.0), make_sample(2, advantage=-1.0)
    before = learner.policy.logprobs(whole([good, bad])).logprobs.detach()
    for _ in range(5):
        train_a_little(learner, [good, bad])
    after = learner.policy.logprobs(whole([good, bad])).logprobs.detach()
    assert learner.policy.id.version == 5
    moved = (after - before).split([good.num_tokens, bad.num_tokens])
    assert moved[0].sum() > 0 > moved[1].sum()


def test_several_optimizer_steps_are_one_version(learner: Learner, samples: list[Sample]) -> None:
    train_a_little(learner, samples, num_epochs=2, num_minibatches=2)
    assert learner.policy.id.version == 1


def test_an_update_without_any_advantage_still_makes_a_version(learner: Learner) -> None:
    before = weights(learner)
    train_a_little(learner, [make_sample(0, advantage=0.0)])
    assert learner.policy.id.version == 1
    torch.testing.assert_close(weights(learner), before, atol=0, rtol=0)


def test_a_gradient_that_is_not_finite_takes_no_step(learner: Learner) -> None:
    before = weights(learner)
    with pytest.raises(UpdateRefused, match="loss is -inf"):
        train_a_little(learner, [make_sample(0, advantage=float("inf"))])
    assert learner.policy.id.version == 0
    torch.testing.assert_close(weights(learner), before, atol=0, rtol=0)


def test_the_learning_rate_warms_up_over_updates(
    loaded_learner: Learner, samples: list[Sample]
) -> None:
    optimizer = OptimizerConfig(learning_rate=4e-4, warmup_steps=4)
    loaded_learner.start(VERSION_0, LoraConfig(rank=8), optimizer, seed=0)
    rates = [
        loaded_learner.update(samples, PLAIN, max_tokens_per_micro_batch=WHOLE_BATCH).learning_rate
        for _ in range(6)
    ]
    assert rates == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 4e-4])


def test_the_published_file_is_the_complete_adapter_that_peft_would_save(
    learner: Learner, samples: list[Sample], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    train_a_little(learner, samples)
    adapter = learner.policy.publish()
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(adapter.content)
    check_tensors(read_header(file), linear_shapes(tiny_checkpoint))
    expected = get_peft_model_state_dict(learner.policy.model)
    tensors = load(bytes(adapter.content))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name].to(torch.bfloat16), atol=0, rtol=0)


def test_publishing_a_version_again_gives_the_same_bytes(
    learner: Learner, samples: list[Sample]
) -> None:
    """A retry after a crash must not look like another adapter of the same version."""
    train_a_little(learner, samples)
    assert len({bytes(learner.policy.publish().content) for _ in range(5)}) == 1


def test_the_latest_adapters_are_kept(learner: Learner, samples: list[Sample]) -> None:
    for _ in range(3):
        train_a_little(learner, samples)
        learner.policy.publish()
    assert learner.policy.kept_versions == (2, 3)


def test_a_new_run_starts_from_the_base_again(learner: Learner, samples: list[Sample]) -> None:
    train_a_little(learner, samples)
    learner.start(VERSION_0, LoraConfig(rank=4), OptimizerConfig(), seed=0)
    batch = whole(samples)
    with torch.no_grad():
        adapted = learner.policy.logprobs(batch).logprobs
        with learner.policy.adapter_disabled():
            torch.testing.assert_close(
                adapted, learner.policy.logprobs(batch).logprobs, atol=0, rtol=0
            )
    assert learner.policy.id.version == 0
    assert learner.policy.kept_versions == ()


def test_an_update_that_fails_in_its_second_micro_batch_leaves_no_gradient(
    learner: Learner, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the update that is tried again would count the first micro-batch twice."""
    logprobs = iter([learner.policy.logprobs])

    def fail_the_second_time(batch: TokenBatch) -> TokenLogprobs:
        return next(logprobs)(batch)

    monkeypatch.setattr(learner.policy, "logprobs", fail_the_second_time)
    with pytest.raises(StopIteration):
        learner.update(samples, PLAIN, max_tokens_per_micro_batch=20)
    assert all(p.grad is None for p in learner.policy.model.parameters())
    assert learner.policy.id == VERSION_0


def test_an_update_that_fails_in_its_second_step_takes_the_first_back(learner: Learner) -> None:
    good = make_sample(1, advantage=1.0)
    bad = replace(make_sample(2, advantage=1.0), temperature=math.nan)
    train_a_little(learner, [good])
    before, norm = weights(learner), gradient(learner, [good])
    with pytest.raises(UpdateRefused, match="loss is nan"):
        train_a_little(learner, [good, bad], num_minibatches=2)
    assert torch.equal(weights(learner), before)
    assert torch.equal(gradient(learner, [good]), norm)
    assert learner.policy.id.version == 1


def test_a_token_the_sampler_thought_impossible_leaves_every_number_finite(
    learner: Learner,
) -> None:
    sample = replace(make_sample(1, advantage=1.0), sampler_logprobs=(-1e6,) * 4)
    stats = learner.update([sample], PLAIN, max_tokens_per_micro_batch=WHOLE_BATCH)
    numbers = [value for _, value in stats if isinstance(value, int | float)]
    assert all(map(math.isfinite, numbers))
    assert stats.importance_truncated_fraction == 1.0


@pytest.mark.parametrize("missing", ["qkv_proj", "lm_head"])
def test_a_target_module_that_cannot_be_served_is_refused_before_the_run(
    learner: Learner, missing: str
) -> None:
    lora = LoraConfig(target_modules=("q_proj", missing))
    with pytest.raises(ValueError, match=f"has {missing}, .* choose from q_proj, k_proj"):
        learner.start(VERSION_0, lora, OptimizerConfig(), seed=0)
    assert learner.policy.lora.rank == 8


def test_rank_stabilized_lora_scales_by_the_root_of_the_rank(
    learner: Learner, samples: list[Sample]
) -> None:
    lora = LoraConfig(rank=16, alpha=8, use_rslora=True)
    learner.start(VERSION_0, lora, OptimizerConfig(), seed=0)
    train_a_little(learner, samples)
    assert learner.policy.publish().manifest.scaling == 8 / 4
    assert learner.policy.model.peft_config["default"].use_rslora
    layer = next(m for m in learner.policy.model.modules() if isinstance(m, LoraLayer))
    assert layer.scaling["default"] == 8 / 4


def tensor_types(state: Any) -> Iterator[torch.dtype]:
    if isinstance(state, Tensor):
        yield state.dtype
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensor_types(value)


def test_the_8_bit_optimizer_learns_and_goes_on_from_its_snapshot(
    learner: Learner, samples: list[Sample]
) -> None:
    """Moments of tensors of 4096 weights or more take 8 bits."""
    options = OptimizerConfig(name="adamw_8bit", learning_rate=1e-3, warmup_steps=0)
    lora = LoraConfig(rank=32, target_modules=("gate_proj",))
    learner.start(VERSION_0, lora, options, seed=0)
    train_a_little(learner, samples)
    snapshot = learner.snapshot()
    assert torch.uint8 in tensor_types(snapshot.optimizer)
    train_a_little(learner, samples)
    expected = weights(learner)
    learner.start(VERSION_0, lora, options, seed=1)
    learner.restore(VERSION_0.model_copy(update={"version": 1}), snapshot)
    train_a_little(learner, samples)
    assert torch.equal(weights(learner), expected)


def test_a_critic_goes_on_from_its_snapshot(learner: Learner, samples: list[Sample]) -> None:
    algorithm = PpoConfig(num_epochs=2)
    options = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)

    def begin(seed: int) -> None:
        learner.start(VERSION_0, LoraConfig(rank=8), options, seed=seed, algorithm=algorithm)

    def learn() -> UpdateStats:
        return repeatable(
            learner.update(samples, algorithm, max_tokens_per_micro_batch=64, guards=NO_GUARDS)
        )

    begin(seed=0)
    learn()
    snapshot = learner.snapshot()
    expected = learn(), weights(learner)
    begin(seed=1)
    learner.restore(VERSION_0.model_copy(update={"version": 1}), snapshot)
    assert learn() == expected[0]
    assert torch.equal(weights(learner), expected[1])
    learner.start(VERSION_0, LoraConfig(rank=8), options, seed=0)
    with pytest.raises(ValueError, match="has a critic: continue the run with the algorithm"):
        learner.restore(VERSION_0, snapshot)  # a run without a critic


def test_a_lora_linear_is_peft_s_and_so_is_its_gradient(
    learner: Learner, samples: list[Sample]
) -> None:
    train_a_little(learner, samples)
    layer = next(m for m in learner.policy.model.modules() if isinstance(m, LoraLayer))
    x = torch.randn(3, 5, layer.base_layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    by_peft = type(layer).forward
    results = []
    for forward in (layer.forward, lambda x: by_peft(layer, x)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = forward(x)
        inputs = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        results.append((y, *torch.autograd.grad(y.float().square().sum(), inputs)))
    for ours, peft in zip(*results, strict=True):
        assert (ours - peft).norm() <= 0.01 * peft.norm()
    with learner.policy.adapter_disabled():
        torch.testing.assert_close(layer.forward(x), layer.base_layer(x), atol=0, rtol=0)
