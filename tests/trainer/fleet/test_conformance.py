"""What a replica's scores prove, and what they do not; the probe that they are scores of."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.fleet.conformance import (
    MIN_FLOOR,
    RESOLVABLE,
    Conformance,
    Probe,
    Scores,
    distance,
    effect_fault,
    fault,
    noise_floor,
)
from services.trainer.fleet.probe import make_probe, probe_sequences
from services.trainer.learner.learner import Learner
from services.trainer.policy.adapter import PublishedAdapter
from services.trainer.policy.policy import Policy
from services.trainer.policy.samples import Sample
from services.trainer.run_config import ConformanceConfig, LoraConfig, OptimizerConfig
from shared.adapters import check_tensors, read_header
from shared.errors import ConformanceFailed, DeadlineExceeded
from shared.model_folder import linear_shapes
from shared.rollout_client import RolloutClient
from shared.schemas import (
    AdapterManifest,
    BaseIdentity,
    PolicyId,
    ScoreRequest,
    ScoreResponse,
    SyncReceipt,
)
from tests.trainer.conftest import PLAIN, VERSION_0
from tests.trainer.policy.test_policy import whole

NUM_TOKENS = 376  # of the default probe
Logprobs = list[float]


# --- verdict ------------------------------------------------------------------------------------


class World:
    """Random logprobs: policies, and two sides that read them with heavy-tailed noise."""

    def __init__(self, seed: int, noise: float, num_tokens: int = NUM_TOKENS) -> None:
        self.rng = random.Random(seed)
        self.noise = noise
        self.num_tokens = num_tokens
        self.base = [-3 * self.rng.random() - 20 for _ in range(num_tokens)]

    def policy(self, effect: float) -> Logprobs:
        """At a distance of about `effect` from the base, much of it on few tokens."""
        return [x + effect * self._heavy_tailed() for x in self.base]

    def read(self, logprobs: Sequence[float]) -> Logprobs:
        return [x + self.noise / 2**0.5 * self._heavy_tailed() for x in logprobs]

    def _heavy_tailed(self) -> float:
        """Student's t with 4 degrees of freedom, of mean absolute value 1."""
        square = sum(self.rng.gauss(0, 1) ** 2 for _ in range(4)) / 4
        return float(self.rng.gauss(0, 1) / square**0.5)


def verdict(
    world: World,
    says: Logprobs,
    *,
    serves: Logprobs,
    base: Logprobs | None = None,
    others: Mapping[str, Logprobs] = {},
) -> str | None:
    trainer_base = world.read(world.base)
    floor = noise_floor(trainer_base, world.read(world.base))
    return fault(
        Scores(trainer_base, world.read(says)),
        Scores(world.read(base or world.base), world.read(serves)),
        floor=floor,
        others={"the base": trainer_base} | {name: world.read(x) for name, x in others.items()},
    )


noises = st.floats(0.001, 0.1)
seeds = st.integers(0, 2**32)


@settings(max_examples=100, deadline=None)
@given(seeds, noises, st.floats(0, 100))
def test_an_honest_replica_passes_whatever_the_noise_and_the_effect(
    seed: int, noise: float, effect_in_floors: float
) -> None:
    world = World(seed, noise)
    policy = world.policy(effect_in_floors * noise)
    earlier = {f"run.1@{i}": world.policy(effect_in_floors * noise) for i in range(3)}
    assert verdict(world, policy, serves=policy, others=earlier) is None


@settings(max_examples=100, deadline=None)
@given(seeds, noises)
def test_a_fresh_adapter_passes_served_or_not(seed: int, noise: float) -> None:
    """B is 0: the policy is the base, and there is nothing to tell apart."""
    world = World(seed, noise)
    assert verdict(world, world.base, serves=world.base) is None


@settings(max_examples=100, deadline=None)
@given(seeds, noises, st.floats(2 * RESOLVABLE, 100))
def test_serving_the_base_is_named(seed: int, noise: float, effect_in_floors: float) -> None:
    """ms-swift#9855, miles#2075, vllm#53888: the sync succeeds, the base is sampled."""
    world = World(seed, noise)
    reason = verdict(world, world.policy(effect_in_floors * noise), serves=world.base)
    assert reason
    assert reason.startswith("it serves the base")


@settings(max_examples=100, deadline=None)
@given(seeds, noises, st.floats(2 * RESOLVABLE, 100))
def test_serving_an_earlier_version_is_named(
    seed: int, noise: float, effect_in_floors: float
) -> None:
    """axolotl 7617b95: the sync became a no-op."""
    world = World(seed, noise)
    versions = {f"run.1@{i}": world.policy(effect_in_floors * noise) for i in range(40, 48)}
    newest = versions.pop("run.1@47")
    reason = verdict(world, newest, serves=versions["run.1@41"], others=versions)
    assert reason
    assert reason.startswith("it serves run.1@41")


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_an_effect_of_another_size_is_found(factor: float) -> None:
    """unsloth-zoo#941: scaled in place once more with every load."""
    world = World(0, noise=0.01)
    policy = world.policy(0.2)
    served = [b + factor * (p - b) for b, p in zip(world.base, policy, strict=True)]
    assert verdict(world, policy, serves=served)


def test_an_effect_of_the_same_size_elsewhere_is_found() -> None:
    """unsloth-zoo#941: gate_proj twice, up_proj never."""
    world = World(0, noise=0.01)
    policy, another = world.policy(0.2), world.policy(0.2)
    served = [
        0.6 * p + 0.6 * a - 0.2 * b for p, a, b in zip(policy, another, world.base, strict=True)
    ]
    reason = verdict(world, policy, serves=served)
    assert reason
    assert "correlation" in reason


def test_base_requests_that_get_an_adapter_are_found() -> None:
    world = World(0, noise=0.01)
    policy = world.policy(0.2)
    reason = verdict(world, policy, serves=policy, base=policy)
    assert reason
    assert reason.startswith("its base is")


def test_an_effect_that_is_constant_or_absent_has_a_verdict() -> None:
    assert effect_fault([1.0, 1.0], [1.0, 1.0], floor=0.01) is None
    assert effect_fault([1.0, 2.0], [0.0, 0.0], floor=0.01) is not None


def test_the_floor_is_the_gap_and_more_on_a_short_probe() -> None:
    assert noise_floor([0.0] * 400, [0.0, 0.02] * 200) == pytest.approx(0.011, rel=1e-2)
    assert noise_floor([0.0] * 8, [0.0, 0.02] * 4) == pytest.approx(0.0176, rel=1e-2)
    assert noise_floor([-1.0] * 400, [-1.0] * 400) == MIN_FLOOR


# --- probe --------------------------------------------------------------------------------------

VOCABULARY = range(3, 16)
PROMPTS = [(1, *(3 + (i * j) % 13 for j in range(i + 2))) for i in range(40)]


def sequences_of(prompts: Sequence[tuple[int, ...]], **changes: int) -> Sequence[Sequence[int]]:
    options = {"num_sequences": 8, "num_tokens": 48, "seed": 0} | changes
    return probe_sequences(prompts, VOCABULARY, **options)


def test_the_probe_is_a_function_of_its_arguments() -> None:
    assert sequences_of(PROMPTS) == sequences_of(PROMPTS)
    assert sequences_of(PROMPTS) != sequences_of(PROMPTS, seed=1)


@pytest.mark.parametrize("num_tokens", [8, 48])
def test_a_probe_sequence_is_a_prompt_without_its_middle_and_tokens_of_others(
    num_tokens: int,
) -> None:
    starts = {(1, *prompt[1:][1 - num_tokens // 2 :]) for prompt in PROMPTS}
    for sequence in sequences_of(PROMPTS, num_tokens=num_tokens):
        assert len(sequence) == num_tokens
        assert any(tuple(sequence[: len(start)]) == start for start in starts)
        assert set(sequence[num_tokens // 2 :]) <= set(VOCABULARY)


def test_few_prompts_make_as_many_sequences() -> None:
    assert len(set(map(tuple, sequences_of([(1, 5, 6, 7)])))) == 8


def test_without_a_dataset_the_probe_is_ordinary_tokens() -> None:
    sequences = sequences_of([(1,)])  # what the empty text is to this tokenizer
    assert {sequence[0] for sequence in sequences} == {1}
    assert set(chain.from_iterable(sequence[1:] for sequence in sequences)) == set(VOCABULARY)
    assert sequences_of([()])[0][0] in VOCABULARY  # to a tokenizer without such a token


# --- the trainer's side -------------------------------------------------------------------------

RAGGED = ((1, 5, 6, 7, 8, 9, 4, 3), (1, 3), (1, 12, 3, 4, 9))


def weights(policy: Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.model.parameters() if p.requires_grad])


def test_score_is_flat_in_the_order_of_the_sequences(policy: Policy) -> None:
    whole = policy.score(RAGGED)
    parts = chain.from_iterable(policy.score([sequence]) for sequence in RAGGED)
    assert len(whole) == 7 + 1 + 4
    assert whole == pytest.approx(tuple(parts), abs=0.1)  # bfloat16, another padding
    assert policy.score(()) == ()


def test_score_is_what_training_computes(
    policy: Policy, learner: Learner, samples: list[Sample]
) -> None:
    learner.update(samples, PLAIN, max_tokens_per_micro_batch=100_000)
    (sample,) = [s for s in samples if s.length == max(s.length for s in samples)]
    trained = policy.logprobs(whole([sample])).logprobs
    scored = policy.score([sample.prompt_token_ids + sample.token_ids])
    assert scored[-sample.num_tokens :] == tuple(trained.tolist())


def test_the_base_is_scored_without_the_adapter(
    policy: Policy, learner: Learner, samples: list[Sample]
) -> None:
    before = policy.score(RAGGED)
    learner.update(samples, PLAIN, max_tokens_per_micro_batch=100_000)
    assert policy.score(RAGGED, base=True) == before
    assert policy.score(RAGGED) != before


def test_scoring_leaves_no_trace(policy: Policy, samples: list[Sample]) -> None:
    policy.logprobs(whole(samples)).logprobs.sum().backward()
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    gradients = [p.grad.clone() for p in parameters if p.grad is not None]
    rng = torch.get_rng_state()
    policy.score(RAGGED, base=True)
    policy.score(RAGGED)
    assert policy.model.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.requires_grad for p in parameters)
    after = [p.grad for p in parameters]
    assert all(a is not None and torch.equal(a, b) for a, b in zip(after, gradients, strict=True))
    for parameter in parameters:
        parameter.grad = None


def test_the_synthetic_adapter_moves_the_logprobs_by_about_a_nat(
    policy: Policy, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    probe = make_probe(policy, PROMPTS, ConformanceConfig(), seed=0)
    assert probe.base_logprobs == policy.score(probe.sequences, base=True)
    assert 0.5 <= distance(probe.synthetic.probe_logprobs, probe.base_logprobs) <= 2
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(probe.synthetic.content)
    header = read_header(file)
    check_tensors(header, linear_shapes(tiny_checkpoint))
    assert header.manifest.policy == probe.synthetic.policy
    assert header.manifest.policy.run_id.startswith("probe-")


def test_making_a_probe_leaves_no_trace(
    policy: Policy, learner: Learner, samples: list[Sample]
) -> None:
    learner.update(samples, PLAIN, max_tokens_per_micro_batch=100_000)
    before, rng = weights(policy), torch.get_rng_state()
    first = make_probe(policy, PROMPTS, ConformanceConfig(), seed=0)
    assert torch.equal(weights(policy), before)
    assert torch.equal(torch.get_rng_state(), rng)
    learner.update(samples, PLAIN, max_tokens_per_micro_batch=100_000)
    assert make_probe(policy, PROMPTS, ConformanceConfig(), seed=0) == first


def test_weights_come_back_when_what_needed_others_fails(policy: Policy) -> None:
    before = weights(policy)
    zeros = {name: torch.zeros(shape) for name, shape in policy.lora_shapes().items()}
    with pytest.raises(RuntimeError), policy.replaced_lora(zeros):
        raise RuntimeError
    assert torch.equal(weights(policy), before)
    zeros.popitem()
    with pytest.raises(KeyError), policy.replaced_lora(zeros):
        pass
    assert torch.equal(weights(policy), before)


def test_a_published_adapter_has_the_logprobs_of_the_runs_probe(
    policy: Policy, learner: Learner, samples: list[Sample]
) -> None:
    learner.update(samples, PLAIN, max_tokens_per_micro_batch=100_000)
    assert policy.publish().probe_logprobs == ()
    policy.set_probe(RAGGED)
    assert policy.publish().probe_logprobs == policy.score(RAGGED)
    learner.start(VERSION_0, LoraConfig(rank=8), OptimizerConfig(), seed=0)
    learner.update(samples, PLAIN, max_tokens_per_micro_batch=100_000)
    assert policy.publish().probe_logprobs == ()


def test_a_probe_is_never_longer_than_the_model_can_read(policy: Policy) -> None:
    config = ConformanceConfig(num_sequences=1, num_tokens=512)
    assert make_probe(policy, PROMPTS, config, seed=0).longest == 511


# --- the replica's side -------------------------------------------------------------------------

RUN = PolicyId(run_id="run", version=0)
BASE = BaseIdentity(weights="0" * 64, recipe=None, tokenizer="0" * 64, chat_template=None)
LENGTHS = (48,) * 8
Serves = Callable[[PolicyId], Logprobs]


def published(policy: PolicyId, probe_logprobs: Sequence[float]) -> PublishedAdapter:
    manifest = AdapterManifest(
        policy=policy, base=BASE, rank=8, scaling=2.0, target_modules=("q_proj",)
    )
    return PublishedAdapter(manifest, b"adapter", "sha-256=:x:", tuple(probe_logprobs))


def version(number: int) -> PolicyId:
    return RUN.model_copy(update={"version": number})


class FakeReplica:
    """Answers /score with what `serves` says of a policy, and takes every adapter."""

    def __init__(self, serves: Serves) -> None:
        self.serves = serves
        self.pushed: list[httpx.URL] = []
        self.scored: list[PolicyId] = []
        self.delay_s = 0.0
        self.answers_as: PolicyId | None = None

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(self.delay_s)
        if request.url.path == "/sync_weights":
            self.pushed.append(request.url)
            receipt = SyncReceipt(
                policy=RUN, digest="0" * 64, outcome="loaded", newest=RUN, num_bytes=7, boot_id="x"
            )
            return httpx.Response(200, content=receipt.model_dump_json())
        asked = ScoreRequest.model_validate(json.loads(request.content))
        assert asked.policy
        self.scored.append(asked.policy)
        flat = iter(self.serves(asked.policy))
        rows = tuple(tuple(next(flat) for _ in ids[1:]) for ids in asked.sequences)
        answer = ScoreResponse(logprobs=rows, policy=self.answers_as or asked.policy, boot_id="x")
        return httpx.Response(200, content=answer.model_dump_json())

    def client(self) -> RolloutClient:
        return RolloutClient("http://replica", transport=httpx.MockTransport(self))


@pytest.fixture
def world() -> World:
    return World(seed=0, noise=0.01)


@pytest.fixture
def probe(world: World) -> Probe:
    synthetic = published(PolicyId(run_id="probe-1", version=1), world.policy(0.7))
    return Probe(tuple((3,) * length for length in LENGTHS), tuple(world.base), synthetic)


def honest(probe: Probe, world: World, *adapters: PublishedAdapter) -> FakeReplica:
    known = {a.policy: a.probe_logprobs for a in (probe.synthetic, *adapters)}
    return FakeReplica(lambda p: world.read(world.base if p.is_base else known[p]))


async def admit(probe: Probe, replica: FakeReplica, timeout_s: float = 5) -> float:
    async with replica.client() as client:
        conformance = Conformance(probe, ConformanceConfig())
        return await conformance.admit(client, run=RUN, timeout_s=timeout_s)


@pytest.mark.anyio
async def test_admission_scores_base_and_synthetic_adapter_and_measures_the_noise(
    probe: Probe, world: World
) -> None:
    replica = honest(probe, world)
    assert 0.004 < await admit(probe, replica) < 0.02
    assert replica.scored == [RUN, probe.synthetic.policy]
    assert [url.params["probe"] for url in replica.pushed] == ["true"]


@pytest.mark.anyio
async def test_kernels_that_agree_on_the_base_alone_have_a_floor(
    probe: Probe, world: World
) -> None:
    noisy = world.read(probe.synthetic.probe_logprobs)
    replica = FakeReplica(lambda p: world.base if p.is_base else noisy)
    gap = distance(noisy, probe.synthetic.probe_logprobs)
    assert await admit(probe, replica) == pytest.approx(gap / 2)


@pytest.mark.anyio
async def test_another_model_is_not_admitted(probe: Probe) -> None:
    """axolotl: "If the models do not match, weight synchronization will silently [...]"."""
    other = World(seed=1, noise=0.01)
    with pytest.raises(ConformanceFailed, match=r"http://replica serves another model .* 0\.\d+"):
        await admit(probe, FakeReplica(lambda _: other.base))


@pytest.mark.anyio
async def test_a_replica_on_which_adapters_do_nothing_is_not_admitted(
    probe: Probe, world: World
) -> None:
    with pytest.raises(ConformanceFailed, match=r"does not apply adapters .* it serves the base"):
        await admit(probe, FakeReplica(lambda _: world.read(world.base)))


@pytest.mark.anyio
async def test_an_answer_for_another_policy_is_refused(probe: Probe, world: World) -> None:
    replica = honest(probe, world)
    replica.answers_as = version(3)
    with pytest.raises(ConformanceFailed, match=r"under policy run.1@0 and answered .* run.1@3"):
        await admit(probe, replica)


@pytest.mark.anyio
async def test_an_admission_ends_at_its_deadline(probe: Probe, world: World) -> None:
    replica = honest(probe, world)
    replica.delay_s = 0.05
    with pytest.raises(DeadlineExceeded):
        await admit(probe, replica, timeout_s=0.08)


@pytest.mark.anyio
async def test_a_check_recognizes_the_last_eight_versions(probe: Probe, world: World) -> None:
    adapters = [published(version(i), world.policy(0.3)) for i in range(1, 11)]
    conformance = Conformance(probe, ConformanceConfig())
    for adapter in adapters:
        conformance.remember(adapter)
    replica = honest(probe, world, *adapters)
    truth = replica.serves

    async def check(serves: int) -> float:
        replica.serves = lambda p: truth(p if p.is_base else version(serves))
        async with replica.client() as client:
            return await conformance.check(client, adapters[-1], floor=0.01, timeout_s=5)

    assert 0.005 < await check(serves=10) < 0.02
    with pytest.raises(ConformanceFailed, match=r"serve policy run.1@10 .* it serves run.1@4 "):
        await check(serves=4)
    with pytest.raises(ConformanceFailed, match=r"serve policy run.1@10 .* its effect there"):
        await check(serves=1)
