"""Keeps a replica busy with requests, and records when each token of some watched ones arrives.

    Load.start() ─▶ concurrent requests ─▶ Load.stop() ─▶ arrivals of the watched ones

Watched completions are streamed; the others return at their end, which costs the service little.
All share the engine's batches, so that a pause of the engine affects every completion. Set
ROLLOUT_STREAM_INTERVAL=1 for one record per token. Times are from time.perf_counter, whose clock
all processes share on Linux.
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
_SETTLED_TOKENS = 8  # tokens per watched completion after which all prompts are computed
_SETTLE_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Arrivals:
    """For each watched completion, (arrival time, number of tokens) in order."""

    completions: Sequence[Sequence[tuple[float, int]]]

    def longest_gap_s(self, start: float, end: float) -> float:
        """The longest pause between tokens of one completion that overlaps [start, end], in s."""
        gaps = [
            later - earlier
            for completion in self.completions
            for (earlier, _), (later, _) in itertools.pairwise(completion)
            if later > start and earlier < end
        ]
        return max(gaps, default=float("nan"))

    def tokens_per_s(self, start: float, end: float) -> float:
        """Mean rate per running completion in [start, end].

        Tokens that arrive together count as spread evenly over the time since the last arrival.
        """
        num_tokens = running_s = 0.0
        for completion in self.completions:
            for (earlier, _), (later, num_new) in itertools.pairwise(completion):
                overlap = min(end, later) - max(start, earlier)
                if overlap > 0:
                    num_tokens += num_new * overlap / (later - earlier)
                    running_s += overlap
        return num_tokens / running_s if running_s else float("nan")


class Load:
    """Keeps `concurrency` completions running, and replaces each that ends, until stopped."""

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
        """Start the requests and return once all prompts are computed."""
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
        """Stop all requests; the engine aborts them when their connections close."""
        for task in self._tasks:
            task.cancel()
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()
        for outcome in outcomes:
            if not isinstance(outcome, asyncio.CancelledError):
                raise RuntimeError("a request of the load failed") from outcome
        return Arrivals(self._completions)

    def _request(self) -> GenerateRequest:
        """A request for half to all of the tokens, so that completions do not end all at once."""
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
    """Build a Load as the subject of a child process."""
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
