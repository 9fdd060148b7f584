"""Does a replica serve what it says it serves? Its /score of a probe against the trainer's.

    admit()   the base: its gap is the noise floor of the pair; then the synthetic adapter
    check()   after every sync: the version, and the base again

All logprobs are flat over the probe's tokens, at temperature 1. A distance is mean |Δlogprob| in
nats, a gap the distance between replica and trainer under one policy, an effect what a policy's
logprobs have over the base's.

The verdict is `fault`. An adapter whose effect drowns in the noise (B is 0 in a fresh one) is
proven by the digest of its upload, and by the synthetic one, which went the same way.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, stdev

from services.trainer.policy.adapter import PublishedAdapter
from services.trainer.run_config import ConformanceConfig
from shared.errors import ConformanceFailed, DeadlineExceeded
from shared.rollout_client import RolloutClient
from shared.schemas import PolicyId, ScoreRequest

Logprobs = Sequence[float]

# Honest replicas: 1,440 adapters on two CPU models, exact and original base, bfloat16 and FP8 KV
# cache, effects of 0 to 9 nats.
MIN_FLOOR = 1e-3  # Nats; no two kernels agree better on every adapter.
RESOLVABLE = 3.0  # In floors; noise does not reach this distance.
MAX_GAP = 3.0  # In floors; honest replicas reach 1.3 while the effect is small.
# Allowed on top per nat of effect, since sharper policies are noisier; honest replicas reach 0.06.
MAX_GAP_OF_EFFECT = 0.1
MIN_COSINE = 0.9  # Between effects far above the noise; honest replicas reach 0.97.
COSINE_NOISE = 3.0  # Allowed distance from 1, in (floor / effect)²; noise on both effects makes 1.
# Replica's effect over the trainer's; honest replicas are between 0.81 and 1.13.
SLOPES = (0.67, 1.5)
SYNTHETIC_NOISE = 0.5  # Share of the gap under the synthetic adapter, which is 1 to 2 floors.

_KEPT_VERSIONS = 8


# --- verdict ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scores:
    """One side's logprobs of the probe."""

    base: Logprobs
    policy: Logprobs

    @property
    def effect(self) -> list[float]:
        return [after - before for before, after in zip(self.base, self.policy, strict=True)]


def distance(some: Logprobs, others: Logprobs) -> float:
    return fmean(abs(a - b) for a, b in zip(some, others, strict=True))


def noise_floor(trainer: Logprobs, replica: Logprobs) -> float:
    """The gap under the base plus two standard errors, because the probe may be short."""
    gaps = [abs(a - b) for a, b in zip(trainer, replica, strict=True)]
    return max(MIN_FLOOR, fmean(gaps) + 2 * stdev(gaps) / math.sqrt(len(gaps)))


def fault(
    trainer: Scores, replica: Scores, *, floor: float, others: Mapping[str, Logprobs]
) -> str | None:
    """What contradicts the claim that the replica serves the policy, or None.

    `others`: the trainer's logprobs under policies that it may serve instead.
    """
    gap, base_gap = distance(trainer.policy, replica.policy), distance(trainer.base, replica.base)
    if base_gap > MAX_GAP * floor:
        return f"its base is {base_gap:.3g} nats off, where noise makes {floor:.3g}"
    gaps = {
        distance(logprobs, replica.policy): name
        for name, logprobs in others.items()
        if distance(logprobs, trainer.policy) > RESOLVABLE * floor
    }
    if gaps and (nearest := min(gaps)) < gap / 2:  # Nearer by far, not merely nearer.
        return f"it serves {gaps[nearest]} ({nearest:.3g} nats off) instead ({gap:.3g})"
    size = distance(trainer.policy, trainer.base)
    if size > RESOLVABLE * floor:
        reason = effect_fault(trainer.effect, replica.effect, floor=floor)
        if reason:
            return reason
    if gap > (limit := MAX_GAP * floor + MAX_GAP_OF_EFFECT * size):
        return f"it is {gap:.3g} nats off, over the limit of {limit:.3g}"
    return None


def effect_fault(trainer: Logprobs, replica: Logprobs, *, floor: float) -> str | None:
    """What contradicts the claim that both sides apply the same adapter, or None."""
    size = fmean(map(abs, trainer))
    min_cosine = min(MIN_COSINE, 1 - COSINE_NOISE * (floor / size) ** 2)
    product = sum(a * b for a, b in zip(trainer, replica, strict=True))
    norms = math.hypot(*trainer), math.hypot(*replica)
    slope = product / norms[0] ** 2
    cosine = product / (norms[0] * norms[1]) if norms[1] else 0.0
    if cosine < min_cosine or not SLOPES[0] <= slope <= SLOPES[1]:
        return (
            f"the adapter has {slope:.2f} times its effect there, with a correlation of "
            f"{cosine:.2f}"
        )
    return None


# --- probe --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Probe:
    """What every replica of a run is asked, and the trainer's own answers."""

    sequences: tuple[tuple[int, ...], ...]
    base_logprobs: tuple[float, ...]
    # Belongs to a run of its own; its `probe_logprobs` are under this adapter.
    synthetic: PublishedAdapter

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; a replica's context must hold one more."""
        return max(map(len, self.sequences))


# --- replicas -----------------------------------------------------------------------------------


class Conformance:
    """Compares the replicas of one run with the trainer's own logprobs."""

    def __init__(self, probe: Probe, config: ConformanceConfig) -> None:
        self._probe = probe
        self._config = config
        self._versions: dict[PolicyId, Logprobs] = {}  # Latest published versions.
        # Replica URL -> its base logprobs at its last admission.
        self._bases: dict[str, Logprobs] = {}

    def remember(self, adapter: PublishedAdapter) -> None:
        """Recognize this version if a replica serves it instead of a later one."""
        self._versions[adapter.policy] = adapter.probe_logprobs
        while len(self._versions) > _KEPT_VERSIONS:
            del self._versions[next(iter(self._versions))]

    async def admit(self, client: RolloutClient, *, run: PolicyId, timeout_s: float) -> float:
        """Prove that a replica serves the base and applies adapters; returns the pair's noise
        floor.

        Raises ConformanceFailed, and what the client raises.
        """
        synthetic = self._probe.synthetic
        async with _deadline(client, timeout_s):
            base = self._bases[client.url] = await self._score(client, run)
            base_gap = distance(self._probe.base_logprobs, base)
            if base_gap > self._config.max_base_gap:
                raise ConformanceFailed(
                    f"{client.url} serves another model than the trainer's, whatever its "
                    f"fingerprint says: its base is {base_gap:.3g} nats per token off, "
                    f"conformance.max_base_gap is {self._config.max_base_gap:g}; restart it with "
                    "the trainer's model"
                )
            floor = noise_floor(self._probe.base_logprobs, base)
            await client.sync_weights(
                synthetic.content, digest=synthetic.content_digest, probe=True, timeout_s=timeout_s
            )
            logprobs = await self._score(client, synthetic.policy)
        trainer = Scores(self._probe.base_logprobs, synthetic.probe_logprobs)
        replica = Scores(base, logprobs)
        reason = fault(
            trainer, replica, floor=floor, others={"the base": trainer.base}
        ) or effect_fault(trainer.effect, replica.effect, floor=floor)
        if reason:
            raise ConformanceFailed(
                f"{client.url} does not apply adapters as the trainer does: scored under a "
                f"synthetic one, {reason}; restart it, with the same version of Tandem"
            )
        # Kernels that agree on the base exactly may still round an adapter differently.
        return max(floor, SYNTHETIC_NOISE * distance(trainer.policy, replica.policy))

    async def check(
        self,
        client: RolloutClient,
        adapter: PublishedAdapter,
        *,
        floor: float,
        timeout_s: float,
        scores_base: bool = True,
    ) -> float:
        """Prove that a replica serves `adapter`; returns its gap. `floor` is what `admit` returned.

        Without `scores_base` the base is taken as it was at admission, because a replica that
        merges adapters into its weights would have to stop for it.

        Raises ConformanceFailed, and what the client raises.
        """
        run = adapter.policy.model_copy(update={"version": 0})
        async with _deadline(client, timeout_s):
            scoring = [self._score(client, adapter.policy)]
            if scores_base:
                scoring.append(self._score(client, run))
            logprobs, *bases = await asyncio.gather(*scoring)
        base = bases[0] if bases else self._bases[client.url]
        trainer = Scores(self._probe.base_logprobs, adapter.probe_logprobs)
        others = {str(p): known for p, known in self._versions.items() if p != adapter.policy}
        others["the base"] = self._probe.base_logprobs
        if reason := fault(trainer, Scores(base, logprobs), floor=floor, others=others):
            raise ConformanceFailed(
                f"{client.url} does not serve policy {adapter.policy} as the trainer has it: "
                f"{reason}; restart it"
            )
        return distance(adapter.probe_logprobs, logprobs)

    async def _score(self, client: RolloutClient, policy: PolicyId) -> tuple[float, ...]:
        sequences = self._probe.sequences
        answer = await client.score(ScoreRequest(sequences=sequences, policy=policy))
        lengths = [len(row) + 1 for row in answer.logprobs]
        if answer.policy != policy or lengths != [len(sequence) for sequence in sequences]:
            raise ConformanceFailed(
                f"{client.url} was asked to score {len(sequences)} sequences under policy {policy} "
                f"and answered {len(lengths)} others, under {answer.policy}: restart it, with the "
                "same version of Tandem"
            )
        return tuple(chain.from_iterable(answer.logprobs))


@asynccontextmanager
async def _deadline(client: RolloutClient, timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"{client.url} did not finish the conformance check within {timeout_s:g} s"
        ) from error
