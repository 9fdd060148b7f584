"""The real `openai` client against the real engine: it gets what /generate samples."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, DefaultAsyncHttpxClient, NotFoundError
from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from examples.demo.model import CHARACTERS, EOS
from shared.schemas import ChatMessage, GenerateRequest, PolicyId, SamplingParams
from tests.publisher import PROBE, Publisher
from tests.replica_process import ReplicaProcess

pytestmark = pytest.mark.anyio

KERNEL_NOISE = 0.05  # bf16 in another order of summation
WITH_IDS = {"return_token_ids": True}
WITHOUT_EOS = {"return_token_ids": True, "ignore_eos": True}
CHAT: list[ChatCompletionMessageParam] = [{"role": "user", "content": "12+3"}]


@pytest.fixture
async def openai(replica: ReplicaProcess) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{replica.url}/v1",
        api_key="any",
        max_retries=0,
        timeout=60,
        http_client=DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        yield client


def extra(record: BaseModel, name: str) -> Any:
    """A field that OpenAI's API does not have."""
    assert record.model_extra
    return record.model_extra[name]


def segments(choice: CompletionChoice) -> list[tuple[PolicyId, int]]:
    return [
        (PolicyId.model_validate(segment["policy"]), segment["num_tokens"])
        for segment in extra(choice, "segments")
    ]


async def test_a_completion_is_the_one_that_generate_samples(
    openai: AsyncOpenAI, publisher: Publisher
) -> None:
    policy = await publisher.publish(1)
    sampled = await openai.completions.create(
        model="policy",
        prompt=[list(PROBE), [1, 3]],
        n=3,
        max_tokens=40,
        temperature=0.8,
        seed=7,
        logprobs=0,
        extra_body=WITH_IDS,
    )
    answer = await publisher.generate(PROBE, (1, 3), n=3, max_tokens=40, temperature=0.8, seed=7)
    expected = [(group, c) for group in answer.groups for c in group.completions]
    assert sampled.model == "policy@1"
    for choice, (group, completion) in zip(sampled.choices, expected, strict=True):
        assert extra(choice, "token_ids") == list(completion.token_ids)
        assert extra(choice, "prompt_token_ids") == list(group.prompt_token_ids)
        assert SamplingParams.model_validate(extra(choice, "sampling")) == group.sampling
        assert (choice.text, choice.finish_reason) == (completion.text, completion.finish_reason)
        assert choice.logprobs
        assert choice.logprobs.token_logprobs == pytest.approx(
            completion.logprobs, abs=KERNEL_NOISE
        )
        assert segments(choice) == [(policy, len(completion.token_ids))]
    num_tokens = sum(len(completion.token_ids) for _, completion in expected)
    assert sampled.usage
    assert sampled.usage.prompt_tokens == len(PROBE) + 2
    assert sampled.usage.completion_tokens == num_tokens


async def test_a_chat_is_the_one_that_generate_samples(
    openai: AsyncOpenAI, publisher: Publisher
) -> None:
    await publisher.publish(1)
    chat = await openai.chat.completions.create(
        model="policy",
        messages=CHAT,
        max_tokens=12,
        seed=3,
        n=2,
        logprobs=True,
        extra_body=WITH_IDS,
    )
    request = GenerateRequest(
        prompts=((ChatMessage(role="user", content="12+3"),),),
        sampling=SamplingParams(max_tokens=12, seed=3, n=2),
    )
    (group,) = (await publisher.client.generate(request)).groups
    for choice, completion in zip(chat.choices, group.completions, strict=True):
        assert choice.message.content == completion.text
        assert extra(choice, "prompt_token_ids") == list(group.prompt_token_ids)
        assert extra(choice, "token_ids") == list(completion.token_ids)
        assert choice.logprobs
        assert choice.logprobs.content
        assert [item.logprob for item in choice.logprobs.content] == pytest.approx(
            completion.logprobs, abs=KERNEL_NOISE
        )
        shown = [item.token for item in choice.logprobs.content]
        assert shown == [CHARACTERS[token] for token in completion.token_ids]


async def test_the_text_of_a_stream_is_that_of_the_answer(
    openai: AsyncOpenAI, publisher: Publisher
) -> None:
    await publisher.publish(1)
    asked: dict[str, Any] = {
        "model": "policy",
        "prompt": list(PROBE),
        "max_tokens": 200,
        "temperature": 0,
        "logprobs": 0,
        "extra_body": WITHOUT_EOS,
    }
    whole = (await openai.completions.create(**asked)).choices[0]
    stream = await openai.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks: list[Completion] = [chunk async for chunk in stream]
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 200
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert len(choices) > 10
    assert "".join(choice.text for choice in choices) == whole.text
    ids = [token for choice in choices for token in extra(choice, "token_ids")]
    assert ids == extra(whole, "token_ids")
    assert extra(choices[0], "prompt_token_ids") == list(PROBE)
    assert [choice.finish_reason for choice in choices[-2:]] == [None, "length"]
    assert whole.logprobs
    offsets = [o for c in choices if c.logprobs for o in c.logprobs.text_offset or ()]
    assert offsets == whole.logprobs.text_offset


async def test_a_streamed_chat_says_what_the_unstreamed_one_says(
    openai: AsyncOpenAI, publisher: Publisher
) -> None:
    await publisher.publish(1)
    whole = await openai.chat.completions.create(
        model="policy", messages=CHAT, max_tokens=30, temperature=0
    )
    stream = await openai.chat.completions.create(
        model="policy", messages=CHAT, max_tokens=30, temperature=0, stream=True
    )
    choices = [choice async for chunk in stream for choice in chunk.choices]
    assert choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == whole.choices[0].message.content
    assert choices[-1].finish_reason == whole.choices[0].finish_reason


async def test_a_stop_string_ends_the_text_before_it(
    openai: AsyncOpenAI, publisher: Publisher
) -> None:
    await publisher.publish(1)
    asked: dict[str, Any] = {"model": "policy", "prompt": list(PROBE), "max_tokens": 200, "seed": 3}
    free = (await openai.completions.create(**asked, extra_body=WITHOUT_EOS)).choices[0]
    stopped = await openai.completions.create(**asked, stop=["12", "7"], extra_body=WITHOUT_EOS)
    (choice,) = stopped.choices
    first = min(place for stop in ("12", "7") if (place := free.text.find(stop)) >= 0)
    assert (choice.text, choice.finish_reason) == (free.text[:first], "stop")


async def test_a_text_has_the_ids_of_the_tokenizer(openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(
        model="base", prompt=["12+3=", "5"], max_tokens=1, extra_body=WITH_IDS
    )
    ids = [extra(choice, "prompt_token_ids") for choice in answer.choices]
    assert ids == [[1, 4, 5, 13, 6, 14], [1, 8]]


async def test_the_models_are_what_can_be_asked_for(
    openai: AsyncOpenAI, publisher: Publisher
) -> None:
    first, second = await publisher.publish(1), await publisher.publish(2)
    listed = {model.id: extra(model, "policy") async for model in openai.models.list()}
    assert listed["policy"] == listed["policy@2"] == second.model_dump()
    assert set(listed) == {"policy", "policy@1", "policy@2", "base"}
    assert extra(await openai.models.retrieve("policy@1"), "policy") == first.model_dump()
    for model, policy in (("policy@1", first), ("policy", second)):
        answer = await openai.completions.create(
            model=model, prompt=[1, 3], max_tokens=5, extra_body=WITHOUT_EOS
        )
        assert segments(answer.choices[0]) == [(policy, 5)]


@pytest.mark.parametrize("model", ["gpt-4", "policy@77"])
async def test_an_unknown_model_is_the_clients_not_found(model: str, openai: AsyncOpenAI) -> None:
    with pytest.raises(NotFoundError) as refused:
        await openai.chat.completions.create(model=model, messages=CHAT)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(NotFoundError):
        await openai.models.retrieve(model)


async def test_what_cannot_be_served_is_the_clients_bad_request(openai: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError, match="logprobs is 5: only the sampled token's logprob"):
        await openai.completions.create(model="base", prompt="5", logprobs=5)
    with pytest.raises(BadRequestError, match="token id 99 is out of vocabulary"):
        await openai.completions.create(model="base", prompt=[99], stream=True)


async def test_a_stream_survives_new_weights_with_every_token(
    openai: AsyncOpenAI, publisher: Publisher
) -> None:
    """The first tokens are those of version 1, the others go on from them under version 2."""
    first = await publisher.publish(1)
    sampling: dict[str, Any] = {"max_tokens": 400, "seed": 9}
    whole = await publisher.generate(PROBE, ignore_eos=True, policy=first, **sampling)
    stream = await openai.completions.create(
        model="policy", prompt=list(PROBE), stream=True, extra_body=WITHOUT_EOS, **sampling
    )
    choices: list[CompletionChoice] = []
    second = None
    async for chunk in stream:
        choices += chunk.choices
        if second is None and len(choices) > 3:
            second = await publisher.publish(2, in_flight="continue")
    ids = [token for choice in choices for token in extra(choice, "token_ids")]
    of_versions = [segment for choice in choices for segment in segments(choice)]
    num_old = sum(num_tokens for policy, num_tokens in of_versions if policy == first)
    assert {policy for policy, _ in of_versions} == {first, second}
    assert len(ids) == 400
    assert ids[:num_old] == list(whole.groups[0].completions[0].token_ids[:num_old])
    text = "".join(choice.text for choice in choices)
    assert text == "".join(CHARACTERS[token] for token in ids if token > EOS)
    assert choices[-1].finish_reason == "length"
