"""The agent on the real services: it trains on exactly the tokens that were sampled."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from examples.agent_tools.agent import train
from examples.agent_tools.model import demonstration, make_agent_model
from examples.agent_tools.task import Problem, calculator, problem, reward
from examples.demo.model import make_tokenizer
from examples.demo.services import DemoServices
from shared.schemas import TrainRequest, TrainResponse
from shared.trainer_client import TrainerClient

pytestmark = pytest.mark.anyio


class RecordingTrainer(TrainerClient):
    """Records the requests sent to POST /train."""

    requests: tuple[TrainRequest, ...] = ()

    async def train(self, request: TrainRequest) -> TrainResponse:
        self.requests += (request,)
        return await super().train(request)


def encode(text: str) -> list[int]:
    return list(make_tokenizer().encode(text, add_special_tokens=False))


@pytest.mark.engine
@pytest.mark.timeout(240)
async def test_the_tokens_that_train_gets_are_those_that_the_endpoint_answered(
    tmp_path: Path,
) -> None:
    """Two updates from 16 episodes of a model that has learned the form of a call."""
    make_agent_model(tmp_path / "model", num_steps=100)
    answered: list[tuple[Any, ...]] = []

    async def keep(response: Any) -> None:
        await response.aread()
        (choice,) = response.json()["choices"]
        logprobs = choice["logprobs"]
        values = logprobs.get("token_logprobs") or [t["logprob"] for t in logprobs["content"]]
        answered.append((choice["prompt_token_ids"], choice["token_ids"], values))

    with DemoServices(tmp_path, num_replicas=1) as services:
        await services.wait_until_ready(timeout_s=180)
        url, key = services.replicas[0].url, services.api_key
        async with (
            DefaultAsyncHttpxClient(trust_env=False, event_hooks={"response": [keep]}) as http,
            AsyncOpenAI(base_url=f"{url}/v1", api_key=key, http_client=http) as client,
            RecordingTrainer(services.trainer.url, api_key=key) as trainer,
        ):
            steps = await train(client, trainer, encode, num_steps=2, num_episodes=16)

    sent = [
        (list(group.prompt_token_ids), list(c.token_ids), list(c.logprobs))
        for request in trainer.requests
        for group in request.groups
        for c in (group.completions[0].completion,)
    ]
    assert sorted(sent) == sorted(answered)
    for step, request in zip(steps, trainer.requests, strict=True):
        episodes = step.episodes
        assert {
            segment.policy.version
            for group in request.groups
            for segment in group.completions[0].completion.segments
        } == {request.expected_policy.version}
        assert (step.record.logprob_gap or 0.0) < 0.05  # None if nothing had a gradient
        assert max(len(episode.turns) for episode in episodes) >= 2
        for turn, following in (pair for e in episodes for pair in pairwise(e.turns)):
            result = calculator(turn.completion.text or "")
            assert result
            assert following.prompt_token_ids == (*turn.conversation, *encode(result))
        rewards = [episode.reward for episode in episodes for _ in episode.turns]
        assert [group.completions[0].reward for group in request.groups] == rewards
    assert [step.record.policy.version for step in steps] == [1, 2]


@pytest.mark.parametrize(
    ("expression", "says"),
    [("47+38", "085s"), ("110+25", "135s"), ("47+", None), ("47+38+2", None), ("", None)],
)
def test_the_calculator_adds_two_numbers(expression: str, says: str | None) -> None:
    assert calculator(expression) == says


def test_only_the_sum_of_all_three_is_rewarded() -> None:
    asked = Problem((47, 38, 25))
    assert asked.question == "s47+38+25"
    assert [reward(asked, text) for text in ("110", "085", "", "1100")] == [1, 0, 0, 0]


def test_a_demonstration_is_right_when_it_calls_twice() -> None:
    rng = random.Random(0)
    num_calls = set()
    for _ in range(40):
        asked = problem(rng)
        *said, (answer, _) = demonstration(asked, rng)
        calls = [text for text, is_policy in said if is_policy]
        num_calls.add(len(calls))
        assert (reward(asked, answer) == 1) == (len(calls) == 2)
    assert num_calls == {0, 1, 2}
