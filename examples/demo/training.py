"""One run on the demo's services, from POST /runs to its last event.

events ──▶ history ──▶ display          GET /replicas ──▶ display
Chaos, if wanted, meanwhile
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.demo.chaos import Chaos
from examples.demo.history import History
from examples.demo.processes import DemoError, watch
from examples.demo.services import DemoServices
from services.trainer.run_config import RunConfig, parse_run_config, read_run_config
from shared.errors import Unavailable
from shared.schemas import EvalRecord, StateRecord, StepRecord
from shared.trainer_client import TrainerClient
from tandem.cli.display import RunDisplay, progress

_RUN_CONFIG = Path(__file__).with_name("run.yaml")
_CALL_TIMEOUT_S = 180.0
_EVENT_TIMEOUT_S = 180.0  # between two events of a run that makes progress
_FLEET_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class FinishedRun:
    history: History
    run_dir: Path


def demo_config(**changes: Any) -> RunConfig:
    """run.yaml with other values of its fields. Raises ValueError for one that cannot be."""
    return changed_config(_RUN_CONFIG, changes)


def changed_config(path: Path, changes: Mapping[str, Any]) -> RunConfig:
    """A run config with other values of its fields. Raises ValueError for one that cannot be."""
    settings = read_run_config(path).model_dump(mode="json", exclude_unset=True)
    settings |= {"resume": "never", **changes}  # an interrupted demo begins anew
    return parse_run_config(json.dumps(settings))


def make_model(path: Path, console: Console) -> None:
    """Make the demo model at `path`, unless it is there."""
    if path.is_dir():
        return
    console.print("Making the demo model: supervised training on noisy demonstrations, once ...")
    from examples.demo.model import NUM_WARM_START_STEPS, make_demo_model

    with warm_start_progress(console, NUM_WARM_START_STEPS) as on_step:
        make_demo_model(path, on_step=on_step)


@contextmanager
def warm_start_progress(console: Console, num_steps: int) -> Iterator[Callable[[int], None]]:
    """A bar for supervised training on one core; what is yielded moves it."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)  # a second one gains little, and loses much if the machine is shared
    logging.disable_progress_bar()
    with progress(console) as bar:
        task = bar.add_task("warm start", total=num_steps)
        yield lambda step: bar.update(task, completed=step)


async def train(
    services: DemoServices,
    config: RunConfig,
    console: Console,
    *,
    chaos: Chaos | None = None,
    meanwhile: Callable[[History], Awaitable[None]] | None = None,
    as_json: bool = False,
) -> FinishedRun:
    """Start a run and show it until it has completed; `meanwhile` sees what it has done so far,
    with `as_json` its events go to stdout too.

    Raises DemoError if it does not, and when a service exits: under chaos the trainer only.
    """
    history = History()
    async with TrainerClient(
        services.trainer.url, api_key=services.api_key, timeout_s=_CALL_TIMEOUT_S
    ) as client:
        with RunDisplay(console, title="", num_steps=config.num_steps) as display:
            following = asyncio.create_task(_follow(client, config, history, display, as_json))
            watching = asyncio.create_task(watch([services.trainer] if chaos else services.all))
            others = [asyncio.create_task(_show_fleet(client, chaos, display))]
            if chaos:
                others.append(asyncio.create_task(chaos.run()))
            if meanwhile:
                others.append(asyncio.ensure_future(_and_wait(meanwhile(history))))
            tasks = {following, watching, *others}
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if following.done() and isinstance(following.exception(), Unavailable):
                    # Perhaps because its service is ending: then that is what to tell.
                    await asyncio.wait({watching}, timeout=1.0)
                for task in (watching, following, *others):
                    if task.done():
                        task.result()
                return await following
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)


async def _and_wait(work: Awaitable[None]) -> None:
    """Do it, and never return: what has been done does not end the run."""
    await work
    await asyncio.Event().wait()


async def _follow(
    client: TrainerClient,
    config: RunConfig,
    history: History,
    display: RunDisplay,
    as_json: bool,
) -> FinishedRun:
    """Start the run and show its events."""
    status = await client.start_run(config.model_dump(mode="json", exclude_unset=True))
    try:
        async with asyncio.timeout(_EVENT_TIMEOUT_S) as deadline:
            async for event in client.events():
                deadline.reschedule(asyncio.get_running_loop().time() + _EVENT_TIMEOUT_S)
                display.add(event)
                if as_json:
                    print(event.model_dump_json(), flush=True)
                match event:
                    case StepRecord():
                        history.steps.append(event)
                    case EvalRecord():
                        history.evals.append(event)
                    case StateRecord(state="completed"):
                        return FinishedRun(history, Path(status.run_dir))
                    case StateRecord(state="failed" | "stopped"):
                        raise DemoError(f"run {status.run_id} {event.state}: {event.detail}")
    except TimeoutError as error:
        raise DemoError(
            f"run {status.run_id} made no progress for {_EVENT_TIMEOUT_S:g} s"
        ) from error
    raise DemoError(f"the events of run {status.run_id} ended before the run did")


async def _show_fleet(client: TrainerClient, chaos: Chaos | None, display: RunDisplay) -> None:
    while True:
        try:
            replicas = (await client.replicas()).replicas
        except Unavailable:  # busy, or ending, which is told elsewhere
            replicas = ()
        display.set_fleet(replicas, f"faults injected: {len(chaos.faults)}" if chaos else "")
        await asyncio.sleep(_FLEET_POLL_S)
