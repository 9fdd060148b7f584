"""A peer of benchmarks/policy_update.py: QLoRA on a given batch, the way most scripts do it.

    checkpoint, FixedBatch ─▶ a plain training loop ─▶ seconds, loss, gradient norm of each step

PEFT's `prepare_model_for_kbit_training` converts unquantized weights to float32. LoRA weights are
float32 too. The forward pass is Transformers' under bfloat16 autocast with gradient checkpointing,
and logprobs come from the logits of all positions at once. The loss is dapo's, on-policy; clipping
and AdamW are torch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

from benchmarks.fixed_batch import FixedBatch, Step, lora_config

_MAX_GRAD_NORM = 1.0
_BETAS = (0.9, 0.99)


def recipe_steps(
    checkpoint: Path,
    batch: FixedBatch,
    *,
    device: str,
    rank: int,
    target_modules: tuple[str, ...],
    learning_rate: float,
    rows_per_micro_batch: int,
    num_steps: int,
    on_model: Callable[[Any], None],
    on_step: Callable[[int], None],
) -> list[Step]:
    """Train on `batch` for `num_steps` optimizer steps.

    `on_model` gets the PEFT model before the first step; `on_step` gets the number of completed
    steps after each step.
    """
    base = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device_map={"": device}
    )
    base = prepare_model_for_kbit_training(
        base,
        use_gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    base.config.use_cache = False
    model = get_peft_model(base, lora_config(rank, target_modules))
    model.train()  # eval mode would silently disable gradient checkpointing
    on_model(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=_BETAS, weight_decay=0.0)
    steps = []
    for number in range(1, 1 + num_steps):
        started = _now(device)
        loss = _accumulate(model, batch, device, rows_per_micro_batch)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(Step(_now(device) - started, loss, grad_norm))
        on_step(number)
    return steps


def _accumulate(model: Any, batch: FixedBatch, device: str, rows_per_micro_batch: int) -> float:
    """Accumulate the gradients of the whole batch over its micro-batches; returns the loss."""
    num_prompt = batch.prompt_ids.shape[1]
    rows = zip(
        torch.cat([batch.prompt_ids, batch.completion_ids], dim=1).split(rows_per_micro_batch),
        batch.completion_ids.split(rows_per_micro_batch),
        batch.advantages.split(rows_per_micro_batch),
        strict=True,
    )
    total = 0.0
    for input_ids, labels, advantages in rows:
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=input_ids.to(device)).logits  # [B, P + R, V]
        logits = logits[:, num_prompt - 1 : -1].float()
        labels = labels.to(device).unsqueeze(-1)
        logprobs = logits.log_softmax(-1).gather(-1, labels).squeeze(-1)  # [B, R]
        ratio = (logprobs - logprobs.detach()).exp()
        loss = -(advantages.to(device).unsqueeze(1) * ratio).sum() / batch.completion_ids.numel()
        loss.backward()
        total += loss.item()
    return total


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
