"""What a scrape of a replica says of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.rollout.service import Service

pytestmark = pytest.mark.anyio


def states(service: Service) -> dict[str, float | None]:
    registry = service.replica.metrics.registry
    return {
        state: registry.get_sample_value("tandem_rollout_state", {"state": state})
        for state in ("starting", "ready", "draining", "dead")
    }


async def test_a_scrape_shows_the_state_of_the_replica(serve: Callable[..., Service]) -> None:
    service = serve()
    assert states(service) == {"starting": 1, "ready": 0, "draining": 0, "dead": 0}
    await service.started()
    assert states(service) == {"starting": 0, "ready": 1, "draining": 0, "dead": 0}
    service.replica.drain()
    assert states(service) == {"starting": 0, "ready": 0, "draining": 1, "dead": 0}
