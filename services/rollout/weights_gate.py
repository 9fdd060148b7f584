"""Who may run while the engine's weights hold one policy at a time.

    under(v1) ─▶ runs
    under(v1) ─▶ runs too
    under(v2) ─▶ waits ───────▶ (all of v1 have ended) ─▶ switch ─▶ runs
    under(v1) ─▶ waits behind it

First come, first served: a policy that others keep busy is still switched to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.rollout.engine import Adapter


@dataclass(slots=True, eq=False)
class _Ticket:
    adapter: Adapter | None  # None: the base
    interrupted: asyncio.Future[None]
    is_in: bool = False
    is_over: bool = False  # whoever held it has gone


class WeightsGate:
    def __init__(self, switch: Callable[[Adapter | None], Awaitable[None]]) -> None:
        """`switch` changes the weights while nothing runs; one that failed is repeated."""
        self._switch = switch
        self._current: Adapter | None = None
        self._is_known = True  # that the weights are those of `_current`
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._turn = asyncio.Lock()  # fair; held by the first of those that wait
        self._waiting: dict[str, _Ticket] = {}

    @asynccontextmanager
    async def under(self, request_id: str, adapter: Adapter | None) -> AsyncGenerator[bool]:
        """Inside, the weights are those of `adapter`; False when it was interrupted before that."""
        ticket = _Ticket(adapter, asyncio.get_running_loop().create_future())
        entering = asyncio.ensure_future(self._enter(ticket))
        self._waiting[request_id] = ticket
        try:
            await asyncio.wait([entering, ticket.interrupted], return_when=asyncio.FIRST_COMPLETED)
            if entering.done():
                entering.result()
            del self._waiting[request_id]
            yield ticket.is_in
        finally:
            self._waiting.pop(request_id, None)
            ticket.is_over = True
            if ticket.is_in:
                self._num_running -= 1
                if not self._num_running:
                    self._idle.set()

    def interrupt(self, request_ids: Iterable[str]) -> None:
        """Let these requests wait no longer; those that run are not meant."""
        for request_id in request_ids:
            ticket = self._waiting.get(request_id)
            if ticket and not ticket.interrupted.done():
                ticket.interrupted.set_result(None)

    async def _enter(self, ticket: _Ticket) -> None:
        """A task of its own: a switch that has begun is finished, whoever leaves meanwhile."""
        async with self._turn:
            if ticket.adapter != self._current or not self._is_known:
                await self._idle.wait()
                if ticket.is_over:
                    return
                self._is_known = False
                await self._switch(ticket.adapter)
                self._current, self._is_known = ticket.adapter, True
            if not ticket.is_over:
                ticket.is_in = True
                self._num_running += 1
                self._idle.clear()
