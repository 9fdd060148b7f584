"""What a replica refuses before it loads anything."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from services.machine import Gpu, Memory
from services.rollout.preflight import (
    adapter_bytes,
    check_gpus,
    check_start,
    warn_of_small_adapter_dir,
)
from services.rollout.settings import RolloutSettings
from shared.checkpoints import linear_shapes

GIB = 1 << 30


def settings(**fields: Any) -> RolloutSettings:
    return RolloutSettings.model_validate({"model": "big", "device": "cpu", **fields})


def gpu(total: int, free: int) -> Gpu:
    return Gpu("H200", Memory(total * GIB, free * GIB, "on GPU 0 (H200)"))


def test_a_gpu_that_others_use_may_become_free() -> None:
    with pytest.raises(
        MemoryError, match=r"ROLLOUT_GPU_MEMORY_UTILIZATION=0.85 asks for 68.0 GiB of 80.0 GiB"
    ):
        check_gpus(settings(), 10 * GIB, [gpu(80, 60)])
    check_gpus(settings(gpu_memory_utilization=0.7), 10 * GIB, [gpu(80, 60)])


def test_weights_larger_than_the_share_of_a_gpu_need_more_gpus() -> None:
    with pytest.raises(ValueError, match=r"its weights take 30.0 GiB of each GPU, and ROLLOUT_GPU"):
        check_gpus(settings(gpu_memory_utilization=0.5), 30 * GIB, [gpu(40, 40)])
    two = settings(gpu_memory_utilization=0.5, tensor_parallel_size=2)
    check_gpus(two, 30 * GIB, [gpu(40, 40)] * 2)


def test_with_a_kv_cache_of_a_given_size_the_share_does_not_count() -> None:
    fixed = settings(kv_cache_memory_bytes=GIB)
    check_gpus(fixed, 10 * GIB, [gpu(80, 11)])
    with pytest.raises(MemoryError, match=r"needs at least 11.0 GiB"):
        check_gpus(fixed, 10 * GIB, [gpu(80, 10)])


def test_a_replica_cannot_span_more_gpus_than_it_sees() -> None:
    with pytest.raises(ValueError, match=r"^ROLLOUT_TENSOR_PARALLEL_SIZE=2, and .* sees 1 GPUs"):
        check_gpus(settings(tensor_parallel_size=2), GIB, [gpu(80, 80)])


def test_a_cpu_is_one_device() -> None:
    with pytest.raises(ValueError, match=r"^ROLLOUT_TENSOR_PARALLEL_SIZE=2 .* on a CPU set it"):
        check_start(settings(tensor_parallel_size=2))


def test_a_kv_cache_larger_than_the_machine_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    here = {"model": str(tiny_checkpoint), "adapter_dir": tmp_path}
    with pytest.raises(ValueError, match=r"KV cache 1048576.0 GiB, vLLM 512 MiB\), and .* free"):
        check_start(settings(**here, kv_cache_memory_bytes=1 << 50))


def test_what_fits_is_the_folder_of_the_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert (
        check_start(settings(model=str(tiny_checkpoint), adapter_dir=tmp_path)) == tiny_checkpoint
    )


def test_the_room_of_an_adapter_is_that_of_its_file(tiny_checkpoint: Path) -> None:
    shapes = linear_shapes(tiny_checkpoint)
    in_and_out = [128 + 128, 64 + 128, 64 + 128, 128 + 128, 384 + 128, 384 + 128, 128 + 384]
    assert adapter_bytes(shapes, rank=8) == 4 * 2 * 8 * sum(in_and_out)
    assert adapter_bytes({"model.layers.0.mlp.router": (8, 8)}, rank=8) == 0


def test_a_folder_too_small_for_the_adapters_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "services")
    huge = {"model.layers.0.self_attn.q_proj": (1 << 44, 1 << 44)}
    warn_of_small_adapter_dir(settings(adapter_dir=tmp_path), huge)
    (record,) = caplog.records
    assert record.getMessage().startswith(str(tmp_path))
    assert "3 adapters of rank 32 take" in record.getMessage()
    assert "shm_size" in record.getMessage()


def test_a_folder_with_room_is_not(
    tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_small_adapter_dir(settings(adapter_dir=tmp_path), linear_shapes(tiny_checkpoint))
    assert caplog.records == []
