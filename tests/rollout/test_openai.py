"""The OpenAI endpoint on a fake engine: what it takes, refuses, and does with interruptions."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from openai import (
    APIError,
    AsyncOpenAI,
    AuthenticationError,
    DefaultAsyncHttpxClient,
    InternalServerError,
    RateLimitError,
)

from services.rollout.openai_types import ChatRequest
from services.tokens import PromptEncoder
from shared.schemas import (
    BASE_POLICY,
    ChatMessage,
    Completion,
    PolicyId,
    SamplingParams,
    ScoredCompletion,
    ScoredGroup,
    Segment,
    ToolCall,
    ToolFunction,
)
from tests.adapters import adapter_file, make_manifest, make_tensors
from tests.fake_engine import LOGPROB, TOKEN
from tests.rollout.service import Service, request, running, until
from tests.rollout.test_registration import FakeTrainer

pytestmark = pytest.mark.anyio

KEY = "a-key-of-the-test"
V1, V2 = (PolicyId(run_id="run", version=version) for version in (1, 2))


class Caller:
    """Posts to /v1 of a service on a real socket."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(f"/v1/{path}", json={"model": "policy", **body})

    async def complete(self, **body: Any) -> dict[str, Any]:
        answer = await self.post("completions", **{"prompt": [1, 3], **body})
        assert answer.is_success, answer.text
        return dict(answer.json())

    async def events(self, path: str = "completions", **body: Any) -> list[str]:
        """What follows `data: ` in a stream, line by line."""
        if path == "completions":
            body = {"prompt": [1, 3], **body}
        answer = await self.post(path, **body, stream=True)
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.text.splitlines()
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def chunks(events: list[str]) -> list[dict[str, Any]]:
    *chunks, done = events
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


@pytest.fixture
async def caller(service: Service) -> AsyncIterator[Caller]:
    async with calling(service) as caller:
        yield caller


@asynccontextmanager
async def calling(service: Service) -> AsyncIterator[Caller]:
    async with (
        service.listening() as client,
        httpx.AsyncClient(base_url=client.url, timeout=30, trust_env=False) as http,
    ):
        yield Caller(http)


async def publish(service: Service, policy: PolicyId, **options: Any) -> None:
    status = await service.client.status()
    assert status.base
    manifest = make_manifest(status.base, policy)
    shapes = service.replica.serving.base.linear_shapes
    adapter = adapter_file(manifest, make_tensors(manifest, shapes, seed=policy.version))
    await service.client.sync_weights(adapter, **options)


# --- answers ------------------------------------------------------------------------------------


async def test_choices_make_the_group_that_post_train_takes(
    service: Service, caller: Caller
) -> None:
    await publish(service, V1)
    answer = await caller.complete(
        n=2, max_tokens=2, seed=5, logprobs=0, return_token_ids=True, purpose="train"
    )
    first, second = answer["choices"]
    assert (first["prompt_token_ids"], first["sampling"]) == (
        second["prompt_token_ids"],
        second["sampling"],
    )
    group = ScoredGroup(
        prompt_token_ids=first["prompt_token_ids"],
        sampling=SamplingParams.model_validate(first["sampling"]),
        completions=tuple(
            ScoredCompletion(
                completion=Completion(
                    token_ids=choice["token_ids"],
                    logprobs=choice["logprobs"]["token_logprobs"],
                    segments=choice["segments"],
                    finish_reason=choice["finish_reason"],
                ),
                reward=1.0,
            )
            for choice in answer["choices"]
        ),
    )
    assert group.prompt_token_ids == (1, 3)
    assert group.sampling == SamplingParams(n=2, max_tokens=2, seed=5)
    assert group.completions[1].completion == Completion(
        token_ids=(TOKEN, TOKEN),
        logprobs=(LOGPROB, LOGPROB),
        segments=(Segment(policy=V1, num_tokens=2),),
        finish_reason="length",
    )
    assert answer["model"] == "policy@1"
    assert answer["boot_id"] == service.replica.boot_id
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}


async def test_token_ids_are_null_unless_they_are_asked_for(caller: Caller) -> None:
    (choice,) = (await caller.complete(max_tokens=1))["choices"]
    for name in ("token_ids", "prompt_token_ids", "sampling", "logprobs"):
        assert choice[name] is None
    assert choice["segments"][0]["policy"]["version"] == 0


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("53", [[1, 8, 6]]),
        ([1, 8], [[1, 8]]),
        (["5", "53"], [[1, 8], [1, 8, 6]]),
        ([[1, 8], [4]], [[1, 8], [4]]),
    ],
    ids=["text", "ids", "texts", "lists of ids"],
)
async def test_a_prompt_is_a_text_or_ids_or_several_of_them(
    prompt: Any, prompts: list[list[int]], caller: Caller
) -> None:
    answer = await caller.complete(prompt=prompt, n=2, max_tokens=1, return_token_ids=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(prompts)))
    assert [choice["prompt_token_ids"] for choice in answer["choices"][::2]] == prompts


async def test_without_a_limit_a_completion_has_16_tokens_and_a_chat_the_context(
    caller: Caller,
) -> None:
    assert (await caller.complete())["usage"]["completion_tokens"] == 16
    chat = await caller.post("chat/completions", messages=[{"role": "user", "content": "5"}])
    assert chat.json()["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 61,
        "total_tokens": 64,  # the context of the fake
    }


async def test_a_chat_answers_with_a_message_and_the_sampled_tokens_logprobs(
    caller: Caller,
) -> None:
    answer = await caller.post(
        "chat/completions",
        messages=[{"role": "user", "content": "5"}],
        max_completion_tokens=2,
        logprobs=True,
        return_token_ids=True,
    )
    (choice,) = answer.json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": "00"}
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([1, 8, 14], [TOKEN, TOKEN])
    token = {"token": "0", "logprob": LOGPROB, "bytes": [48], "top_logprobs": []}
    assert choice["logprobs"] == {"content": [token, token]}


async def test_a_stream_opens_every_choice_and_ends_with_the_usage_and_done(
    caller: Caller,
) -> None:
    events = await caller.events(
        "chat/completions",
        messages=[{"role": "user", "content": "5"}],
        n=2,
        max_tokens=2,
        return_token_ids=True,
        stream_options={"include_usage": True},
    )
    *of_choices, last = chunks(events)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert {chunk["usage"] for chunk in of_choices} == {None}
    assert len({chunk["id"] for chunk in [*of_choices, last]}) == 1
    for index in (0, 1):
        choices = [c for chunk in of_choices for c in chunk["choices"] if c["index"] == index]
        assert [c["delta"] for c in choices] == [
            {"role": "assistant", "content": ""},
            {"role": None, "content": "0"},
            {"role": None, "content": "0"},
        ]
        assert [c["finish_reason"] for c in choices] == [None, None, "length"]
        assert [c["prompt_token_ids"] for c in choices] == [[1, 8, 14], None, None]
        assert [c["token_ids"] for c in choices] == [[], [TOKEN], [TOKEN]]


async def test_a_stream_with_nothing_to_say_sends_comments(
    service: Service, caller: Caller
) -> None:
    service.engine.hold()
    body = {"model": "policy", "prompt": [1, 3], "max_tokens": 1, "stream": True}
    lines = []
    async with caller.http.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            lines.append(line)
            if line == ": alive":
                service.engine.release()
    assert ": alive" in lines
    assert "data: [DONE]" in lines


# --- models -------------------------------------------------------------------------------------


async def models(caller: Caller) -> dict[str, Any]:
    data = (await caller.http.get("/v1/models")).json()["data"]
    return {model["id"]: model["policy"] for model in data}


async def test_the_models_are_the_newest_policy_its_resident_versions_and_the_base(
    service: Service, caller: Caller
) -> None:
    base = BASE_POLICY.model_dump()
    assert await models(caller) == {"policy": base, "base": base}
    await publish(service, V1)
    await publish(service, V2)
    assert await models(caller) == {
        "policy": V2.model_dump(),
        "policy@1": V1.model_dump(),
        "policy@2": V2.model_dump(),
        "base": base,
    }
    one = (await caller.http.get("/v1/models/policy@1")).json()
    assert (one["policy"], one["max_model_len"]) == (V1.model_dump(), 64)


@pytest.mark.parametrize(
    ("model", "policy"),
    [("policy", V2), ("policy@2", V2), ("policy@1", V1), ("base", BASE_POLICY)],
)
async def test_a_model_name_picks_the_version(
    model: str, policy: PolicyId, service: Service, caller: Caller
) -> None:
    await publish(service, V1)
    await publish(service, V2)
    answer = await caller.complete(model=model, max_tokens=1)
    assert answer["choices"][0]["segments"] == [{"policy": policy.model_dump(), "num_tokens": 1}]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("gpt-4", "there is no model 'gpt-4' here: ask for 'policy'"),
        ("policy@x", "there is no model 'policy@x'"),
        ("policy@7", "policy run.1@7 is not resident here; resident are run.1@1"),
    ],
)
async def test_an_unknown_model_is_404_model_not_found(
    model: str, says: str, service: Service, caller: Caller
) -> None:
    await publish(service, V1)
    answer = await caller.post("completions", prompt="5", model=model)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert says in error["message"]


async def test_in_a_fleet_the_model_policy_is_503_until_a_run_has_published_one(
    serve: Callable[..., Service],
) -> None:
    service = serve(registration=FakeTrainer().registration())
    await service.started()
    async with calling(service) as caller:
        refused = await caller.post("completions", prompt="5")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "model 'base' at /v1" in refused.json()["error"]["message"]
        assert await models(caller) == {"policy": None, "base": BASE_POLICY.model_dump()}
        for model in ("base", "policy@0"):
            assert (await caller.complete(model=model, max_tokens=1))["model"] == "base"
        await publish(service, V1)
        assert (await caller.complete(max_tokens=1))["model"] == "policy@1"


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"echo": True}, "echo is True: not supported here: remove it"),
        ({"best_of": 3}, "best_of is 3: not supported here: remove it"),
        ({"suffix": "x"}, "suffix is 'x': not supported here"),
        ({"logit_bias": {"5": 1}}, "logit_bias is {'5': 1}: not supported here"),
        ({"logprobs": 5}, "logprobs is 5: only the sampled token's logprob is kept: send 0"),
        ({"temperatur": 1}, "unknown field 'temperatur'"),
        ({"prompt": [1, "5"]}, "prompt is [1, '5']: write a text, a list of token ids"),
        ({"prompt": [{"role": "user", "content": "5"}]}, "write a text, a list of token ids"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": [99]}, "token id 99 is out of vocabulary"),
        ({"n": 5}, "the request asks for 5 completions (prompts × n), the limit is 4"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0.5, "purpose": "train"}, "top_p=0.5 in a training request"),
        ({"max_tokens": 64}, "over the context of 64 tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_served_is_400_with_one_sentence(
    fields: dict[str, Any], says: str, stream: bool, caller: Caller
) -> None:
    answer = await caller.post("completions", **{"prompt": [1, 3], "stream": stream, **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert says in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", None)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": [{"type": "function"}]}, "no call is parsed from the answer"),
        ({"tool_choice": "required"}, "no call is parsed from the answer"),
        ({"response_format": {"type": "json_object"}}, "response_format is"),
        ({"top_logprobs": 2, "logprobs": True}, "top_logprobs is 2: only the sampled token's"),
        ({"audio": {"voice": "x"}}, "unknown field 'audio'"),
        ({"messages": []}, "messages is []"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
    ],
)
async def test_what_a_chat_cannot_do_is_400_with_one_sentence(
    fields: dict[str, Any], says: str, caller: Caller
) -> None:
    body = {"messages": [{"role": "user", "content": "5"}], **fields}
    answer = await caller.post("chat/completions", **body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


async def test_what_changes_nothing_is_taken_and_null_is_the_default(caller: Caller) -> None:
    neutral = {"user": "me", "metadata": {"a": "b"}, "store": True, "echo": False, "best_of": 1}
    null = dict.fromkeys(["temperature", "stop", "seed", "stream_options", "logit_bias", "suffix"])
    answer = await caller.complete(max_tokens=1, return_token_ids=True, **neutral, **null)
    assert answer["choices"][0]["sampling"] == SamplingParams(max_tokens=1).model_dump(mode="json")


async def test_a_wrong_key_is_401_and_an_unknown_route_404_in_openais_shape(
    serve: Callable[..., Service],
) -> None:
    service = serve(TANDEM_API_KEY=KEY)
    refused = await service.get("/v1/models")
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert refused.json()["error"]["code"] == "invalid_api_key"
    missing = await service.get("/v1/embeddings", Authorization=f"Bearer {KEY}")
    assert missing.status_code == 404
    assert "there is no route GET /v1/embeddings" in missing.json()["error"]["message"]
    starting = await service.get("/v1/models", Authorization=f"Bearer {KEY}")
    assert starting.status_code == 503
    assert starting.json()["error"]["type"] == "server_error"


async def test_a_full_queue_is_429_with_retry_after(service: Service, caller: Caller) -> None:
    task = await running(service, n=3)
    for stream in (False, True):
        answer = await caller.post("completions", prompt=[1, 3], n=2, stream=stream)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    service.engine.release()
    await task


async def test_the_openai_client_raises_its_own_exceptions(
    serve: Callable[..., Service],
) -> None:
    service = serve(TANDEM_API_KEY=KEY)
    await service.started()
    async with service.listening() as at, DefaultAsyncHttpxClient(trust_env=False) as http:

        def client(key: str) -> AsyncOpenAI:
            url = f"{at.url}/v1"
            return AsyncOpenAI(base_url=url, api_key=key, http_client=http, max_retries=0)

        with pytest.raises(AuthenticationError) as refused:
            await client("wrong").models.list()
        assert refused.value.code == "invalid_api_key"
        service.engine.hold()
        task = asyncio.ensure_future(service.client.generate(request(4)))
        await until(lambda: len(service.engine.running) == 1)
        with pytest.raises(RateLimitError) as full:
            await client(KEY).completions.create(model="base", prompt="5")
        assert full.value.response.headers["retry-after"] == "1"
        service.engine.release()
        await task
        service.engine.fails = RuntimeError("broken")
        with pytest.raises(InternalServerError):
            await client(KEY).completions.create(model="base", prompt="5")
        stream = await client(KEY).completions.create(model="base", prompt="5", stream=True)
        with pytest.raises(APIError, match="broken"):
            _ = [chunk async for chunk in stream]


# --- interruptions ------------------------------------------------------------------------------


async def interrupted_by_v2(
    service: Service, caller: Caller, call: Callable[..., Any], **body: Any
) -> Any:
    """What a request of 5 tokens gets whose engine says 2 under V1, until V2 comes."""
    await publish(service, V1)
    service.engine.hold(after=2)
    task = asyncio.ensure_future(call(max_tokens=5, logprobs=0, return_token_ids=True, **body))
    await until(lambda: len(service.engine.running) == 1)
    await publish(service, V2, in_flight="continue")
    await until(lambda: len(service.engine.running) >= 1)
    service.engine.release()
    return await task


async def test_a_sync_interrupts_nothing_for_good_the_rest_comes_under_the_new_version(
    service: Service, caller: Caller
) -> None:
    answer = await interrupted_by_v2(service, caller, caller.complete, n=2)
    assert answer["model"] == "policy@1"
    assert answer["usage"]["completion_tokens"] == 10
    for choice in answer["choices"]:
        assert [Segment.model_validate(item) for item in choice["segments"]] == [
            Segment(policy=V1, num_tokens=2),
            Segment(policy=V2, num_tokens=3),
        ]
        assert choice["token_ids"] == [TOKEN] * 5
        assert choice["logprobs"]["token_logprobs"] == [LOGPROB] * 5
        assert (choice["text"], choice["finish_reason"]) == ("00000", "length")


async def test_an_interrupted_stream_goes_on_where_it_was(service: Service, caller: Caller) -> None:
    events = await interrupted_by_v2(service, caller, caller.events, n=2)
    for index in (0, 1):
        choices = [c for chunk in chunks(events) for c in chunk["choices"] if c["index"] == index]
        assert "".join(choice["text"] for choice in choices) == "00000"
        assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1]["finish_reason"] == "length"
        offsets = [o for choice in choices for o in choice["logprobs"]["text_offset"]]
        assert offsets == [0, 1, 2, 3, 4]
        segments = [Segment.model_validate(s) for choice in choices for s in choice["segments"]]
        assert [(s.policy, s.num_tokens) for s in segments] == [(V1, 1)] * 2 + [(V2, 1)] * 3


async def test_a_pinned_version_goes_on_under_itself(service: Service, caller: Caller) -> None:
    answer = await interrupted_by_v2(service, caller, caller.complete, model="policy@1")
    (segment,) = answer["choices"][0]["segments"]
    assert segment == {"policy": V1.model_dump(), "num_tokens": 5}


async def test_what_cannot_go_on_exactly_begins_again_under_the_new_version(
    service: Service, caller: Caller
) -> None:
    answer = await interrupted_by_v2(service, caller, caller.complete, stop="7")
    (segment,) = answer["choices"][0]["segments"]
    assert segment == {"policy": V2.model_dump(), "num_tokens": 5}


async def test_a_stream_that_cannot_go_on_exactly_ends_with_an_error(
    service: Service, caller: Caller
) -> None:
    await publish(service, V1)
    service.engine.hold(after=2)
    task = asyncio.ensure_future(caller.events(max_tokens=5, presence_penalty=0.5))
    await until(lambda: len(service.engine.running) == 1)
    await publish(service, V2, in_flight="continue")
    *_, last = await task
    error = json.loads(last)["error"]
    assert error["type"] == "server_error"
    assert "new weights interrupted this stream" in error["message"]
    assert await counted_errors(service) == {"Unavailable": 1}


async def test_a_drain_answers_no_half_completion(serve: Callable[..., Service]) -> None:
    service = serve(drain_timeout_s=0.05)
    await service.started()
    service.engine.hold(after=2)
    async with calling(service) as caller:
        whole = asyncio.ensure_future(caller.post("completions", prompt=[1, 3], max_tokens=5))
        stream = asyncio.ensure_future(caller.events(max_tokens=5))
        await until(lambda: len(service.engine.running) == 2)
        await service.client.drain()
        answer = await whole
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "draining" in answer.json()["error"]["message"]
        *_, last = await stream
        assert "draining" in json.loads(last)["error"]["message"]
        assert await counted_errors(service) == {"NotReady": 2}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_the_engines_work(
    stream: bool, service: Service, caller: Caller
) -> None:
    service.engine.hold()
    body = {"prompt": [1, 3], "max_tokens": 9, "stream": stream}
    task = asyncio.ensure_future(caller.post("completions", **body))
    await until(lambda: len(service.engine.running) == 1)
    task.cancel()
    await until(lambda: len(service.engine.cancelled) == 1)
    await until(lambda: service.replica.serving.sampler.idle.is_set())
    assert await counted_errors(service) == {"ClientClosed": 1}


async def counted_errors(service: Service) -> dict[str, float]:
    """How many of each type the metrics have."""
    text = (await service.get("/metrics")).text
    counted = re.findall(r'tandem_rollout_errors_total\{type="(\w+)"\} (\S+)', text)
    return {name: float(count) for name, count in counted}


# --- chat messages ------------------------------------------------------------------------------


def test_the_messages_of_an_agent_reach_the_chat_template() -> None:
    request = ChatRequest.model_validate(
        {
            "model": "policy",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "what is "}, TWO_PLUS_TWO]},
                {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "call-1", "content": "4"},
            ],
        }
    )
    (messages,) = request.prompts()
    function = ToolFunction(name="calculator", arguments={"expression": "2+2"})
    assert messages == (
        ChatMessage(role="user", content="what is 2+2"),
        ChatMessage(
            role="assistant", content="", tool_calls=(ToolCall(id="call-1", function=function),)
        ),
        ChatMessage(role="tool", content="4", tool_call_id="call-1"),
    )
    tokenizer = Rendering()
    PromptEncoder(tokenizer, 16).encode(messages)
    parsed = {"name": "calculator", "arguments": {"expression": "2+2"}}
    assert tokenizer.rendered == [
        {"role": "user", "content": "what is 2+2"},
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": parsed}]},
        {"role": "tool", "content": "4", "tool_call_id": "call-1"},
    ]


TWO_PLUS_TWO = {"type": "text", "text": "2+2"}
CALL = {
    "id": "call-1",
    "type": "function",
    "function": {"name": "calculator", "arguments": '{"expression": "2+2"}'},
}


class Rendering:
    """A tokenizer that keeps what its chat template is given."""

    chat_template = "{{ messages }}"
    rendered: object = None

    def apply_chat_template(self, messages: object, **_: object) -> str:
        self.rendered = messages
        return ""

    def encode(self, text: str, **_: object) -> list[int]:
        return []
