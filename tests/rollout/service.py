"""A replica on a fake engine, behind its app."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI

from services.rollout.app import create_app
from services.rollout.registration import Registration
from services.rollout.replica import BootedEngine, Replica
from services.rollout.settings import RolloutSettings
from shared.rollout_client import RolloutClient
from shared.schemas import GenerateRequest, GenerateResponse, PolicyId, SamplingParams
from tests.fake_engine import FakeEngine

WAIT_S = 20.0


class Service:
    """A replica behind its app, with a client, and the exit code it asked for."""

    def __init__(
        self,
        settings: RolloutSettings,
        *,
        boot_error: str | None = None,
        registration: Registration | None = None,
    ) -> None:
        self.engine = FakeEngine()
        self.exited = asyncio.Event()
        self.exit_codes: list[int] = []

        def boot(_: RolloutSettings, model_dir: Path) -> BootedEngine:
            if boot_error:
                raise RuntimeError(boot_error)
            return BootedEngine(self.engine, "fake")

        self.replica = Replica(
            settings, registration=registration, on_exit=self._on_exit, boot_engine=boot
        )
        self.app: FastAPI = create_app(self.replica)
        self.client = self.make_client(settings.api_key)

    def make_client(self, api_key: str | None) -> RolloutClient:
        transport = httpx.ASGITransport(app=self.app)
        return RolloutClient("http://replica", api_key=api_key, transport=transport, timeout_s=30)

    def _on_exit(self, code: int) -> None:
        self.exit_codes.append(code)
        self.exited.set()

    async def exit_code(self) -> int:
        async with asyncio.timeout(WAIT_S):
            await self.exited.wait()
        return self.exit_codes[0]

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[RolloutClient]:
        """A client over a real socket: an in-process one buffers whole answers."""
        config = uvicorn.Config(
            self.app, lifespan="off", log_level="warning", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.ensure_future(server._serve([listener]))
            await until(lambda: server.started)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            try:
                async with RolloutClient(url, timeout_s=30) as client:
                    yield client
            finally:
                server.should_exit = True
                await serving

    async def get(self, path: str, **headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as http:
            return await http.get(path, headers=headers)

    async def post(self, path: str, body: bytes) -> httpx.Response:
        """Send a JSON body as it is."""
        transport = httpx.ASGITransport(app=self.app)
        headers = {"Content-Type": "application/json"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://replica", timeout=None
        ) as http:
            return await http.post(path, content=body, headers=headers)

    async def started(self) -> None:
        await until(lambda: self.replica.status().state != "starting")


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until `condition` holds; fail when it does not in time."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.005)


def request(n: int = 1, *, max_tokens: int = 2, policy: PolicyId | None = None) -> GenerateRequest:
    sampling = SamplingParams(n=n, max_tokens=max_tokens)
    return GenerateRequest(prompts=((1, 3),), sampling=sampling, policy=policy)


async def running(service: Service, n: int = 1) -> asyncio.Task[GenerateResponse]:
    """A request that the engine holds."""
    service.engine.hold()
    before = len(service.engine.running)
    task = asyncio.ensure_future(service.client.generate(request(n)))
    await until(lambda: len(service.engine.running) > before)
    return task
