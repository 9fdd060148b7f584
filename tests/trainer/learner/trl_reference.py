"""TRL 1.16.0's own losses, advantages and importance weights, on given numbers.

    Batch (flat) ─padded─▶ the trainer's method, whose `self` is a stub ─▶ loss, advantages, weights

What is run is TRL's code, from the released package. A stub stands in for what needs a model: it
hands the logprobs out that a forward would have given.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def _import_trl() -> tuple[Any, Any, Any]:
    """TRL's trainers, without the engine that it would import where one is installed."""
    engine = sys.modules.get("vllm")
    sys.modules["vllm"] = None  # type: ignore[assignment]  # how Python spells "cannot be imported"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated")
            warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
            from trl.experimental.online_dpo import OnlineDPOTrainer
            from trl.trainer.grpo_trainer import GRPOTrainer
            from trl.trainer.rloo_trainer import RLOOTrainer
    finally:
        del sys.modules["vllm"]
        if engine is not None:
            sys.modules["vllm"] = engine
    return GRPOTrainer, RLOOTrainer, OnlineDPOTrainer


GRPOTrainer, RLOOTrainer, OnlineDPOTrainer = _import_trl()


@dataclass(frozen=True, slots=True)
class Batch:
    """Completions of random lengths; one of them is masked and has no loss token. Float32."""

    lengths: tuple[int, ...]
    rows: Tensor  # [N] int64
    policy_logprobs: Tensor  # [N], requires a gradient
    old_logprobs: Tensor  # [N]
    reference_logprobs: Tensor  # [N]
    sampler_logprobs: Tensor  # [N], some NaN
    entropies: Tensor  # [N]
    advantages: Tensor  # [rows]

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    def padded(self, values: Tensor) -> Tensor:
        """[N] -> [rows, longest], with 0 behind the tokens of a row; differentiable."""
        columns = torch.cat([torch.arange(length) for length in self.lengths])
        empty = values.new_zeros(self.num_rows, max(self.lengths))
        return empty.index_put((self.rows, columns), values)

    @property
    def mask(self) -> Tensor:
        return self.padded(torch.ones_like(self.rows))


def random_batch(seed: int, *, num_rows: int = 24, longest: int = 40) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (num_rows,), generator=generator)
    lengths[seed % num_rows] = 0
    rows = torch.arange(num_rows).repeat_interleave(lengths)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(len(rows), generator=generator)

    policy = -3 * torch.rand(len(rows), generator=generator)
    old = policy + noise(0.3)
    sampler = (old + noise(0.2)).masked_fill(
        torch.rand(len(rows), generator=generator) < 0.05, torch.nan
    )
    return Batch(
        lengths=tuple(lengths.tolist()),
        rows=rows,
        policy_logprobs=policy.requires_grad_(),
        old_logprobs=old.detach(),
        reference_logprobs=(policy + noise(0.3)).detach(),
        sampler_logprobs=sampler.detach(),
        entropies=2 * torch.rand(len(rows), generator=generator),
        # not centred: a loss that cancels to almost 0 has no relative error worth the name
        advantages=torch.randn(num_rows, generator=generator) + 0.5,
    )


class _OneProcess:
    """accelerate.Accelerator on one process; keeps the loss that is sent backward."""

    num_processes = 1
    process_index = 0
    sync_gradients = True
    device = torch.device("cpu")
    loss: Tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim else tensor[None]

    gather_for_metrics = gather

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def pad_across_processes(self, tensor: Tensor, **_: Any) -> Tensor:
        return tensor

    def backward(self, loss: Tensor) -> None:
        self.loss = loss


def _metrics() -> dict[str, defaultdict[str, list[float]]]:
    return {"train": defaultdict(list), "eval": defaultdict(list)}


# --- losses -----------------------------------------------------------------------------------


def grpo_loss(
    batch: Batch,
    *,
    loss_type: str,
    level: str,
    epsilon_low: float,
    epsilon_high: float,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    delta: float | None = None,
    top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None,
    importance_sampling_ratio: Tensor | None = None,
    max_completion_length: int = 64,
    num_items_in_batch: int | None = None,
    steps_per_generation: int = 1,
) -> Tensor:
    """The loss [] of one optimizer step that is one micro-batch."""
    trainer = SimpleNamespace(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        beta=beta,
        top_entropy_quantile=top_entropy_quantile,
        off_policy_mask_threshold=off_policy_mask_threshold,
        use_vllm=importance_sampling_ratio is not None,
        vllm_importance_sampling_correction=True,
        max_completion_length=max_completion_length,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(
            use_bias_correction_kl=use_bias_correction_kl,
            delta=delta,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=steps_per_generation,
        ),
        accelerator=_OneProcess(),
        model=SimpleNamespace(training=True),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        _get_per_token_logps_and_entropies=_forward_of(batch.policy_logprobs, batch),
        _metrics=_metrics(),
    )
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    inputs = _inputs(batch) | {
        "old_per_token_logps": batch.padded(batch.old_logprobs),
        "ref_per_token_logps": batch.padded(batch.reference_logprobs),
        "sampling_per_token_logps": batch.padded(batch.sampler_logprobs),
        "num_items_in_batch": torch.tensor(num_items_in_batch or sum(batch.lengths)),
    }
    if importance_sampling_ratio is not None:
        inputs["importance_sampling_ratio"] = importance_sampling_ratio
    loss: Tensor = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss


def rloo_loss(batch: Batch, *, epsilon: float) -> Tensor:
    trainer = SimpleNamespace(
        epsilon_low=epsilon,
        epsilon_high=epsilon,
        aux_loss_enabled=False,
        accelerator=_OneProcess(),
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=_forward_of(batch.policy_logprobs, batch),
        _metrics=_metrics(),
    )
    inputs = _inputs(batch) | {"old_logps": batch.padded(batch.old_logprobs).sum(1)}
    loss: Tensor = RLOOTrainer._compute_loss(trainer, None, inputs)
    return loss


def _inputs(batch: Batch) -> dict[str, Tensor]:
    prompts = torch.ones(batch.num_rows, 3, dtype=torch.int64)
    return {
        "prompt_ids": prompts,
        "prompt_mask": prompts,
        "completion_ids": torch.zeros_like(batch.mask),
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
    }


def _forward_of(logprobs: Tensor, batch: Batch) -> Any:
    def forward(*_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return batch.padded(logprobs), batch.padded(batch.entropies), None

    return forward


def online_dpo_loss(batch: Batch, rewards: Tensor, *, loss_type: str, beta: float) -> Tensor:
    """The loss [] of pairs; the first half of the rows are the first completions of prompts."""
    policy, reference = _Model(), _Model()
    logprobs = {policy: batch.policy_logprobs, reference: batch.reference_logprobs}
    accelerator = _OneProcess()
    prompts = torch.ones(batch.num_rows, 3, dtype=torch.int64)
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            use_vllm=False,
            missing_eos_penalty=None,
            loss_type=loss_type,
            torch_empty_cache_steps=None,
            optim="adamw_torch",
            n_gpu=1,
            gradient_accumulation_steps=1,
        ),
        beta=beta,
        eos_token_ids=[2],
        ref_model=reference,
        reward_funcs=[None],
        processing_class=SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids)),
        accelerator=accelerator,
        stats=defaultdict(list),
        _generate=lambda *_: (prompts, prompts, torch.zeros_like(batch.mask), batch.mask, None),
        _forward=lambda model, *_: batch.padded(logprobs[model]),
        _calculate_rewards_from_functions=lambda **_: rewards.clone(),
    )
    OnlineDPOTrainer.training_step(trainer, policy, {"prompt": ["p"] * (batch.num_rows // 2)})
    return accelerator.loss


class _Model:
    def train(self) -> None: ...


# --- advantages and importance weights --------------------------------------------------------


def grpo_advantages(
    rewards: Tensor, *, group_size: int, weights: Sequence[float], scale: str, aggregation: str
) -> list[float]:
    """Unweighted rewards [completions, rewards] -> advantages, a group after the other."""
    output = _scored(
        GRPOTrainer,
        rewards,
        group_size=group_size,
        reward_weights=torch.tensor(weights),
        scale_rewards=scale,
        multi_objective_aggregation=aggregation,
        use_vllm=False,
    )
    return _list(output["advantages"])


def importance_weights(
    batch: Batch, *, mode: str, max_ratio: float, min_ratio: float | None
) -> Tensor:
    """[rows, longest] or [rows, 1]: what multiplies the loss of a token."""
    output = _scored(
        GRPOTrainer,
        torch.zeros(batch.num_rows, 1),
        group_size=1,
        batch=batch,
        reward_weights=torch.ones(1),
        scale_rewards="none",
        multi_objective_aggregation="sum_then_normalize",
        use_vllm=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=max_ratio,
        vllm_importance_sampling_clip_min=min_ratio,
    )
    weights: Tensor = output["importance_sampling_ratio"]
    return weights


def rloo_advantages(
    rewards: Tensor, batch: Batch, *, group_size: int, beta: float, normalize: bool
) -> list[float]:
    """Rewards [completions], minus beta times the KL estimate of `batch` -> advantages."""
    output = _scored(
        RLOOTrainer,
        rewards[:, None],
        group_size=group_size,
        batch=batch,
        beta=beta,
        reward_weights=torch.ones(1),
        reward_clip_range=None,
        normalize_advantages=normalize,
        use_vllm=False,
    )
    return _list(output["advantages"])


def _scored(
    trainer_class: Any,
    rewards: Tensor,
    *,
    group_size: int,
    batch: Batch | None = None,
    beta: float = 0.0,
    **settings: Any,
) -> dict[str, Tensor]:
    """What the trainer makes of a batch of completions that it was stubbed to generate."""
    lengths = batch.lengths if batch else (1,) * len(rewards)
    policy, reference = SimpleNamespace(training=True, is_gradient_checkpointing=False), object()
    sampler = batch.sampler_logprobs.split(lengths) if batch else [torch.zeros(1)] * len(rewards)
    completions = [[7] * length for length in lengths]
    generated: dict[Any, tuple[Any, ...]] = {
        RLOOTrainer: ([[5]] * len(rewards), completions, ["x"] * len(rewards)),
        GRPOTrainer: (
            [[5]] * len(rewards),
            completions,
            None,
            ["x"] * len(rewards),
            [part.tolist() for part in sampler],
            {},
            None,
            None,
        ),
    }

    def forward(model: object, *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        if batch is None:
            return torch.zeros(len(rewards), 1), None, None
        logprobs = batch.reference_logprobs if model is reference else batch.old_logprobs
        return batch.padded(logprobs), None, None

    names = [f"reward_{i}" for i in range(rewards.shape[1])]
    trainer = SimpleNamespace(
        accelerator=_OneProcess(),
        model=policy,
        ref_model=reference,
        beta=beta,
        num_generations=group_size,
        num_iterations=1,
        reward_funcs=names,
        reward_func_names=names,
        environment_factories=None,
        environments=None,
        tools=[],
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        log_multimodal=False,
        vllm_importance_sampling_correction=True,
        args=SimpleNamespace(
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            per_device_train_batch_size=len(rewards),
            gradient_checkpointing_kwargs=None,
        ),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _generate=lambda prompts: generated[trainer_class],
        _get_per_token_logps_and_entropies=forward,
        _calculate_rewards=lambda *_: rewards,
        _pending_extra_logs={},
        _pending_metrics={},
        _metrics=_metrics(),
        _logs={
            "prompt": [],
            "completion": [],
            "rewards": defaultdict(list),
            "advantages": [],
            "extra": defaultdict(list),
        },
        **settings,
    )
    output: dict[str, Tensor] = trainer_class._generate_and_score_completions(
        trainer, [{"prompt": "p"}] * len(rewards)
    )
    return output


def _list(advantages: Tensor) -> list[float]:
    values: list[float] = advantages.tolist()
    return values
