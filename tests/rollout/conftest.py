"""Replicas on a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from services.rollout.registration import Registration
from services.rollout.settings import RolloutSettings
from tests.rollout.service import Service


@pytest.fixture
async def serve(tmp_path: Path, tiny_checkpoint: Path) -> AsyncIterator[Callable[..., Service]]:
    """Make a service from settings; it has to be started."""
    services: list[Service] = []

    def make(
        *, boot_error: str | None = None, registration: Registration | None = None, **settings: Any
    ) -> Service:
        fields = {
            "model": str(tiny_checkpoint),
            "base": "original",
            "adapter_dir": tmp_path,
            "drain_delay_s": 0.0,
            "max_completions": 4,
            **settings,
        }
        service = Service(
            RolloutSettings.model_validate(fields),
            boot_error=boot_error,
            registration=registration,
        )
        service.replica.start()
        services.append(service)
        return service

    yield make
    for service in services:
        service.engine.release()
        await service.replica.stop()
        await service.client.aclose()


@pytest.fixture
async def service(serve: Callable[..., Service]) -> Service:
    service = serve()
    await service.started()
    return service
