"""Requests that cannot be served are refused with the reason, on the real engine over real HTTP."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from shared.errors import MEDIA_TYPE, TYPE_PREFIX, UnknownPolicy
from shared.schemas import GenerateRequest, SamplingParams
from tests.publisher import PROBE, Publisher
from tests.replica_process import ReplicaProcess, until

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request body, and what is said about it."""

    name: str
    path: str
    body: bytes
    status: int
    error: str
    says: str


def generate(
    name: str, says: str, *, error: str = "InvalidRequest", status: int = 422, **fields: Any
) -> Refusal:
    body = json.dumps({"prompts": [[1, 3, 4]], **fields}).encode()
    return Refusal(f"generate {name}", "/generate", body, status, error, says)


def score(name: str, says: str, *sequences: object, **fields: Any) -> Refusal:
    body = json.dumps({"sequences": sequences, **fields}).encode()
    return Refusal(f"score {name}", "/score", body, 422, "InvalidRequest", says)


def raw(name: str, body: bytes, says: str, path: str = "/generate") -> Refusal:
    return Refusal(name, path, body, 422, "InvalidRequest", says)


REFUSALS = [
    generate("no prompts", "prompts is []", prompts=[]),
    generate("an empty prompt", "prompts.0", prompts=[[]]),
    generate("an empty text", "prompts.0.text is ''", prompts=[""]),
    generate(
        "an id out of vocabulary",
        "token id 16 is out of vocabulary: the largest id is 15",
        prompts=[[1, 16]],
    ),
    generate("a negative id", "is -1", prompts=[[1, -1]]),
    generate("an id that is a fraction", "is 1.5", prompts=[[1, 1.5]]),
    generate(
        "a prefix out of vocabulary", "token id 99 is out of vocabulary", completion_prefix=[3, 99]
    ),
    generate(
        "a prefix for two prompts", "exactly one prompt", prompts=[[1], [1]], completion_prefix=[3]
    ),
    generate(
        "over the context",
        "prompt 1 has 500 tokens and max_tokens is 13, together over the context of 512",
        prompts=[[1], [1] * 500],
        sampling={"max_tokens": 13},
    ),
    generate("a prompt that fills the context", "prompt 0 has 512 tokens", prompts=[[1] * 512]),
    generate(
        "more completions than the limit",
        "asks for 65 completions (prompts × n), the limit is 64",
        sampling={"n": 65, "max_tokens": 1},
    ),
    generate(
        "more prompts than the limit",
        "asks for 66 completions (prompts × n), the limit is 64",
        prompts=[[1]] * 33,
        sampling={"n": 2, "max_tokens": 1},
    ),
    generate("n = 0", "sampling.n is 0", sampling={"n": 0}),
    generate("greedy n = 2", "at temperature 0", sampling={"n": 2, "temperature": 0}),
    # Faults S1 and S2: numbers and ids that the engine would choke on.
    generate("top_k beyond 32 bits", "sampling.top_k is", sampling={"top_k": 2**64 - 1}),
    generate("n beyond 32 bits", "sampling.n is", sampling={"n": 2**31}),
    generate("max_tokens beyond 32 bits", "sampling.max_tokens", sampling={"max_tokens": 10**30}),
    generate(
        "a stop token out of vocabulary",
        "token id 16 is out of vocabulary: the largest id is 15",
        sampling={"stop_token_ids": [16], "min_tokens": 1, "max_tokens": 4},
    ),
    generate("an id beyond 32 bits", "prompts.0", prompts=[[1, 2**31]]),
    generate(
        "a penalty that overflows",
        "sampling.repetition_penalty is 1e-300",
        sampling={"repetition_penalty": 1e-300},
    ),
    generate(
        "a version beyond 32 bits",
        "policy.version",
        policy={"run_id": "nobody", "version": 10**40},
    ),
    generate("a negative temperature", "sampling.temperature is -1", sampling={"temperature": -1}),
    generate(
        "more min_tokens than max_tokens",
        "min_tokens is 5, over max_tokens 4",
        sampling={"min_tokens": 5, "max_tokens": 4},
    ),
    generate("an unknown field", "unknown field 'sampling.best_of'", sampling={"best_of": 2}),
    generate("an unknown role of the request", "purpose is 'test'", purpose="test"),
    generate("an empty chat message", "prompts.0", prompts=[[{"role": "user"}]]),
    generate(
        "training with top_p",
        "top_p=0.9 in a training request: a policy gradient needs logprobs of the full softmax",
        error="UnsuitableForTraining",
        purpose="train",
        sampling={"top_p": 0.9},
    ),
    generate(
        "training with top_k and a penalty",
        "top_k=5, repetition_penalty=1.1 in a training request",
        error="UnsuitableForTraining",
        purpose="train",
        sampling={"top_k": 5, "repetition_penalty": 1.1},
    ),
    generate(
        "greedy training",
        "temperature=0 in a training request",
        error="UnsuitableForTraining",
        purpose="train",
        sampling={"temperature": 0},
    ),
    generate(
        "an unknown policy",
        "policy nobody.1@3 is not resident here",
        error="UnknownPolicy",
        status=404,
        policy={"run_id": "nobody", "version": 3},
    ),
    raw(
        "generate a temperature of NaN",
        b'{"prompts": [[1]], "sampling": {"temperature": NaN}}',
        "sampling.temperature is nan",
    ),
    raw("generate malformed JSON", b'{"prompts": [[1]', "the body is not JSON"),
    raw("generate an empty body", b"", "is required"),
    raw("generate a list", b"[]", "the body is []"),
    Refusal(
        "generate a body over the limit",
        "/generate",
        b'{"prompts": ["' + b"1" * (1 << 20) + b'"]}',
        413,
        "BodyTooLarge",
        "1048593 bytes is over the limit of 1048576",
    ),
    score("no sequences", "sequences is []"),
    score("a sequence of one token", "sequences.0", [1]),
    score("an id out of vocabulary", "token id 16 is out of vocabulary", [1, 16]),
    score("a negative id", "is -5", [1, -5]),
    score("over the context", "sequence 0 has 512 tokens, /score takes at most 511", [1] * 512),
    score("more sequences than the limit", "asks for 65 completions", *[[1, 3]] * 65),
    score("an unknown field", "unknown field 'temperature'", [1, 3], temperature=0.5),
    raw("score malformed JSON", b"sequences", "the body is not JSON", path="/score"),
]


def post(replica: ReplicaProcess, path: str, body: bytes) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.post(
        replica.url + path, content=body, headers=headers, timeout=30, trust_env=False
    )


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.name)
def test_a_bad_request_is_refused_with_the_reason(row: Refusal, replica: ReplicaProcess) -> None:
    response = post(replica, row.path, row.body)
    assert response.status_code == row.status, response.text
    assert response.headers["content-type"] == MEDIA_TYPE
    problem = response.json()
    assert (problem["type"], problem["title"]) == (TYPE_PREFIX + row.error, row.error)
    assert row.says in problem["detail"]
    assert post(replica, "/generate", b'{"prompts":[[1]],"sampling":{"max_tokens":1}}').is_success


@pytest.mark.parametrize("path", ["/nowhere", "/policies/0", "/policies/77"])
def test_what_does_not_exist_is_a_404_problem(path: str, replica: ReplicaProcess) -> None:
    response = replica.get(path)
    assert (response.status_code, response.headers["content-type"]) == (404, MEDIA_TYPE)


def test_a_method_that_a_route_does_not_have_is_named(replica: ReplicaProcess) -> None:
    assert "there is no route GET /generate" in replica.get("/generate").json()["detail"]


async def test_an_unresident_version_names_the_resident_ones(publisher: Publisher) -> None:
    await publisher.publish(1)
    await publisher.publish(2)
    with pytest.raises(UnknownPolicy) as refused:
        await publisher.generate([1], policy=publisher.policy(3), max_tokens=1)
    resident = [str(publisher.policy(1)), str(publisher.policy(2))]
    assert refused.value.extra == {"resident": resident}
    assert resident[1] in refused.value.detail


async def test_a_disconnect_stops_the_engines_work(
    replica: ReplicaProcess, publisher: Publisher
) -> None:
    """64 completions of 470 tokens would take half a minute; nobody waits for them any more."""
    await publisher.publish(1)
    request = GenerateRequest(
        prompts=(PROBE,), sampling=SamplingParams(n=64, max_tokens=470, ignore_eos=True)
    )
    before = replica.metric("vllm:generation_tokens_total")
    task = asyncio.ensure_future(publisher.client.generate(request))
    await until(lambda: replica.metric("vllm:num_requests_running") > 0)
    assert replica.metric("tandem_rollout_outstanding_completions") == 64
    task.cancel()
    await until(lambda: replica.metric("tandem_rollout_outstanding_completions") == 0)
    # The gauge is set by the engine's next step, so a short request makes one.
    await publisher.generate([1], max_tokens=1)
    await until(lambda: replica.metric("vllm:num_requests_running") == 0)
    assert replica.num_leases(publisher.policy(1)) == 0
    assert replica.metric("vllm:generation_tokens_total") - before < 64 * 470 / 2
