"""Whole runs over HTTP: a trainer and a replica on one GPU, and on one each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from examples.demo.audit import audit
from examples.demo.training import demo_config
from services.trainer.run_config import RunConfig
from shared.schemas import ReplicasResponse
from tests.gpu import machine
from tests.gpu.conftest import Report
from tests.gpu.replicas import SECOND_GPU, Replicas, only_gpu
from tests.replica_process import ReplicaProcess
from tests.trainer_process import TrainerProcess, lines, start_trainer

NUM_STEPS, LEARNING_RATE = 20, 5e-4  # the demo's rate is for an eighth of the width
_RUN_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Trained:
    """A run that completed, on one replica that still serves."""

    config: RunConfig
    run_dir: Path

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in lines(self.run_dir / "metrics.jsonl") if line["kind"] == kind]

    @property
    def accuracies(self) -> list[float]:
        """Held out, sampled, of every evaluation."""
        return [record["sampled_reward"] for record in self.records("eval")]

    def check_versions(self) -> None:
        """Every completion was trained on once, right after the version that sampled it."""
        result = audit(self.run_dir, self.config)
        assert result.is_clean, str(result)
        assert result.num_trained > 0
        steps = self.records("step")
        assert [step["policy"]["version"] for step in steps] == list(range(1, len(steps) + 1))
        assert {step["staleness_max"] for step in steps} == {0}
        assert len(steps) == self.config.num_steps


def train(trainer: TrainerProcess, replica: ReplicaProcess, config: RunConfig) -> Trained:
    trainer.start_run(**config.model_dump(mode="json", exclude_unset=True))
    status = trainer.until_end(timeout_s=_RUN_TIMEOUT_S)
    (seen,) = ReplicasResponse.model_validate_json(trainer.get("/replicas").content).replicas
    log = trainer.log.read_text()
    assert (seen.url, seen.state, seen.policy) == (replica.url, "serving", status.policy), log
    assert "quarantined" not in log, log
    return Trained(config, Path(status.run_dir))


def config_of(num_steps: int, **changes: Any) -> RunConfig:
    """The demo's run on this model."""
    evaluation = demo_config().model_dump(mode="json")["eval"] | {"every_steps": num_steps}
    return demo_config(
        num_steps=num_steps,
        prompts_per_step=64,
        optimizer={"learning_rate": LEARNING_RATE, "warmup_steps": 0},
        eval=evaluation,
        replace_run=True,
        **changes,
    )


@pytest.fixture
def trainer_of(
    wide_checkpoint: Path, tmp_path: Path
) -> Iterator[Callable[[ReplicaProcess], TrainerProcess]]:
    """Start a trainer beside a replica."""
    started: list[TrainerProcess] = []

    def start(replica: ReplicaProcess) -> TrainerProcess:
        trainer = start_trainer(tmp_path, wide_checkpoint, replica.url, device=machine.DEVICE)
        started.append(trainer)
        return trainer

    yield start
    for trainer in started:
        trainer.end()


def test_the_loop_learns_on_one_gpu(
    replicas: Replicas,
    trainer_of: Callable[[ReplicaProcess], TrainerProcess],
    report: Report,
) -> None:
    replica = replicas["exact-fp8"]
    trained = train(trainer_of(replica), replica, config_of(NUM_STEPS))
    trained.check_versions()
    first, last = trained.accuracies[0], trained.accuracies[-1]
    report(f"held-out accuracy before and after {NUM_STEPS} updates", (first, last))
    assert last >= first + 0.2


@pytest.mark.skipif(machine.num_gpus() < 2, reason="needs two GPUs")
def test_the_loop_runs_with_the_trainer_on_one_gpu_and_the_replica_on_another(
    replicas: Replicas, trainer_of: Callable[[ReplicaProcess], TrainerProcess]
) -> None:
    replica = replicas[SECOND_GPU]
    with only_gpu(0):
        trainer = trainer_of(replica)
    train(trainer, replica, config_of(3)).check_versions()
