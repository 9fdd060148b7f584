"""The HTTP face and the life of a replica, in process, on a fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message

from shared.adapters import content_digest
from shared.errors import (
    MEDIA_TYPE,
    DeadlineExceeded,
    EngineDead,
    NotReady,
    Overloaded,
)
from shared.schemas import PolicyId, ScoreRequest
from tests.adapters import adapter_file, make_manifest, make_tensors
from tests.fake_engine import LOGPROB, TOKEN
from tests.rollout.service import Service, request, running, until
from tests.slow_client import SlowClient

pytestmark = pytest.mark.anyio

KEY = "a-key-of-the-test"


# --- routes -------------------------------------------------------------------------------------


async def test_a_completion_carries_ids_logprobs_policy_and_the_boot_id(service: Service) -> None:
    answer = await service.client.generate(request(2))
    assert answer.boot_id == service.replica.boot_id
    (group,) = answer.groups
    assert group.prompt_token_ids == (1, 3)
    for completion in group.completions:
        assert completion.token_ids == (TOKEN, TOKEN)
        assert completion.logprobs == (LOGPROB, LOGPROB)
        assert completion.segments[0].policy.is_base


async def test_an_unpinned_score_says_which_policy_answered(service: Service) -> None:
    answer = await service.client.score(ScoreRequest(sequences=((1, 3, 4),)))
    assert answer.logprobs == ((LOGPROB, LOGPROB),)
    assert answer.policy.is_base


async def adapter_of(service: Service, *, version: int = 1) -> bytes:
    """The file of a version of a run."""
    status = await service.client.status()
    assert status.base
    manifest = make_manifest(status.base, PolicyId(run_id="run", version=version))
    shapes = service.replica.serving.base.linear_shapes
    return adapter_file(manifest, make_tensors(manifest, shapes, seed=0))


async def test_an_adapter_becomes_resident_and_its_file_can_be_read(service: Service) -> None:
    adapter = await adapter_of(service)
    receipt = await service.client.sync_weights(adapter)
    assert receipt.num_bytes == len(adapter)
    assert (await service.client.policies()).newest == PolicyId(run_id="run", version=1)
    assert await service.client.adapter(1) == adapter
    folder = service.engine.loaded[0].path
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)  # scaling 2 × rank 8


@pytest.mark.parametrize("version", ["-1", "2147483648", "1" + "0" * 400, "9" * 5000, "1.5", "x"])
async def test_a_version_that_cannot_exist_is_refused_by_name(
    version: str, service: Service
) -> None:
    """Fault S13: 10^400 went through to the store, and came back in full."""
    answer = await service.get(f"/policies/{version}")
    assert (answer.status_code, answer.headers["content-type"]) == (422, MEDIA_TYPE)
    assert answer.json()["detail"].startswith("path.version is '")
    assert len(answer.content) <= 4096


async def test_clients_that_do_not_read_keep_few_retired_adapters(
    service: Service, tmp_path: Path
) -> None:
    """Fault S11: each of them kept the memory of a version, for as long as it stayed."""

    def num_retired() -> int:
        """Adapter files that are deleted and still take memory."""
        gc.collect()
        lines = Path("/proc/self/maps").read_text().splitlines()
        held = {line.split(maxsplit=5)[-1] for line in lines if str(tmp_path) in line}
        return sum(path.endswith(" (deleted)") for path in held)

    clients: list[SlowClient] = []
    answers = []
    for version in range(1, 11):
        await service.client.sync_weights(await adapter_of(service, version=version))
        clients.append(client := SlowClient(reads=False))
        answers.append(asyncio.ensure_future(client.get(service.app, f"/policies/{version}")))
        await until(lambda: all(client.status for client in clients))
    assert [client.status for client in clients] == [200] * 4 + [503] * 6
    assert clients[-1].headers["retry-after"] == "1"
    assert num_retired() == 4
    for client in clients:
        client.left.set()
    await asyncio.gather(*answers)
    assert num_retired() == 0
    assert await service.client.adapter(10)


async def test_hostile_adapters_are_refused_shortly_and_a_sync_beside_them_succeeds(
    service: Service,
) -> None:
    """Fault S8: ten such uploads made a sync wait 43 s, and an answer had 1.2 MB."""
    good = await adapter_of(service)
    next_one = await adapter_of(service, version=2)
    (size,) = struct.unpack("<Q", next_one[:8])
    table = json.loads(next_one[8 : 8 + size])
    name = next(name for name in table if name != "__metadata__")
    headers = [
        "{" + ",".join(f'"{i:05}":0' for i in [*range(99_000), 98_999]) + "}",
        json.dumps(table | {name: table[name] | {"shape": [1e308] * 100_000}}),
        json.dumps(table | {name: table[name] | {"dtype": "x" * 10**6}}),
        json.dumps(table | {name: table[name] | {"data_offsets": [0, 10**4000]}}),
        json.dumps(table | {"x" * 10**6: table[name]}),
        json.dumps({name: 0, **table}).replace("base_model", "\\ud800" * 1000),
    ]
    bodies = [struct.pack("<Q", len(text)) + text.encode() for text in headers]
    transport = httpx.ASGITransport(app=service.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as http:

        async def upload(body: bytes) -> httpx.Response:
            digest = content_digest(hashlib.sha256(body).digest())
            return await http.post(
                "/sync_weights", content=body, headers={"Content-Digest": digest}
            )

        uploads = asyncio.gather(*(upload(body) for body in bodies * 2))
        receipt = await service.client.sync_weights(good)
        answers = await uploads
    assert receipt.outcome == "loaded"
    for answer in answers:
        assert (answer.status_code, answer.json()["title"]) == (422, "InvalidAdapter")
        assert len(answer.content) <= 4096
    assert (await service.client.policies()).newest == receipt.policy


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/generate"),
        ("POST", "/score"),
        ("POST", "/sync_weights"),
        ("GET", "/policies"),
        ("GET", "/policies/1"),
        ("POST", "/drain"),
        ("GET", "/status"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
    ],
)
async def test_every_route_but_healthz_needs_the_key(
    method: str, path: str, serve: Callable[..., Service]
) -> None:
    service = serve(TANDEM_API_KEY=KEY)
    transport = httpx.ASGITransport(app=service.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
            response = await http.request(method, path, headers=headers)
            assert response.status_code == 401
            assert response.headers["content-type"] == MEDIA_TYPE
            assert response.headers["www-authenticate"] == "Bearer"
            assert KEY not in response.text
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.head("/healthz")).status_code == 200  # fault S13: load balancers ask so
    assert service.replica.status().state != "draining"


async def test_the_key_opens_the_routes(serve: Callable[..., Service]) -> None:
    service = serve(TANDEM_API_KEY=KEY)
    assert (await service.client.status()).state == "starting"
    await service.started()
    assert (await service.client.generate(request())).groups


async def test_a_full_queue_is_429_with_retry_after(service: Service) -> None:
    task = await running(service, n=3)
    with pytest.raises(Overloaded, match="3 completions are queued or running and 2 more") as full:
        await service.client.generate(request(2))
    assert full.value.retry_after_s == 1.0
    transport = httpx.ASGITransport(app=service.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as http:
        response = await http.post("/score", json={"sequences": [[1, 3]] * 2})
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    service.engine.release()
    await task
    assert (await service.client.generate(request(4))).groups


async def test_a_request_over_the_deadline_is_504_and_its_work_is_cancelled(
    serve: Callable[..., Service],
) -> None:
    service = serve(request_timeout_s=0.1)
    await service.started()
    service.engine.hold()
    with pytest.raises(DeadlineExceeded, match=r"longer than 0\.1 s"):
        await service.client.generate(request())
    assert service.engine.running == set()
    assert len(service.engine.cancelled) == 1
    assert service.replica.status().num_outstanding_completions == 0


async def test_metrics_count_completions_errors_and_syncs(service: Service) -> None:
    await service.client.generate(request(3))
    await service.get("/nowhere")
    text = (await service.get("/metrics")).text
    assert 'tandem_rollout_completions_total{finish_reason="length"} 3.0' in text
    assert 'tandem_rollout_errors_total{type="NotFound"} 1.0' in text
    assert "tandem_rollout_outstanding_completions 0.0" in text
    assert "tandem_rollout_policy_version 0.0" in text


async def test_a_client_that_goes_away_cancels_the_engines_work(service: Service) -> None:
    service.engine.hold()
    body = request().model_dump_json().encode()
    answers, disconnect = await call_and_leave(service, body)
    await until(lambda: len(service.engine.running) == 1)
    disconnect.set()
    await until(lambda: service.engine.running == set())
    await answers
    assert len(service.engine.cancelled) == 1
    assert service.replica.status().num_outstanding_completions == 0


async def call_and_leave(service: Service, body: bytes) -> tuple[asyncio.Task[None], asyncio.Event]:
    """POST /generate as a server would; set the event to close the connection."""
    disconnect = asyncio.Event()
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await disconnect.wait()
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        assert disconnect.is_set()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/generate",
        "raw_path": b"/generate",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    return asyncio.ensure_future(service.app(scope, receive, send)), disconnect


async def test_an_unexpected_error_is_a_problem_too(service: Service) -> None:
    service.engine.fails = RuntimeError("out of luck")
    transport = httpx.ASGITransport(app=service.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as http:
        response = await http.post("/score", json={"sequences": [[1, 3]]})
    assert (response.status_code, response.headers["content-type"]) == (500, MEDIA_TYPE)
    assert response.json()["detail"] == "RuntimeError: out of luck"


# --- life ---------------------------------------------------------------------------------------


async def test_while_it_starts_it_is_alive_but_not_ready(serve: Callable[..., Service]) -> None:
    service = serve()
    assert (await service.get("/healthz")).status_code == 200
    assert (await service.get("/readyz")).status_code == 503
    assert (await service.client.status()).state == "starting"
    with pytest.raises(NotReady, match="starting: preparing the base"):
        await service.client.generate(request())
    await service.started()
    assert (await service.get("/readyz")).status_code == 200
    assert (await service.client.status()).vllm_version == "fake"


async def test_a_boot_that_fails_exits_1_and_says_why(serve: Callable[..., Service]) -> None:
    service = serve(boot_error="no such device")
    assert await service.exit_code() == 1
    status = await service.client.status()
    assert (status.state, status.detail) == ("dead", "boot failed: no such device")


async def test_a_model_that_does_not_exist_exits_2_and_names_it(
    serve: Callable[..., Service], tmp_path: Path
) -> None:
    service = serve(model=str(tmp_path / "nothing"))
    assert await service.exit_code() == 2
    assert str(tmp_path / "nothing") in (await service.client.status()).detail


async def test_drain_finishes_what_runs_then_exits_0(service: Service) -> None:
    task = await running(service)
    assert (await service.client.drain()).state == "draining"
    assert (await service.get("/readyz")).status_code == 503
    await until(lambda: service.replica._refusing)
    with pytest.raises(NotReady):
        await service.client.generate(request())
    assert service.exit_codes == []
    service.engine.release()
    assert len((await task).groups) == 1
    assert await service.exit_code() == 0


async def test_drain_still_serves_during_its_delay(serve: Callable[..., Service]) -> None:
    service = serve(drain_delay_s=0.3)
    await service.started()
    await service.client.drain()
    assert (await service.get("/readyz")).status_code == 503
    assert len((await service.client.generate(request())).groups) == 1
    assert await service.exit_code() == 0


async def test_drain_interrupts_what_does_not_finish_in_time(serve: Callable[..., Service]) -> None:
    service = serve(drain_timeout_s=0.05)
    await service.started()
    task = await running(service)
    await service.client.drain()
    (group,) = (await task).groups
    assert [completion.finish_reason for completion in group.completions] == ["interrupted"]
    assert await service.exit_code() == 0


async def test_drain_cuts_a_score_that_does_not_finish_in_time(
    serve: Callable[..., Service],
) -> None:
    service = serve(drain_timeout_s=0.05)
    await service.started()
    service.engine.hold()
    task = asyncio.ensure_future(service.client.score(ScoreRequest(sequences=((1, 3),))))
    await until(lambda: len(service.engine.running) == 1)
    await service.client.drain()
    assert await service.exit_code() == 0
    assert not task.done()
    service.engine.release()
    await task


async def test_draining_twice_is_one_drain(service: Service) -> None:
    await service.client.drain()
    await service.client.drain()
    await service.exit_code()
    assert service.exit_codes == [0]


async def test_an_engine_that_dies_answers_503_and_exits_1(service: Service) -> None:
    task = await running(service)
    service.engine.die("killed by the test")
    with pytest.raises(EngineDead, match="killed by the test"):
        await task
    assert await service.exit_code() == 1
    assert (await service.get("/readyz")).status_code == 503
    assert (await service.client.status()).state == "dead"
    with pytest.raises(EngineDead, match="use another one"):
        await service.client.generate(request())


async def test_an_engine_that_makes_no_token_while_requests_run_exits_1(
    serve: Callable[..., Service],
) -> None:
    service = serve(stall_timeout_s=0.3)
    await service.started()
    task = await running(service)
    assert await service.exit_code() == 1
    detail = (await service.client.status()).detail
    assert detail == "the engine made no token for 0.3 s with 1 completions outstanding"
    service.engine.release()
    await task


async def test_an_engine_that_answers_nothing_is_never_ready(
    serve: Callable[..., Service],
) -> None:
    service = serve(stall_timeout_s=0.3)
    service.engine.hold()
    assert await service.exit_code() == 1
    detail = (await service.client.status()).detail
    assert "the engine answered no request within ROLLOUT_STALL_TIMEOUT_S=0.3 s" in detail


async def test_an_engine_that_takes_no_adapter_in_exits_1_though_it_makes_tokens(
    serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(stall_timeout_s=0.3)
    await service.started()
    num_tokens = itertools.count()
    monkeypatch.setattr(service.engine, "num_tokens_processed", lambda: next(num_tokens))
    task = await running(service)
    service.engine.hold_loads()
    sync = asyncio.ensure_future(service.client.sync_weights(await adapter_of(service)))
    assert await service.exit_code() == 1
    detail = (await service.client.status()).detail
    assert detail == "the engine has not loaded an adapter within 0.3 s"
    service.engine.release_loads()
    service.engine.release()
    await asyncio.gather(sync, task)


async def test_an_engine_hangs_though_its_clients_come_and_go(
    serve: Callable[..., Service],
) -> None:
    """Fault S6: the clock began anew whenever nothing was outstanding."""
    service = serve(stall_timeout_s=2.0)
    await service.started()
    service.engine.hold()
    async with asyncio.timeout(60):
        while not service.exit_codes:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.4):
                    await service.client.generate(request())
            await asyncio.sleep(0.1)
    assert service.exit_codes == [1]
    assert "the engine made no token for 2 s" in service.replica.status().detail


async def test_an_engine_that_only_serves_impatient_clients_proves_that_it_works(
    serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their requests make no token; the replica asks for one of its own, and stays."""
    service = serve(stall_timeout_s=4.0)
    await service.started()
    num_tokens = 0
    tries = 0
    generate = service.engine.generate

    def try_or_hold(request_id: str, ids: Any, *rest: Any, **options: Any) -> Any:
        nonlocal num_tokens, tries
        if tuple(ids) == (0,):
            num_tokens += 1
            tries += 1
            service.engine.release()
        else:
            service.engine.hold()
        return generate(request_id, ids, *rest, **options)

    monkeypatch.setattr(service.engine, "generate", try_or_hold)
    monkeypatch.setattr(service.engine, "num_tokens_processed", lambda: num_tokens)
    async with asyncio.timeout(60):
        while tries < 2 and not service.exit_codes:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await service.client.generate(request())
    assert service.exit_codes == []


async def test_an_engine_that_removes_no_adapter_exits_1(
    serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault S6: it held every later sync, and nobody noticed."""
    service = serve(stall_timeout_s=0.3, max_live_policies=1)
    await service.started()
    never = asyncio.Event()

    async def unload(_: object) -> None:
        await never.wait()

    monkeypatch.setattr(service.engine, "unload_adapter", unload)
    await service.client.sync_weights(await adapter_of(service, version=1))
    second = await adapter_of(service, version=2)
    sync = asyncio.ensure_future(service.client.sync_weights(second))  # Version 1 has to leave.
    assert await service.exit_code() == 1
    assert service.replica.status().detail == "the engine has not removed an adapter within 0.3 s"
    never.set()
    await asyncio.gather(sync, return_exceptions=True)


async def test_an_idle_engine_is_not_a_stalled_one(serve: Callable[..., Service]) -> None:
    service = serve(stall_timeout_s=0.3)
    await service.started()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await service.exited.wait()
    assert (await service.client.status()).state == "ready"


async def test_stop_shuts_the_engine_down_and_removes_the_adapter_folder(
    service: Service, tmp_path: Path
) -> None:
    assert len(list(tmp_path.iterdir())) == 1
    await service.replica.stop()
    assert service.engine.has_shut_down
    assert list(tmp_path.iterdir()) == []


async def test_the_folder_of_a_killed_replica_is_removed_and_that_of_a_live_one_is_not(
    service: Service, serve: Callable[..., Service], tmp_path: Path
) -> None:
    (live,) = tmp_path.iterdir()
    left = tmp_path / "tandem-adapters-left"
    left.mkdir()
    (left / "lock").touch()
    second = serve()
    await second.started()
    assert live.is_dir()
    assert not left.exists()
