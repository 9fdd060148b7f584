"""Settings of a replica, from the environment: `ROLLOUT_MODEL=... python -m services.rollout`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.auth import ApiKey
from shared.http_client import ROLLOUT_PORT
from shared.logs import LogLevel
from shared.schemas import ReplicaRegistration, RolloutLimits, ServingMode

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # Ranks of vLLM's adapter slots.
AttentionBackend = Literal["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION"]  # vLLM's
_SHARED_MEMORY = Path("/dev/shm")
_SERVICE_URL = re.compile(r"https?://[^/?#\s]{1,280}/?")


class RolloutSettings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="ROLLOUT_", extra="forbid", frozen=True, env_ignore_empty=True
    )

    model: str  # Checkpoint folder or hub id of the model that the trainer trains.
    host: str = "127.0.0.1"  # Address to listen on; any but loopback requires a key.
    port: int = Field(
        default=ROLLOUT_PORT, ge=0, le=65535
    )  # Port to listen on; 0 takes a free one.
    # Key of both services; every route but /healthz requires it.
    api_key: ApiKey | None = Field(default=None, validation_alias="TANDEM_API_KEY", repr=False)
    log_level: LogLevel = "INFO"  # Least severe messages to log.

    trainer_url: str | None = (
        None  # Trainer to register with; None: the trainer knows this replica.
    )
    advertise_url: str | None = Field(  # URL that the trainer is to use; default: the own address.
        default=None, validate_default=True
    )
    lease_s: float = Field(
        gt=0, default=15.0
    )  # Lease of a registration, renewed every third of it.

    # nf4-exact: the dequantized weights of a 4-bit trainer. original: the 16-bit weights.
    base: Literal["nf4-exact", "original"] = "nf4-exact"
    cache_dir: Path = Path("~/.cache/tandem")  # Where exact bases are kept, by fingerprint.
    adapter_dir: Path | None = None  # Where adapter files are kept; None: shared memory.

    device: Literal["auto", "cpu", "cuda"] = "auto"  # `auto` takes a GPU if there is one.
    kv_cache_dtype: str = "default"  # vLLM's dtypes; `default` is fp8 on a GPU that has it.
    kv_cache_memory_bytes: int | None = Field(  # None: 256 MiB on a CPU, what is left on a GPU.
        default=None, ge=1
    )
    attention_backend: AttentionBackend | None = None  # None: on a GPU, one that needs no nvcc.
    # Share of the GPU's memory that vLLM takes.
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    tensor_parallel_size: int = Field(default=1, ge=1)  # GPUs per replica.
    max_model_len: int | None = Field(  # Prompt and completion tokens; None: the model's limit.
        default=None, ge=1
    )
    max_num_seqs: int = Field(default=256, ge=1)  # Sequences that run at the same time.
    # Tokens of one engine step; None: vLLM's choice.
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    enforce_eager: bool = False  # Skip CUDA graphs, which boots sooner and samples slower.
    seed: int = Field(default=0, ge=0, lt=1 << 32)  # Seed of requests without one.

    # lora: several adapters next to the base. merged: one adapter, merged into the base's weights.
    serving_mode: ServingMode = "lora"
    max_lora_rank: int = Field(default=32, ge=1, le=512)  # Largest LoRA rank of a run.
    # Policy versions served at the same time; the engine gets one more slot for the next one.
    max_live_policies: int = Field(default=2, ge=1, le=16)

    # Limit on the completions of one request, and on all that are queued or running.
    max_completions: int = Field(default=4096, ge=1)
    max_adapter_bytes: int = Field(default=1 << 30, ge=1)  # Largest adapter file.
    max_body_bytes: int = Field(default=32 << 20, ge=1)  # Largest JSON body of a request.
    body_timeout_s: float = Field(gt=0, default=300.0)  # Time limit for a request body to arrive.
    request_timeout_s: float = Field(gt=0, default=600.0)  # Time limit for the answer to a request.
    stream_interval: int = Field(default=8, ge=1)  # Tokens per completion in one stream record.
    sync_wait_s: float = Field(ge=0, default=30.0)  # How long a sync waits for a free adapter slot.
    # An engine that runs requests without a token for this long is taken to hang.
    stall_timeout_s: float = Field(gt=0, default=120.0)
    # How long a draining replica still takes requests, while clients notice that it is not ready.
    drain_delay_s: float = Field(ge=0, default=3.0)
    # Time limit for running requests to finish.
    drain_timeout_s: float = Field(ge=0, default=120.0)

    @field_validator("advertise_url")
    @classmethod
    def _can_be_registered(cls, url: str | None) -> str | None:
        if url is not None:
            try:
                ReplicaRegistration(url=url)
            except ValidationError:
                raise ValueError(
                    f"{url!r} is not the URL of a replica: write it as http://host:port, with the "
                    "port even where it is the default"
                ) from None
        return url

    @field_validator("trainer_url")
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
