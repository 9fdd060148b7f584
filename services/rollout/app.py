"""The HTTP face of a replica: each route parses and delegates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Path, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from services.answers import Downloads
from services.http import (
    PROBLEMS,
    check_content_length,
    check_query,
    prepare_app,
    raw_body,
    until_disconnect,
)
from services.rollout.openai import OpenAiEndpoint, error_response
from services.rollout.openai_types import (
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    Model,
    Models,
)
from services.rollout.replica import Replica
from services.rollout.streams import NdjsonResponse, SseResponse
from services.rollout.sync import SyncOptions
from shared.errors import ClientClosed
from shared.metrics import exposition
from shared.schemas import (
    MAX_INT32,
    GenerateRequest,
    GenerateResponse,
    PoliciesResponse,
    RolloutStatus,
    ScoreRequest,
    ScoreResponse,
    SyncReceipt,
    Wire,
)

_MAX_JSON_VALUES = 1 << 22  # Tokens of a request, mostly.
_LAST_RECORD_S = 2.0  # Time after the request timeout in which a stream can still say so.
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "With `stream` NDJSON, one StreamRecord of shared/schemas.py per line",
        "content": {"application/x-ndjson": {}},
    }
}
_CHUNKED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "With `stream` server-sent events: chunks, then [DONE]",
        "content": {"text/event-stream": {}},
    }
}


def create_app(replica: Replica) -> FastAPI:
    settings = replica.settings
    openai = OpenAiEndpoint(replica)
    downloads = Downloads()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        replica.start()
        yield
        await replica.stop()

    app = FastAPI(
        title="Tandem rollout",
        lifespan=lifespan,
        responses=PROBLEMS,
        docs_url=None,  # FastAPI's pages load scripts from another host.
        redoc_url=None,
        dependencies=[Depends(check_query)],
    )
    prepare_app(
        app,
        api_key=settings.api_key,
        max_body_bytes=settings.max_body_bytes,
        max_json_values=_MAX_JSON_VALUES,
        body_timeout_s=settings.body_timeout_s,
        streamed=frozenset({"/sync_weights"}),
        on_error=lambda error: replica.metrics.errors.labels(type(error).__name__).inc(),
        answer_errors={"/v1/": error_response},
    )

    @app.post("/generate", response_model=GenerateResponse, responses=_STREAMED)
    async def generate(
        body: GenerateRequest, request: Request
    ) -> GenerateResponse | NdjsonResponse:
        """Prompts × `n` completions, under a pinned policy or the newest one."""
        sampler = replica.serving.sampler
        if body.stream:
            return await NdjsonResponse.opened(
                sampler.stream(body), timeout_s=settings.request_timeout_s + _LAST_RECORD_S
            )
        return await until_disconnect(request, sampler.generate(body))

    @app.post("/score")
    async def score(body: ScoreRequest, request: Request) -> ScoreResponse:
        """Logprobs of given token ids under a given version, at temperature 1."""
        return await until_disconnect(request, replica.serving.sampler.score(body))

    @app.post("/v1/completions", response_model=CompletionAnswer, responses=_CHUNKED)
    async def completions(body: CompletionRequest, request: Request) -> Wire | SseResponse:
        """As OpenAI's: prompts as text or token ids."""
        return await answer(body, request)

    @app.post("/v1/chat/completions", response_model=ChatAnswer, responses=_CHUNKED)
    async def chat_completions(body: ChatRequest, request: Request) -> Wire | SseResponse:
        """As OpenAI's: messages, rendered by the checkpoint's chat template."""
        return await answer(body, request)

    async def answer(body: CompletionRequest | ChatRequest, request: Request) -> Wire | SseResponse:
        if body.stream:
            return await SseResponse.opened(openai.stream(body), timeout_s=openai.stream_timeout_s)
        return await until_disconnect(request, openai.complete(body))

    @app.get("/v1/models")
    async def models() -> Models:
        """`policy` is the newest version, `policy@17` a resident one, `base` the base."""
        return openai.models()

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Model:
        """One of them; 404 for any other."""
        return openai.model(name)

    @app.post("/sync_weights", openapi_extra=raw_body("application/octet-stream"))
    async def sync_weights(
        request: Request,
        activate: bool = True,
        replace_run: bool = False,
        in_flight: Literal["finish", "continue"] = "finish",
        probe: bool = False,
    ) -> SyncReceipt:
        """Take in an adapter: one safetensors file, with `Content-Digest: sha-256=:…:` (RFC 9530).

        The same version and digest again is 200 without a reload. `activate=false` installs
        without making it the newest, `replace_run=true` ends another run here,
        `in_flight=continue` interrupts older completions instead of letting them finish, and
        `probe=true` takes the adapter for one `/score` and nothing else.
        """
        receiver = replica.serving.receiver
        check_content_length(request, settings.max_adapter_bytes)
        options = SyncOptions(activate, replace_run, in_flight, probe)
        try:
            return await receiver.receive(
                request.stream(), request.headers.get("content-digest"), options
            )
        except ClientDisconnect as error:
            raise ClientClosed("the client closed the connection during the upload") from error

    @app.get("/policies")
    async def policies() -> PoliciesResponse:
        """The versions that it serves; version 0, the base, is always one of them."""
        return replica.policies()

    @app.get("/policies/{version}", response_class=Response)
    async def policy(version: Annotated[int, Path(ge=0, le=MAX_INT32)]) -> Response:
        """The adapter file of a version, as it was received."""
        return downloads.send_file(replica.serving.policies.adapter_file(version))

    @app.post("/drain", status_code=202)
    async def drain() -> RolloutStatus:
        """Not ready, finish what runs, then exit 0; SIGTERM does the same."""
        return replica.drain()

    @app.get("/status")
    async def status() -> RolloutStatus:
        """Base, limits, versions and load."""
        return replica.status()

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive. Needs no key."""
        return {"status": "alive"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """The engine accepts requests; else 503."""
        replica.check_ready()
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format, vLLM's metrics included."""
        return Response(exposition(replica.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app
