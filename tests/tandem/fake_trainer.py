"""A scripted trainer behind a socket, for tests of the command line."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from services.http import prepare_app
from shared.errors import NotFound, ServiceError
from shared.schemas import (
    PolicyId,
    ReplicaRegistration,
    ReplicasResponse,
    ReplicaState,
    ReplicaStatus,
    RunEvent,
    RunState,
    RunStatus,
    StateRecord,
    StepRecord,
    TrainerStatus,
)
from tests.rollout.service import until

RUN = PolicyId(run_id="sort-1", version=0)


def step_record(step: int, **fields: Any) -> StepRecord:
    """A record in which every number that is neither given nor has a default is 0."""
    needed = [name for name, field in StepRecord.model_fields.items() if field.is_required()]
    record = dict.fromkeys(needed, 0) | {
        "step": step,
        "policy": RUN.model_copy(update={"version": step}),
        "reward_mean": 0.125 * step,
    }
    return StepRecord.model_validate(record | fields)


def replica_status(id: str, state: ReplicaState, detail: str = "") -> ReplicaStatus:
    return ReplicaStatus(
        id=id,
        url=f"http://{id}",
        source="registered",
        state=state,
        detail=detail,
        boot_id=None,
        policy=RUN if state == "serving" else None,
        num_outstanding_completions=0,
        num_outstanding_tokens=0,
        logprob_gap=0.002,
        last_sync_s=0.145,
        num_failures=0,
    )


class FakeTrainer:
    """Serves `events` of its run; the stream stays open until the last event ends the run."""

    def __init__(self, *, api_key: str | None = None) -> None:
        self.run: RunStatus | None = None
        self.events: list[RunEvent] = []
        self.replicas: list[ReplicaStatus] = []
        self.refusal: ServiceError | None = None  # raised by POST /runs
        self.submitted: list[bytes] = []
        self.cuts_events = False
        self.num_followers = 0
        self.url = ""
        self.app = self._create_app(api_key)

    def begin(self, state: RunState = "running", detail: str = "") -> None:
        self.run = RunStatus(
            run_id=RUN.run_id,
            state=state,
            detail=detail,
            step=0,
            num_steps=2,
            policy=RUN,
            last_step=None,
            last_eval=None,
            run_dir="runs/sort-1",
        )
        self.events = [StateRecord(state="running")]

    def end(self, state: RunState, detail: str = "") -> None:
        assert self.run
        self.run = self.run.model_copy(update={"state": state, "detail": detail})
        self.events.append(StateRecord(state=state, detail=detail))

    def _create_app(self, api_key: str | None) -> FastAPI:
        app = FastAPI()
        prepare_app(
            app, api_key=api_key, max_body_bytes=1 << 20, max_json_values=1000, body_timeout_s=5.0
        )

        @app.get("/status")
        async def status() -> TrainerStatus:
            return TrainerStatus(state="ready", detail="", model="tiny", base=None, run=self.run)

        @app.post("/runs")
        async def start(request: Request) -> RunStatus:
            self.submitted.append(await request.body())
            if self.refusal:
                raise self.refusal
            if self.run is None:
                self.begin()
            return self._run()

        @app.get("/runs/current")
        async def run() -> RunStatus:
            return self._run()

        @app.post("/runs/current/stop")
        async def stop() -> RunStatus:
            self.end("stopped")
            return self._run()

        @app.get("/runs/current/events")
        async def events() -> StreamingResponse:
            return StreamingResponse(self._stream(), media_type="text/event-stream")

        @app.get("/replicas")
        async def replicas() -> ReplicasResponse:
            return ReplicasResponse(replicas=tuple(self.replicas))

        @app.post("/replicas")
        async def register(body: ReplicaRegistration) -> ReplicaStatus:
            self.replicas.append(replica_status(body.url.removeprefix("http://"), "discovered"))
            return self.replicas[-1]

        @app.delete("/replicas/{id}")
        async def remove(id: str) -> ReplicaStatus:
            for status in self.replicas:
                if status.id == id:
                    self.replicas.remove(status)
                    return status
            raise NotFound(f"there is no replica {id!r}")

        return app

    def _run(self) -> RunStatus:
        if self.run is None:
            raise NotFound("there is no run")
        return self.run

    async def _stream(self) -> AsyncIterator[str]:
        self.num_followers += 1
        for event in self.events:
            yield f"event: {event.kind}\ndata: {event.model_dump_json()}\n\n"
        last = self.events[-1]
        while not self.cuts_events and isinstance(last, StateRecord) and last.state == "running":
            await asyncio.sleep(0.02)
            yield ": alive\n\n"
            last = self.events[-1]

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        config = uvicorn.Config(self.app, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.ensure_future(server._serve([listener]))
            await until(lambda: server.started)
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            try:
                yield
            finally:
                server.should_exit = True
                await serving
