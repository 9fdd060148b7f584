"""From a wish to settings: where trainer and replica go, and how they share the memory there.

Request ─▶ Placement on one GPU, or one for each ─▶ Plan: the first that fits, or what to change
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from services.trainer.plan.inputs import GIB, Gpu, Model
from services.trainer.plan.memory import (
    BLOCK_TOKENS,
    LORA_RANKS,
    Batch,
    KvCacheDtype,
    Optimizer,
    ReplicaMemory,
    TrainerMemory,
    replica_memory,
    trainer_memory,
)
from services.trainer.run_config import RunConfig
from shared.schemas import ServingMode

UTILIZATION = 0.85  # Default in rollout/settings.py.
_MAX_TOKENS: int = RunConfig.model_fields["max_tokens_per_micro_batch"].default
# Smaller micro-batches are slower, because each dequantizes the base again.
_SENSIBLE_TOKENS = 4096
# Share of running completions to keep when a micro-batch takes memory from the KV cache.
_KEPT = 0.75
_STEP = 256  # Proposals are rounded to multiples of this many tokens.


@dataclass(frozen=True, slots=True)
class Request:
    model: Model
    gpu: Gpu
    batch: Batch  # One update.
    lora_rank: int
    optimizer: Optimizer
    load_in_4bit: bool
    offload: bool  # Whether layer inputs go to host memory.
    kv_cache_dtype: KvCacheDtype
    max_num_seqs: int
    serving_mode: ServingMode
    max_tokens: int | None  # Tokens per micro-batch; None lets the planner choose.


@dataclass(frozen=True, slots=True)
class Placement:
    """The settings of one arrangement, and whether there is memory for it."""

    request: Request
    num_gpus: int  # With 1 both services share the GPU.
    max_tokens: int  # Tokens per micro-batch.
    trainer: TrainerMemory
    replica: ReplicaMemory

    @property
    def utilization(self) -> float:
        """Of ROLLOUT_GPU_MEMORY_UTILIZATION: what is left of one GPU; of two the default, where it
        suffices."""
        usable = self.request.gpu.usable_bytes
        others = self.replica.beside + (self.trainer.total if self.num_gpus == 1 else 0)
        most = max(math.floor(100 * (usable - others) / usable), 0) / 100
        suffices = self.num_gpus == 2 and UTILIZATION * usable >= self._needed_share
        return min(most, UTILIZATION) if suffices else most

    @property
    def share(self) -> int:
        return int(self.utilization * self.request.gpu.usable_bytes)

    @property
    def num_completions(self) -> int:
        """That have room in the KV cache at once, each with its prompt."""
        return self._kv_tokens // _in_blocks(self.request.batch.context)

    @property
    def num_groups(self) -> int:
        """That have, with a prompt for each."""
        return self._kv_tokens // self._group_tokens

    @property
    def _kv_tokens(self) -> int:
        return self.replica.kv_tokens(self.share, self.request.kv_cache_dtype)

    @property
    def _group_tokens(self) -> int:
        """vLLM shares whole blocks."""
        batch = self.request.batch
        shared = batch.prompt // BLOCK_TOKENS * BLOCK_TOKENS
        return shared + batch.group_size * _in_blocks(batch.context - shared)

    @property
    def _needed_share(self) -> int:
        """For the KV cache of one group."""
        token = self.replica.token[self.request.kv_cache_dtype]
        return self.replica.fixed + self._group_tokens * token

    @property
    def missing_bytes(self) -> int:
        """Of a GPU; 0 where it fits."""
        return max(self._lacks.values())

    @property
    def lacks_more(self) -> str:
        return max(self._lacks, key=lambda who: self._lacks[who])

    @property
    def _lacks(self) -> dict[str, int]:
        trainer = self.trainer.total - self.request.gpu.usable_bytes
        return {
            "the replica": max(self._needed_share - self.share, 0),
            "the trainer": max(trainer, 0) if self.num_gpus == 2 else 0,
        }


def _in_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def place(request: Request, num_gpus: int) -> Placement:
    """With the largest micro-batch that costs little of the KV cache; where nothing fits, with what
    lacks least.

    A prompt is computed once where its whole group has room in a micro-batch, so smaller ones are
    for want of memory alone.
    """
    batch, row = request.batch, request.batch.context
    group = -(-batch.group_positions // _STEP) * _STEP
    least = group if group <= _MAX_TOKENS else _SENSIBLE_TOKENS
    sizes = {row, group, *(_MAX_TOKENS >> n for n in range(3))}
    chosen = sorted((n for n in sizes if row <= n <= max(row, _MAX_TOKENS)), reverse=True)
    sizes_tried = [request.max_tokens] if request.max_tokens else chosen
    placements = [_placement(request, num_gpus, size) for size in sizes_tried]
    fitting = [placement for placement in placements if not placement.missing_bytes]
    if not fitting:
        return min(placements, key=lambda placement: placement.missing_bytes)
    sensible = [placement for placement in fitting if placement.max_tokens >= least] or fitting[:1]
    at_once = min(batch.num_groups, request.max_num_seqs / batch.group_size)
    most = min(at_once, max(placement.num_groups for placement in sensible))
    return next(p for p in sensible if p.num_groups >= _KEPT * most)


def _placement(request: Request, num_gpus: int, max_tokens: int) -> Placement:
    return Placement(
        request=request,
        num_gpus=num_gpus,
        max_tokens=max_tokens,
        trainer=trainer_memory(
            request.model,
            request.batch,
            max_tokens=max_tokens,
            lora_rank=request.lora_rank,
            optimizer=request.optimizer,
            load_in_4bit=request.load_in_4bit,
            offload=request.offload,
        ),
        replica=replica_memory(
            request.model,
            lora_rank=request.lora_rank,
            max_num_seqs=request.max_num_seqs,
            serving_mode=request.serving_mode,
        ),
    )


# --- the plan -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    # The first placement on one or two GPUs that fits, or else the one on two.
    placement: Placement
    verdict: str  # One sentence.

    @property
    def fits(self) -> bool:
        return not self.placement.missing_bytes

    @property
    def environment(self) -> dict[str, str]:
        request, placement = self.placement.request, self.placement
        bases = {"TRAINER_LOAD_IN_4BIT": "false", "ROLLOUT_BASE": "original"}
        return {
            "ROLLOUT_GPU_MEMORY_UTILIZATION": f"{placement.utilization:g}",
            "ROLLOUT_KV_CACHE_DTYPE": request.kv_cache_dtype,
            "ROLLOUT_MAX_MODEL_LEN": str(request.batch.context),
            "ROLLOUT_MAX_NUM_SEQS": str(request.max_num_seqs),
            "ROLLOUT_MAX_LORA_RANK": str(request.lora_rank),
            "ROLLOUT_SERVING_MODE": request.serving_mode,
            **({} if request.load_in_4bit else bases),
            **({"TRAINER_OFFLOAD_ACTIVATIONS": "true"} if request.offload else {}),
        }

    @property
    def run_config(self) -> dict[str, Any]:
        request = self.placement.request
        merged = {"in_flight": "continue"} if request.serving_mode == "merged" else {}
        return {
            "prompts_per_step": request.batch.num_groups,
            "sampling": {"n": request.batch.group_size, "max_tokens": request.batch.completion},
            "lora": {"rank": request.lora_rank},
            "optimizer": {"name": request.optimizer},
            "max_tokens_per_micro_batch": self.placement.max_tokens,
            **merged,
        }


def make_plan(request: Request) -> Plan:
    one, two = place(request, 1), place(request, 2)
    if not one.missing_bytes:
        return Plan(one, f"fits on one GPU; its KV cache holds {_holds(one)}")
    if not two.missing_bytes:
        todo = _remedy(request, lambda other: place(other, 1))
        return Plan(
            two,
            "fits on two GPUs, one for the trainer and one for the replica, whose KV cache holds "
            f"{_holds(two)}; on one they lack {_gibibytes(one.missing_bytes)}: {todo}",
        )
    todo = _remedy(request, lambda other: place(other, 2))
    return Plan(
        two,
        f"does not fit, even with a GPU for each: {two.lacks_more} lacks "
        f"{_gibibytes(two.missing_bytes)}; {todo}",
    )


def _holds(placement: Placement) -> str:
    batch, num_groups = placement.request.batch, placement.num_groups
    groups = f"{num_groups:,} group{'' if num_groups == 1 else 's'} of {batch.group_size}"
    alone = f"{placement.num_completions:,} completions of {batch.context:,} tokens"
    return f"{groups} at once, or {alone} that share no prompt"


def _gibibytes(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def _remedy(request: Request, placed: Callable[[Request], Placement]) -> str:
    """The first change after which it fits."""
    for words, changed in _changes(request):
        placement = placed(changed)
        if not placement.missing_bytes:
            return words.format(placement)
    needed = (request.gpu.usable_bytes + placed(request).missing_bytes) / GIB
    return f"take a GPU with {math.ceil(needed)} GiB or more, or a smaller model"


def _changes(request: Request) -> Iterator[tuple[str, Request]]:
    """Settings that take less, those first that cost nothing else; words have a placement."""
    batch = request.batch
    if request.max_tokens:
        yield (
            "lower max_tokens_per_micro_batch to {0.max_tokens}",
            replace(request, max_tokens=None),
        )
    if not request.offload:
        yield "set TRAINER_OFFLOAD_ACTIVATIONS=true", replace(request, offload=True)
    if request.kv_cache_dtype != "fp8" and request.gpu.has_fp8 is not False:
        condition = "" if request.gpu.has_fp8 else " (it needs compute capability 8.9)"
        yield f"set ROLLOUT_KV_CACHE_DTYPE=fp8{condition}", replace(request, kv_cache_dtype="fp8")
    if request.serving_mode == "merged":
        yield "set ROLLOUT_SERVING_MODE=lora", replace(request, serving_mode="lora")
    if not request.load_in_4bit:
        yield (
            "set TRAINER_LOAD_IN_4BIT=true and ROLLOUT_BASE=nf4-exact",
            replace(request, load_in_4bit=True),
        )
    if request.optimizer == "adamw":
        yield "set optimizer.name to adamw_8bit", replace(request, optimizer="adamw_8bit")
    for size in range(batch.group_size - 1, max(batch.group_size // 2, 2) - 1, -1):
        smaller = replace(request, batch=replace(batch, group_size=size))
        yield f"lower sampling.n to {size}", smaller
    for rank in reversed([rank for rank in LORA_RANKS if 8 <= rank < request.lora_rank]):
        yield f"lower lora.rank to {rank}", replace(request, lora_rank=rank)
    for context in range((batch.context - 1) // _STEP * _STEP, 0, -_STEP):
        completion = max(min(batch.completion, context // 2), context - batch.prompt)
        shorter = replace(batch, prompt=context - completion, completion=completion)
        words = f"shorten the context to {context:,} tokens"
        if completion < batch.completion:
            words += f", with completions (sampling.max_tokens) of {completion:,}"
        yield words, replace(request, batch=shorter)
