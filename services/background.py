"""The long-lived tasks of a service. None ends without a word: it is logged, counted, and then
starts again or ends what depends on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


class Background:
    """`on_failure` is called with the name of a task that failed or ended by mistake."""

    def __init__(self, on_failure: Callable[[str], object] = lambda _: None) -> None:
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[None]] = set()

    def run(
        self,
        name: str,
        work: Awaitable[None],
        *,
        on_error: Callable[[Exception], object] = lambda _: None,
    ) -> asyncio.Task[None]:
        """Run `work` once. An exception is logged and counted, then passed to `on_error`."""

        async def run() -> None:
            try:
                await work
            except Exception as error:
                self._report(name, error)
                on_error(error)

        return self._start(run())

    def repeat(
        self, name: str, work: Callable[[], Awaitable[None]], *, pause_s: float
    ) -> asyncio.Task[None]:
        """Run `work` again and again, `pause_s` after it has ended, until the task is cancelled."""

        async def repeat() -> None:
            while True:
                try:
                    await work()
                except Exception as error:
                    self._report(name, error)
                await asyncio.sleep(pause_s)

        return self._start(repeat())

    async def aclose(self) -> None:
        """Cancel the tasks and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _report(self, name: str, error: Exception) -> None:
        log.error("%s failed", name, exc_info=error)
        self._on_failure(name)
