"""An event loop in a thread, on which the fleet and a replica of one's own live."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from services.processes import ChildService
from services.trainer.fleet.fleet import Fleet

_STOP_TIMEOUT_S = 10.0  # How long a replica may take to end by itself.


log = logging.getLogger(__name__)
Result = TypeVar("Result")
_POLL_S = 0.5  # How often to look whether the child has died.


class Background:
    """An event loop in a thread, with the fleet and the child that live on it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.child: ChildService | None = None
        self.fleet: Fleet | None = None
        self._is_closed = False
        self._closing = threading.Lock()  # No call may begin after closing.
        self._thread = threading.Thread(
            target=self.loop.run_forever, name="tandem-engine", daemon=True
        )
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """The result, from any thread but the loop's. An interrupt cancels the work."""
        with self._closing:
            if self._is_closed:
                coroutine.close()
                raise RuntimeError("the engine was closed: load the model again")
            future = asyncio.run_coroutine_threadsafe(self._while_alive(coroutine), self.loop)
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError(
                "the engine was closed before it had answered: load the model again"
            ) from None
        except BaseException:
            future.cancel()
            raise

    async def _while_alive(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Raises ProcessFailed as soon as the child has ended, instead of waiting for it."""
        task = asyncio.ensure_future(coroutine)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_POLL_S)
                if self.child and not task.done():
                    self.child.check_alive()
            return task.result()
        finally:
            task.cancel()

    def close(self) -> None:
        """Idempotent. Callers that wait for a result get an error."""
        # The last reference was dropped on the loop's thread.
        if threading.current_thread() is self._thread:
            threading.Thread(target=self.close).start()
            return
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        ending = asyncio.run_coroutine_threadsafe(self._end(), self.loop)
        try:
            ending.result(_STOP_TIMEOUT_S)
        except TimeoutError:
            log.warning("the engine's requests did not end within %g s", _STOP_TIMEOUT_S)
        if self.child:
            self.child.stop(timeout_s=_STOP_TIMEOUT_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_STOP_TIMEOUT_S)
        if not self._thread.is_alive():  # Otherwise it ends with the process.
            self.loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.fleet is not None:
            await self.fleet.aclose()
