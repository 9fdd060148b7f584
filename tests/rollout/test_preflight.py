"""What a replica refuses before it loads anything."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from services.machine import Gpu, Memory, weight_bytes
from services.rollout.preflight import (
    adapter_bytes,
    check_gpus,
    check_start,
    choose_attention,
    warn_of_small_adapter_dir,
)
from services.rollout.settings import RolloutSettings, prepare_environment
from services.server import read_settings
from shared.model_folder import linear_shapes

GIB = 1 << 30


def settings(**fields: Any) -> RolloutSettings:
    return RolloutSettings.model_validate({"model": "big", "device": "cpu", **fields})


def gpu(total: int, free: int) -> Gpu:
    return Gpu("H200", (9, 0), Memory(total * GIB, free * GIB, "on GPU 0 (H200)"))


def attention(*capabilities: tuple[int, int], **fields: Any) -> tuple[str, str | None]:
    """KV cache and backend on GPUs of these capabilities."""
    gpus = [
        Gpu("GPU", capability, Memory(80 * GIB, 80 * GIB, "on it")) for capability in capabilities
    ]
    chosen = choose_attention(settings(device="cuda", **fields), gpus)
    return chosen.resolved_kv_cache_dtype, chosen.attention_backend


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
    with pytest.raises(
        ValueError, match=r"KV cache 1048576.0 GiB, vLLM 512 MiB\), but only .* free"
    ):
        check_start(settings(**here, kv_cache_memory_bytes=1 << 50))


def test_what_fits_is_the_folder_of_the_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    here = settings(model=str(tiny_checkpoint), adapter_dir=tmp_path)
    assert check_start(here) == (here, tiny_checkpoint)


@pytest.mark.parametrize(
    ("capability", "fp8", "auto"),
    [
        ((8, 9), "TRITON_ATTN", None),
        ((9, 0), None, None),
        ((10, 0), "TRITON_ATTN", "TRITON_ATTN"),
        ((10, 3), "TRITON_ATTN", "TRITON_ATTN"),
        ((12, 0), "TRITON_ATTN", None),
    ],
)
def test_where_vllm_would_compile_attention_it_is_told_to_use_triton(
    capability: tuple[int, int], fp8: str | None, auto: str | None
) -> None:
    assert attention(capability) == ("fp8", fp8)
    assert attention(capability, kv_cache_dtype="auto") == ("auto", auto)


def test_the_other_fp8_is_triton_s_on_hopper_too() -> None:
    assert attention((9, 0), kv_cache_dtype="fp8_e5m2") == ("fp8_e5m2", "TRITON_ATTN")


@pytest.mark.parametrize("named", ["FLASHINFER", "FLASH_ATTN"])
def test_a_backend_that_is_named_stays(named: str) -> None:
    assert attention((10, 0), attention_backend=named) == ("fp8", named)


@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3"])
def test_a_gpu_without_fp8_keeps_its_kv_cache_in_16_bits_and_says_why(
    dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "services")
    assert attention((8, 0), kv_cache_dtype=dtype) == ("auto", None)
    (record,) = caplog.records
    assert "needs a GPU of compute capability 8.9, GPU has 8.0" in record.getMessage()
    assert attention((8, 6), kv_cache_dtype=dtype, attention_backend="TRITON_ATTN")[0] == "auto"


def test_flashinfer_named_has_fp8_on_every_gpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "services")
    assert attention((8, 0), attention_backend="FLASHINFER") == ("fp8", "FLASHINFER")
    assert caplog.records == []


def test_the_oldest_of_several_gpus_says_whether_there_is_fp8() -> None:
    assert attention((9, 0), (8, 0)) == ("auto", None)
    assert attention((9, 0), (10, 0)) == ("fp8", "TRITON_ATTN")


def test_vllm_does_not_compile_a_sampler_unless_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.environ", {})
    prepare_environment(settings(device="cuda"))
    assert os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    monkeypatch.setattr("os.environ", {"VLLM_USE_FLASHINFER_SAMPLER": "1"})
    prepare_environment(settings(device="cuda"))
    assert os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == "1"


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("GPU_MEMORY_UTILIZATION", "0", "greater than 0"),
        ("GPU_MEMORY_UTILIZATION", "85", "less than or equal to 1"),
        ("TENSOR_PARALLEL_SIZE", "0", "greater than or equal to 1"),
        ("KV_CACHE_MEMORY_BYTES", "0", "greater than or equal to 1"),
        ("MAX_MODEL_LEN", "-1", "greater than or equal to 1"),
        ("MAX_NUM_SEQS", "0", "greater than or equal to 1"),
        ("MAX_NUM_BATCHED_TOKENS", "0", "greater than or equal to 1"),
        ("SEED", "-1", "greater than or equal to 0"),
        ("MAX_ADAPTER_BYTES", "0", "greater than or equal to 1"),
        ("MAX_BODY_BYTES", "0", "greater than or equal to 1"),
        ("BODY_TIMEOUT_S", "0", "greater than 0"),
        ("REQUEST_TIMEOUT_S", "0", "greater than 0"),
        ("SYNC_WAIT_S", "-1", "greater than or equal to 0"),
        ("STALL_TIMEOUT_S", "0", "greater than 0"),
        ("DRAIN_DELAY_S", "-1", "greater than or equal to 0"),
        ("DRAIN_TIMEOUT_S", "-1", "greater than or equal to 0"),
        ("ATTENTION_BACKEND", "FLASH", "'FLASH_ATTN', 'FLASHINFER', 'TRITON_ATTN'"),
    ],
)
def test_a_setting_out_of_its_bounds_is_named_with_them(
    name: str,
    value: str,
    bound: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ROLLOUT_MODEL", "m")
    monkeypatch.setenv(f"ROLLOUT_{name}", value)
    with pytest.raises(SystemExit):
        read_settings(RolloutSettings)
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"ROLLOUT_{name}: ")
    assert bound in sentence


def test_merged_serving_takes_its_copy_of_the_base_from_vllm_s_share(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = weight_bytes(tiny_checkpoint).linears
    assert copy == sum(
        2 * num_out * num_in for num_out, num_in in linear_shapes(tiny_checkpoint).values()
    )
    one = Gpu("H200", (9, 0), Memory(8 * copy, 8 * copy, "on GPU 0"))
    monkeypatch.setattr("services.rollout.preflight.gpus_by_a_child", lambda _: [one])
    common = {"model": str(tiny_checkpoint), "device": "cuda", "adapter_dir": tmp_path}
    merged, _ = check_start(settings(serving_mode="merged", gpu_memory_utilization=0.75, **common))
    assert merged.gpu_memory_utilization == pytest.approx(0.75 - 1 / 8)
    with pytest.raises(ValueError, match=r"its weights take .* raise that"):
        check_start(settings(serving_mode="merged", gpu_memory_utilization=0.25, **common))
    check_start(settings(serving_mode="lora", gpu_memory_utilization=0.25, **common))
    fixed, _ = check_start(
        settings(
            serving_mode="merged", gpu_memory_utilization=0.05, kv_cache_memory_bytes=1, **common
        )
    )
    assert fixed.gpu_memory_utilization == 0.05


def test_adapters_are_merged_on_one_gpu_alone() -> None:
    with pytest.raises(ValueError, match=r"merged with ROLLOUT_TENSOR_PARALLEL_SIZE=2"):
        check_start(settings(device="cuda", serving_mode="merged", tensor_parallel_size=2))


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
