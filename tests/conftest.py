"""Session-wide fixtures: one tiny checkpoint and one real rollout service."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shared.model_folder import linear_shapes
from shared.rollout_client import RolloutClient
from tests.replica_process import ReplicaProcess, start_replica, wait_until_ready

if TYPE_CHECKING:  # imports torch, for which tests of the wire need not wait
    from tests.publisher import Publisher

WEIGHT_FACTOR = 3.0  # default weights give flat logprobs, on which adapters have no effect


def pytest_configure() -> None:
    """Limit torch to one thread before its import, because more would compete with the engine."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """Restore SIGINT, which a shell's background job ignores and child processes would inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 4 layers, a vocabulary of 16 tokens and a context of 512."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_tiny_checkpoint(path)
    return path


def save_tiny_checkpoint(path: Path) -> None:
    import torch

    from examples.demo import model as demo

    model = demo.make_model(seed=0, max_position_embeddings=512)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(WEIGHT_FACTOR)
    demo.save(model, path)


@pytest.fixture(scope="session")
def base_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of all replicas of the session, so that the exact base is built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def replica(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, base_cache: Path
) -> Iterator[ReplicaProcess]:
    """The real service on the real engine; each test isolates itself by starting a new run."""
    replica = start_replica(
        tmp_path_factory.mktemp("replica"),
        tiny_checkpoint,
        base_cache,
        max_lora_rank=16,
        max_live_policies=2,
        sync_wait_s=1,
        max_adapter_bytes=8 << 20,
        max_body_bytes=1 << 20,
        max_completions=64,
        max_num_seqs=8,
        max_num_batched_tokens=512,  # one full context, so that prefills queue up
    )
    try:
        wait_until_ready(replica)
        yield replica
    finally:
        replica.end()


@pytest.fixture
async def client(replica: ReplicaProcess) -> AsyncIterator[RolloutClient]:
    async with RolloutClient(replica.url, timeout_s=60) as client:
        yield client


@pytest.fixture
async def publisher(client: RolloutClient, tiny_checkpoint: Path) -> Publisher:
    from tests.publisher import Publisher

    status = await client.status()
    assert status.base
    return Publisher(client, status.base, linear_shapes(tiny_checkpoint))
