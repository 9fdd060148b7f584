"""The peer of benchmarks/policy_update.py: optimizer steps of TRL's GRPOTrainer on a given batch.

    checkpoint, FixedBatch ─▶ GRPOTrainer.train() ─▶ seconds, gradient norm, positions of each step

Only sampling and scoring are replaced: `_generate_and_score_completions` returns the batch. Loss,
metrics, padding, gradient accumulation, clipping and AdamW are those of TRL 1.16.0 and
Transformers. TRL's constructor also decides how a 4-bit base is trained: LoRA weights and their
gradients in bfloat16, bfloat16 autocast, gradient checkpointing, no
`prepare_model_for_kbit_training`, scaled-dot-product attention, and a fused head that computes
logprobs and entropies in chunks. This is the step of a run without vLLM; with `use_vllm=True`, TRL
adds one forward pass over the batch, which is not measured.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.fixed_batch import FixedBatch, Step, lora_config


def trl_steps(
    checkpoint: Path,
    batch: FixedBatch,
    *,
    device: str,
    dtype: str,
    liger: bool,
    rank: int,
    target_modules: tuple[str, ...],
    learning_rate: float,
    rows_per_micro_batch: int,
    num_steps: int,
    on_model: Callable[[Any], None],
    on_step: Callable[[int], None],
) -> list[Step]:
    """Train on `batch` for `num_steps` optimizer steps.

    `dtype` is the dtype of norms, embeddings and head; TRL's default is "float32". `on_model` gets
    the PEFT model before the first step; `on_step` gets the number of completed steps after each.
    """
    num_rows = len(batch.advantages)
    num_generations = max(2, batch.group_size)  # TRL requires at least 2; nothing is generated
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=str(checkpoint),
            reward_funcs=_no_rewards,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=rows_per_micro_batch,
                gradient_accumulation_steps=num_rows // rows_per_micro_batch,
                num_generations=num_generations,
                max_completion_length=batch.completion_ids.shape[1],
                max_steps=num_steps,
                learning_rate=learning_rate,
                lr_scheduler_type="constant",
                adam_beta2=0.99,
                use_liger_kernel=liger,
                use_cpu=device == "cpu",
                model_init_kwargs={
                    "dtype": dtype,
                    "device_map": {"": "cpu" if device == "cpu" else 0},
                },
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": ""}] * num_rows * num_generations),
            peft_config=lora_config(rank, target_modules),
        )
        inputs = _inputs(batch, device)
        trainer._generate_and_score_completions = lambda _: inputs
        on_model(trainer.model)
        clock = _Clock(device, on_step)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    records = [record for record in trainer.state.log_history if "grad_norm" in record]
    trainer.accelerator.free_memory()
    return [
        Step(seconds, record["loss"], record["grad_norm"])
        for seconds, record in zip(clock.seconds, records, strict=True)
    ]


def _no_rewards(**_: Any) -> list[float]:
    raise AssertionError("the batch is already scored")


def _inputs(batch: FixedBatch, device: str) -> dict[str, Tensor]:
    """What `_generate_and_score_completions` returns in a run without vLLM."""
    completions = batch.completion_ids.to(device)
    return {
        "prompt_ids": batch.prompt_ids.to(device),
        "prompt_mask": torch.ones_like(batch.prompt_ids).to(device),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": batch.advantages.to(device),
        "num_items_in_batch": torch.tensor(completions.numel(), device=device),
    }


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Measures seconds from before the first micro-batch to after the optimizer step."""

    def __init__(self, device: str, on_step: Callable[[int], None]) -> None:
        self.seconds: list[float] = []
        self._is_cuda = device == "cuda"
        self._on_step = on_step
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self._started)
        self._on_step(len(self.seconds))

    def _now(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
