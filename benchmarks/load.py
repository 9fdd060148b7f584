"""Requests that keep a replica busy, some of which are watched: when did each of their tokens come?

    Load.start() ─▶ streams that run beside each other ─▶ Load.stop() ─▶ arrivals of the watched

The watched ones are streamed and the rest is answered at its end, so that the service does little
for them; all are in the same batches of the engine, whose pauses every one of them feels. Set
ROLLOUT_STREAM_INTERVAL=1 for a record per token. Times are those of time.perf_counter, which on
Linux all processes share.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.checkpoints import FIRST_ORDINARY_TOKEN
from benchmarks.child import loop_in_a_thread
from shared.rollout_client import RolloutClient
from shared.schemas import GenerateRequest, SamplingParams, StreamTokens

_NUM_WATCHED = 4
_SETTLED_TOKENS = 8  # of every watched completion: then all prompts are computed
_SETTLE_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Of the tokens of watched completions: (time, tokens that came then), in order."""

    completions: Sequence[Sequence[tuple[float, int]]]

    def longest_gap_s(self, start: float, end: float) -> float:
        """Longest time without a token of a completion, of those that reach into [start, end]."""
        gaps = [
            later - earlier
            for completion in self.completions
            for (earlier, _), (later, _) in itertools.pairwise(completion)
            if later > start and earlier < end
        ]
        return max(gaps, default=float("nan"))

    def tokens_per_s(self, start: float, end: float) -> float:
        """Of a completion while it runs; tokens are spread over the time since the last."""
        num_tokens = running_s = 0.0
        for completion in self.completions:
            for (earlier, _), (later, num_new) in itertools.pairwise(completion):
                overlap = min(end, later) - max(start, earlier)
                if overlap > 0:
                    num_tokens += num_new * overlap / (later - earlier)
                    running_s += overlap
        return num_tokens / running_s if running_s else float("nan")


class Load:
    """`concurrency` completions at any time, started anew as they end, until they are stopped."""

    def __init__(
        self, url: str, *, concurrency: int, prompt: int, completion: int, vocabulary: int
    ) -> None:
        self._url = url
        self._concurrency = concurrency
        self._prompt = prompt
        self._vocabulary = vocabulary
        self._completion = completion
        self._rng = random.Random(0)
        self._completions: list[list[tuple[float, int]]] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Return once every completion makes tokens."""
        self._completions = []
        num_watched = min(_NUM_WATCHED, self._concurrency)
        client = RolloutClient(self._url)
        self._tasks = [
            asyncio.create_task(self._watch(client) if i < num_watched else self._repeat(client))
            for i in reversed(range(self._concurrency))  # the watched come last
        ]
        async with asyncio.timeout(_SETTLE_TIMEOUT_S):
            while not self._is_settled(num_watched):
                for task in self._tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.01)
        self._client = client

    def _is_settled(self, num_watched: int) -> bool:
        settled = [c for c in self._completions if sum(n for _, n in c) >= _SETTLED_TOKENS]
        return len(settled) >= num_watched

    async def stop(self) -> Arrivals:
        """End it; the engine drops what runs when the connections close."""
        for task in self._tasks:
            task.cancel()
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()
        for outcome in outcomes:
            if not isinstance(outcome, asyncio.CancelledError):
                raise RuntimeError("a request of the load failed") from outcome
        return Arrivals(self._completions)

    def _request(self) -> GenerateRequest:
        """Of half to all of the tokens: that completions end one by one, not all at once."""
        ids = range(FIRST_ORDINARY_TOKEN, self._vocabulary)
        prompt = tuple(self._rng.choices(ids, k=self._prompt))
        num_tokens = self._rng.randint(self._completion // 2, self._completion)
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        return GenerateRequest(prompts=(prompt,), sampling=sampling)

    async def _repeat(self, client: RolloutClient) -> None:
        while True:
            await client.generate(self._request())

    async def _watch(self, client: RolloutClient) -> None:
        while True:
            arrivals: list[tuple[float, int]] = []
            self._completions.append(arrivals)
            async with contextlib.aclosing(client.stream(self._request())) as records:
                async for record in records:
                    if isinstance(record, StreamTokens) and record.token_ids:
                        arrivals.append((time.perf_counter(), len(record.token_ids)))


@contextlib.contextmanager
def build_load(
    url: str, *, concurrency: int, prompt: int, completion: int, vocabulary: int
) -> Iterator[tuple[Load, asyncio.AbstractEventLoop]]:
    """A Load as the subject of a child process."""
    with loop_in_a_thread() as loop:
        yield (
            Load(
                url,
                concurrency=concurrency,
                prompt=prompt,
                completion=completion,
                vocabulary=vocabulary,
            ),
            loop,
        )
