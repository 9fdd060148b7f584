"""Settings of the trainer, from the environment: `TRAINER_MODEL=... python -m services.trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.auth import ApiKey
from shared.http_client import ROLLOUT_PORT, TRAINER_PORT, service_url
from shared.logs import LogLevel


class TrainerSettings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="TRAINER_", extra="forbid", frozen=True, env_ignore_empty=True
    )

    model: str  # Checkpoint folder or hub id; 16-bit, or 4-bit already.
    host: str = "127.0.0.1"  # Address to listen on; any but loopback requires a key.
    port: int = Field(
        default=TRAINER_PORT, ge=0, le=65535
    )  # Port to listen on; 0 takes a free one.
    # Key of both services; every route but /healthz requires it.
    api_key: ApiKey | None = Field(default=None, validation_alias="TANDEM_API_KEY", repr=False)
    log_level: LogLevel = "INFO"  # Least severe messages to log.

    # Replicas, separated by commas: http://host:port, or host[:port] for all addresses of a name.
    rollout_urls: Annotated[tuple[str, ...], NoDecode] = ()
    probe_interval_s: float = Field(gt=0, default=1.0)  # Time between two probes of every replica.
    # Time limit of one probe; a replica that misses two in a row is taken to hang.
    probe_timeout_s: float = Field(gt=0, default=5.0)
    ready_timeout_s: float = 900.0  # How long a run waits for its first replica.

    device: Literal["auto", "cpu", "cuda"] = "auto"  # `auto` takes a GPU if there is one.
    load_in_4bit: bool = True  # False: a 16-bit base, which needs ROLLOUT_BASE=original.
    # Compute layers again in the backward pass, which trades time for memory.
    gradient_checkpointing: bool = True
    # Move saved activations to host memory, which trades some speed for longer contexts.
    offload_activations: bool = False
    # Training processes, one per GPU (services/trainer/followers.py).
    data_parallel_size: int = Field(default=1, ge=1)

    runs_dir: Path = Path("runs")  # One folder per run (services/trainer/run/folder.py).
    # Latest versions that GET /policy/adapters/{version} still serves.
    kept_adapters: int = Field(default=2, ge=1)
    max_body_bytes: int = 256 << 20  # Largest request body.
    body_timeout_s: float = 300.0  # Time limit for a request body to arrive.

    @field_validator("rollout_urls", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(url.strip() for url in value.split(",") if url.strip())
        return value

    @field_validator("rollout_urls")
    @classmethod
    def _are_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(service_url(url, port=ROLLOUT_PORT) for url in urls)
