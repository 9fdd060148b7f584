"""Typed client of the trainer service (services/trainer/app.py)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter

from shared.errors import Unavailable
from shared.http_client import ServiceClient, raise_problem
from shared.schemas import (
    CompletionsResponse,
    PolicyStatus,
    ReplicaRegistration,
    ReplicasResponse,
    ReplicaStatus,
    RunEvent,
    RunStatus,
    TrainerStatus,
    TrainRequest,
    TrainResponse,
)

_EVENT: TypeAdapter[RunEvent] = TypeAdapter(RunEvent)


class TrainerClient(ServiceClient):
    async def start_run(self, config: Mapping[str, Any] | bytes) -> RunStatus:
        """Start a run. `config` is a run config (services/trainer/run_config.py), or the unchanged
        content of a YAML or JSON file with one, whose line numbers the trainer's errors then name.
        """
        return await self._call(
            RunStatus,
            "POST",
            "/runs",
            content=config if isinstance(config, bytes) else json.dumps(config).encode(),
            headers={"Content-Type": "application/yaml"},
        )

    async def run(self) -> RunStatus:
        return await self._call(RunStatus, "GET", "/runs/current", timeout_s=10)

    async def stop_run(self) -> RunStatus:
        return await self._call(RunStatus, "POST", "/runs/current/stop", timeout_s=60)

    async def events(self, *, silence_s: float = 60.0) -> AsyncIterator[RunEvent]:
        """Yield the events of the current run from its first one until it ends.

        Raises Unavailable after `silence_s` without data; the service sends a comment every few
        seconds.
        """
        timeout = httpx.Timeout(silence_s, connect=5.0)
        try:
            async with self._http.stream("GET", "/runs/current/events", timeout=timeout) as stream:
                if stream.is_error:
                    await stream.aread()
                    raise_problem(stream)
                async for line in stream.aiter_lines():
                    if line.startswith("data:"):
                        yield _EVENT.validate_json(line.removeprefix("data:").strip())
        except httpx.TransportError as error:
            raise Unavailable(f"the event stream of {self.url} failed: {error!r}") from error

    async def completions(self, *, num_groups: int = 64) -> CompletionsResponse:
        """The newest scored groups of the current run, at most `num_groups`."""
        path = f"/runs/current/completions?num_groups={num_groups}"
        return await self._call(CompletionsResponse, "GET", path, timeout_s=10)

    async def train(self, request: TrainRequest) -> TrainResponse:
        return await self._call(TrainResponse, "POST", "/train", body=request)

    async def policy(self) -> PolicyStatus:
        return await self._call(PolicyStatus, "GET", "/policy", timeout_s=10)

    async def adapter(self, version: int) -> bytes:
        return await self._request("GET", f"/policy/adapters/{version}")

    async def replicas(self) -> ReplicasResponse:
        return await self._call(ReplicasResponse, "GET", "/replicas", timeout_s=10)

    async def register(self, registration: ReplicaRegistration) -> ReplicaStatus:
        """Add a replica to the fleet, or renew its lease."""
        return await self._call(ReplicaStatus, "POST", "/replicas", body=registration, timeout_s=5)

    async def remove(self, replica_id: str) -> None:
        """Remove a replica from the fleet. Its id is its host:port."""
        await self._request("DELETE", f"/replicas/{quote(replica_id, safe='')}", timeout_s=10)

    async def status(self) -> TrainerStatus:
        return await self._call(TrainerStatus, "GET", "/status", timeout_s=10)
