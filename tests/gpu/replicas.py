"""Every replica of the session, started at once: one takes minutes to boot, and so do all; and a
run that publishes to one of them."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from shared.adapters import expected_shapes
from shared.model_folder import linear_shapes
from shared.rollout_client import RolloutClient
from shared.schemas import PolicyId, ScoreRequest
from tests.adapters import adapter_file, make_manifest
from tests.gpu import machine
from tests.publisher import Publisher
from tests.replica_process import ReplicaProcess, eventually, start_replica

COMMON: Mapping[str, Any] = {
    "device": machine.DEVICE,
    "kv_cache_memory_bytes": 1 << 30,
    "gpu_memory_utilization": 0.05,  # must be free at the start; the line above says what is taken
    "max_model_len": machine.CONTEXT,
    "max_num_seqs": machine.NUM_LONG + 32,  # others run beside the long ones
    "max_lora_rank": 16,
}
REPLICAS: Mapping[str, Mapping[str, Any]] = {
    "exact-fp8": {},  # the default
    "exact-bf16": {"kv_cache_dtype": "auto"},
    "merged": {"kv_cache_dtype": "auto", "serving_mode": "merged"},
    # These only score: without graphs they are ready sooner.
    "original-fp8": {"kv_cache_dtype": "fp8", "base": "original", "enforce_eager": True},
    "original-bf16": {"kv_cache_dtype": "auto", "base": "original", "enforce_eager": True},
}
SECOND_GPU = "second-gpu"  # the replica there, where there is one
# Strengths of adapters: one drowns what the base knows, so that completions do not fall into loops
# that every version would go on with; the other is that of a training.
STRONG, TRAINED = 2.0, 0.05
_CALL_TIMEOUT_S = 300.0


class Replicas:
    """By name; the first look at one waits until it is ready."""

    def __init__(self, root: Path, checkpoint: Path) -> None:
        def start(name: str, settings: Mapping[str, Any]) -> ReplicaProcess:
            return start_replica(root / name, checkpoint, root / "cache", **COMMON, **settings)

        self._started = {name: start(name, settings) for name, settings in REPLICAS.items()}
        if machine.num_gpus() > 1:
            with only_gpu(1):
                self._started[SECOND_GPU] = start(SECOND_GPU, REPLICAS["exact-fp8"])

    def __getitem__(self, name: str) -> ReplicaProcess:
        replica = self._started[name]
        is_there = eventually(lambda: _is_ready(replica), timeout_s=machine.BOOT_TIMEOUT_S)
        assert is_there, replica.log.read_text()
        return replica

    def end(self) -> None:
        for replica in self._started.values():
            replica.process.terminate()
        for replica in self._started.values():
            replica.end()


def _is_ready(replica: ReplicaProcess) -> bool:
    assert replica.process.poll() is None, replica.log.read_text()
    try:
        return replica.get("/readyz").is_success
    except httpx.TransportError:
        return False


@contextmanager
def only_gpu(index: int) -> Iterator[None]:
    """Inside, processes that are started see one GPU of those that this one sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", visible[index])
        yield


class Run(Publisher):
    """A fresh run on one replica. The strength of its adapters means the same at every width."""

    def adapter(
        self,
        policy: PolicyId,
        *,
        seed: int | None = None,
        strength: float = STRONG,
        **fields: Any,
    ) -> bytes:
        manifest = make_manifest(self.base, policy, **fields)
        seed = policy.version if seed is None else seed
        shapes = expected_shapes(manifest, self.shapes)
        tensors = lora_tensors(shapes, manifest.scaling, seed=seed, strength=strength)
        return adapter_file(manifest, tensors)

    async def scores(
        self, sequences: Sequence[Sequence[int]], policy: PolicyId
    ) -> tuple[tuple[float, ...], ...]:
        request = ScoreRequest(sequences=tuple(map(tuple, sequences)), policy=policy)
        return (await self.client.score(request)).logprobs


@asynccontextmanager
async def run_on(replica: ReplicaProcess) -> AsyncIterator[Run]:
    async with RolloutClient(replica.url, timeout_s=_CALL_TIMEOUT_S) as client:
        base = (await client.status()).base
        assert base
        yield Run(client, base, linear_shapes(replica.checkpoint))


def lora_tensors(
    shapes: Mapping[str, Sequence[int]], scaling: float, *, seed: int, strength: float
) -> dict[str, Tensor]:
    """In bf16, random, such that |scaling · B · A · x| ≈ strength · |x| in every module."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in sorted(shapes):
        size = strength / scaling if name.endswith("lora_B.weight") else 1.0
        random = torch.randn(tuple(shapes[name]), generator=generator)
        tensors[name] = (size / math.sqrt(shapes[name][1]) * random).to(torch.bfloat16)
    return tensors


def gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The mean |Δlogprob|, nats."""
    return fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))
