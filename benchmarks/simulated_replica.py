"""A rollout service on real HTTP whose engine samples nothing and answers at a fixed rate.

`python -m benchmarks.simulated_replica` reads the ROLLOUT_* settings from the environment. The
engine runs `NUM_SLOTS` requests at once; a request takes `SECONDS_PER_REQUEST`, a load `LOAD_S`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Iterable, Sequence
from pathlib import Path

from services.rollout.app import create_app
from services.rollout.engine import Adapter, FinishReason, SampledDelta
from services.rollout.replica import BootedEngine, Replica
from services.rollout.settings import RolloutSettings
from services.server import Server, read_settings
from shared.logs import configure_logging
from shared.schemas import SamplingParams

NUM_SLOTS = 8
SECONDS_PER_REQUEST = 1.0
LOAD_S = 0.2
_TOKEN, _LOGPROB = 3, -0.5


class SimulatedEngine:
    """Emits deltas of `stream_interval` tokens, spread evenly over the time of a request."""

    max_model_len = 512

    def __init__(self, stream_interval: int) -> None:
        self._stream_interval = stream_interval
        self._slots = asyncio.Semaphore(NUM_SLOTS)
        self._num_tokens = 0

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapter: Adapter | None,
        *,
        stream: bool,
    ) -> AsyncGenerator[SampledDelta]:
        total = sampling.max_tokens or 1
        step = self._stream_interval if stream else total
        loop = asyncio.get_running_loop()
        async with self._slots:
            started = loop.time()
            for first in range(0, total, step):
                num_tokens = min(step, total - first)
                due = started + SECONDS_PER_REQUEST * (first + num_tokens) / total
                await asyncio.sleep(max(0.0, due - loop.time()))
                self._num_tokens += num_tokens
                reason: FinishReason | None = "length" if first + num_tokens == total else None
                for index in range(sampling.n):
                    yield SampledDelta(
                        index, [_TOKEN] * num_tokens, [_LOGPROB] * num_tokens, reason, None
                    )

    async def score(
        self, request_id: str, token_ids: Sequence[int], adapter: Adapter | None
    ) -> list[float]:
        return [_LOGPROB] * (len(token_ids) - 1)

    async def interrupt(self, request_ids: Iterable[str]) -> None:
        raise AssertionError("the benchmark never interrupts a request")

    async def load_adapter(self, adapter: Adapter) -> None:
        await asyncio.sleep(LOAD_S)

    async def unload_adapter(self, adapter: Adapter) -> None: ...

    def death(self) -> str | None:
        return None

    def num_unfinished(self) -> int:
        return 0  # the simulated engine never hangs

    def num_tokens_processed(self) -> int:
        return self._num_tokens

    def shutdown(self) -> None: ...


def main() -> int:
    settings = read_settings(RolloutSettings)
    configure_logging("rollout", settings.log_level)

    def boot(settings: RolloutSettings, _: Path) -> BootedEngine:
        return BootedEngine(SimulatedEngine(settings.stream_interval), "simulated")

    replica = Replica(settings, on_exit=lambda code: server.exit(code), boot_engine=boot)
    server = Server(
        create_app(replica), host=settings.host, port=settings.port, on_stop=replica.drain
    )
    return server.run_until_exit()


if __name__ == "__main__":
    sys.exit(main())
