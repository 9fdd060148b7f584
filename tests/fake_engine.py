"""An engine that samples nothing: for tests of HTTP, leases and life cycle alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Literal

from services.rollout.engine import Adapter, SampledSequence
from shared.errors import EngineDead, InvalidAdapter
from shared.schemas import SamplingParams

TOKEN, LOGPROB = 3, -0.5


class FakeEngine:
    """Answers at once, or while `held` only after `release`. Keeps what was asked of it."""

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
        self._go = asyncio.Event()
        self._go.set()
        self._load = asyncio.Event()
        self._load.set()
        self._stops: dict[str, asyncio.Event] = {}

    # --- what a test does -----------------------------------------------------------------------

    def hold(self) -> None:
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    def hold_loads(self) -> None:
        self._load.clear()

    def release_loads(self) -> None:
        self._load.set()

    def die(self, reason: str) -> None:
        """Like a process that is gone: whoever waits gets EngineDead."""
        self.died = reason
        self.release()

    # --- the protocol ---------------------------------------------------------------------------

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapter: Adapter | None,
    ) -> list[SampledSequence]:
        interrupted = await self._work(request_id)
        num_tokens = 1 if interrupted else sampling.max_tokens or 1
        reason: Literal["interrupted", "length"] = "interrupted" if interrupted else "length"
        tokens, logprobs = [TOKEN] * num_tokens, [LOGPROB] * num_tokens
        return [SampledSequence(tokens, logprobs, reason, None) for _ in range(sampling.n)]

    async def score(
        self, request_id: str, token_ids: Sequence[int], adapter: Adapter | None
    ) -> list[float]:
        await self._work(request_id)
        return [LOGPROB] * (len(token_ids) - 1)

    async def interrupt(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
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

    def num_tokens_processed(self) -> int:
        return 0

    def shutdown(self) -> None:
        self.has_shut_down = True

    async def _work(self, request_id: str) -> bool:
        """Wait to be released; whether the work was interrupted."""
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
