"""One policy at a time in the engine's weights: who runs, who waits, and what a switch that fails
or that nobody waits for any more leaves behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.rollout.engine import Adapter
from services.rollout.weights_gate import WeightsGate

pytestmark = pytest.mark.anyio

V1, V2 = (Adapter(slot_id=i, name=f"v{i}", path=Path(f"/v{i}")) for i in (1, 2))


class World:
    """A gate, requests that run until they are told to end, and what happened, in order."""

    def __init__(self) -> None:
        self.gate = WeightsGate(self._switch)
        self.events: list[str] = []
        self.fails = 0
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._switching = asyncio.Event()
        self._switching.set()

    async def _switch(self, adapter: Adapter | None) -> None:
        await self._switching.wait()
        if self.fails:
            self.fails -= 1
            raise RuntimeError("no memory")
        self.events.append(f"weights {adapter.name if adapter else 'base'}")

    def hold_switches(self) -> None:
        self._switching.clear()

    def release_switches(self) -> None:
        self._switching.set()

    async def start(self, name: str, adapter: Adapter | None) -> asyncio.Task[None]:
        self._ends[name] = asyncio.Event()
        self._tasks[name] = asyncio.ensure_future(self._run(name, adapter))
        await settle()
        return self._tasks[name]

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self._tasks[name]
        await settle()

    async def _run(self, name: str, adapter: Adapter | None) -> None:
        async with self.gate.under(name, adapter) as is_in:
            self.events.append(f"{name} {'runs' if is_in else 'was interrupted'}")
            if is_in:
                await self._ends[name].wait()


@pytest.fixture
def world() -> World:
    return World()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_requests_of_one_policy_run_together(world: World) -> None:
    for name in "ab":
        await world.start(name, V1)
    assert world.events == ["weights v1", "a runs", "b runs"]


async def test_the_first_makes_sure_of_the_weights_though_it_runs_on_the_base(world: World) -> None:
    for name in "ab":
        await world.start(name, None)
    assert world.events == ["weights base", "a runs", "b runs"]


async def test_another_policy_waits_until_all_of_the_first_have_ended(world: World) -> None:
    for name in "ab":
        await world.start(name, V1)
    await world.start("c", V2)
    await world.end("a")
    assert world.events[-1] == "b runs"
    await world.end("b")
    assert world.events[-2:] == ["weights v2", "c runs"]


async def test_who_comes_later_does_not_overtake(world: World) -> None:
    await world.start("a", V1)
    await world.start("b", V2)
    await world.start("c", V1)
    assert world.events == ["weights v1", "a runs"]
    await world.end("a")
    assert world.events[2:] == ["weights v2", "b runs"]
    await world.end("b")
    assert world.events[4:] == ["weights v1", "c runs"]


async def test_who_is_interrupted_while_it_waits_does_not_run(world: World) -> None:
    await world.start("a", V1)
    waiting = await world.start("b", V2)
    world.gate.interrupt(["a", "b", "unknown"])
    await waiting
    assert world.events == ["weights v1", "a runs", "b was interrupted"]
    await world.end("a")
    await world.start("c", V1)
    assert world.events[3:] == ["c runs"]  # no switch for the one that left


async def test_who_is_cancelled_while_it_waits_leaves_nothing(world: World) -> None:
    await world.start("a", V1)
    waiting = await world.start("b", V2)
    waiting.cancel()
    await settle()
    await world.end("a")
    await world.start("c", V1)
    assert world.events == ["weights v1", "a runs", "c runs"]


@pytest.mark.parametrize("leaves", ["cancelled", "interrupted"])
async def test_who_leaves_while_others_run_holds_up_nobody(world: World, leaves: str) -> None:
    await world.start("a", V1)
    waiting = await world.start("b", V2)
    later = await world.start("c", V1)
    if leaves == "cancelled":
        waiting.cancel()
    else:
        world.gate.interrupt(["b"])
    await settle()
    assert world.events[-1] == "c runs"
    assert not later.done()


async def test_a_switch_that_nobody_waits_for_any_more_is_finished_first(world: World) -> None:
    world.hold_switches()
    leaving = await world.start("a", V1)
    await world.start("b", None)
    leaving.cancel()
    await settle()
    assert world.events == []
    assert world.gate.num_waiting == 1
    world.release_switches()
    await settle()
    assert world.events == ["weights v1", "weights base", "b runs"]
    assert world.gate.num_waiting == 0


async def test_a_switch_that_failed_is_told_and_made_again(world: World) -> None:
    world.fails = 1
    failed = await world.start("a", V1)
    with pytest.raises(RuntimeError, match="no memory"):
        await failed
    await world.start("b", None)  # nobody knows what the weights are
    assert world.events == ["weights base", "b runs"]
