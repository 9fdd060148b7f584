"""From requests to engine calls and back: GenerateRequest -> leases -> CompletionGroups."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from services.rollout.engine import Engine, SampledSequence
from services.rollout.policies import Lease, PolicyStore
from services.tokens import PromptEncoder
from shared.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    UnsuitableForTraining,
)
from shared.metrics import RolloutMetrics
from shared.schemas import (
    MAX_SEED,
    Completion,
    CompletionGroup,
    GenerateRequest,
    GenerateResponse,
    PolicyId,
    RolloutLimits,
    SamplingParams,
    ScoreRequest,
    ScoreResponse,
    Segment,
)

Result = TypeVar("Result")


class Sampler:
    """Runs requests under leased versions, never more than `limits.max_completions` at once."""

    def __init__(
        self,
        *,
        engine: Engine,
        policies: PolicyStore,
        encoder: PromptEncoder,
        limits: RolloutLimits,
        timeout_s: float,
        boot_id: str,
        metrics: RolloutMetrics,
    ) -> None:
        self._engine = engine
        self._policies = policies
        self._encoder = encoder
        self._limits = limits
        self._timeout_s = timeout_s
        self._boot_id = boot_id
        self._metrics = metrics
        self._request_ids = itertools.count()
        self.num_outstanding = 0
        self.idle = asyncio.Event()  # set while nothing is outstanding
        self.idle.set()

    # --- generate -------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        """One group per prompt, in order, all under one version."""
        if request.purpose == "train":
            _refuse_biased_sampling(request.sampling)
        num_completions = len(request.prompts) * request.sampling.n
        prompts = [self._encoder.encode(prompt) for prompt in request.prompts]
        samplings = [self._resolve(request, i, prompt) for i, prompt in enumerate(prompts)]
        with self._admitted(num_completions), ExitStack() as leases:
            work = [
                (self._lease(leases, request.policy, interruptible=True), prompt, sampling)
                for prompt, sampling in zip(prompts, samplings, strict=True)
            ]
            groups = await self._within_deadline(
                self._group(request_id, lease, prompt, request.completion_prefix, sampling)
                for (request_id, lease), prompt, sampling in work
            )
        return GenerateResponse(groups=groups, boot_id=self._boot_id)

    def _lease(
        self, leases: ExitStack, policy: PolicyId | None, *, interruptible: bool
    ) -> tuple[str, Lease]:
        """A new request id and its lease; nothing is awaited between choosing and leasing."""
        request_id = self._next_id()
        lease = self._policies.lease(policy, request_id, interruptible=interruptible)
        return request_id, leases.enter_context(lease)

    async def _group(
        self,
        request_id: str,
        lease: Lease,
        prompt: tuple[int, ...],
        prefix: tuple[int, ...],
        sampling: SamplingParams,
    ) -> CompletionGroup:
        sequences = await self._engine.generate(
            request_id, prompt + prefix, sampling, lease.adapter
        )
        completions = tuple(_completion(sequence, lease.policy) for sequence in sequences)
        for completion in completions:
            self._metrics.completions.labels(completion.finish_reason).inc()
        return CompletionGroup(prompt_token_ids=prompt, completions=completions, sampling=sampling)

    def _resolve(
        self, request: GenerateRequest, index: int, prompt: tuple[int, ...]
    ) -> SamplingParams:
        """The sampling that prompt `index` gets: its own seeds, and max_tokens as a number."""
        sampling, prefix = request.sampling, request.completion_prefix
        if sampling.temperature == 0 and sampling.n > 1:
            raise InvalidRequest(
                f"sampling.n is {sampling.n} at temperature 0: greedy completions are all equal"
            )
        if prefix:
            self._encoder.check_vocabulary(prefix)
        num_context = len(prompt) + len(prefix)
        room = self._limits.max_model_len - num_context
        if room < (wanted := sampling.max_tokens or 1):
            raise InvalidRequest(
                f"prompt {index} has {num_context} tokens and max_tokens is {wanted}, together "
                f"over the context of {self._limits.max_model_len} tokens"
            )
        max_tokens = sampling.max_tokens or room
        if sampling.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens is {sampling.min_tokens}, over max_tokens {max_tokens}"
            )
        seed = sampling.seed
        if seed is not None:
            seed = (seed + index * sampling.n) % MAX_SEED
        return sampling.model_copy(update={"max_tokens": max_tokens, "seed": seed})

    # --- score ----------------------------------------------------------------------------------

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """The logprobs of the sequences' tokens, all under one version."""
        for index, ids in enumerate(request.sequences):
            self._encoder.check_vocabulary(ids)
            if len(ids) >= self._limits.max_model_len:
                raise InvalidRequest(
                    f"sequence {index} has {len(ids)} tokens, /score takes at most "
                    f"{self._limits.max_model_len - 1}"
                )
        with self._admitted(len(request.sequences)), ExitStack() as leases:
            held = [
                self._lease(leases, request.policy, interruptible=False) for _ in request.sequences
            ]
            logprobs = await self._within_deadline(
                self._score(request_id, lease, ids)
                for (request_id, lease), ids in zip(held, request.sequences, strict=True)
            )
        policy = held[0][1].policy
        return ScoreResponse(logprobs=logprobs, policy=policy, boot_id=self._boot_id)

    async def _score(
        self, request_id: str, lease: Lease, ids: tuple[int, ...]
    ) -> tuple[float, ...]:
        return _finite(await self._engine.score(request_id, ids, lease.adapter), lease.policy)

    # --- bounds ---------------------------------------------------------------------------------

    @contextmanager
    def _admitted(self, num_completions: int) -> Iterator[None]:
        """Count completions in and out; 429 when the queue is full, 422 when it never could fit."""
        limit = self._limits.max_completions
        if num_completions > limit:
            raise InvalidRequest(
                f"the request asks for {num_completions} completions (prompts × n), the limit is "
                f"{limit}: send it in parts"
            )
        if self.num_outstanding + num_completions > limit:
            raise Overloaded(
                f"{self.num_outstanding} completions are queued or running and {num_completions} "
                f"more are over the limit of {limit}: try again, or another replica",
                retry_after_s=1.0,
            )
        self._count(num_completions)
        try:
            yield
        finally:
            self._count(-num_completions)

    def _count(self, change: int) -> None:
        self.num_outstanding += change
        self._metrics.outstanding_completions.set(self.num_outstanding)
        if self.num_outstanding:
            self.idle.clear()
        else:
            self.idle.set()

    async def _within_deadline(
        self, work: Iterable[Coroutine[Any, Any, Result]]
    ) -> tuple[Result, ...]:
        """All results in order; the first error or the deadline cancels the rest."""
        tasks = [asyncio.ensure_future(item) for item in work]
        try:
            async with asyncio.timeout(self._timeout_s):
                return tuple(await asyncio.gather(*tasks))
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the request took longer than {self._timeout_s:g} s and was stopped: ask for "
                "fewer tokens, or raise ROLLOUT_REQUEST_TIMEOUT_S"
            ) from error
        finally:
            for task in tasks:
                task.cancel()
            # The leases end after this: no cancelled request may still be in the engine then.
            await asyncio.gather(*tasks, return_exceptions=True)

    def _next_id(self) -> str:
        return f"{self._boot_id}-{next(self._request_ids)}"


def _refuse_biased_sampling(sampling: SamplingParams) -> None:
    if obstacles := sampling.gradient_obstacles():
        raise UnsuitableForTraining(
            f"{', '.join(obstacles)} in a training request: a policy gradient needs logprobs of "
            "the full softmax, so only the temperature may change; with purpose 'eval' it is served"
        )


def _completion(sequence: SampledSequence, policy: PolicyId) -> Completion:
    num_tokens = len(sequence.token_ids)
    return Completion(
        token_ids=tuple(sequence.token_ids),
        logprobs=_finite(sequence.logprobs, policy),
        segments=(Segment(policy=policy, num_tokens=num_tokens),) if num_tokens else (),
        finish_reason=sequence.finish_reason,
        text=sequence.text,
    )


def _finite(logprobs: Sequence[float], policy: PolicyId) -> tuple[float, ...]:
    if not all(map(math.isfinite, logprobs)):
        raise InternalError(
            f"the engine returned logprobs that are not finite under policy {policy}: its weights "
            "overflow; lower the learning rate, or resume from an earlier version"
        )
    return tuple(logprobs)
