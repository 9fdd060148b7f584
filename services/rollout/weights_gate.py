"""Who may run while the engine's weights hold one policy at a time.

    under(v1) ─▶ runs
    under(v1) ─▶ runs too
    under(v2) ─▶ waits ───────▶ (all of v1 have ended) ─▶ switch ─▶ runs
    under(v1) ─▶ waits behind it

First come, first served: a policy that others keep busy is still switched to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.rollout.engine import Adapter

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Ticket:
    adapter: Adapter | None  # None for the base.
    left: asyncio.Future[None]  # Done when nobody waits for it any more.
    is_in: bool = False

    def leave(self) -> None:
        if not self.left.done():
            self.left.set_result(None)


class WeightsGate:
    def __init__(self, switch: Callable[[Adapter | None], Awaitable[None]]) -> None:
        """`switch` changes the weights while nothing runs; one that failed is repeated."""
        self._switch = switch
        self._current: Adapter | None = None
        self._is_known = False  # Whether the weights are known to be those of `_current`.
        self._num_running = 0
        self._woken = asyncio.Event()  # Wakes the waiter whose turn it is.
        self._turn = asyncio.Lock()  # Fair; held by the first waiter.
        self._waiting: dict[str, _Ticket] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def under(self, request_id: str, adapter: Adapter | None) -> AsyncGenerator[bool]:
        """Inside, the weights include `adapter`; yields False when interrupted before that."""
        ticket = _Ticket(adapter, asyncio.get_running_loop().create_future())
        entering = asyncio.ensure_future(self._enter(ticket))
        self._waiting[request_id] = ticket
        try:
            try:
                await asyncio.wait([entering, ticket.left], return_when=asyncio.FIRST_COMPLETED)
            finally:
                ticket.leave()
                del self._waiting[request_id]
            if entering.done():
                entering.result()
            yield ticket.is_in
        finally:
            if ticket.is_in:
                self._num_running -= 1
                self._woken.set()

    def interrupt(self, request_ids: Iterable[str]) -> None:
        """Let these requests wait no longer; those that run are not meant."""
        for ticket in filter(None, map(self._waiting.get, request_ids)):
            ticket.leave()

    async def _enter(self, ticket: _Ticket) -> None:
        """A task of its own: a switch that has begun is finished, whoever leaves meanwhile."""
        async with self._turn:
            if ticket.adapter != self._current or not self._is_known:
                ticket.left.add_done_callback(lambda _: self._woken.set())
                while self._num_running and not ticket.left.done():
                    self._woken.clear()
                    await self._woken.wait()
                if ticket.left.done():
                    return
                self._is_known = False
                try:
                    await self._switch(ticket.adapter)
                except Exception as error:
                    if not ticket.left.done():
                        raise
                    log.error("changing the weights failed: %s", error)
                    return
                self._current, self._is_known = ticket.adapter, True
            if not ticket.left.done():
                ticket.is_in = True
                self._num_running += 1
