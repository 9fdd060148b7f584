"""What trainer and replica allocate on a GPU, in bytes, counted as their code allocates it.

    trainer   weights, LoRA, gradients and moments stay. On top of them an update has its peak in
              the head (logprobs.py), in the layer that is computed again for the backward pass
              (lora.py, liger-kernel, attention.py), or in the optimizer's step
    replica   vLLM takes a share of the GPU for weights, adapters and activations; the KV cache is
              what they leave of it

All but the figures that are named here follows from the model's shape. Counted is an update of one
optimizer step on CUDA, without critic; tests/trainer/plan/test_plan.py has the measured peaks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from services.trainer.plan.inputs import Model
from shared.schemas import ServingMode

Optimizer = Literal["adamw", "adamw_8bit"]
KvCacheDtype = Literal["fp8", "auto"]
_HALF, _FLOAT = 2, 4  # Bytes.

# --- figures that do not follow from the shape
# cuBLAS keeps 32 MiB on Hopper, cuBLASLt as much (torch's defaults).
_CUBLAS_BYTES = 64 << 20
# A CUDA context with the kernels of torch and Triton; an allowance, not measured.
CONTEXT_BYTES = 640 << 20
# Share of activations that torch's allocator wastes; an allowance, not measured.
_FRAGMENTS = 0.1
# What vLLM 0.26 counts in its share besides weights, adapters, activations and KV cache (kernels,
# NCCL, buffers): 1.17e9 bytes were left over on an H200, see tests/trainer/plan/test_plan.py.
_ENGINE_BYTES = 1_170_000_000
# CUDA graphs on top of vLLM 0.26's share; an allowance, not measured.
_GRAPH_BYTES = 1 << 30

# --- figures of other files, which import what the planner must not: tests hold them equal
CHUNK_LOGITS = 1 << 27  # As in trainer/policy/logprobs.py.
SCORE_POSITIONS = 8192  # As in trainer/policy/policy.py.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # As in rollout/settings.py.
MAX_LIVE_POLICIES = 2  # As in rollout/settings.py.
OFFLOADED_LEFT = 3  # Layer inputs still on the device; see trainer/policy/offload.py.
_BATCHED_TOKENS = 2048  # vLLM's default for an engine without a server.
BLOCK_TOKENS = 16  # Block size of vLLM's KV cache.
_ATTENTION_ROWS = 128  # Rows to which flash attention pads every segment in the backward pass.


# --- the trainer --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of an update."""

    num_groups: int
    group_size: int
    prompt: int  # In tokens.
    completion: int

    @property
    def context(self) -> int:
        return self.prompt + self.completion

    @property
    def group_positions(self) -> int:
        return _positions(self.prompt, self.completion, self.group_size)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Trees of one size in a packed row (samples.py)."""

    num_trees: int
    tree_size: int  # In completions.
    prompt: int
    completion: int

    @property
    def num_completions(self) -> int:
        return self.num_trees * self.tree_size

    @property
    def positions(self) -> int:
        return self.num_trees * _positions(self.prompt, self.completion, self.tree_size)

    @property
    def keys(self) -> int:
        """Each completion of a shared prompt has a copy of the prompt's."""
        copies = self.num_completions if self.tree_size > 1 else 0
        return self.positions + copies * self.prompt

    @property
    def segments(self) -> int:
        return self.num_completions + (self.num_trees if self.tree_size > 1 else 0)

    @property
    def tokens(self) -> int:
        """Whose logprobs are computed."""
        return self.num_completions * self.completion


def micro_batches(batch: Batch, max_tokens: int) -> list[MicroBatch]:
    """The largest ones that the trainer cuts a batch into, one per size of tree."""
    sizes = Counter(_trees(batch, batch.group_size, max_tokens))
    return [
        MicroBatch(
            num_trees=min(
                count * batch.num_groups,
                max(1, max_tokens // _positions(batch.prompt, batch.completion, size)),
            ),
            tree_size=size,
            prompt=batch.prompt,
            completion=batch.completion,
        )
        for size, count in sizes.items()
    ]


def _trees(batch: Batch, num_completions: int, max_tokens: int) -> list[int]:
    """Completions per tree, of a group or a part of one."""
    positions = _positions(batch.prompt, batch.completion, num_completions)
    if num_completions == 1 or positions <= max_tokens:
        return [num_completions]
    half = num_completions // 2
    parts = half, num_completions - half
    return [size for part in parts for size in _trees(batch, part, max_tokens)]


def _positions(prompt: int, completion: int, num_completions: int) -> int:
    return prompt + num_completions * (completion - 1)  # The last token of each predicts nothing.


@dataclass(frozen=True, slots=True)
class Activations:
    """Of a micro-batch."""

    layer_inputs: int  # Inputs that the device keeps for the backward pass.
    host_inputs: int  # Inputs in host memory at that time.
    last_inputs: int  # Inputs still there at the first layer, which is computed last.
    head: int  # Logits of a chunk, and the final states.
    layer: int  # The last layer, recomputed, with its gradients.

    @property
    def peak(self) -> int:
        return self.layer_inputs + max(self.head, self.layer)


def activations(
    model: Model, micro: MicroBatch, *, load_in_4bit: bool, offload: bool
) -> Activations:
    positions, keys, width = micro.positions, micro.keys, model.query_width
    dense = _HALF * model.largest_linear
    inputs = _HALF * positions * model.hidden
    # At the backward pass of down_proj. Saved: two normed inputs and the state between them,
    # queries before and after their norm and what they attended to, keys before it, gate, up and
    # their product; gradients by the output and by the product. The weight, and weight and gradient
    # beside LoRA's.
    mlp = _HALF * positions * (4 * model.hidden + 3 * width + model.key_width)
    mlp += _HALF * positions * 4 * model.intermediate + 2 * _HALF * keys * model.key_width
    mlp += (2 if load_in_4bit else 1) * dense + inputs
    # At that of flash attention. The MLP is gone; gradients by the residual, by what was attended
    # to, by queries (and float32 sums of it, padded), by keys and values (and per head of queries),
    # beside which there are copies of shared ones.
    attention = _HALF * positions * (2 * model.hidden + 5 * width + model.key_width)
    attention += _FLOAT * (positions + _ATTENTION_ROWS * micro.segments) * width
    attention += (4 if micro.tree_size > 1 else 2) * _HALF * keys * model.key_width
    attention += 2 * _HALF * keys * width if model.kv_heads < model.heads else 0
    return Activations(
        layer_inputs=(OFFLOADED_LEFT if offload else model.layers) * inputs,
        host_inputs=model.layers * inputs if offload else 0,
        last_inputs=(OFFLOADED_LEFT if offload else 1) * inputs,
        head=_head(model, positions, micro.tokens, has_gradients=True),
        layer=max(mlp, attention),
    )


def _head(model: Model, positions: int, tokens: int, *, has_gradients: bool) -> int:
    """Logits of a chunk in float32, the final states and those that predict a token; gradients by
    the logits in 16 bits, and by the last."""
    logits = min(tokens, max(1, CHUNK_LOGITS // model.vocabulary)) * model.vocabulary
    half = positions * model.hidden + tokens * model.hidden
    if has_gradients:
        half += logits + tokens * model.hidden
    return _FLOAT * logits + _HALF * half


@dataclass(frozen=True, slots=True)
class TrainerMemory:
    weights: int
    lora: int  # In float32.
    gradients: int
    optimizer: int
    cublas: int
    activations: Activations
    step: int  # Temporaries of the optimizer step.
    is_cut: bool  # Whether several micro-batches accumulate gradients.
    other_lengths: int  # Growth of the peak when samples have other lengths than planned.

    @property
    def peak(self) -> int:
        """The most that torch has allocated in an update of completions as long as planned for."""
        earlier = self.gradients if self.is_cut else 0
        on_top = (
            earlier + self.activations.peak,
            self.gradients + self.activations.last_inputs + self.activations.layer,
            self.gradients + self.step,
        )
        return self.weights + self.lora + self.optimizer + self.cublas + max(on_top)

    @property
    def fragments(self) -> int:
        return round(_FRAGMENTS * (self.activations.peak + self.other_lengths))

    @property
    def total(self) -> int:
        """What the process takes of the GPU."""
        return self.peak + self.other_lengths + self.fragments + CONTEXT_BYTES


def trainer_memory(
    model: Model,
    batch: Batch,
    *,
    max_tokens: int,
    lora_rank: int,
    optimizer: Optimizer,
    load_in_4bit: bool,
    offload: bool = False,
) -> TrainerMemory:
    """`max_tokens`: of a micro-batch; `offload`: with TRAINER_OFFLOAD_ACTIVATIONS."""

    def largest(completion: int) -> tuple[Activations, float]:
        """And the peak that there can be where other lengths fill the micro-batch."""
        found, filled = [], []
        for micro in micro_batches(replace(batch, completion=completion), max_tokens):
            parts = activations(model, micro, load_in_4bit=load_in_4bit, offload=offload)
            found.append(parts)
            is_all = micro.num_completions == batch.num_groups * batch.group_size
            filling = 1.0 if is_all else max(max_tokens / micro.positions, 1.0)
            filled.append(filling * parts.peak)
        return max(found, key=lambda parts: parts.peak), max(filled)

    first, *others = micro_batches(batch, max_tokens)
    lora, (planned, filled) = _FLOAT * model.num_lora(lora_rank), largest(batch.completion)
    # Shorter completions need more copies of their prompt's keys.
    shorter = [largest(max(batch.completion // divisor, 1))[1] for divisor in (2, 4)]
    scores = _head(model, SCORE_POSITIONS, SCORE_POSITIONS, has_gradients=False) - lora
    return TrainerMemory(
        weights=model.nf4_bytes if load_in_4bit else model.weights.bf16,
        lora=lora,
        gradients=lora,
        # Two moments; in 8 bits, 256 values share a float32.
        optimizer=2 * lora if optimizer == "adamw" else round(lora / 2 * (1 + 4 / 256)),
        cublas=_CUBLAS_BYTES,
        activations=planned,
        step=lora if optimizer == "adamw" else 0,  # Square roots of the second moments.
        is_cut=bool(others) or first.num_completions < batch.num_groups * batch.group_size,
        other_lengths=round(max(filled, *shorter, scores)) - planned.peak,
    )


# --- the replica --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReplicaMemory:
    weights: int  # In bfloat16.
    copy: int  # Copy of the linears, from which merged adapters are removed.
    slots: int  # Adapter slots.
    engine: int
    token: Mapping[KvCacheDtype, int]  # KV cache per token.
    beside: int  # On top of vLLM's share: CUDA context, graphs, an adapter being loaded.

    @property
    def fixed(self) -> int:
        """Of vLLM's share, before any KV cache."""
        return self.weights + self.copy + self.slots + self.engine

    def kv_tokens(self, share: int, dtype: KvCacheDtype) -> int:
        """That fit in what `share` leaves."""
        blocks = max(share - self.fixed, 0) // (BLOCK_TOKENS * self.token[dtype])
        return blocks * BLOCK_TOKENS


def replica_memory(
    model: Model, *, lora_rank: int, max_num_seqs: int, serving_mode: ServingMode
) -> ReplicaMemory:
    adapter = _HALF * model.num_lora(lora_rank)
    slot_rank = next(rank for rank in LORA_RANKS if rank >= lora_rank)
    slots = (MAX_LIVE_POLICIES + 1) * _HALF * model.num_lora(slot_rank)
    is_merged = serving_mode == "merged"
    states = _HALF * _BATCHED_TOKENS * 3 * (model.hidden + model.intermediate)
    logits = _FLOAT * max_num_seqs * model.vocabulary
    key_values = 2 * model.layers * model.key_width
    return ReplicaMemory(
        weights=model.weights.bf16,
        copy=_HALF * model.num_linear if is_merged else 0,
        slots=0 if is_merged else slots,
        engine=max(states, logits) + _ENGINE_BYTES,
        token={"fp8": key_values, "auto": _HALF * key_values},
        beside=CONTEXT_BYTES + _GRAPH_BYTES + (2 * adapter if is_merged else adapter),
    )
