"""How the client reads a stream, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from shared.errors import (
    DeadlineExceeded,
    EngineDead,
    Overloaded,
    ServiceError,
    Unavailable,
    UnknownPolicy,
)
from shared.rollout_client import RolloutClient
from shared.schemas import (
    BASE_POLICY,
    GenerateRequest,
    SamplingParams,
    StreamAlive,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTokens,
    Wire,
)

pytestmark = pytest.mark.anyio

REQUEST = GenerateRequest(prompts=((1, 3),))
START = StreamStart(
    group=0,
    prompt_token_ids=(1, 3),
    sampling=SamplingParams(),
    policy=BASE_POLICY,
    boot_id="boot",
)
TOKENS = StreamTokens(
    group=0, completion=0, token_ids=(4,), logprobs=(-0.5,), finish_reason="length"
)
END = StreamEnd(boot_id="boot")


def line(record: Wire) -> bytes:
    return record.model_dump_json().encode() + b"\n"


class Body(httpx.AsyncByteStream):
    """Yields chunks, then raises an error or, with `hangs`, stays silent. Records its closing."""

    def __init__(self, *chunks: bytes, error: Exception | None = None, hangs: bool = False) -> None:
        self.chunks = chunks
        self.error = error
        self.hangs = hangs
        self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk
        if self.error:
            raise self.error
        if self.hangs:
            await asyncio.Event().wait()

    async def aclose(self) -> None:
        self.is_closed = True


def client(
    answer: Body | httpx.Response, seen: Callable[[httpx.Request], None] = lambda _: None
) -> RolloutClient:
    def handle(request: httpx.Request) -> httpx.Response:
        seen(request)
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, stream=answer)

    return RolloutClient("http://replica", transport=httpx.MockTransport(handle))


async def records(body: Body | httpx.Response, **options: float) -> list[Wire]:
    async with client(body) as replica:
        return [record async for record in replica.stream(REQUEST, **options)]


async def test_a_stream_yields_starts_and_tokens_and_asks_for_a_stream() -> None:
    body = Body(line(START) + line(StreamAlive()), line(TOKENS), line(END))
    asked: list[httpx.Request] = []
    async with client(body, asked.append) as replica:
        found = [record async for record in replica.stream(REQUEST)]
    assert found == [START, TOKENS]
    assert GenerateRequest.model_validate_json(asked[0].content).stream
    assert body.is_closed


async def test_a_line_may_arrive_in_pieces() -> None:
    content = line(START) + line(TOKENS) + line(END)
    assert await records(Body(*(content[i : i + 7] for i in range(0, len(content), 7)))) == [
        START,
        TOKENS,
    ]


async def test_an_error_record_is_raised_as_the_services_own_error() -> None:
    error = EngineDead("gone", extra={"why": "test"}, retry_after_s=2.0)
    with pytest.raises(EngineDead, match="gone") as raised:
        await records(Body(line(START), line(StreamError(problem=error.to_problem()))))
    assert (raised.value.extra, raised.value.retry_after_s) == ({"why": "test"}, 2.0)


async def test_an_error_answer_is_raised_as_the_services_own_error() -> None:
    for error in (UnknownPolicy("no such"), Overloaded("full", retry_after_s=1.0)):
        with pytest.raises(type(error), match=error.detail):
            await records(httpx.Response(error.status, json=error.to_problem()))


@pytest.mark.parametrize(
    "body",
    [
        Body(line(START), line(TOKENS)),
        Body(line(START), line(TOKENS)[:-9]),
        Body(),
        Body(line(START), error=httpx.RemoteProtocolError("peer closed")),
        Body(error=httpx.ReadError("reset")),
    ],
    ids=["without an end", "within a line", "empty", "broken off", "reset"],
)
async def test_a_stream_that_is_cut_off_is_unavailable(body: Body) -> None:
    with pytest.raises(Unavailable, match="http://replica/generate"):
        await records(body)
    assert body.is_closed


@pytest.mark.parametrize(
    "content", [b"hello\n", b"{}\n", b'{"kind": "tokens"}\n', b'{"kind": "other"}\n', b"\n"]
)
async def test_an_invalid_line_raises_an_error_that_names_the_service(content: bytes) -> None:
    with pytest.raises(ServiceError, match="http://replica/generate sent a line") as raised:
        await records(Body(line(START), content))
    assert type(raised.value) is ServiceError


async def test_silence_and_the_deadline_raise_different_errors() -> None:
    body = Body(line(START), hangs=True)
    with pytest.raises(Unavailable, match=r"sent nothing for 0\.05 s"):
        await records(body, silence_s=0.05)
    assert body.is_closed
    with pytest.raises(DeadlineExceeded, match=r"did not end its stream within 0\.05 s"):
        await records(Body(line(START), hangs=True), timeout_s=0.05)


async def test_closing_the_generator_closes_the_answer() -> None:
    body = Body(line(START), hangs=True)
    async with client(body) as replica:
        stream = replica.stream(REQUEST)
        assert await anext(stream) == START
        assert not body.is_closed
        await stream.aclose()
        assert body.is_closed
