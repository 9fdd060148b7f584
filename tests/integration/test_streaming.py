"""What a stream of the real engine says, and what is left when it ends early."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from shared.errors import MEDIA_TYPE, Unavailable
from shared.schemas import Completion, GenerateResponse, Segment, StreamStart, StreamTokens
from tests.publisher import PROBE, Publisher
from tests.replica_process import ReplicaProcess, until

pytestmark = pytest.mark.anyio

KERNEL_NOISE = 0.05  # bf16 in another order of summation


@dataclass(slots=True)
class Streamed:
    """The records of one stream, in their order."""

    starts: list[StreamStart] = field(default_factory=list)
    tokens: list[StreamTokens] = field(default_factory=list)

    def add(self, record: StreamStart | StreamTokens) -> None:
        if isinstance(record, StreamStart):
            assert not self.tokens, "a group starts after tokens"
            self.starts.append(record)
        else:
            self.tokens.append(record)

    def completion(self, group: int, completion: int) -> Completion:
        """As the same request without `stream` answers it."""
        records = [r for r in self.tokens if (r.group, r.completion) == (group, completion)]
        assert [r.finish_reason for r in records[:-1]] == [None] * (len(records) - 1)
        ids = tuple(token for record in records for token in record.token_ids)
        reason = records[-1].finish_reason
        assert reason, "a completion without an end"
        return Completion(
            token_ids=ids,
            logprobs=tuple(value for record in records for value in record.logprobs),
            segments=(Segment(policy=self.starts[group].policy, num_tokens=len(ids)),),
            finish_reason=reason,
            text="".join(record.text or "" for record in records),
        )


async def collect(records: AsyncIterator[StreamStart | StreamTokens]) -> Streamed:
    streamed = Streamed()
    async for record in records:
        streamed.add(record)
    return streamed


def assert_same(streamed: Streamed, answer: GenerateResponse) -> None:
    for i, group in enumerate(answer.groups):
        start = streamed.starts[i]
        assert (start.group, start.prompt_token_ids) == (i, group.prompt_token_ids)
        assert start.sampling == group.sampling
        for k, expected in enumerate(group.completions):
            completion = streamed.completion(i, k)
            assert completion.token_ids == expected.token_ids
            assert completion.logprobs == pytest.approx(expected.logprobs, abs=KERNEL_NOISE)
            assert completion.segments == expected.segments
            assert completion.finish_reason == expected.finish_reason
            assert completion.text == expected.text


async def test_a_stream_says_what_the_same_request_answers_without_it(
    publisher: Publisher,
) -> None:
    await publisher.publish(1)
    prompts = ([1, 3, 4], [1, 5, 6], PROBE)
    sampling: dict[str, Any] = {"n": 3, "max_tokens": 60, "seed": 7}
    streamed = await collect(publisher.stream(*prompts, **sampling))
    answer = await publisher.generate(*prompts, **sampling)
    assert_same(streamed, answer)
    reasons = {c.finish_reason for group in answer.groups for c in group.completions}
    assert reasons == {"stop", "length"}


async def test_a_stop_string_cuts_the_streamed_text_as_it_cuts_the_other(
    publisher: Publisher,
) -> None:
    await publisher.publish(1)
    sampling: dict[str, Any] = {
        "max_tokens": 200,
        "seed": 3,
        "stop": ("12", "7"),
        "ignore_eos": True,
    }
    streamed = await collect(publisher.stream(PROBE, **sampling))
    answer = await publisher.generate(PROBE, **sampling)
    assert_same(streamed, answer)
    assert answer.groups[0].completions[0].finish_reason == "stop"


async def test_text_is_left_out_of_a_stream_on_request(publisher: Publisher) -> None:
    streamed = await collect(publisher.stream([1, 3], max_tokens=3, detokenize=False))
    assert {record.text for record in streamed.tokens} == {None}


async def test_tokens_come_while_the_completion_is_still_sampled(publisher: Publisher) -> None:
    """ROLLOUT_STREAM_INTERVAL is 8: one record for the first token, then one per 8 or more."""
    await publisher.publish(1)
    streamed = await collect(publisher.stream(PROBE, max_tokens=400, seed=2, ignore_eos=True))
    sizes = [len(record.token_ids) for record in streamed.tokens]
    assert sum(sizes) == 400
    assert sizes[0] == 1
    assert 10 < len(sizes) <= 51


async def test_an_interrupted_stream_has_every_token_so_far_and_the_completion_can_go_on(
    publisher: Publisher,
) -> None:
    first = await publisher.publish(1)
    sampling: dict[str, Any] = {"n": 4, "max_tokens": 400, "seed": 9, "ignore_eos": True}
    whole = await publisher.generate(PROBE, policy=first, **sampling)
    streamed, second = Streamed(), None
    async with aclosing(publisher.stream(PROBE, **sampling)) as records:
        async for record in records:
            streamed.add(record)
            if second is None and sum(len(r.token_ids) for r in streamed.tokens) > 40:
                second = await publisher.publish(2, in_flight="continue")
    assert second
    for k, expected in enumerate(whole.groups[0].completions):
        part = streamed.completion(0, k)
        num_tokens = len(part.token_ids)
        assert part.finish_reason == "interrupted"
        assert 10 <= num_tokens < 400
        assert part.token_ids == expected.token_ids[:num_tokens]
        assert part.segments[0].policy == first
    part = streamed.completion(0, 0)
    rest = await collect(
        publisher.stream(
            PROBE,
            completion_prefix=part.token_ids,
            max_tokens=400 - len(part.token_ids),
            seed=1,
            ignore_eos=True,
        )
    )
    assert (rest.starts[0].prompt_token_ids, rest.starts[0].policy) == (PROBE, second)
    continued = rest.completion(0, 0)
    assert len(part.token_ids) + len(continued.token_ids) == 400
    assert continued.finish_reason == "length"


async def test_a_client_that_leaves_a_stream_ends_its_work_and_its_leases(
    replica: ReplicaProcess, publisher: Publisher
) -> None:
    """64 completions of 470 tokens would take half a minute; nobody reads them any more."""
    policy = await publisher.publish(1)
    before = replica.metric("vllm:generation_tokens_total")
    stream = publisher.stream(PROBE, n=64, max_tokens=470, ignore_eos=True)
    async with aclosing(stream) as records:
        async for record in records:
            if isinstance(record, StreamTokens):
                break
        assert replica.num_leases(policy) == 1
        assert replica.metric("tandem_rollout_outstanding_completions") == 64
        assert replica.metric("tandem_rollout_open_streams") == 1
    await until(lambda: replica.metric("tandem_rollout_outstanding_completions") == 0)
    assert replica.metric("tandem_rollout_open_streams") == 0
    assert replica.num_leases(policy) == 0
    # The gauge is set by the engine's next step, so a short request makes one.
    await publisher.generate([1], max_tokens=1)
    await until(lambda: replica.metric("vllm:num_requests_running") == 0)
    assert replica.metric("vllm:generation_tokens_total") - before < 64 * 470 / 2


async def test_streams_and_answers_share_the_engine(publisher: Publisher) -> None:
    await publisher.publish(1)
    sampling: dict[str, Any] = {"n": 2, "max_tokens": 30, "seed": 5, "ignore_eos": True}
    expected = await publisher.generate(PROBE, **sampling)
    *streams, answer = await asyncio.gather(
        *(collect(publisher.stream(PROBE, **sampling)) for _ in range(4)),
        publisher.generate(PROBE, **sampling),
    )
    for streamed in streams:
        assert isinstance(streamed, Streamed)
        assert_same(streamed, expected)
    assert isinstance(answer, GenerateResponse)
    assert answer.groups[0].completions[0].token_ids == expected.groups[0].completions[0].token_ids


@pytest.mark.parametrize(
    ("fields", "status", "error"),
    [
        ({"prompts": [[1, 99]]}, 422, "InvalidRequest"),
        ({"prompts": [[1] * 512]}, 422, "InvalidRequest"),
        ({"sampling": {"n": 65}}, 422, "InvalidRequest"),
        ({"purpose": "train", "sampling": {"top_p": 0.5}}, 422, "UnsuitableForTraining"),
        ({"policy": {"run_id": "nobody", "version": 3}}, 404, "UnknownPolicy"),
    ],
    ids=["vocabulary", "context", "completions", "training", "policy"],
)
def test_what_cannot_be_served_is_refused_before_the_stream_begins(
    fields: dict[str, object], status: int, error: str, replica: ReplicaProcess
) -> None:
    body = json.dumps({"prompts": [[1, 3]], "stream": True, **fields}).encode()
    headers = {"Content-Type": "application/json"}
    response = httpx.post(
        replica.url + "/generate", content=body, headers=headers, timeout=30, trust_env=False
    )
    assert (response.status_code, response.headers["content-type"]) == (status, MEDIA_TYPE)
    assert response.json()["title"] == error


async def test_a_stream_is_one_json_record_per_line_that_ends_with_the_boot_id(
    replica: ReplicaProcess, publisher: Publisher
) -> None:
    body = {"prompts": [[1, 3]], "stream": True, "sampling": {"max_tokens": 3, "ignore_eos": True}}
    async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
        response = await http.post(replica.url + "/generate", json=body)
    assert response.headers["content-type"] == "application/x-ndjson"
    first, *_, last = [json.loads(line) for line in response.text.splitlines()]
    assert (first["kind"], last["kind"]) == ("start", "end")
    assert last["boot_id"] == (await publisher.client.status()).boot_id


async def test_a_replica_that_cannot_be_reached_is_unavailable(publisher: Publisher) -> None:
    nowhere = type(publisher.client)("http://127.0.0.1:9")
    with pytest.raises(Unavailable):
        await collect(Publisher(nowhere, publisher.base, publisher.shapes).stream([1]))
