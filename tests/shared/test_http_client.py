"""How a client handles answers, errors and silence, without a socket."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

import httpx
import pytest

from shared.adapters import content_digest
from shared.errors import DeadlineExceeded, ServiceError, Unavailable, UnknownPolicy
from shared.http_client import ServiceClient
from shared.rollout_client import RolloutClient
from shared.schemas import BASE_POLICY, PoliciesResponse

pytestmark = pytest.mark.anyio

POLICIES = PoliciesResponse(newest=BASE_POLICY, resident=(), boot_id="boot")


def client(answer: Callable[[httpx.Request], httpx.Response], **options: str) -> RolloutClient:
    transport = httpx.MockTransport(answer)
    return RolloutClient("http://replica/", transport=transport, **options)  # type: ignore[arg-type]


async def test_an_answer_is_a_typed_record() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert (request.method, str(request.url)) == ("GET", "http://replica/policies")
        return httpx.Response(200, content=POLICIES.model_dump_json())

    async with client(answer) as replica:
        assert await replica.policies() == POLICIES


async def test_the_key_is_sent_as_a_bearer_token() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer key"
        return httpx.Response(200, content=POLICIES.model_dump_json())

    async with client(answer, api_key="key") as replica:
        await replica.policies()


async def test_a_sync_sends_the_digest_and_its_options() -> None:
    content = b"adapter"
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(422, json=ServiceError("no").to_problem())

    async with client(answer) as replica:
        with pytest.raises(ServiceError):
            await replica.sync_weights(content, activate=False, in_flight="continue")
    (request,) = seen
    assert request.content == content
    assert request.headers["content-digest"] == content_digest(hashlib.sha256(content).digest())
    assert dict(request.url.params) == {
        "activate": "false",
        "replace_run": "false",
        "in_flight": "continue",
        "probe": "false",
    }


async def test_an_error_answer_raises_the_class_that_the_service_named() -> None:
    problem = UnknownPolicy("not here", extra={"resident": ["a.1@2"]}).to_problem()
    async with client(lambda _: httpx.Response(404, json=problem)) as replica:
        with pytest.raises(UnknownPolicy, match="not here") as raised:
            await replica.policies()
    assert raised.value.extra == {"resident": ["a.1@2"]}


@pytest.mark.parametrize("body", ["<html>Bad Gateway</html>", "[]", '"text"', ""])
async def test_an_error_answer_of_a_proxy_is_a_service_error(body: str) -> None:
    async with client(lambda _: httpx.Response(502, text=body)) as replica:
        with pytest.raises(ServiceError) as raised:
            await replica.policies()
    assert raised.value.detail


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError])
async def test_a_broken_connection_is_unavailable_and_names_the_url(
    error: type[httpx.TransportError],
) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        raise error("broken")

    async with client(answer) as replica:
        with pytest.raises(Unavailable, match=r"GET http://replica/policies failed: \w+ broken"):
            await replica.policies()


async def test_silence_ends_at_the_deadline() -> None:
    class Silence(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await asyncio.Event().wait()
            raise AssertionError

    async with RolloutClient("http://replica", transport=Silence(), timeout_s=0.05) as replica:
        with pytest.raises(DeadlineExceeded, match=r"gave no answer within 0\.05 s"):
            await replica.adapter(1)


@pytest.mark.parametrize("body", ["<html>Welcome</html>", "{}", ""])
async def test_an_answer_of_another_service_names_the_url(body: str) -> None:
    async with client(lambda _: httpx.Response(200, text=body)) as replica:
        with pytest.raises(ServiceError, match="GET http://replica/policies did not answer with"):
            await replica.policies()


@pytest.mark.parametrize(("num_at_once", "num_connections"), [(1, 32), (64, 64)])
async def test_connections_are_kept_for_the_next_request(
    num_at_once: int, num_connections: int
) -> None:
    """Requests rotate among small pools, and never use a proxy."""
    num_opened = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_opened
        num_opened += 1
        while await reader.readline():
            while await reader.readline() != b"\r\n":
                pass
            await asyncio.sleep(0.01)  # Keeps concurrent connections open at the same time.
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, ServiceClient(f"http://127.0.0.1:{port}") as client:
        for _ in range(128 // num_at_once):
            await asyncio.gather(*(client._request("GET", "/") for _ in range(num_at_once)))
        assert num_opened <= num_connections
