"""Publishes the adapters of a new run to a replica, as a trainer does, but without training."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from shared.rollout_client import RolloutClient
from shared.schemas import (
    BaseIdentity,
    GenerateRequest,
    GenerateResponse,
    PolicyId,
    SamplingParams,
    ScoreRequest,
    StreamStart,
    StreamTokens,
)
from tests.adapters import LinearShapes, adapter_file, make_manifest, make_tensors

PROBE = (1, *(3 + i * i % 13 for i in range(40)))


class Publisher:
    def __init__(self, client: RolloutClient, base: BaseIdentity, shapes: LinearShapes) -> None:
        self.client = client
        self.base = base
        self.shapes = shapes
        self.run_id = f"run-{secrets.token_hex(4)}"

    def policy(self, version: int, incarnation: int = 1) -> PolicyId:
        return PolicyId(run_id=self.run_id, incarnation=incarnation, version=version)

    def adapter(
        self, policy: PolicyId, *, seed: int | None = None, strength: float = 0.05, **fields: Any
    ) -> bytes:
        """A valid adapter; `seed` defaults to the version, and `fields` go into the manifest."""
        manifest = make_manifest(self.base, policy, **fields)
        seed = policy.version if seed is None else seed
        tensors = make_tensors(manifest, self.shapes, seed=seed, strength=strength)
        return adapter_file(manifest, tensors)

    async def publish(self, version: int, **options: Any) -> PolicyId:
        """Publish a version of this run, which replaces any other run on the replica."""
        policy = self.policy(version)
        await self.client.sync_weights(self.adapter(policy), replace_run=True, **options)
        return policy

    async def generate(
        self,
        *prompts: Sequence[int],
        policy: PolicyId | None = None,
        completion_prefix: Sequence[int] = (),
        **sampling: Any,
    ) -> GenerateResponse:
        return await self.client.generate(_request(prompts, policy, completion_prefix, sampling))

    def stream(
        self,
        *prompts: Sequence[int],
        policy: PolicyId | None = None,
        completion_prefix: Sequence[int] = (),
        **sampling: Any,
    ) -> AsyncGenerator[StreamStart | StreamTokens]:
        return self.client.stream(_request(prompts, policy, completion_prefix, sampling))

    async def score(
        self, ids: Sequence[int] = PROBE, policy: PolicyId | None = None
    ) -> tuple[float, ...]:
        answer = await self.client.score(ScoreRequest(sequences=(tuple(ids),), policy=policy))
        return answer.logprobs[0]


def _request(
    prompts: Sequence[Sequence[int]],
    policy: PolicyId | None,
    completion_prefix: Sequence[int],
    sampling: dict[str, Any],
) -> GenerateRequest:
    return GenerateRequest(
        prompts=tuple(tuple(prompt) for prompt in prompts),
        policy=policy,
        completion_prefix=tuple(completion_prefix),
        sampling=SamplingParams(**sampling),
    )
