"""Settings of a replica, from the environment: `ROLLOUT_MODEL=... python -m services.rollout`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.auth import ApiKey
from shared.http_client import ROLLOUT_PORT
from shared.logs import LogLevel
from shared.schemas import RolloutLimits, ServingMode

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks vLLM has slots for
AttentionBackend = Literal["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION"]  # vLLM's
_SHARED_MEMORY = Path("/dev/shm")
_SERVICE_URL = re.compile(r"https?://[^/?#\s]{1,280}/?")


class RolloutSettings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="ROLLOUT_", extra="forbid", frozen=True, env_ignore_empty=True
    )

    model: str  # checkpoint folder or hub id: the model that the trainer trains
    host: str = "127.0.0.1"  # to listen on; another than loopback needs a key
    port: int = Field(default=ROLLOUT_PORT, ge=0, le=65535)  # 0: any free one
    # of both services; every route but /healthz wants it
    api_key: ApiKey | None = Field(default=None, validation_alias="TANDEM_API_KEY", repr=False)
    log_level: LogLevel = "INFO"  # what is logged

    trainer_url: str | None = None  # registers itself there, and renews
    advertise_url: str | None = Field(  # where that trainer reaches it; default: its own address
        default=None, validate_default=True
    )
    lease_s: float = Field(gt=0, default=15.0)  # the registration's; renewed three times as often

    # nf4-exact: what a 4-bit trainer computes with; original: the 16-bit weights
    base: Literal["nf4-exact", "original"] = "nf4-exact"
    cache_dir: Path = Path("~/.cache/tandem")  # the exact bases, by fingerprint
    adapter_dir: Path | None = None  # resident adapter files; default: shared memory

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    kv_cache_dtype: str = "default"  # default: fp8 on a GPU that has it, else auto
    kv_cache_memory_bytes: int | None = Field(  # default: 256 MiB on CPU, the rest of a GPU
        default=None, ge=1
    )
    attention_backend: AttentionBackend | None = None  # on a GPU; default: one that needs no nvcc
    # the share of a GPU that vLLM takes
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    tensor_parallel_size: int = Field(default=1, ge=1)  # GPUs of one replica
    max_model_len: int | None = Field(  # prompt + completion tokens; default: the model's
        default=None, ge=1
    )
    max_num_seqs: int = Field(default=256, ge=1)  # sequences that run at once
    # of one engine step; default: vLLM's
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    enforce_eager: bool = False  # without CUDA graphs: boots sooner, samples slower
    seed: int = Field(default=0, ge=0, lt=1 << 32)  # of requests without one

    # lora: adapters beside the base, several at once. merged: one at a time, in the base's weights.
    serving_mode: ServingMode = "lora"
    max_lora_rank: int = Field(default=32, ge=1, le=512)  # the largest rank a run may have
    max_live_policies: int = Field(default=2, ge=1, le=16)  # one more slot receives the next one

    max_completions: int = Field(default=4096, ge=1)  # per request, and queued or running in all
    max_adapter_bytes: int = Field(default=1 << 30, ge=1)  # of one adapter file
    max_body_bytes: int = Field(default=32 << 20, ge=1)  # of a JSON request
    body_timeout_s: float = Field(gt=0, default=300.0)  # for the whole body of a request to arrive
    request_timeout_s: float = Field(gt=0, default=600.0)  # for a request to be answered
    stream_interval: int = Field(default=8, ge=1)  # tokens of a completion per record of a stream
    sync_wait_s: float = Field(ge=0, default=30.0)  # a sync, for a version to be released
    stall_timeout_s: float = Field(  # no token for this long while requests run: the engine hangs
        gt=0, default=120.0
    )
    drain_delay_s: float = Field(  # not ready but serving, until every client has noticed
        ge=0, default=3.0
    )
    drain_timeout_s: float = Field(ge=0, default=120.0)  # for running requests to finish

    @field_validator("trainer_url", "advertise_url")
    @classmethod
    def _is_a_service_url(cls, url: str | None) -> str | None:
        if url is not None and not (_SERVICE_URL.fullmatch(url) and _has_valid_port(url)):
            raise ValueError(f"{url!r} is not the URL of a service: write it as http://host:port")
        return url

    @field_validator("advertise_url")
    @classmethod
    def _is_known_to_the_trainer(cls, url: str | None, info: ValidationInfo) -> str | None:
        if url is None and info.data.get("trainer_url") and info.data.get("port") == 0:
            raise ValueError(
                "ROLLOUT_PORT=0 takes any free port, which the trainer of ROLLOUT_TRAINER_URL "
                "cannot know: set the port, or this to where the trainer reaches the replica"
            )
        return url

    @property
    def resolved_device(self) -> Literal["cpu", "cuda"]:
        if self.device != "auto":
            return self.device
        return "cuda" if any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"

    @property
    def num_live_policies(self) -> int:
        return 1 if self.serving_mode == "merged" else self.max_live_policies

    @property
    def lora_slot_rank(self) -> int:
        """The smallest rank vLLM offers that holds `max_lora_rank`."""
        return next(rank for rank in _LORA_RANKS if rank >= self.max_lora_rank)

    @property
    def resolved_kv_cache_dtype(self) -> str:
        """fp8 by default on a GPU; on a CPU without the instructions for it always auto."""
        on_cpu = self.resolved_device == "cpu"
        if self.kv_cache_dtype == "default":
            return "auto" if on_cpu else "fp8"
        if on_cpu and self.kv_cache_dtype.startswith("fp8") and not _cpu_has_fp8_kernels():
            return "auto"
        return self.kv_cache_dtype

    @property
    def resolved_adapter_dir(self) -> Path:
        root = self.adapter_dir or (_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path("/tmp"))
        return root.expanduser().resolve()

    def limits(self, max_model_len: int) -> RolloutLimits:
        return RolloutLimits(
            max_model_len=max_model_len,
            max_lora_rank=self.max_lora_rank,
            max_live_policies=self.num_live_policies,
            max_num_seqs=self.max_num_seqs,
            max_completions=self.max_completions,
            max_adapter_bytes=self.max_adapter_bytes,
            max_body_bytes=self.max_body_bytes,
        )


def _has_valid_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _cpu_has_fp8_kernels() -> bool:
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return bool(flags and {"avx512f", "amx_tile"} & set(flags[1].split()))


def prepare_environment(settings: RolloutSettings) -> None:
    """Set what torch and vllm read when they are imported; call before that.

    CPU: without torch.compile and with one engine process the boot takes 3 s instead of 35 s, and
    one OpenMP thread is faster than two that spin. CUDA: a forked engine core hangs at start-up,
    and what is compiled is kept, which halves the next start.
    """
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if settings.resolved_device == "cpu":
        environment |= {
            "TORCH_COMPILE_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings there are about GPUs
        }
    else:
        compiled = settings.cache_dir.expanduser() / "vllm"
        environment |= {
            "VLLM_CACHE_ROOT": str(compiled),
            "TRITON_CACHE_DIR": str(compiled / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            # It is compiled at the first use, for which an image need not have the tools. It would
            # seldom be used: it returns no logprobs of the distribution that was sampled.
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
        }
    for name, value in environment.items():
        os.environ.setdefault(name, value)
