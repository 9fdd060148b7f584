"""Honest and lying replicas on the real engine, held to a real QLoRA policy."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.trainer.data.datasets import load_prompts
from services.trainer.fleet.conformance import RESOLVABLE, Conformance, Probe, distance
from services.trainer.fleet.probe import make_probe
from services.trainer.learner.learner import Learner
from services.trainer.policy.adapter import PublishedAdapter
from services.trainer.policy.policy import Policy
from services.trainer.run_config import (
    ConformanceConfig,
    LoraConfig,
    OptimizerConfig,
    SortDigitsDataset,
)
from shared.errors import ConformanceFailed
from shared.rollout_client import RolloutClient
from shared.schemas import GenerateRequest, PolicyId, SamplingParams
from tests.lying_replica import Lie
from tests.replica_process import ReplicaProcess, start_replica, wait_until_ready
from tests.trainer.conftest import PLAIN, make_sample

pytestmark = pytest.mark.anyio

LORA = LoraConfig(rank=8, alpha=16)
FRESH, TINY, SMALL, STRONG = 0.0, 0.003, 0.05, 0.4  # effects of 0, 0.01, 0.1 and 0.6 nats
NUM_SEEDS = 20
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def lie_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lie") / "lie"


@pytest.fixture(scope="module")
def liar(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
    base_cache: Path,
    lie_file: Path,
) -> Iterator[ReplicaProcess]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LIE_FILE", str(lie_file))
        replica = start_replica(
            tmp_path_factory.mktemp("liar"),
            tiny_checkpoint,
            base_cache,
            module="tests.lying_replica",
            max_lora_rank=8,
        )
    try:
        wait_until_ready(replica)
        yield replica
    finally:
        replica.end()


@pytest.fixture(scope="module")
def fp8_replica(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, base_cache: Path
) -> Iterator[ReplicaProcess]:
    replica = start_replica(
        tmp_path_factory.mktemp("fp8"),
        tiny_checkpoint,
        base_cache,
        max_lora_rank=8,
        kv_cache_dtype="fp8",  # without the instructions for it, the same as the liar's
    )
    try:
        wait_until_ready(replica)
        yield replica
    finally:
        replica.end()


@dataclass
class Run:
    """A run that publishes random adapters to one replica and has them proven."""

    policy: Policy
    probe: Probe
    client: RolloutClient
    start: PolicyId = field(
        default_factory=lambda: PolicyId(run_id=f"run-{secrets.token_hex(4)}", version=0)
    )
    floor: float = math.nan

    def __post_init__(self) -> None:
        self.newest = self.start
        self.conformance = Conformance(self.probe, ConformanceConfig())

    async def admit(self) -> float:
        self.floor = await self.conformance.admit(self.client, run=self.start, timeout_s=TIMEOUT_S)
        return self.floor

    def adapter(self, strength: float, seed: int) -> PublishedAdapter:
        """The next version: a random direction, `strength` of the input of every module."""
        self.newest = self.newest.next()
        with self.policy.replaced_lora(random_lora(self.policy, strength, seed)):
            return self.policy.export(self.newest, self.policy.score(self.probe.sequences))

    async def prove(self, adapter: PublishedAdapter) -> float:
        """Push, check and remember; the gap."""
        await self.client.sync_weights(adapter.content, replace_run=True)
        gap = await self.conformance.check(
            self.client, adapter, floor=self.floor, timeout_s=TIMEOUT_S
        )
        self.conformance.remember(adapter)
        return gap

    def effect(self, adapter: PublishedAdapter) -> float:
        return distance(adapter.probe_logprobs, self.probe.base_logprobs)


def random_lora(policy: Policy, strength: float, seed: int) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[1])
        for name, shape in policy.lora_shapes().items()
    }
    factors = {"lora_A": 1.0, "lora_B": strength / LORA.scaling}
    return {name: tensor * factors[name.split(".")[-2]] for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def learner(tiny_checkpoint: Path) -> Learner:
    learner = Learner(Policy.load(str(tiny_checkpoint), device="cpu"))
    start = PolicyId(run_id="trained", version=0)
    learner.start(start, LORA, OptimizerConfig(learning_rate=1e-3, warmup_steps=0), seed=0)
    return learner


@pytest.fixture(scope="module")
def policy(learner: Learner) -> Policy:
    return learner.policy


@pytest.fixture(scope="module")
def probe(policy: Policy) -> Probe:
    prompts = load_prompts(SortDigitsDataset(num_prompts=64), policy.encoder, seed=0)
    return make_probe(policy, [p.token_ids for p in prompts], ConformanceConfig(), seed=0)


@pytest.fixture
async def run(
    liar: ReplicaProcess, lie_file: Path, policy: Policy, probe: Probe
) -> AsyncIterator[Run]:
    """On the liar, which is honest until told otherwise."""
    lie_file.write_text("none")
    async with RolloutClient(liar.url, timeout_s=TIMEOUT_S) as client:
        yield Run(policy, probe, client)


@pytest.fixture
async def fp8_run(fp8_replica: ReplicaProcess, policy: Policy, probe: Probe) -> AsyncIterator[Run]:
    async with RolloutClient(fp8_replica.url, timeout_s=TIMEOUT_S) as client:
        yield Run(policy, probe, client)


# --- no false alarms ----------------------------------------------------------------------------


async def no_alarms(run: Run, strength: float) -> None:
    await run.admit()
    for seed in range(NUM_SEEDS):
        await run.prove(run.adapter(strength, seed))


@pytest.mark.parametrize("strength", [FRESH, TINY, STRONG])
async def test_no_adapter_of_an_honest_replica_raises_an_alarm(run: Run, strength: float) -> None:
    await no_alarms(run, strength)


@pytest.mark.parametrize("strength", [FRESH, SMALL, STRONG])
async def test_no_adapter_raises_an_alarm_over_an_fp8_kv_cache(
    fp8_run: Run, strength: float
) -> None:
    await no_alarms(fp8_run, strength)


async def test_every_version_of_a_training_passes(run: Run, learner: Learner, probe: Probe) -> None:
    """Small steps: neighbours are alike, and the effect grows out of the noise."""
    await run.admit()
    policy = learner.policy
    learner.start(run.start, LORA, OptimizerConfig(learning_rate=3e-4, warmup_steps=0), seed=1)
    policy.set_probe(probe.sequences)
    effects = []
    for step in range(10):
        samples = [make_sample(16 * step + i, advantage=(-1.0) ** i) for i in range(16)]
        learner.update(samples, PLAIN, max_tokens_per_micro_batch=4096)
        adapter = policy.publish()
        await run.prove(adapter)
        effects.append(run.effect(adapter))
    assert min(effects) < RESOLVABLE * run.floor < max(effects)


async def test_a_busy_replica_passes(run: Run) -> None:
    """In batches with other sequences, sums come in another order."""
    await run.admit()
    await run.prove(run.adapter(SMALL, seed=0))
    request = GenerateRequest(
        prompts=tuple(sequence[:8] for sequence in run.probe.sequences),
        sampling=SamplingParams(n=8, max_tokens=200, ignore_eos=True),
        policy=run.newest,
    )
    working = asyncio.create_task(run.client.generate(request))
    for seed in range(1, 6):
        await run.prove(run.adapter(SMALL, seed))
        assert not working.done()
    await working


# --- no misses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ("base", "it serves the base"),
        ("stale", r"it serves run-\w+.1@1 "),
        ("swapped", "nats off|times its effect"),
        ("twice", "times its effect"),
        ("layer_lost", "nats off, over the limit"),
    ],
)
async def test_a_lie_about_a_version_is_found(
    run: Run, lie_file: Path, lie: Lie, reason: str
) -> None:
    """ms-swift#9855, axolotl 7617b95, unsloth-zoo#941: the sync succeeds, and something else is
    served than was trained."""
    await run.admit()
    await run.prove(run.adapter(SMALL, seed=1))
    lie_file.write_text(lie)
    with pytest.raises(ConformanceFailed, match=rf"does not serve policy run-.*@2 .*({reason})"):
        await run.prove(run.adapter(SMALL, seed=2))
    lie_file.write_text("none")
    await run.prove(run.adapter(SMALL, seed=3))


@pytest.mark.parametrize("lie", ["base", "swapped", "twice", "layer_lost"])
async def test_a_replica_that_spoils_adapters_is_not_admitted(
    run: Run, lie_file: Path, lie: Lie
) -> None:
    """vllm#53888, unsloth-zoo#941: known before a training has made an effect to measure."""
    lie_file.write_text(lie)
    with pytest.raises(ConformanceFailed, match="does not apply adapters as the trainer does"):
        await run.admit()


async def test_a_replica_of_other_weights_is_not_admitted(
    run: Run, policy: Policy, probe: Probe
) -> None:
    """axolotl's docs: "if the models do not match ..." the trainer here has another first layer."""
    embeddings = policy.model.get_input_embeddings().weight
    weights = embeddings.data
    try:
        embeddings.data = weights.roll(1, dims=0)
        other = make_probe(policy, [], ConformanceConfig(), seed=0)
    finally:
        embeddings.data = weights
    run.conformance = Conformance(other, ConformanceConfig())
    with pytest.raises(ConformanceFailed, match="serves another model than the trainer's"):
        await run.admit()
