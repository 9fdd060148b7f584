"""The trainer service in process: a real policy, and replicas that are played by a transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from starlette.types import Message

from services.trainer.app import create_app
from services.trainer.policy import Policy
from services.trainer.run_config import RunConfig
from services.trainer.settings import TrainerSettings
from services.trainer.trainer import Trainer
from shared.errors import NotFound, RunConflict
from shared.schemas import (
    Completion,
    PolicyId,
    SamplingParams,
    ScoredCompletion,
    ScoredGroup,
    Segment,
    StateRecord,
    TrainRequest,
)
from shared.trainer_client import TrainerClient
from tests.trainer.test_fleet import FakeReplica, make_fleet

pytestmark = pytest.mark.anyio
EXTERNAL = RunConfig.model_validate({"managed": False, "lora": {"rank": 8}})
WAIT_S = 20.0


@pytest.fixture
async def trainer(loaded_policy: Policy, tmp_path: Path) -> AsyncIterator[Trainer]:
    """Ready, with no replica."""
    trainer = Trainer(TrainerSettings(model="tiny", runs_dir=tmp_path))
    trainer._policy = loaded_policy
    yield trainer
    await trainer.stop()


def train_request(policy: PolicyId, key: str = "a") -> TrainRequest:
    def scored(token: int, reward: float) -> ScoredCompletion:
        completion = Completion(
            token_ids=(token,),
            logprobs=(-2.0,),
            segments=(Segment(policy=policy, num_tokens=1),),
            finish_reason="length",
        )
        return ScoredCompletion(completion=completion, reward=reward)

    group = ScoredGroup(
        prompt_token_ids=(3, 4),
        sampling=SamplingParams(n=2, max_tokens=1),
        completions=(scored(5, 0.0), scored(6, 1.0)),
    )
    return TrainRequest(groups=(group,), expected_policy=policy, idempotency_key=key)


async def end_of_run(trainer: Trainer) -> str:
    async with asyncio.timeout(WAIT_S):
        states = [e.state async for _, e in trainer.events(0) if isinstance(e, StateRecord)]
    return states[-1]


async def test_events_without_a_run_are_not_found(trainer: Trainer) -> None:
    transport = httpx.ASGITransport(app=create_app(trainer))
    async with TrainerClient("http://trainer", transport=transport) as client:
        with pytest.raises(NotFound, match="there is no run"):
            async for _ in client.events():
                pass


async def test_a_loop_of_ones_own_fits_a_replica_of_any_context(trainer: Trainer) -> None:
    """`sampling` of the run config is not what such a loop samples with."""
    replica = FakeReplica(base=trainer.policy.identity)
    trainer._fleet = make_fleet(replica)
    policy = (await trainer.start_run(EXTERNAL)).policy
    answer = await trainer.train(train_request(policy))
    assert answer.policy == policy.next()


async def test_a_replica_that_refuses_the_update_costs_no_answer(trainer: Trainer) -> None:
    """The policy has moved on: a retry that were refused would lose what was learned."""
    replica = FakeReplica(base=trainer.policy.identity)
    trainer._fleet = make_fleet(replica)
    policy = (await trainer.start_run(EXTERNAL)).policy
    first = train_request(policy)
    replica.refusal = RunConflict("another trainer took this replica over")
    answer = await trainer.train(first)
    assert (answer.policy, answer.receipts) == (policy.next(), ())
    assert "another trainer" in answer.replicas[0].detail
    assert await trainer.train(first) == answer


async def test_a_run_that_is_stopped_answers_the_update_that_runs(trainer: Trainer) -> None:
    policy = (await trainer.start_run(EXTERNAL)).policy
    training = asyncio.create_task(trainer.train(train_request(policy)))
    while not trainer.policy.id.version:  # noqa: ASYNC110 (the update has no event)
        await asyncio.sleep(0)
    await trainer.stop_run()
    assert (await training).policy == policy.next()
    assert await end_of_run(trainer) == "stopped"
    with pytest.raises(RunConflict, match="is stopped"):
        await trainer.train(train_request(policy.next(), key="b"))


async def test_an_update_whose_client_left_is_answered_to_the_retry(trainer: Trainer) -> None:
    policy = (await trainer.start_run(EXTERNAL)).policy
    request = train_request(policy)
    left = asyncio.create_task(trainer.train(request))
    while not trainer.policy.id.version:  # noqa: ASYNC110 (the update has no event)
        await asyncio.sleep(0)
    left.cancel()
    assert (await trainer.train(request)).policy == policy.next()


async def test_a_run_config_that_was_cut_off_starts_no_run(trainer: Trainer) -> None:
    """The first line of a config may be a config too."""
    messages: Iterator[Message] = iter(
        [
            {"type": "http.request", "body": b"managed: false\n", "more_body": True},
            {"type": "http.disconnect"},
        ]
    )
    sent: list[Message] = []

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/runs", "headers": [], "query_string": b""}
    await create_app(trainer)(scope, receive, send)
    assert sent[0]["status"] == 499
    with pytest.raises(NotFound):
        trainer.run_status()


async def test_json_without_its_content_type_is_told_so(trainer: Trainer) -> None:
    """`curl -d` says that it sends a form."""
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=create_app(trainer)), base_url="http://trainer"
    ) as http:
        answer = await http.post("/train", content=b'{"groups": []}')
    assert answer.status_code == 422
    assert "Content-Type: application/json" in answer.json()["detail"]
