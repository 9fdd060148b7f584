"""What keeps a run from learning, and what the page is told of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.trainer.app import create_app
from services.trainer.fleet.fleet import Fleet
from services.trainer.learner.learner import Learner
from services.trainer.run.stalls import stalls
from services.trainer.run_config import (
    EvalConfig,
    RunConfig,
    SortDigitsDataset,
    dump_run_config,
    parse_run_config,
)
from services.trainer.trainer import Trainer
from shared.errors import NotFound
from shared.schemas import PolicyId, TrainRequest
from shared.trainer_client import TrainerClient
from tests.fake_replica import FakeReplica
from tests.replica_process import until
from tests.trainer.test_trainer import EXTERNAL, MANAGED, make_trainer, train_request

pytestmark = pytest.mark.anyio


@pytest.fixture
async def trainer(loaded_learner: Learner, tmp_path: Path) -> AsyncIterator[Trainer]:
    trainer = make_trainer(loaded_learner, tmp_path)
    yield trainer
    await trainer.stop()


@pytest.fixture
async def client(trainer: Trainer) -> AsyncIterator[TrainerClient]:
    transport = httpx.ASGITransport(app=create_app(trainer))
    async with TrainerClient("http://trainer", transport=transport) as client:
        yield client


def equal_rewards(policy: PolicyId) -> TrainRequest:
    request = train_request(policy, key="equal")
    (group,) = request.groups
    completions = tuple(c.model_copy(update={"reward": 0.5}) for c in group.completions)
    same = group.model_copy(update={"completions": completions})
    return request.model_copy(update={"groups": (same,)})


def managed(**changes: Any) -> RunConfig:
    return MANAGED.model_copy(update=changes)


def held_out(every_steps: int) -> EvalConfig:
    return EvalConfig(dataset=SortDigitsDataset(), every_steps=every_steps)


# --- stalls -------------------------------------------------------------------------------------


async def test_a_run_that_learns_or_has_ended_is_not_held_up(trainer: Trainer) -> None:
    policy = (await trainer.start_run(EXTERNAL)).policy
    await trainer.train(train_request(policy))
    assert trainer.run_status().stalls == ()
    await trainer.train(equal_rewards(policy.next()))
    assert trainer.run_status().stalls
    await trainer.stop_run()
    assert trainer.run_status().stalls == ()


async def test_a_step_of_equal_rewards_taught_nothing(trainer: Trainer) -> None:
    policy = (await trainer.start_run(EXTERNAL)).policy
    await trainer.train(equal_rewards(policy))
    (sentence,) = trainer.run_status().stalls
    assert sentence.startswith(
        "step 1 taught nothing: all 1 groups have equal rewards (mean 0.5); unless"
    )


async def test_a_run_without_its_replica_says_why(trainer: Trainer) -> None:
    replica = FakeReplica("http://127.0.0.1:1")
    replica.crash()
    trainer._fleet = Fleet((replica.url,), connect=lambda _: replica.client())
    await trainer.fleet.look()
    await trainer.start_run(EXTERNAL)
    await until(lambda: bool(trainer.run_status().stalls))
    found = trainer.run_status().stalls
    assert found[0].startswith("0 of 1 replicas that must serve policy")
    assert replica.url in found[0]


async def test_a_run_whose_last_event_is_long_ago_stands_still(trainer: Trainer) -> None:
    policy = (await trainer.start_run(EXTERNAL)).policy
    await trainer.train(train_request(policy))
    run = replace(trainer._run().run, config=MANAGED)
    assert stalls(run) == ()
    run.log.changed_at -= 100
    (sentence,) = stalls(run)
    assert sentence.startswith("no update for 100 s, the last step took ")
    assert stalls(trainer._run().run) == (), "a loop of the user's own takes its time"


async def test_a_first_step_may_take_ten_minutes_or_as_long_as_a_request(trainer: Trainer) -> None:
    await trainer.start_run(EXTERNAL)
    run = replace(trainer._run().run, config=managed(generate_timeout_s=60.0))
    run.log.changed_at -= 500
    assert stalls(run) == ()
    run.log.changed_at -= 150
    (sentence,) = stalls(run)
    assert sentence.startswith("no update for 650 s, there was no step yet: look for")
    assert stalls(replace(run, config=managed(generate_timeout_s=3600.0))) == ()


async def test_a_first_evaluation_may_take_as_long_as_a_first_step(trainer: Trainer) -> None:
    policy = (await trainer.start_run(EXTERNAL)).policy
    await trainer.train(train_request(policy))
    is_due, comes_later = (
        replace(trainer._run().run, config=managed(num_steps=9, eval=held_out(every)))
        for every in (1, 2)
    )
    is_due.log.changed_at -= 100
    assert stalls(is_due) == ()
    assert stalls(comes_later)
    is_due.log.changed_at -= 550
    assert stalls(is_due)


# --- what else the page asks for ----------------------------------------------------------------


async def test_groups_sent_to_train_are_shown_newest_first(
    trainer: Trainer, client: TrainerClient
) -> None:
    with pytest.raises(NotFound, match="there is no run"):
        await client.completions()
    policy = (await trainer.start_run(EXTERNAL)).policy
    assert (await client.completions()).groups == ()
    await trainer.train(train_request(policy))
    await trainer.train(train_request(policy.next(), key="b"))
    answer = await client.completions()
    assert [group.step for group in answer.groups] == [2, 1]
    newest = answer.groups[0]
    assert newest.prompt == trainer.policy.encoder.decode((3, 4))
    assert [c.reward for c in newest.completions] == [0.0, 1.0]
    assert [c.text for c in newest.completions] == [
        trainer.policy.encoder.decode((token,)) for token in (5, 6)
    ]
    assert newest.completions[0].segments[0].policy == policy.next()
    assert len((await client.completions(num_groups=1)).groups) == 1


async def test_the_config_of_a_run_can_be_posted_again(
    trainer: Trainer, client: TrainerClient
) -> None:
    await trainer.start_run(EXTERNAL)
    answer = await client._http.get("/runs/current/config")
    assert answer.headers["content-type"] == "application/yaml"
    assert parse_run_config(answer.text) == trainer.run_config()
    assert parse_run_config(dump_run_config(MANAGED)) == MANAGED
