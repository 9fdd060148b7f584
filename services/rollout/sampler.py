"""From requests to engine calls and back: GenerateRequest -> leases -> CompletionGroups, at the end
or as StreamRecords on the way."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from services.rollout.engine import Engine, SampledDelta
from services.rollout.policies import Lease, PolicyStore
from services.rollout.streams import merged
from services.tokens import PromptEncoder
from shared.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotReady,
    Overloaded,
    ServiceError,
    UnsuitableForTraining,
)
from shared.metrics import RolloutMetrics
from shared.schemas import (
    MAX_SEED,
    ChatMessage,
    Completion,
    CompletionGroup,
    GenerateRequest,
    GenerateResponse,
    PolicyId,
    PromptInput,
    RolloutLimits,
    SamplingParams,
    ScoreRequest,
    ScoreResponse,
    Segment,
    StreamAlive,
    StreamEnd,
    StreamError,
    StreamStart,
    StreamTokens,
    Wire,
)

log = logging.getLogger(__name__)
Result = TypeVar("Result")
_ALIVE_S = 0.5  # Interval of the signs of life in an idle stream.
_INTERRUPT_PAUSE_S = 0.02
_INLINE_CHARACTERS = 1 << 14  # Tokenized on the event loop: it takes a few milliseconds.
_MESSAGE_CHARACTERS = 64  # What rendering a message costs, in characters of text.
_ENCODING_THREADS = 2


@dataclass(frozen=True, slots=True)
class _Work:
    """One prompt of a request, and what it runs with."""

    group: int
    request_id: str
    lease: Lease
    prompt: tuple[int, ...]
    prefix: tuple[int, ...]
    sampling: SamplingParams  # As applied.


class Sampler:
    """Runs requests under leased versions, never more than `limits.max_completions` at once.

    One of a fleet (`in_fleet`) answers a request that pins no policy only under a policy of a run.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        policies: PolicyStore,
        encoder: PromptEncoder,
        limits: RolloutLimits,
        timeout_s: float,
        in_fleet: bool,
        boot_id: str,
        metrics: RolloutMetrics,
    ) -> None:
        self._engine = engine
        self._policies = policies
        self._encoder = encoder
        self._limits = limits
        self._timeout_s = timeout_s
        self._in_fleet = in_fleet
        self._boot_id = boot_id
        self._metrics = metrics
        # Threads of their own: uploads of adapters never wait for texts.
        self._encoding = ThreadPoolExecutor(_ENCODING_THREADS, "encode")
        self._request_ids = itertools.count()
        self._running: set[str] = set()  # Ids of interruptible requests.
        self.num_outstanding = 0
        self.idle = asyncio.Event()  # Set while nothing is outstanding.
        self.idle.set()

    # --- generate -------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        """One group per prompt, in order, all under one version."""
        async with self._admitted_work(request) as work:
            groups = await self._within_deadline(self._group(item) for item in work)
        return GenerateResponse(groups=groups, boot_id=self._boot_id)

    async def stream(
        self, request: GenerateRequest, *, counts_errors: bool = True
    ) -> AsyncGenerator[Sequence[Wire]]:
        """What `generate` answers, as it comes: batches of StreamRecords.

        What is refused is raised before the first batch; later errors are records, and counted
        here unless the caller's answer is another one. Closing the generator stops the work; the
        leases end with it, or before the last record.
        """
        last: StreamEnd | StreamError = StreamEnd(boot_id=self._boot_id)
        with self._metrics.open_streams.track_inprogress():
            async with self._admitted_work(request) as work:
                try:
                    yield [self._start(item) for item in work]
                    records = merged(
                        [self._records(item) for item in work],
                        pause_s=_ALIVE_S,
                        timeout_s=self._timeout_s,
                    )
                    async with aclosing(records):
                        async for batch in records:
                            yield batch or [StreamAlive()]
                except (asyncio.CancelledError, GeneratorExit):
                    if counts_errors:
                        self._metrics.errors.labels("ClientClosed").inc()
                    raise
                except Exception as error:  # The status was sent, so the stream says it.
                    problem = self._as_service_error(error)
                    if counts_errors:
                        self._metrics.errors.labels(type(problem).__name__).inc()
                    last = StreamError(problem=problem.to_problem())
        yield [last]

    async def interrupt(self) -> None:
        """End what generates now: it is answered as `interrupted`, with the tokens it has."""
        while self._running:  # Repeat: a request may still be on its way into the engine.
            await self._engine.interrupt(tuple(self._running))
            await asyncio.sleep(_INTERRUPT_PAUSE_S)

    async def try_engine(self) -> None:
        """Generate one token under the newest version, whoever else waits for the engine."""
        request_id = self._next_id()
        sampling = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
        with self._policies.lease(None, request_id, interruptible=True) as lease:
            deltas = self._engine.generate(request_id, (0,), sampling, lease.adapter, stream=False)
            async with aclosing(deltas):
                async for _ in deltas:
                    pass

    @asynccontextmanager
    async def _admitted_work(self, request: GenerateRequest) -> AsyncGenerator[list[_Work]]:
        """Check the request, count it in, and lease what it runs under; all of it ends together.

        Nothing is awaited between choosing a version and leasing it.
        """
        if request.purpose == "train":
            _refuse_biased_sampling(request.sampling)
        num_completions = len(request.prompts) * request.sampling.n
        with self._admitted(num_completions), ExitStack() as leases:
            prompts = await self._encode(request.prompts)
            samplings = [self._resolve(request, i, prompt) for i, prompt in enumerate(prompts)]
            work = []
            for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
                request_id, lease = self._lease(leases, request.policy, interruptible=True)
                prefix = request.completion_prefix
                work.append(_Work(i, request_id, lease, prompt, prefix, sampling))
            yield work

    async def _encode(self, prompts: Sequence[PromptInput]) -> list[tuple[int, ...]]:
        """The prompts' token ids. Long texts are tokenized in a thread, without the GIL."""

        def encode() -> list[tuple[int, ...]]:
            limit = self._limits.max_model_len
            return [self._encoder.encode(prompt, max_tokens=limit) for prompt in prompts]

        if sum(map(_text_size, prompts)) <= _INLINE_CHARACTERS:
            return encode()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await loop.run_in_executor(self._encoding, encode)
        except TimeoutError as error:
            raise self._as_service_error(error) from error

    def resolve(self, policy: PolicyId | None) -> PolicyId:
        """The version that a request runs under: without a pinned one the newest."""
        if policy is None and self._in_fleet and self._policies.newest.is_base:
            raise NotReady(
                "this replica belongs to a fleet and holds no policy of a run yet: send the "
                "request again, or pin version 0 for the base (model 'base' at /v1)",
                retry_after_s=1.0,
            )
        return policy or self._policies.newest

    def _lease(
        self, leases: ExitStack, policy: PolicyId | None, *, interruptible: bool
    ) -> tuple[str, Lease]:
        """A new request id and its lease."""
        policy = self.resolve(policy)
        request_id = self._next_id()
        lease = self._policies.lease(policy, request_id, interruptible=interruptible)
        return request_id, leases.enter_context(lease)

    def _start(self, work: _Work) -> StreamStart:
        return StreamStart(
            group=work.group,
            prompt_token_ids=work.prompt,
            sampling=work.sampling,
            policy=work.lease.policy,
            boot_id=self._boot_id,
        )

    async def _group(self, work: _Work) -> CompletionGroup:
        parts: list[list[SampledDelta]] = [[] for _ in range(work.sampling.n)]
        async with aclosing(self._deltas(work, stream=False)) as deltas:
            async for delta in deltas:
                parts[delta.index].append(delta)
        return CompletionGroup(
            prompt_token_ids=work.prompt,
            completions=tuple(_completion(deltas, work.lease.policy) for deltas in parts),
            sampling=work.sampling,
        )

    async def _records(self, work: _Work) -> AsyncGenerator[StreamTokens]:
        async with aclosing(self._deltas(work, stream=True)) as deltas:
            async for delta in deltas:
                yield StreamTokens(
                    group=work.group,
                    completion=delta.index,
                    token_ids=tuple(delta.token_ids),
                    logprobs=_finite(delta.logprobs, work.lease.policy),
                    finish_reason=delta.finish_reason,
                    text=delta.text,
                )

    async def _deltas(self, work: _Work, *, stream: bool) -> AsyncGenerator[SampledDelta]:
        """The engine's deltas, each sequence to its end."""
        unfinished = set(range(work.sampling.n))
        engine_deltas = self._engine.generate(
            work.request_id,
            work.prompt + work.prefix,
            work.sampling,
            work.lease.adapter,
            stream=stream,
        )
        self._running.add(work.request_id)
        try:
            async with aclosing(engine_deltas) as deltas:
                async for delta in deltas:
                    if delta.finish_reason:
                        unfinished.remove(delta.index)
                        self._metrics.completions.labels(delta.finish_reason).inc()
                    yield delta
        finally:
            self._running.discard(work.request_id)
            self._policies.ended(work.request_id)
        if unfinished:
            raise InternalError(
                f"the engine ended request {work.request_id} with {len(unfinished)} of "
                f"{work.sampling.n} completions unfinished"
            )

    def _resolve(
        self, request: GenerateRequest, index: int, prompt: tuple[int, ...]
    ) -> SamplingParams:
        """The sampling that prompt `index` gets: its own seeds, and max_tokens as a number."""
        sampling, prefix = request.sampling, request.completion_prefix
        if sampling.temperature == 0 and sampling.n > 1:
            raise InvalidRequest(
                f"sampling.n is {sampling.n} at temperature 0: greedy completions are all equal"
            )
        for ids in (prefix, sampling.stop_token_ids):
            if ids:
                self._encoder.check_vocabulary(ids)
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

    def check_room(self, num_completions: int) -> None:
        """Raises Overloaded when the queue is full, InvalidRequest when they could never fit."""
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

    @contextmanager
    def _admitted(self, num_completions: int) -> Iterator[None]:
        """Count completions in and out. Raises as `check_room` does."""
        self.check_room(num_completions)
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
            raise self._as_service_error(error) from error
        finally:
            for task in tasks:
                task.cancel()
            # Leases end after this, when no cancelled request may still be in the engine.
            await asyncio.gather(*tasks, return_exceptions=True)

    def _as_service_error(self, error: Exception) -> ServiceError:
        if isinstance(error, ServiceError):
            return error
        if isinstance(error, TimeoutError):
            return DeadlineExceeded(
                f"the request took longer than {self._timeout_s:g} s and was stopped: ask for "
                "fewer tokens, or raise ROLLOUT_REQUEST_TIMEOUT_S"
            )
        log.error("a stream failed", exc_info=error)
        return InternalError(f"{type(error).__name__}: {error}")

    def _next_id(self) -> str:
        return f"{self._boot_id}-{next(self._request_ids)}"


def _text_size(prompt: PromptInput) -> int:
    """About how many characters have to be rendered and tokenized."""
    if isinstance(prompt, str):
        return len(prompt)
    if not isinstance(prompt[0], ChatMessage):
        return 0
    messages = [message for message in prompt if isinstance(message, ChatMessage)]
    num_calls = sum(len(message.tool_calls or ()) for message in messages)
    return (
        sum(len(message.content) for message in messages)
        + _MESSAGE_CHARACTERS * len(messages)
        + _INLINE_CHARACTERS * num_calls
    )


def _refuse_biased_sampling(sampling: SamplingParams) -> None:
    if obstacles := sampling.gradient_obstacles():
        raise UnsuitableForTraining(
            f"{', '.join(obstacles)} in a training request: a policy gradient needs logprobs of "
            "the full softmax, so only the temperature may change; with purpose 'eval' it is served"
        )


def _completion(deltas: Sequence[SampledDelta], policy: PolicyId) -> Completion:
    """The completion that the deltas of one sequence make, the last of which says its end."""
    token_ids = tuple(token for delta in deltas for token in delta.token_ids)
    texts = [delta.text for delta in deltas if delta.text is not None]
    reason = deltas[-1].finish_reason
    assert reason, "a sequence without an end"
    return Completion(
        token_ids=token_ids,
        logprobs=_finite([value for delta in deltas for value in delta.logprobs], policy),
        segments=(Segment(policy=policy, num_tokens=len(token_ids)),) if token_ids else (),
        finish_reason=reason,
        text="".join(texts) if texts else None,
    )


def _finite(logprobs: Sequence[float], policy: PolicyId) -> tuple[float, ...]:
    if not all(map(math.isfinite, logprobs)):
        raise InternalError(
            f"the engine returned logprobs that are not finite under policy {policy}: its weights "
            "overflow; lower the learning rate, or resume from an earlier version"
        )
    return tuple(logprobs)
