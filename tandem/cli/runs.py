"""`tandem run`: submit a run config, follow the run, or stop it.

CONFIG ─▶ POST /runs          GET /runs/current/events ─▶ RunDisplay, or NDJSON
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Annotated

import typer

from shared.errors import ServiceError, Unavailable
from shared.schemas import RunEvent, RunStatus, StateRecord
from shared.trainer_client import TrainerClient
from tandem.cli.connect import (
    DEFAULT_TRAINER_URL,
    Json,
    TrainerUrl,
    console,
    print_json,
    trainer_at,
)
from tandem.cli.display import RunDisplay

_FLEET_POLL_S = 1.0
_STOP_POLL_S = 0.3
_ENDED = ("completed", "failed", "stopped", "suspended")
_INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    app.command()(run)
    app.command()(follow)


def run(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="Run config, YAML or JSON; - reads stdin. Without it, attach to the current run.",
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Do not follow the run.")] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="Stop the current run after its current step.")
    ] = False,
    url: TrainerUrl = DEFAULT_TRAINER_URL,
    as_json: Json = False,
) -> int:
    """Start a run and follow it, attach to the current one, or stop it.

    Ctrl-C detaches and the run continues. --json prints the events as NDJSON. The exit code is 1
    when the run fails.
    """
    if config is not None and stop:
        raise ValueError("CONFIG starts a run and --stop ends the current one: pass only one")
    if config is None and detach and not stop:
        raise ValueError("--detach needs a run to start or stop: add a CONFIG or --stop")
    if stop:
        return asyncio.run(_stop(url, wait=not detach, as_json=as_json))
    content = None if config is None else _read(config)
    started: list[RunStatus] = []
    try:
        return asyncio.run(_run(url, content, started, detach=detach, as_json=as_json))
    except KeyboardInterrupt:
        for status in started:
            print(
                f"\nDetached: run {status.run_id} continues. `tandem run` attaches again, "
                "`tandem run --stop` stops it.",
                file=sys.stderr,
            )
        return _INTERRUPTED


def follow(url: TrainerUrl = DEFAULT_TRAINER_URL, as_json: Json = False) -> int:
    """Attach to the current run, like `tandem run` without a CONFIG."""
    return run(url=url, as_json=as_json)


def _read(config: str) -> bytes:
    if config == "-":
        return sys.stdin.buffer.read()
    try:
        with open(config, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(
            f"{config} cannot be read ({error.strerror}): pass the path of a run config"
        ) from None


async def _run(
    url: str, content: bytes | None, started: list[RunStatus], *, detach: bool, as_json: bool
) -> int:
    async with trainer_at(url) as trainer:
        if content is None:
            status = await _current(trainer)
        else:
            status = await trainer.start_run(content)
        started.append(status)
        if not detach:
            return await _follow(trainer, status, as_json=as_json)
        if as_json:
            print_json(status)
        else:
            console().print(
                f"Started run {status.run_id} in {status.run_dir}. `tandem run` attaches to it, "
                "`tandem run --stop` stops it."
            )
        return 0


async def _current(trainer: TrainerClient) -> RunStatus:
    if (status := (await trainer.status()).run) is None:
        raise ServiceError(f"{trainer.url} has no run: start one with `tandem run CONFIG`")
    return status


# --- follow -------------------------------------------------------------------------------------


async def _follow(trainer: TrainerClient, status: RunStatus, *, as_json: bool) -> int:
    """Show every event until the run ends.

    Raises ServiceError when the run failed, Unavailable when it was suspended or its events ended
    early.
    """
    last: RunEvent | None = None
    if as_json:
        async for last in trainer.events():
            print_json(last)
    else:
        title = f"run {status.run_id} on {trainer.url}"
        if (out := console()).is_terminal:
            title += " · Ctrl-C detaches, the run continues"
        with RunDisplay(out, title=title, num_steps=status.num_steps) as display:
            watching = asyncio.create_task(_watch_fleet(trainer, display))
            try:
                async for last in trainer.events():
                    display.add(last)
            finally:
                watching.cancel()
                await asyncio.wait({watching})
    if not isinstance(last, StateRecord) or last.state not in _ENDED:
        raise Unavailable(
            f"the events of run {status.run_id} ended before the run did: `tandem run` attaches "
            "again"
        )
    return await _outcome(trainer, last, as_json=as_json)


async def _outcome(trainer: TrainerClient, last: StateRecord, *, as_json: bool) -> int:
    status = await trainer.run()
    if last.state == "failed":
        raise ServiceError(f"run {status.run_id} failed: {last.detail}")
    if last.state == "suspended":
        raise Unavailable(
            f"the trainer shut down at step {status.step} of run {status.run_id}: start it again "
            "to resume the run, then attach with `tandem run`"
        )
    if not as_json:
        console().print(
            f"Run {status.run_id} {last.state} at step {status.step}; results in {status.run_dir}. "
            "`tandem export FOLDER` writes the adapter, or with --merged a checkpoint.",
            soft_wrap=True,
        )
    return 0


async def _watch_fleet(trainer: TrainerClient, display: RunDisplay) -> None:
    while True:
        with contextlib.suppress(Unavailable):  # busy or shutting down: the events say which
            display.set_fleet((await trainer.replicas()).replicas)
        await asyncio.sleep(_FLEET_POLL_S)


async def _stop(url: str, *, wait: bool, as_json: bool) -> int:
    async with trainer_at(url) as trainer:
        before = await _current(trainer)
        status = before if before.state in _ENDED else await trainer.stop_run()
        while wait and status.state not in _ENDED:
            await asyncio.sleep(_STOP_POLL_S)
            status = await trainer.run()
    if as_json:
        print_json(status)
    elif before.state in _ENDED:
        console().print(
            f"Run {status.run_id} has already ended: {status.state} at step {status.step}."
        )
    elif status.state in _ENDED:
        console().print(f"Run {status.run_id} {status.state} at step {status.step}.")
    else:
        console().print(f"Run {status.run_id} stops after its current step, {status.step + 1}.")
    if status.state == "failed":
        raise ServiceError(f"run {status.run_id} failed: {status.detail}")
    return 0
