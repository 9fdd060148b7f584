"""A streamed /generate over a real socket, on a fake engine: records, refusals, ends."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import httpx
import pytest

from shared.errors import (
    DeadlineExceeded,
    EngineDead,
    InternalError,
    NotReady,
    Overloaded,
    Unavailable,
    UnsuitableForTraining,
)
from shared.rollout_client import RolloutClient
from shared.schemas import GenerateRequest, SamplingParams, StreamStart, StreamTokens
from tests.fake_engine import LOGPROB, TOKEN
from tests.rollout.service import Service, request, running, until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(service: Service) -> AsyncIterator[RolloutClient]:
    async with service.listening() as client:
        yield client


async def collect(
    client: RolloutClient, asked: GenerateRequest, **options: float
) -> tuple[list[StreamStart], list[StreamTokens]]:
    records = [record async for record in client.stream(asked, **options)]
    starts = [record for record in records if isinstance(record, StreamStart)]
    return starts, [record for record in records if isinstance(record, StreamTokens)]


def is_free(service: Service) -> bool:
    """Nothing of a request is left."""
    status = service.replica.status()
    return not service.engine.running and status.num_outstanding_completions == 0


async def test_a_stream_starts_every_group_in_order_and_ends_every_completion(
    service: Service, client: RolloutClient
) -> None:
    asked = GenerateRequest(
        prompts=((1, 3), (1, 4)), sampling=SamplingParams(n=2, max_tokens=3, seed=5)
    )
    starts, tokens = await collect(client, asked)
    assert [(s.group, s.prompt_token_ids, s.sampling.seed) for s in starts] == [
        (0, (1, 3), 5),
        (1, (1, 4), 7),
    ]
    assert all(start.policy.is_base for start in starts)
    for group, completion in ((0, 0), (0, 1), (1, 0), (1, 1)):
        of_one = [t for t in tokens if (t.group, t.completion) == (group, completion)]
        assert [(t.token_ids, t.logprobs, t.finish_reason) for t in of_one] == [
            ((TOKEN,), (LOGPROB,), None),
            ((TOKEN,), (LOGPROB,), None),
            ((TOKEN,), (LOGPROB,), "length"),
        ]
    assert is_free(service)
    text = (await service.get("/metrics")).text
    assert 'tandem_rollout_completions_total{finish_reason="length"} 4.0' in text
    assert "tandem_rollout_errors_total{" not in text
    assert "tandem_rollout_open_streams 0.0" in text


async def test_a_stream_that_has_nothing_to_say_says_that_it_is_alive(
    service: Service, client: RolloutClient
) -> None:
    service.engine.hold()
    body = {"prompts": [[1, 3]], "stream": True, "sampling": {"max_tokens": 1}}
    seen: list[tuple[str, float]] = []
    async with (
        httpx.AsyncClient(trust_env=False) as http,
        http.stream("POST", client.url + "/generate", json=body) as response,
    ):
        assert response.headers["content-type"] == "application/x-ndjson"
        async for line in response.aiter_lines():
            seen.append((json.loads(line)["kind"], time.monotonic()))
            if len(seen) == 4:
                service.engine.release()
    kinds, times = zip(*seen, strict=True)
    assert kinds == ("start", "alive", "alive", "alive", "tokens", "end")
    assert all(later - earlier < 1 for earlier, later in itertools.pairwise(times))


async def test_what_is_refused_is_refused_before_the_stream_begins(
    service: Service, client: RolloutClient
) -> None:
    biased = SamplingParams(top_p=0.5)
    training = GenerateRequest(prompts=((1,),), sampling=biased, purpose="train")
    with pytest.raises(UnsuitableForTraining):
        await collect(client, training)
    task = await running(service, n=3)
    with pytest.raises(Overloaded) as full:
        await collect(client, request(2))
    assert full.value.retry_after_s == 1.0
    service.engine.release()
    await task
    assert is_free(service)


async def test_a_client_that_closes_a_stream_cancels_the_engines_work(
    service: Service, client: RolloutClient
) -> None:
    service.engine.hold(after=2)
    async with aclosing(client.stream(request(2, max_tokens=9))) as records:
        seen = [await anext(records) for _ in range(5)]
        assert service.replica.status().num_outstanding_completions == 2
    assert len(seen) == 5
    await until(lambda: is_free(service))
    assert len(service.engine.cancelled) == 1
    await until(lambda: service.replica.serving.sampler.idle.is_set())
    assert 'errors_total{type="ClientClosed"} 1.0' in (await service.get("/metrics")).text


async def test_a_stream_over_the_deadline_ends_with_the_reason(
    serve: Callable[..., Service],
) -> None:
    service = serve(request_timeout_s=0.2)
    await service.started()
    service.engine.hold(after=1)
    async with service.listening() as client:
        with pytest.raises(DeadlineExceeded, match=r"longer than 0\.2 s"):
            await collect(client, request(max_tokens=5))
    assert is_free(service)


async def test_a_replica_that_hangs_is_noticed_by_its_silence(
    service: Service, client: RolloutClient
) -> None:
    """NeMo-RL#3589: a dead engine parks rollouts for ever when no wait has an end."""
    service.engine.hold()
    with pytest.raises(Unavailable, match=r"sent nothing for 0\.2 s"):
        await collect(client, request(), silence_s=0.2)
    with pytest.raises(DeadlineExceeded, match=r"did not end its stream within 0\.8 s"):
        await collect(client, request(), timeout_s=0.8)
    await until(lambda: is_free(service))


async def test_an_engine_that_dies_ends_the_stream_with_the_reason(
    service: Service, client: RolloutClient
) -> None:
    service.engine.hold(after=2)
    async with aclosing(client.stream(request(2, max_tokens=9))) as records:
        for _ in range(5):
            await anext(records)
        service.engine.die("killed by the test")
        with pytest.raises(EngineDead, match="killed by the test"):
            await anext(records)
    assert is_free(service)


async def test_an_unexpected_error_is_a_record_of_the_stream(
    service: Service, client: RolloutClient
) -> None:
    service.engine.fails = RuntimeError("out of luck")
    with pytest.raises(InternalError, match="RuntimeError: out of luck"):
        await collect(client, request())
    assert is_free(service)


async def test_drain_finishes_a_stream(service: Service, client: RolloutClient) -> None:
    service.engine.hold(after=1)
    task = asyncio.ensure_future(collect(client, request(max_tokens=3)))
    await until(lambda: len(service.engine.running) == 1)
    await service.client.drain()
    await until(lambda: service.replica._refusing)
    with pytest.raises(NotReady):
        await collect(client, request())
    service.engine.release()
    _, tokens = await task
    assert [record.finish_reason for record in tokens] == [None, None, "length"]
    assert await service.exit_code() == 0


async def test_drain_interrupts_a_stream_that_does_not_end_in_time(
    serve: Callable[..., Service],
) -> None:
    service = serve(drain_timeout_s=0.05)
    await service.started()
    service.engine.hold(after=2)
    async with service.listening() as client:
        task = asyncio.ensure_future(collect(client, request(2, max_tokens=9)))
        await until(lambda: len(service.engine.running) == 1)
        await service.client.drain()
        _, tokens = await task
    for completion in (0, 1):
        of_one = [t for t in tokens if t.completion == completion]
        assert sum(len(t.token_ids) for t in of_one) == 2
        assert [t.finish_reason for t in of_one] == [None, None, "interrupted"]
    assert await service.exit_code() == 0
    assert is_free(service)
