"""W&B and Trackio, the real packages, without a network: what they get, and how they fail."""

from __future__ import annotations

import asyncio
import json
import struct
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.trainer.learner.learner import Learner
from services.trainer.run.log import RunLog
from services.trainer.run.tracking import TrackedRun, check_tracking
from services.trainer.run_config import (
    HttpReward,
    TrackingConfig,
    TrackioTracking,
    WandbTracking,
    parse_run_config,
)
from services.trainer.trainer import Trainer
from shared.errors import InvalidRequest
from shared.metrics import TrainerMetrics, scalars
from shared.schemas import StateRecord, StepRecord
from tests.trainer.run.test_log import evaluation, step_of
from tests.trainer.test_trainer import MANAGED, make_trainer, offline

pytestmark = pytest.mark.anyio
_BLOCK_BYTES = 32768
_WANDB_TIMEOUT_S = 60.0  # passes on a machine that is four times slower, too
OFFLINE = WandbTracking(type="wandb", project="p", mode="offline")


@pytest.fixture(scope="session", autouse=True)
def _trackio_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Trackio reads it once, when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        yield


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "HF_HOME", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
async def trainer(loaded_learner: Learner, tmp_path: Path) -> AsyncIterator[Trainer]:
    trainer = make_trainer(loaded_learner, tmp_path)
    yield trainer
    await trainer.stop()


def step(number: int, reward_mean: float) -> StepRecord:
    return step_of().model_copy(update={"step": number, "reward_mean": reward_mean})


def opened(
    folder: Path, *trackers: TrackingConfig, run_id: str = "r", is_new: bool = True
) -> RunLog:
    tracked = TrackedRun(trackers, run_id, is_new, folder, {"num_steps": 3})
    return RunLog(folder, TrainerMetrics(), tracked=tracked)


async def ended(log: RunLog) -> RunLog:
    await log.emit(StateRecord(state="completed"))
    log.finish_trackers()
    log.close()
    return log


async def wandb_logs(folder: Path) -> list[bytes]:
    """The files that `wandb sync` would upload, one per life of the run.

    W&B's own process writes them, and may still do so after the run has finished here: a file is
    whole when it has the record that the run exited.
    """
    async with asyncio.timeout(_WANDB_TIMEOUT_S):
        while True:
            logs = [p.read_bytes() for p in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
            if logs and all(any(r.HasField("exit") for r in wandb_records(log)) for log in logs):
                return logs
            await asyncio.sleep(0.05)


async def wandb_rows(folder: Path, count: int) -> list[dict[str, Any]]:
    """The rows of the history, of all lives of the run."""
    rows = [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for log in await wandb_logs(folder)
        for record in wandb_records(log)
        if record.history.item
    ]
    assert len(rows) == count
    return rows


def wandb_records(log: bytes) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    for data in leveldb_records(log[7:]):
        yield Record.FromString(data)


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format; the first block is 7 bytes shorter (W&B's header)."""
    position, record = 0, b""
    while position + 7 <= len(log):
        left = _BLOCK_BYTES - (position + 7) % _BLOCK_BYTES
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, position)
        position += 7 + length
        if position > len(log):  # the rest is being written
            return
        record += log[position - length : position]
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def trackio_rows(project: str, run: str) -> list[dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    rows: list[dict[str, Any]] = SQLiteStorage.get_logs(project, run)
    return rows


async def test_wandb_has_the_numbers_of_steps_and_evaluations_under_the_names_of_tensorboard(
    tmp_path: Path,
) -> None:
    log = opened(tmp_path, OFFLINE)
    await log.emit(step(1, 0.25))
    await log.emit(evaluation(1, 0.75))
    assert (await ended(log)).detail == ""
    first, second = await wandb_rows(tmp_path, 2)
    assert {name.partition("/")[2] for name in first if name.startswith("step/")} == set(
        scalars(step(1, 0.25))
    )
    assert (first["step"], first["step/reward_mean"]) == (1, 0.25)
    assert (second["step"], second["eval/sampled_reward"]) == (1, 0.75)


async def test_wandb_goes_on_with_the_run_of_its_id_when_the_run_resumes_at_a_checkpoint(
    tmp_path: Path,
) -> None:
    first = opened(tmp_path, OFFLINE)
    await first.emit(step(1, 0.1))
    await first.emit(step(2, 0.2))
    await ended(first)
    second = opened(tmp_path, OFFLINE, is_new=False)
    await second.emit(step(2, 0.3))  # the checkpoint was that of step 1
    await ended(second)
    assert [path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")] == [
        "run-r.wandb",
        "run-r.wandb",
    ]
    rows = [(row["step"], row["step/reward_mean"]) for row in await wandb_rows(tmp_path, 3)]
    assert sorted(rows) == [(1, 0.1), (2, 0.2), (2, 0.3)]


async def test_trackio_goes_on_with_the_run_of_its_name_when_the_run_resumes(
    tmp_path: Path,
) -> None:
    config = TrackioTracking(type="trackio", project="resumed")
    first = opened(tmp_path, config)
    await first.emit(step(1, 0.1))
    await ended(first)
    second = opened(tmp_path, config, is_new=False)
    await second.emit(step(2, 0.2))
    await second.emit(evaluation(2, 0.5))
    assert (await ended(second)).detail == ""
    rows = trackio_rows("resumed", "r")
    assert [(row["step"], row.get("step/reward_mean")) for row in rows] == [
        (1, 0.1),
        (2, 0.2),
        (2, None),
    ]
    assert rows[-1]["eval/sampled_reward"] == 0.5


async def test_a_tracker_that_fails_is_said_once_and_the_run_keeps_all_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb").write_text("in the way")
    metrics = TrainerMetrics()
    tracked = TrackedRun((OFFLINE,), "r", True, tmp_path, {})
    log = RunLog(tmp_path, metrics, tracked=tracked)
    for number in (1, 2, 3):
        await log.emit(step(number, 0.5))
    await ended(log)
    (problem,) = [line for line in caplog.messages if "tracking type wandb takes no more" in line]
    assert log.detail in problem
    assert log.detail.startswith("tracking type wandb takes no more: ")
    assert metrics.registry.get_sample_value("tandem_trainer_log_failures_total") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


async def test_a_server_that_is_away_loses_the_curves_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "none")
    monkeypatch.setenv("TRACKIO_SERVER_URL", "no-url")
    log = opened(tmp_path, TrackioTracking(type="trackio", project="away"))
    await log.emit(step(1, 0.5))
    assert "must be a full URL" in (await ended(log)).detail


@pytest.mark.usefixtures("no_login")
def test_a_tracker_without_login_is_refused_before_the_run() -> None:
    with pytest.raises(ValueError, match="wandb has no login: set WANDB_API_KEY"):
        check_tracking([WandbTracking(type="wandb", project="p")])
    with pytest.raises(ValueError, match="trackio has no login for its space: set HF_TOKEN"):
        check_tracking([TrackioTracking(type="trackio", project="p", space_id="me/space")])
    check_tracking([OFFLINE, TrackioTracking(type="trackio", project="p")])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_without_its_package_is_refused_before_the_run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    config: TrackingConfig = (
        OFFLINE if name == "wandb" else TrackioTracking(type="trackio", project="p")
    )
    with pytest.raises(ValueError, match=f"needs the package {name}, .*pip install {name}"):
        check_tracking([config])


@pytest.mark.parametrize(
    ("trackers", "problem"),
    [
        ("[{type: wandb}]", "tracking.0.project is missing"),
        ("[{type: wandb, project: 'a b'}]", "tracking.0.project is 'a b'"),
        ("[{type: mlflow, project: p}]", "unknown type 'mlflow': there are wandb, trackio"),
        ("[{type: wandb, project: p}, {type: wandb, project: q}]", "two trackers have the same"),
    ],
)
def test_a_tracker_that_is_written_wrong_is_named(trackers: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_run_config(f"managed: false\ntracking: {trackers}\n")


def test_no_tracker_is_on_by_default() -> None:
    assert parse_run_config("managed: false").tracking == ()


# --- whole runs -----------------------------------------------------------------------------------


async def ended_run(trainer: Trainer) -> str:
    """The state that the run ended in, once its trackers have everything."""
    task = trainer._run().task
    assert task
    await asyncio.wait_for(task, 60)
    return trainer.run_status().state


async def test_a_run_that_goes_on_is_one_run_in_both_trackers(
    trainer: Trainer, tmp_path: Path
) -> None:
    trackers = (OFFLINE, TrackioTracking(type="trackio", project="whole"))
    for num_steps in (2, 3):
        await trainer.start_run(offline(tmp_path, num_steps=num_steps, tracking=trackers))
        assert await ended_run(trainer) == "completed"
    run_dir = tmp_path / "offline"
    logged = [(row["step"], row["step/loss"]) for row in await wandb_rows(run_dir, 3)]
    assert [(row["step"], row["step/loss"]) for row in trackio_rows("whole", "offline")] == logged
    assert [number for number, _ in logged] == [1, 2, 3]
    assert logged == [
        (record["step"], record["loss"])
        for record in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "step"
    ]
    assert trainer.run_status().detail == ""


async def test_trackers_are_not_told_the_query_of_a_reward_service(
    trainer: Trainer, tmp_path: Path
) -> None:
    judge = HttpReward(url="http://judge/score?token=hidden")
    changes = {"run_id": "judged", "rewards": (judge,), "tracking": (OFFLINE,)}
    await trainer.start_run(MANAGED.model_copy(update=changes))
    await trainer.stop_run()
    assert await ended_run(trainer) == "stopped"
    (log,) = await wandb_logs(tmp_path / "judged")
    assert b"http://judge/score" in log
    assert b"hidden" not in log


@pytest.mark.usefixtures("no_login")
async def test_a_run_with_a_tracker_that_cannot_be_used_is_refused_and_leaves_nothing(
    trainer: Trainer, tmp_path: Path
) -> None:
    online = WandbTracking(type="wandb", project="p")
    with pytest.raises(InvalidRequest, match="no login"):
        await trainer.start_run(offline(tmp_path, tracking=(online,)))
    assert not (tmp_path / "offline").exists()


async def test_a_tracker_that_fails_while_a_run_trains_is_in_its_detail_and_it_completes(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_SERVER_URL", "no-url")
    tracker = TrackioTracking(type="trackio", project="failing")
    await trainer.start_run(offline(tmp_path, num_steps=2, tracking=(tracker,)))
    assert await ended_run(trainer) == "completed"
    status = trainer.run_status()
    assert status.step == 2
    assert status.detail.startswith("tracking type trackio takes no more: ")
