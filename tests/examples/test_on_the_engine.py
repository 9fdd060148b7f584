"""Shortened run configs of the examples on a real trainer and the real engine, and one complete
example, started as a user would."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.gsm8k.__main__ import datasets
from examples.http_reward.__main__ import RewardService
from services.trainer.trainer import Trainer
from shared.schemas import EvalRecord, RunEvent, StateRecord, StepRecord
from shared.trainer_client import TrainerClient
from tests.replica_process import ReplicaProcess
from tests.trainer_in_process import booted_trainer, client_of, until_end

pytestmark = [pytest.mark.anyio, pytest.mark.engine]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
async def trainer(
    anyio_backend: str,
    replica: ReplicaProcess,
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Trainer]:
    async with booted_trainer(
        tiny_checkpoint, replica.url, tmp_path_factory.mktemp("runs")
    ) as trainer:
        yield trainer


@pytest.fixture
async def runs(trainer: Trainer) -> AsyncIterator[TrainerClient]:
    async with client_of(trainer) as client:
        yield client


def short(name: str, **changes: Any) -> dict[str, Any]:
    """The example's run.yaml with two steps of a few groups."""
    text = (ROOT / "examples" / name / "run.yaml").read_text()
    config: dict[str, Any] = yaml.safe_load(text) | changes
    config["sampling"] |= {"n": 4}
    config["eval"] |= {"num_prompts": 8}
    return config | {"num_steps": 2, "prompts_per_step": 8, "replace_run": True}


def check_completed(events: list[RunEvent]) -> None:
    """Assert that all steps sampled from the last version, and that both evaluations were made."""
    assert events[-1] == StateRecord(state="completed")
    steps = [event for event in events if isinstance(event, StepRecord)]
    assert [step.policy.version for step in steps] == [1, 2]
    assert [event.step for event in events if isinstance(event, EvalRecord)] == [0, 2]


async def test_gsm8k_runs_from_its_question_files_to_math_verify(
    runs: TrainerClient, tmp_path: Path
) -> None:
    """The tiny model does not know the words; the test covers the path of the data."""
    await runs.start_run(short("gsm8k", **datasets(tmp_path)))
    check_completed(await until_end(runs))


async def test_online_dpo_learns_from_pairs_that_the_judge_ranked(runs: TrainerClient) -> None:
    await runs.start_run(short("online_dpo"))
    events = await until_end(runs)
    check_completed(events)
    steps = [event for event in events if isinstance(event, StepRecord)]
    assert [step.reward_mean for step in steps] == pytest.approx([0.5, 0.5])  # zero-sum


async def test_a_reward_service_that_dies_and_comes_back_costs_time_and_nothing_else(
    trainer: Trainer, runs: TrainerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = RewardService()
    monkeypatch.setenv("REWARD_KEY", service.key)
    async with service.running(tmp_path) as processes:
        await runs.start_run(short("http_reward", **service.changes(tmp_path)))
        events = []
        async for _, event in trainer.events(0):
            events.append(event)
            if isinstance(event, EvalRecord) and event.step == 0:
                processes[-1].kill()
            elif isinstance(event, StateRecord) and "has been away for" in event.detail:
                assert away_since(trainer) > 0
                processes.append(service.start(tmp_path))
    assert len(processes) == 2
    assert away_since(trainer) == 0
    check_completed(events)


def away_since(trainer: Trainer) -> float:
    name = "tandem_trainer_reward_outage_timestamp_seconds"
    value = trainer.metrics.registry.get_sample_value(name)
    assert value is not None
    return value


@pytest.mark.timeout(170)
def test_an_example_is_one_command_that_fails_when_nothing_is_learned(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "examples.online_dpo", "--steps", "1", "--min-rise", "100"]
    options = ["--model", str(tiny_checkpoint), "--work-dir", str(tmp_path)]
    ended = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=160, check=False
    )
    assert ended.returncode == 1, ended.stderr
    assert "held-out share as good as the answer, sampled" in ended.stdout
    assert "less than the required 100" in ended.stderr
    assert (tmp_path / "online_dpo/curve.png").exists()
