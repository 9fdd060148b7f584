"""The HTTP face of the trainer: each route parses and delegates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from prometheus_client import CONTENT_TYPE_LATEST

from services.answers import Downloads
from services.http import PROBLEMS, check_query, prepare_app, raw_body
from services.trainer.dashboard import page_files, serve_page
from services.trainer.run.recent import MAX_COMPLETIONS
from services.trainer.run_config import dump_run_config, parse_run_config
from services.trainer.trainer import Trainer
from shared.errors import InvalidRequest
from shared.metrics import exposition
from shared.schemas import (
    MAX_INT32,
    CompletionsResponse,
    PolicyStatus,
    ReplicaRegistration,
    ReplicasResponse,
    ReplicaStatus,
    RunStatus,
    TrainerStatus,
    TrainRequest,
    TrainResponse,
)

_MAX_JSON_VALUES = 1 << 24  # Tokens and logprobs of a batch, mostly.


def create_app(trainer: Trainer) -> FastAPI:
    settings = trainer.settings
    downloads = Downloads()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        trainer.start()
        yield
        await trainer.stop()

    app = FastAPI(
        title="Tandem trainer",
        lifespan=lifespan,
        responses=PROBLEMS,
        docs_url=None,  # FastAPI's pages load scripts from another host.
        redoc_url=None,
        dependencies=[Depends(check_query)],
    )
    page = page_files(needs_key=settings.api_key is not None)
    prepare_app(
        app,
        api_key=settings.api_key,
        max_body_bytes=settings.max_body_bytes,
        max_json_values=_MAX_JSON_VALUES,
        body_timeout_s=settings.body_timeout_s,
        open_paths=frozenset(page),  # The page holds no data and asks for the key.
    )
    serve_page(app, page)

    @app.post("/runs", status_code=201, openapi_extra=raw_body("application/yaml"))
    async def start_run(request: Request) -> RunStatus:
        """The body is a run config, YAML or JSON of at most 1 MiB (services/trainer/run_config.py).

        A `run_id` that exists resumes from its last checkpoint, unless `resume` is `never`.
        """
        try:
            config = await asyncio.to_thread(parse_run_config, await request.body())
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        return await trainer.start_run(config)

    @app.get("/runs/current")
    async def run() -> RunStatus:
        """The current run, or the last one."""
        return trainer.run_status()

    @app.post("/runs/current/stop")
    async def stop_run() -> RunStatus:
        """End the run after its step. Posting its config again resumes it."""
        return await trainer.stop_run()

    @app.get(
        "/runs/current/events",
        response_class=EventSourceResponse,
        dependencies=[Depends(trainer.run_status)],  # Answers 404 before the stream begins.
    )
    async def events(
        last_event_id: Annotated[int, Header(ge=-1, le=MAX_INT32)] = -1,
    ) -> AsyncIterator[ServerSentEvent]:
        """Every event of the run from the first; Last-Event-ID resumes after that one."""
        async for index, event in trainer.events(last_event_id + 1):
            yield ServerSentEvent(data=event, event=event.kind, id=str(index))

    @app.get("/runs/current/config")
    async def run_config() -> Response:
        """The config that the run was started with. Posting it again resumes the run."""
        return Response(dump_run_config(trainer.run_config()), media_type="application/yaml")

    @app.get("/runs/current/completions")
    async def completions(
        num_groups: Annotated[int, Query(ge=1, le=MAX_COMPLETIONS)] = MAX_COMPLETIONS,
    ) -> CompletionsResponse:
        """The newest scored groups, newest first."""
        return await trainer.completions(num_groups)

    @app.post("/train")
    async def train(body: TrainRequest) -> TrainResponse:
        """One policy update from groups that you sampled and scored, or from pairs for `dpo`."""
        return await trainer.train(body)

    @app.get("/policy")
    async def policy() -> PolicyStatus:
        """The policy that trains, and which of its adapters are kept."""
        return trainer.policy_status()

    @app.get("/policy/adapters/{version}", response_class=Response)
    async def adapter(version: Annotated[int, Path(ge=0, le=MAX_INT32)]) -> Response:
        """The adapter file of a version, with its `Content-Digest`."""
        published = trainer.policy.adapter(version)
        return downloads.send(
            memoryview(published.content), {"Content-Digest": published.content_digest}
        )

    @app.get("/replicas")
    async def replicas() -> ReplicasResponse:
        """Which replicas serve, and why the others do not."""
        return ReplicasResponse(replicas=trainer.fleet.status())

    @app.post("/replicas", status_code=201)
    async def register(body: ReplicaRegistration) -> ReplicaStatus:
        """Register a replica; with a lease, repeat it before the lease ends."""
        return trainer.fleet.register(body)

    @app.delete("/replicas/{id}")
    async def remove(id: str) -> ReplicaStatus:
        """Take a replica out of the fleet, until it restarts or is registered again."""
        return trainer.fleet.remove(id)

    @app.get("/status")
    async def status() -> TrainerStatus:
        """The model, its base, and the run."""
        return trainer.status()

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive. Needs no key."""
        return {"status": "alive"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """200 once the policy is loaded, else 503."""
        trainer.check_ready()
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(exposition(trainer.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app
