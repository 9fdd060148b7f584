"""The trainer service in process: a real policy, and replicas that are played by a transport."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from safetensors.torch import load
from starlette.types import Message
from torch import Tensor

from services.trainer.app import create_app
from services.trainer.fleet.fleet import Fleet
from services.trainer.learner.learner import Learner
from services.trainer.policy.policy import Policy
from services.trainer.policy.samples import Sample
from services.trainer.run.log import RunLog
from services.trainer.run.run import Run
from services.trainer.run_config import RunConfig
from services.trainer.settings import TrainerSettings
from services.trainer.trainer import Trainer
from shared.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    RunConflict,
    UnexpectedPolicy,
    UnsuitableForTraining,
)
from shared.schemas import (
    AdapterManifest,
    Completion,
    PolicyId,
    PreferencePair,
    RunEvent,
    SamplingParams,
    ScoredCompletion,
    ScoredGroup,
    ScoreRequest,
    ScoreResponse,
    Segment,
    StateRecord,
    StepRecord,
    TrainRequest,
)
from shared.trainer_client import TrainerClient
from tests.fake_replica import FakeReplica
from tests.slow_client import SlowClient
from tests.trainer.conftest import no_file_longer_than
from tests.trainer.policy.test_policy import train_a_little

pytestmark = pytest.mark.anyio
WAIT_S = 20.0


def external(**changes: Any) -> RunConfig:
    return RunConfig.model_validate({"managed": False, "lora": {"rank": 8}, **changes})


EXTERNAL = external()
MANAGED = RunConfig.model_validate(
    {"num_steps": 1, "dataset": {"type": "sort_digits"}, "rewards": [{"type": "exact_match"}]}
)


def make_trainer(learner: Learner, runs_dir: Path) -> Trainer:
    """Ready, with no replica."""
    trainer = Trainer(TrainerSettings(model="tiny", runs_dir=runs_dir))
    trainer._learner = learner
    return trainer


@pytest.fixture
async def trainer(loaded_learner: Learner, tmp_path: Path) -> AsyncIterator[Trainer]:
    trainer = make_trainer(loaded_learner, tmp_path)
    yield trainer
    await trainer.stop()


class PlayedReplica(FakeReplica):
    """Scores with the trainer's own model: nothing of this service is an engine."""

    def __init__(self, policy: Policy) -> None:
        super().__init__("http://127.0.0.1:1", status_changes={"base": policy.identity})
        self.policy = policy
        self.adapters: dict[PolicyId, dict[str, Tensor]] = {}

    async def answer(self, request: httpx.Request) -> httpx.Response:
        content = await request.aread()
        if request.url.path == "/score":
            return self._score(ScoreRequest.model_validate_json(content))
        if request.url.path == "/sync_weights":
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            manifest = AdapterManifest.model_validate_json(
                header["__metadata__"]["tandem_manifest"]
            )
            self.adapters[manifest.policy] = load(content)
            request = httpx.Request(
                "POST", request.url, content=manifest.policy.model_dump_json().encode()
            )
        return await super().answer(request)

    def _score(self, asked: ScoreRequest) -> httpx.Response:
        assert asked.policy
        if asked.policy.is_base:
            flat = self.policy.score(asked.sequences, base=True)
        else:
            with self.policy.replaced_lora(self.adapters[asked.policy]):
                flat = self.policy.score(asked.sequences)
        ends = accumulate((len(sequence) - 1 for sequence in asked.sequences), initial=0)
        rows = tuple(flat[start:end] for start, end in pairwise(ends))
        answer = ScoreResponse(policy=asked.policy, logprobs=rows, boot_id=self.boot_id)
        return httpx.Response(200, content=answer.model_dump_json())


async def join(trainer: Trainer) -> PlayedReplica:
    """A replica of the trainer's fleet."""
    replica = PlayedReplica(trainer.policy)
    trainer._fleet = Fleet((replica.url,), connect=lambda _: replica.client())
    await trainer.fleet.look()
    return replica


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


async def history(trainer: Trainer) -> list[RunEvent]:
    """Every event of the run, once it has ended."""
    async with asyncio.timeout(WAIT_S):
        return [event async for _, event in trainer.events(0)]


async def end_of_run(trainer: Trainer) -> str:
    last = (await history(trainer))[-1]
    assert isinstance(last, StateRecord)
    return last.state


def steps(events: list[RunEvent]) -> list[int]:
    return [event.step for event in events if isinstance(event, StepRecord)]


async def take_steps(trainer: Trainer, count: int) -> PolicyId:
    """Updates of an external run from its current policy on; the policy after them."""
    for _ in range(count):
        policy = trainer.policy.id
        await trainer.train(train_request(policy, key=str(policy)))
    return trainer.policy.id


async def test_events_without_a_run_are_not_found(trainer: Trainer) -> None:
    transport = httpx.ASGITransport(app=create_app(trainer))
    async with TrainerClient("http://trainer", transport=transport) as client:
        with pytest.raises(NotFound, match="there is no run"):
            async for _ in client.events():
                pass


async def test_a_loop_of_ones_own_fits_a_replica_of_any_context(trainer: Trainer) -> None:
    """`sampling` of the run config is not what such a loop samples with."""
    await join(trainer)
    policy = (await trainer.start_run(EXTERNAL)).policy
    answer = await trainer.train(train_request(policy))
    assert answer.policy == policy.next()


async def test_a_replica_that_refuses_the_update_costs_no_answer(trainer: Trainer) -> None:
    """The policy has moved on: a retry that were refused would lose what was learned."""
    replica = await join(trainer)
    policy = (await trainer.start_run(EXTERNAL)).policy
    first = train_request(policy)
    await trainer._run().ready.wait()
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


def http_to(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://trainer")


async def test_json_without_its_content_type_is_told_so(trainer: Trainer) -> None:
    """`curl -d` says that it sends a form."""
    async with http_to(create_app(trainer)) as http:
        answer = await http.post("/train", content=b'{"groups": []}')
    assert answer.status_code == 422
    assert "Content-Type: application/json" in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * (1 << 20),
        b" " * (1 << 20) + b"managed: false",
        b'{"rewards": [' + b"1," * 400_000 + b"1]}",
        b'{"' + b"k" * 10**6 + b'": 1}',
        b"num_steps: 1" + b":1" * 400_000,
        b"num_steps: !!timestamp x",
        b"a: \xff",
    ],
    ids=lambda body: body[:12].decode(errors="replace"),
)
async def test_a_hostile_config_is_refused_shortly(body: bytes, trainer: Trainer) -> None:
    """Fault S9: some took the trainer's loop for 25 s, one was a 500."""
    async with http_to(create_app(trainer)) as http:
        answer = await http.post("/runs", content=body)
    assert (answer.status_code, answer.json()["title"]) == (422, "InvalidRequest")
    assert len(answer.content) <= 4096


@pytest.mark.parametrize("number", ["-2", "2147483648", "1" + "0" * 400, "9" * 5000])
async def test_a_number_that_cannot_exist_is_refused_by_name(number: str, trainer: Trainer) -> None:
    """Fault S13."""
    await trainer.start_run(EXTERNAL)
    async with http_to(create_app(trainer)) as http:
        answers = {
            "path.version": await http.get(f"/policy/adapters/{number}"),
            "query.num_groups": await http.get(f"/runs/current/completions?num_groups={number}"),
            "header.last-event-id": await http.get(
                "/runs/current/events", headers={"Last-Event-ID": number}
            ),
        }
    for name, answer in answers.items():
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith(f"{name} is '")
        assert len(answer.content) <= 4096


async def test_an_adapter_has_its_digest_and_is_sent_to_few_at_a_time(trainer: Trainer) -> None:
    """Fault S11: clients that do not read kept a copy of an adapter each."""
    await trainer.start_run(EXTERNAL)
    await take_steps(trainer, 1)
    app, published = create_app(trainer), trainer.policy.adapter(1)
    async with http_to(app) as http:
        answer = await http.get("/policy/adapters/1")
    assert answer.content == bytes(published.content)
    assert answer.headers["content-digest"] == published.content_digest

    clients = [SlowClient(reads=False) for _ in range(6)]
    sending = [asyncio.ensure_future(client.get(app, "/policy/adapters/1")) for client in clients]
    async with asyncio.timeout(WAIT_S):
        while any(client.status is None for client in clients):  # noqa: ASYNC110 (no event)
            await asyncio.sleep(0.005)
    assert sorted(client.status or 0 for client in clients) == [200] * 4 + [503] * 2
    for client in clients:
        client.left.set()
    await asyncio.gather(*sending)


# --- resume -------------------------------------------------------------------------------------


async def test_a_run_that_was_stopped_goes_on_when_it_is_posted_again(trainer: Trainer) -> None:
    first = (await trainer.start_run(external(run_id="again"))).policy
    await take_steps(trainer, 2)
    await trainer.stop_run()
    assert await end_of_run(trainer) == "stopped"

    again = await trainer.start_run(external(run_id="again"))
    assert again.policy == PolicyId(run_id="again", incarnation=2, version=2)
    assert (again.step, again.last_step.step if again.last_step else None) == (2, 2)
    with pytest.raises(UnexpectedPolicy) as error:
        await trainer.train(train_request(first.next().next(), key="old"))
    assert error.value.extra["current"] == again.policy.model_dump()
    assert await take_steps(trainer, 1) == again.policy.next()
    await trainer.stop_run()
    assert steps(await history(trainer)) == [1, 2, 3]


async def test_a_run_of_a_trainer_that_was_told_to_exit_goes_on_in_the_next_one(
    trainer: Trainer, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """And a run that was stopped does not."""
    await trainer.start_run(external(run_id="mine"))
    await take_steps(trainer, 1)
    trainer.shut_down()
    assert await end_of_run(trainer) == "suspended"
    await trainer.stop()

    restarted = Trainer(TrainerSettings(model=str(tiny_checkpoint), runs_dir=tmp_path))
    await restarted.boot()
    assert restarted.policy.id == PolicyId(run_id="mine", incarnation=2, version=1)
    assert await take_steps(restarted, 1) == PolicyId(run_id="mine", incarnation=2, version=2)
    await restarted.stop_run()
    assert steps(await history(restarted)) == [1, 2]
    await restarted.stop()

    idle = Trainer(TrainerSettings(model=str(tiny_checkpoint), runs_dir=tmp_path))
    await idle.boot()
    assert idle.status().run is None
    await idle.stop()


async def test_a_step_that_does_not_end_in_time_is_left_to_the_next_process(
    loaded_learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM has a bound, however long an update takes: nothing of it was kept or published."""
    left = []
    trainer = Trainer(
        TrainerSettings(model="tiny", runs_dir=tmp_path), on_stuck=lambda: left.append("exit")
    )
    trainer._learner = loaded_learner
    update, go_on = loaded_learner.update, threading.Event()

    def slow_update(*args: Any, **options: Any) -> Any:
        go_on.wait(WAIT_S)
        return update(*args, **options)

    monkeypatch.setattr(loaded_learner, "update", slow_update)
    monkeypatch.setattr("services.trainer.trainer._STOP_TIMEOUT_S", 0.1)
    policy = (await trainer.start_run(external(run_id="slow"))).policy
    training = asyncio.create_task(trainer.train(train_request(policy)))
    await trainer._run().ready.wait()
    await asyncio.sleep(0.05)
    trainer.shut_down()
    await trainer.stop()
    assert left == ["exit"]
    last = (await history(trainer))[-1]
    assert last == StateRecord(state="suspended", detail="the trainer was stopped within a step")
    go_on.set()
    with pytest.raises(ValueError, match="closed file"):  # the real process is gone by now
        await training


async def test_a_boot_that_still_loads_is_abandoned_and_a_finished_one_is_not(
    loaded_learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that has the model and now loads the data of a run that it takes up."""
    left: list[str] = []
    is_loading, go_on = threading.Event(), threading.Event()

    def slow_look(runs_dir: Path) -> None:
        is_loading.set()
        go_on.wait(WAIT_S)

    monkeypatch.setattr("services.trainer.trainer.check_start", lambda settings: None)
    monkeypatch.setattr("services.trainer.trainer.newest_unfinished", slow_look)
    monkeypatch.setattr("services.trainer.trainer.load_learner", lambda _: loaded_learner)
    settings = TrainerSettings(model="tiny", runs_dir=tmp_path)
    for is_done in (False, True):
        trainer = Trainer(settings, abandon_boot=lambda: left.append("exit"))
        is_loading.clear()
        trainer.start()
        await asyncio.to_thread(is_loading.wait, WAIT_S)
        assert trainer.learner is loaded_learner
        if is_done:
            assert trainer._boot_task
            await trainer._boot_task
        trainer.shut_down()
        await trainer.stop()
        assert left == ["exit"]
        go_on.set()


async def test_a_run_that_says_never_ends_with_its_trainer(trainer: Trainer) -> None:
    await trainer.start_run(external(resume="never"))
    trainer.shut_down()
    assert await end_of_run(trainer) == "stopped"


async def test_a_stop_that_was_asked_for_stays_one_when_the_trainer_exits(trainer: Trainer) -> None:
    await trainer.start_run(EXTERNAL)
    await trainer.stop_run()
    trainer.shut_down()
    assert await end_of_run(trainer) == "stopped"


async def test_a_run_is_not_executed_twice(
    trainer: Trainer, loaded_learner: Learner, tmp_path: Path
) -> None:
    """Nor does a trainer that boots beside the one that executes it take it up."""
    policy = (await trainer.start_run(external(run_id="mine"))).policy
    other = make_trainer(loaded_learner, tmp_path)
    with pytest.raises(RunConflict, match="another trainer executes run 'mine'"):
        await other.start_run(external(run_id="mine"))
    await other._take_up_unfinished()
    assert other.status().run is None
    assert trainer.policy.id == policy
    await other.stop()


async def test_another_config_under_the_same_run_id_is_refused(trainer: Trainer) -> None:
    await trainer.start_run(external(run_id="mine"))
    await trainer.stop_run()
    await end_of_run(trainer)
    with pytest.raises(InvalidRequest, match=r"lora\.rank is 4, run 'mine' began with 8"):
        await trainer.start_run(external(run_id="mine", lora={"rank": 4}))
    assert (await trainer.start_run(external(run_id="mine"))).policy.incarnation == 2


async def test_a_run_that_cannot_be_taken_up_does_not_keep_the_trainer_from_another(
    trainer: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await trainer.start_run(external(run_id="mine", checkpoint={"every_steps": 1, "keep": 1}))
    await take_steps(trainer, 1)
    trainer.shut_down()
    await history(trainer)
    await trainer.stop()
    (tmp_path / "mine/checkpoints/step-000001/optimizer.pt").write_bytes(b"")
    restarted = make_trainer(trainer.learner, tmp_path)
    await restarted._take_up_unfinished()
    assert "the unfinished run is not taken up: no checkpoint in" in caplog.records[-1].message
    assert (await restarted.start_run(external(run_id="other"))).policy.incarnation == 1
    await restarted.stop()


async def test_a_run_whose_dataset_was_edited_does_not_go_on(
    trainer: Trainer, tmp_path: Path
) -> None:
    dataset = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": f"s{i}=", "answer": str(i)}) for i in range(4)]
    dataset.write_text("\n".join(rows))
    config = RunConfig.model_validate(
        {
            "run_id": "mine",
            "num_steps": 1,
            "dataset": {"type": "jsonl", "path": str(dataset)},
            "rewards": [{"type": "exact_match"}],
        }
    )
    for _ in range(2):
        await trainer.start_run(config)
        await trainer.stop_run()
        assert await end_of_run(trainer) == "stopped"
    dataset.write_text("\n".join(rows[1:]))
    with pytest.raises(Conflict, match=r"prompts\.jsonl is not the one that run 'mine' began with"):
        await trainer.start_run(config)


async def test_a_run_that_is_stopped_within_its_last_step_is_completed(
    trainer: Trainer, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def last_step(run: Run) -> None:
        train_a_little(run.learner, samples)
        await trainer.stop_run()

    monkeypatch.setattr("services.trainer.trainer.run_steps", last_step)
    await join(trainer)
    small = {"lora": EXTERNAL.lora, "sampling": SamplingParams(n=2, max_tokens=4)}
    await trainer.start_run(MANAGED.model_copy(update=small))
    assert await end_of_run(trainer) == "completed"


# --- what breaks --------------------------------------------------------------------------------


def broken_device(*_: Any, **__: Any) -> Any:
    raise RuntimeError("CUDA error: an illegal memory access")


async def test_a_run_whose_device_breaks_ends_and_leaves_the_trainer_to_the_next(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await trainer.start_run(external(run_id="broken"))
    await take_steps(trainer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.learner, "snapshot", broken_device)
        patch.setattr(trainer.policy, "publish", broken_device)
        await trainer.stop_run()
        assert await end_of_run(trainer) == "failed"
    detail = trainer.run_status().detail
    assert "illegal memory access; see the trainer's log, then post the run again" in detail
    assert (await trainer.start_run(EXTERNAL)).policy.incarnation == 1


async def test_a_run_that_cannot_be_taken_up_for_want_of_memory_does_not_keep_the_trainer_starting(
    trainer: Trainer,
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await trainer.start_run(external(run_id="mine"))
    trainer.shut_down()
    await history(trainer)
    await trainer.stop()
    restarted = Trainer(TrainerSettings(model=str(tiny_checkpoint), runs_dir=tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "start", broken_device)
        await restarted.boot()
    restarted.check_ready()
    (record,) = [r for r in caplog.records if "is not taken up" in r.message]
    assert record.exc_info
    assert (await restarted.start_run(external(run_id="mine"))).policy.incarnation == 2
    await restarted.stop()


async def test_a_run_that_cannot_begin_is_no_run(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "emit", broken_device)
        with pytest.raises(RuntimeError):
            await trainer.start_run(external(run_id="mine"))
    assert trainer.status().run is None
    assert (await trainer.start_run(external(run_id="mine"))).policy.incarnation == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_full_disk_costs_no_update_and_no_answer(trainer: Trainer) -> None:
    policy = (await trainer.start_run(EXTERNAL)).policy
    request = train_request(policy)
    with no_file_longer_than(100):
        answer = await trainer.train(request)
    assert await trainer.train(request) == answer
    await trainer.stop_run()
    assert steps(await history(trainer)) == [1]
    metrics = Path(trainer.run_status().run_dir) / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == len(await history(trainer))


async def test_an_update_is_answered_again_although_its_checkpoint_failed(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = (await trainer.start_run(external(checkpoint={"every_steps": 1, "keep": 1}))).policy
    request = train_request(policy)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.learner, "snapshot", broken_device)
        with pytest.raises(RuntimeError):
            await trainer.train(request)
    assert (await trainer.train(request)).policy == policy.next()


async def test_the_step_is_the_version_although_an_adapter_could_not_be_published(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = (await trainer.start_run(EXTERNAL)).policy
    with monkeypatch.context() as patch:
        patch.setattr(trainer.policy, "publish", broken_device)
        with pytest.raises(RuntimeError):
            await trainer.train(train_request(policy))
    answer = await trainer.train(train_request(policy.next(), key="b"))
    assert (answer.step.step, answer.policy.version) == (2, 2)


async def test_a_run_that_ended_keeps_its_policy_when_the_next_one_cannot_begin(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await trainer.start_run(external(run_id="old"))
    last = await take_steps(trainer, 1)
    await trainer.stop_run()
    await end_of_run(trainer)
    monkeypatch.setattr("services.trainer.run.prepare.make_probe", broken_device)
    with pytest.raises(RuntimeError):
        await trainer.start_run(external(run_id="new"))
    status = trainer.run_status()
    assert (status.run_id, status.policy, status.step) == ("old", last, 1)


async def test_a_run_that_is_stopped_before_a_replica_came_never_waits_for_updates(
    trainer: Trainer,
) -> None:
    await trainer.start_run(EXTERNAL)
    await trainer.stop_run()
    states = [event.state for event in await history(trainer) if isinstance(event, StateRecord)]
    assert states == ["running", "stopping", "stopped"]


# --- fleet --------------------------------------------------------------------------------------


async def test_a_run_without_any_replica_waits_and_says_how_to_get_one(trainer: Trainer) -> None:
    status = await trainer.start_run(MANAGED)
    assert status.state == "running"
    assert "set TRAINER_ROLLOUT_URLS, or start one with ROLLOUT_TRAINER_URL" in status.detail
    await trainer.stop_run()
    assert await end_of_run(trainer) == "stopped"


async def test_a_replica_is_registered_and_removed_over_http(trainer: Trainer) -> None:
    transport = httpx.ASGITransport(app=create_app(trainer))
    async with httpx.AsyncClient(transport=transport, base_url="http://trainer") as http:
        answer = await http.post("/replicas", json={"url": "http://127.0.0.1:9"})
        assert (answer.status_code, answer.json()["id"]) == (201, "127.0.0.1:9")
        (listed,) = (await http.get("/replicas")).json()["replicas"]
        assert (listed["url"], listed["source"]) == ("http://127.0.0.1:9", "registered")
        assert (await http.delete("/replicas/127.0.0.1:9")).status_code == 200
        answer = await http.delete("/replicas/10.0.0.1:9")
        assert answer.status_code == 404
        assert "there is no replica '10.0.0.1:9'" in answer.json()["detail"]


# --- pairs --------------------------------------------------------------------------------------


def offline(tmp_path: Path, **changes: Any) -> RunConfig:
    """Three pairs a step, of a dataset of eight."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"s{i}1=", "chosen": f"1{i}", "rejected": f"{i}1"} for i in range(2, 10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig.model_validate(
        {
            "run_id": "offline",
            "algorithm": "dpo",
            "num_steps": 4,
            "prompts_per_step": 3,
            "dataset": {"type": "preferences", "path": str(path)},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
            "lora": {"rank": 8},
            **changes,
        }
    )


def trained_positions(trainer: Trainer) -> list[tuple[int, int]]:
    lines = (Path(trainer.run_status().run_dir) / "groups.jsonl").read_text().splitlines()
    return [(line["step"], line["position"]) for line in map(json.loads, lines)]


async def test_an_offline_run_learns_from_its_pairs_without_a_replica(
    trainer: Trainer, tmp_path: Path
) -> None:
    await trainer.start_run(offline(tmp_path, num_steps=24))
    events = await history(trainer)
    assert steps(events) == list(range(1, 25))
    records = [event for event in events if isinstance(event, StepRecord)]
    assert {(record.num_groups, record.num_samples) for record in records} == {(3, 6)}
    assert records[-1].loss < records[0].loss / 2
    assert trained_positions(trainer) == [(1 + p // 3, p) for p in range(72)]


async def test_an_offline_run_that_stops_within_a_step_repeats_no_pair(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = trainer.learner.update

    def stop_in_the_third(*args: Any, **options: Any) -> Any:
        if trainer.policy.id.version == 2:
            trainer._run().run.stop.set()
        return update(*args, **options)

    monkeypatch.setattr(trainer.learner, "update", stop_in_the_third)
    for state in ("stopped", "completed"):
        await trainer.start_run(offline(tmp_path))
        assert await end_of_run(trainer) == state
    assert trained_positions(trainer) == [(1 + p // 3, p) for p in range(12)]


async def test_pairs_are_for_dpo_and_groups_for_the_others(trainer: Trainer) -> None:
    policy = (await trainer.start_run(external(algorithm="dpo"))).policy
    pair = PreferencePair(prompt_token_ids=(3, 4), chosen_token_ids=(5, 2), rejected_token_ids=(6,))
    with pytest.raises(UnsuitableForTraining, match="dpo learns from pairs, the request has group"):
        await trainer.train(train_request(policy))
    request = TrainRequest(pairs=(pair,) * 2, expected_policy=policy, idempotency_key="b")
    answer = await trainer.train(request)
    assert (answer.policy, answer.step.num_samples) == (policy.next(), 4)
    beyond = pair.model_copy(update={"chosen_token_ids": (5,) * 600})
    request = TrainRequest(pairs=(pair, beyond), expected_policy=answer.policy, idempotency_key="c")
    with pytest.raises(InvalidRequest, match=r"pair 1 has 602 tokens .* has 512 positions"):
        await trainer.train(request)
    await trainer.stop_run()
    await end_of_run(trainer)
    policy = (await trainer.start_run(EXTERNAL)).policy
    request = TrainRequest(pairs=(pair,), expected_policy=policy, idempotency_key="d")
    with pytest.raises(UnsuitableForTraining, match="grpo learns from groups, the request has pai"):
        await trainer.train(request)


async def test_groups_that_cannot_be_compared_are_refused(trainer: Trainer) -> None:
    policy = (await trainer.start_run(EXTERNAL)).policy
    request = train_request(policy)
    (group,) = request.groups
    alone = group.model_copy(update={"completions": group.completions[:1]})
    with pytest.raises(UnsuitableForTraining, match="group 0 has 1 completion"):
        await trainer.train(request.model_copy(update={"groups": (alone,)}))
    bad, good = group.completions
    parts = good.model_copy(update={"rewards": (0.5, 0.5)})
    mixed = group.model_copy(update={"completions": (bad, parts)})
    with pytest.raises(UnsuitableForTraining, match="1 or 2 rewards"):
        await trainer.train(request.model_copy(update={"groups": (mixed,)}))


async def test_an_offline_run_waits_for_no_replica_that_is_configured_and_gone(
    loaded_learner: Learner, tmp_path: Path
) -> None:
    settings = TrainerSettings(
        model="tiny", runs_dir=tmp_path, rollout_urls="http://127.0.0.1:9", ready_timeout_s=600
    )
    trainer = Trainer(settings)
    trainer._learner = loaded_learner
    try:
        await trainer.start_run(offline(tmp_path))
        assert await end_of_run(trainer) == "completed"
    finally:
        await trainer.stop()


async def test_a_refused_update_ends_the_run_and_costs_no_update_before_it(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = trainer.learner.update

    def refuse_the_third(*args: Any, **options: Any) -> Any:
        if trainer.policy.id.version == 2:
            raise FloatingPointError("the gradient is not finite")
        return update(*args, **options)

    monkeypatch.setattr(trainer.learner, "update", refuse_the_third)
    await trainer.start_run(offline(tmp_path))
    assert await end_of_run(trainer) == "failed"
    assert "refused/step-000003.json" in trainer.run_status().detail
    assert trainer.metrics.registry.get_sample_value("tandem_trainer_refused_updates_total") == 1
    monkeypatch.undo()
    await trainer.start_run(offline(tmp_path))
    assert await end_of_run(trainer) == "completed"
    assert trained_positions(trainer) == [(1 + p // 3, p) for p in range(12)]
