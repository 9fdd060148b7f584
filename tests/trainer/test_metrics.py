"""What a scrape of the trainer says of the run that goes on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from services.trainer.learner.learner import Learner
from services.trainer.trainer import Trainer
from shared.errors import RunConflict
from tests.trainer.test_trainer import (
    end_of_run,
    external,
    join,
    make_trainer,
    take_steps,
    train_request,
)

pytestmark = pytest.mark.anyio


def shown(trainer: Trainer, name: str, **labels: str) -> float | None:
    return trainer.metrics.registry.get_sample_value(f"tandem_trainer_{name}", labels)


async def test_a_scrape_shows_the_state_and_the_bounds_of_the_run(
    loaded_learner: Learner, tmp_path: Path
) -> None:
    trainer = make_trainer(loaded_learner, tmp_path)
    await join(trainer)
    assert shown(trainer, "run_state", state="external") == 0
    started_at = time.time()
    await trainer.start_run(external(max_staleness=3, min_ready_replicas=1))
    await trainer._run().ready.wait()
    assert shown(trainer, "run_state", state="external") == 1
    assert shown(trainer, "run_max_staleness") == 3
    assert shown(trainer, "run_min_ready_replicas") == 1
    begun_at = shown(trainer, "version_timestamp_seconds")
    assert begun_at is not None
    assert started_at <= begun_at <= time.time()

    await take_steps(trainer, 1)
    made_at = shown(trainer, "version_timestamp_seconds")
    assert made_at is not None
    assert begun_at < made_at <= time.time()
    assert shown(trainer, "policy_version") == 1

    await trainer.stop_run()
    assert await end_of_run(trainer) == "stopped"
    assert shown(trainer, "run_state", state="external") == 0
    assert shown(trainer, "run_state", state="stopped") == 1
    assert shown(trainer, "policy_version") == 1
    await trainer.start_run(external())
    await trainer._run().ready.wait()
    assert shown(trainer, "run_max_staleness") == 0
    assert shown(trainer, "policy_version") is None
    await trainer.stop()


async def test_a_replica_that_lacks_the_newest_version_is_not_in_sync(
    loaded_learner: Learner, tmp_path: Path
) -> None:
    trainer = make_trainer(loaded_learner, tmp_path)
    replica = await join(trainer)
    assert shown(trainer, "replicas_in_sync") == 0
    policy = (await trainer.start_run(external())).policy
    await trainer._run().ready.wait()
    assert shown(trainer, "replicas_in_sync") == 1
    replica.refusal = RunConflict("another trainer took this replica over")
    await trainer.train(train_request(policy))
    assert shown(trainer, "replicas_in_sync") == 0
    await trainer.stop()


async def test_a_loop_that_samples_elsewhere_needs_no_replica(
    loaded_learner: Learner, tmp_path: Path
) -> None:
    trainer = make_trainer(loaded_learner, tmp_path)
    await trainer.start_run(external())
    await trainer._run().ready.wait()
    assert shown(trainer, "run_min_ready_replicas") == 0
    await trainer.stop()
