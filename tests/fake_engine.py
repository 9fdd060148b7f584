"""An engine that samples nothing, for tests of HTTP, leases and life cycle only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence

from services.rollout.engine import Adapter, FinishReason, SampledDelta
from shared.errors import EngineDead, InvalidAdapter
from shared.schemas import SamplingParams

TOKEN, LOGPROB = 3, -0.5


class FakeEngine:
    """Answers at once, or after `hold` only once released. Records what it is asked to do."""

    max_model_len = 64

    def __init__(self) -> None:
        self.loaded: list[Adapter] = []
        self.running: set[str] = set()
        self.cancelled: list[str] = []
        self.interrupted: list[str] = []
        self.refuse_adapters = False
        self.fails: Exception | None = None
        self.died: str | None = None
        self.has_shut_down = False
        self._free_tokens = 0
        self._go = asyncio.Event()
        self._go.set()
        self._load = asyncio.Event()
        self._load.set()
        self._stops: dict[str, asyncio.Event] = {}

    # --- what a test does -----------------------------------------------------------------------

    def hold(self, *, after: int = 0) -> None:
        """Make work wait for `release`; streams still emit their first `after` tokens."""
        self._free_tokens = after
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    def hold_loads(self) -> None:
        self._load.clear()

    def release_loads(self) -> None:
        self._load.set()

    def die(self, reason: str) -> None:
        """Act like a process that has died: every waiting call raises EngineDead."""
        self.died = reason
        self.release()

    # --- the protocol ---------------------------------------------------------------------------

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapter: Adapter | None,
        *,
        stream: bool,
    ) -> AsyncGenerator[SampledDelta]:
        """With `stream`, yield one token of every sequence at a time."""
        num_tokens, num_left = sampling.max_tokens or 1, sampling.max_tokens or 1
        num_free = self._free_tokens if stream else 0
        while num_left:
            interrupted = False
            if num_tokens - num_left >= num_free:
                interrupted = await self._work(request_id)
            num_new = 0 if interrupted else 1 if stream else num_left
            num_left -= num_new
            reason: FinishReason | None = "length" if not num_left else None
            for k in range(sampling.n):
                yield SampledDelta(
                    index=k,
                    token_ids=[TOKEN] * num_new,
                    logprobs=[LOGPROB] * num_new,
                    finish_reason="interrupted" if interrupted else reason,
                    text=None,
                )
            if interrupted:
                return

    async def score(
        self, request_id: str, token_ids: Sequence[int], adapter: Adapter | None
    ) -> list[float]:
        await self._work(request_id)
        return [LOGPROB] * (len(token_ids) - 1)

    async def interrupt(self, request_ids: Iterable[str]) -> None:
        for request_id in self.running.intersection(request_ids):
            self.interrupted.append(request_id)
            self._stops[request_id].set()

    async def load_adapter(self, adapter: Adapter) -> None:
        await self._load.wait()
        if self.refuse_adapters:
            raise InvalidAdapter("the fake refuses every adapter")
        assert adapter.slot_id not in [other.slot_id for other in self.loaded]
        self.loaded.append(adapter)

    async def unload_adapter(self, adapter: Adapter) -> None:
        self.loaded.remove(adapter)

    def death(self) -> str | None:
        return self.died

    def num_unfinished(self) -> int:
        return len(self.running)

    def num_tokens_processed(self) -> int:
        return 0

    def shutdown(self) -> None:
        self.has_shut_down = True

    async def _work(self, request_id: str) -> bool:
        """Wait for `release`; returns whether the work was interrupted."""
        if self.fails:
            raise self.fails
        stop = self._stops[request_id] = asyncio.Event()
        self.running.add(request_id)
        waits = [asyncio.ensure_future(event.wait()) for event in (self._go, stop)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.cancelled.append(request_id)
            raise
        finally:
            self.running.remove(request_id)
            for wait in waits:
                wait.cancel()
        if self.died:
            raise EngineDead(self.died)
        return stop.is_set()
