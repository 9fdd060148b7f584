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

    model: str  # checkpoint folder or hub id, 16-bit or already 4-bit
    host: str = "127.0.0.1"  # to listen on; another than loopback needs a key
    port: int = Field(default=TRAINER_PORT, ge=0, le=65535)  # 0: any free one
    # of both services; every route but /healthz wants it
    api_key: ApiKey | None = Field(default=None, validation_alias="TANDEM_API_KEY", repr=False)
    log_level: LogLevel = "INFO"  # what is logged

    # Separated by commas: http://host:port, or host[:port], all of whose addresses are replicas.
    rollout_urls: Annotated[tuple[str, ...], NoDecode] = ()
    probe_interval_s: float = Field(gt=0, default=1.0)  # between two looks at names and replicas
    probe_timeout_s: float = Field(gt=0, default=5.0)  # two in a row without an answer: it hangs
    ready_timeout_s: float = 900.0  # how long a run waits for a replica to boot

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    load_in_4bit: bool = True  # False: a 16-bit base; replicas then need ROLLOUT_BASE=original
    # computes layers again in the backward pass: less memory, more time
    gradient_checkpointing: bool = True
    offload_activations: bool = False  # what it keeps, to host memory: longer contexts, some speed
    data_parallel_size: int = Field(default=1, ge=1)  # processes, each on a GPU; see parallel.py

    runs_dir: Path = Path("runs")  # of each run: see run_folder.py
    kept_adapters: int = Field(default=2, ge=1)  # versions GET /policy/adapters/{version} has
    max_body_bytes: int = 256 << 20  # of a request
    body_timeout_s: float = 300.0  # for the whole body of a request to arrive

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
