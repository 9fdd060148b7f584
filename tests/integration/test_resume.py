"""kill -9 of the trainer: the run goes on in the next process, and nobody can tell from its data.

The replica lives on, with versions of the life that was killed which are newer than what the next
life begins with. It runs one sequence at a time, so that a seed gives the same tokens whatever else
it has to do: the losses of a run that was interrupted are those of one that was not.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from shared.schemas import PolicyId
from tests.faulty_proxy import FaultyProxy
from tests.replica_process import ReplicaProcess, eventually, start_replica, wait_until_ready
from tests.trainer_process import TrainerProcess, lines, start_trainer

NUM_STEPS, PROMPTS_PER_STEP, CHECKPOINT_EVERY = 6, 2, 3
WAIT_S = 90.0
CONFIG: dict[str, Any] = {
    "num_steps": NUM_STEPS,
    "prompts_per_step": PROMPTS_PER_STEP,
    "sampling": {"n": 4, "max_tokens": 8},
    "dataset": {"type": "sort_digits", "num_prompts": 8},  # the run is longer than an epoch
    "rewards": [{"type": "function", "path": "tests.trainer_process:share_of_small_digits"}],
    "lora": {"rank": 8, "alpha": 16},
    "optimizer": {"learning_rate": 5e-3, "warmup_steps": 6},
    "checkpoint": {"every_steps": CHECKPOINT_EVERY},
    "replace_run": True,
}


class Place:
    """Where trainers of this module live and die, one after another, beside one replica."""

    def __init__(self, root: Path, checkpoint: Path, replica: ReplicaProcess) -> None:
        self.root = root
        self.checkpoint = checkpoint
        self.replica = replica
        self._trainer: TrainerProcess | None = None

    @property
    def trainer(self) -> TrainerProcess:
        """The one that lives; the next one after it has died."""
        if self._trainer is None or self._trainer.process.poll() is not None:
            self._trainer = start_trainer(self.root, self.checkpoint, self.replica.url)
        return self._trainer

    def end(self) -> None:
        if self._trainer:
            self._trainer.end()

    def run_dir(self, run_id: str) -> Path:
        return self.root / "runs" / run_id

    def steps(self, run_id: str) -> list[dict[str, Any]]:
        events = lines(self.run_dir(run_id) / "metrics.jsonl")
        return [event for event in events if event["kind"] == "step"]

    def checkpoints(self, run_id: str) -> list[str]:
        folder = self.run_dir(run_id) / "checkpoints"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, base_cache: Path
) -> Iterator[Place]:
    replica = start_replica(
        tmp_path_factory.mktemp("steady-replica"), tiny_checkpoint, base_cache, max_num_seqs=1
    )
    place = Place(tmp_path_factory.mktemp("trainer"), tiny_checkpoint, replica)
    try:
        wait_until_ready(replica)
        yield place
    finally:
        place.end()
        replica.end()


@pytest.fixture(scope="module")
def whole_run(place: Place) -> list[dict[str, Any]]:
    """The steps of a run that nothing interrupts."""
    place.trainer.start_run(**CONFIG, run_id="whole")
    place.trainer.until_end(timeout_s=WAIT_S)
    return place.steps("whole")


def until(condition: Callable[[], bool]) -> None:
    assert eventually(condition, timeout_s=WAIT_S)


def check_run(
    place: Place, run_id: str, *, incarnation: int, whole_run: list[dict[str, Any]]
) -> None:
    """The run is complete: every prompt once, every step once, and each one as in the whole run.

    Equal means equal: an update, and on this replica a sampled token, has one order of sums.
    """
    status = place.trainer.until_end(timeout_s=WAIT_S)
    assert status.policy == PolicyId(run_id=run_id, incarnation=incarnation, version=NUM_STEPS)
    groups = lines(place.run_dir(run_id) / "groups.jsonl")
    assert [(g["step"], g["position"]) for g in groups] == [
        (1 + position // PROMPTS_PER_STEP, position)
        for position in range(NUM_STEPS * PROMPTS_PER_STEP)
    ]
    compared = ("step", "num_tokens", "reward_mean", "loss", "grad_norm", "learning_rate")
    steps = place.steps(run_id)
    assert [[step[name] for name in compared] for step in steps] == [
        [step[name] for name in compared] for step in whole_run
    ]


def test_a_trainer_that_is_killed_goes_on_from_its_checkpoint(
    place: Place, whole_run: list[dict[str, Any]]
) -> None:
    """trl#5863: a resume sampled all past prompts again; trl#7036: past the end of an epoch."""
    place.trainer.start_run(**CONFIG, run_id="killed")
    until(lambda: len(place.steps("killed")) > CHECKPOINT_EVERY)
    place.trainer.kill()
    assert place.checkpoints("killed") == [f"step-{CHECKPOINT_EVERY:06d}"]
    check_run(place, "killed", incarnation=2, whole_run=whole_run)  # nobody told it to go on


@pytest.mark.faults
def test_a_trainer_that_is_killed_before_its_first_checkpoint_begins_again(
    place: Place, whole_run: list[dict[str, Any]]
) -> None:
    """The replica has versions of the first life when the second publishes its own."""
    place.trainer.start_run(**CONFIG, run_id="early")
    until(lambda: len(place.steps("early")) == CHECKPOINT_EVERY - 1)
    place.trainer.kill()
    assert place.checkpoints("early") == []
    check_run(place, "early", incarnation=2, whole_run=whole_run)


@pytest.mark.faults
def test_a_trainer_that_is_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    place: Place, whole_run: list[dict[str, Any]]
) -> None:
    """open-rl#83. Every step is saved, so there are several chances to kill before the rename."""
    place.trainer.start_run(**{**CONFIG, "checkpoint": {"every_steps": 1}}, run_id="torn")
    folder = place.run_dir("torn") / "checkpoints"
    until((folder / "step-000001").exists)
    num_kills = 0
    while not list(folder.glob("*.writing")):
        wait_for_a_write(folder, place.trainer)
        place.trainer.kill()
        num_kills += 1
    check_run(place, "torn", incarnation=1 + num_kills, whole_run=whole_run)
    assert place.checkpoints("torn") == [f"step-{step:06d}" for step in (NUM_STEPS - 1, NUM_STEPS)]


def wait_for_a_write(folder: Path, trainer: TrainerProcess) -> None:
    """Return the moment that a temporary name exists, without a pause between two looks."""
    while True:
        for _ in range(20_000):
            if any(name.endswith(".writing") for name in os.listdir(folder)):
                return
        assert trainer.run().state == "running", "every write was too fast to be caught"


@pytest.mark.faults
@pytest.mark.anyio
@pytest.mark.parametrize(
    ("direction", "after_bytes"),
    [("up", 0), ("up", 50_000), ("down", 0)],
    ids=["published-not-sent", "half-sent", "loaded-not-acknowledged"],
)
async def test_a_trainer_that_is_killed_while_it_pushes_a_version_publishes_another_in_its_place(
    place: Place,
    whole_run: list[dict[str, Any]],
    direction: Literal["up", "down"],
    after_bytes: int,
) -> None:
    """The replica may hold the version that the next life trains again: in its own incarnation."""
    run_id = f"pushing-{direction}-{after_bytes}"
    place.end()
    async with FaultyProxy(place.replica.url) as proxy:
        trainer = await asyncio.to_thread(start_trainer, place.root, place.checkpoint, proxy.url)
        await asyncio.to_thread(trainer.start_run, **CONFIG, run_id=run_id)
        await asyncio.to_thread(until, lambda: len(place.steps(run_id)) >= CHECKPOINT_EVERY)
        cut = proxy.cut(direction, after_bytes=after_bytes, match="POST /sync_weights")
        await asyncio.wait_for(cut.made.wait(), WAIT_S)
        trainer.kill()
    await asyncio.to_thread(check_run, place, run_id, incarnation=2, whole_run=whole_run)


@pytest.mark.faults
def test_a_trainer_that_is_told_to_exit_loses_no_step(
    place: Place, whole_run: list[dict[str, Any]]
) -> None:
    """SIGTERM: the step that runs is finished and kept, wherever the next checkpoint was due."""
    place.trainer.start_run(**CONFIG, run_id="told")
    until(lambda: len(place.steps("told")) == 1)
    leaving = place.trainer.process
    leaving.send_signal(signal.SIGTERM)
    assert leaving.wait(20) == 0
    assert place.checkpoints("told") == [f"step-{len(place.steps('told')):06d}"]
    last = lines(place.run_dir("told") / "metrics.jsonl")[-1]
    assert (last["kind"], last["state"]) == ("state", "suspended")
    check_run(place, "told", incarnation=2, whole_run=whole_run)


@pytest.mark.faults
def test_a_run_that_samples_ahead_trains_every_prompt_once_however_often_it_is_killed(
    place: Place,
) -> None:
    """trl#7274: what was in flight pinned the position to resume from."""
    ahead = {"max_staleness": 2, "num_steps": 8, "checkpoint": {"every_steps": 2}}
    place.trainer.start_run(**{**CONFIG, **ahead}, run_id="ahead")
    for num_steps in (3, 5):
        trainer = place.trainer
        until(lambda: len(place.steps("ahead")) >= num_steps)  # noqa: B023 (used at once)
        trainer.kill()
    assert place.trainer.until_end(timeout_s=WAIT_S).policy.incarnation == 3
    groups = lines(place.run_dir("ahead") / "groups.jsonl")
    assert sorted(group["position"] for group in groups) == list(range(8 * PROMPTS_PER_STEP))
    steps = place.steps("ahead")
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert max(step["staleness_max"] for step in steps) <= 2
