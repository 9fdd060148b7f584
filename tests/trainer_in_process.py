"""A trainer in the test's own process, on the real engine, and a client without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from services.trainer.app import create_app
from services.trainer.settings import TrainerSettings
from services.trainer.trainer import Trainer
from shared.schemas import RunEvent
from shared.trainer_client import TrainerClient


@asynccontextmanager
async def booted_trainer(
    checkpoint: Path, replica_url: str, runs_dir: Path
) -> AsyncIterator[Trainer]:
    trainer = Trainer(
        TrainerSettings(
            model=str(checkpoint),
            rollout_urls=(replica_url,),
            runs_dir=runs_dir,
            ready_timeout_s=10,
        )
    )
    trainer.fleet.start()
    await trainer.boot()
    yield trainer
    await trainer.stop()


@asynccontextmanager
async def client_of(trainer: Trainer) -> AsyncIterator[TrainerClient]:
    """A client of `trainer`; stops the run at the end."""
    transport = httpx.ASGITransport(create_app(trainer))
    async with TrainerClient("http://trainer", transport=transport, timeout_s=120) as client:
        yield client
        if trainer.status().run:
            await client.stop_run()
            await until_end(client)


async def until_end(client: TrainerClient) -> list[RunEvent]:
    return [event async for event in client.events()]
