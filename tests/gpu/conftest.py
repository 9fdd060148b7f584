"""Everything that takes minutes is made once: the model, the replicas, the policy that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.trainer.learner.learner import Learner
from services.trainer.policy.policy import Policy
from services.trainer.run_config import LoraConfig, OptimizerConfig
from shared.schemas import PolicyId
from tests.gpu import machine
from tests.gpu.replicas import Replicas

LORA = LoraConfig(rank=8, alpha=16)  # the rank and scaling of tests/adapters.py
Report = Callable[[str, object], None]
_TIMEOUT_S = 600  # the first test that needs a replica waits until it has booted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here, obstacle = Path(__file__).parent, machine.obstacle()
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(_TIMEOUT_S))
            item.add_marker(pytest.mark.filterwarnings("default"))  # of other packages than on CPUs
            if obstacle:
                item.add_marker(pytest.mark.skip(obstacle))


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str], record_property: Report) -> Report:
    """Say a figure, though the output of tests is captured."""

    def say(name: str, value: object) -> None:
        record_property(name, value)
        with capsys.disabled():
            print(f"\n{name}: {value}", flush=True)

    return say


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of real width that half knows how to sort digits."""
    from tests.gpu.checkpoint import make_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "wide"
    make_checkpoint(path, device=machine.DEVICE, shape=machine.SHAPE)
    return path


@pytest.fixture(scope="session")
def replicas(tmp_path_factory: pytest.TempPathFactory, wide_checkpoint: Path) -> Iterator[Replicas]:
    replicas = Replicas(tmp_path_factory.mktemp("replicas"), wide_checkpoint)
    yield replicas
    replicas.end()


@pytest.fixture(scope="session")
def learner(wide_checkpoint: Path, replicas: Replicas) -> Learner:
    """A QLoRA policy at version 0 of a run. It loads while the replicas boot."""
    learner = Learner(Policy.load(str(wide_checkpoint), device=machine.DEVICE))
    start = PolicyId(run_id="trained", version=0)
    learner.start(start, LORA, OptimizerConfig(), seed=0)
    return learner


@pytest.fixture(scope="session")
def policy(learner: Learner) -> Policy:
    return learner.policy
