"""`python -m examples.demo`: a trainer and a rollout service train a policy on this machine.

The demo makes the model, starts both services as processes of their own, submits run.yaml to the
trainer, shows its events, and ends both. What it writes is under .demo/.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from examples.demo.display import RunDisplay, WaitDisplay, progress
from examples.demo.history import History
from examples.demo.plot import plot_curve
from examples.demo.processes import (
    ROOT,
    DemoError,
    ServiceProcess,
    free_ports,
    wait_until_ready,
    watch,
)
from services.trainer.run_config import RunConfig, parse_run_config, read_run_config
from shared.errors import ServiceError, Unavailable
from shared.schemas import EvalRecord, StateRecord, StepRecord
from shared.trainer_client import TrainerClient

RUN_CONFIG = Path(__file__).with_name("run.yaml")
WORK_DIR = ROOT / ".demo"
MODEL_DIR = WORK_DIR / "model"
READY_TIMEOUT_S = 180.0
EVENT_TIMEOUT_S = 180.0  # between two events of a run that makes progress
STOP_TIMEOUT_S = 10.0  # for a service to end by itself
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    options, config = parse_options()
    console = Console(highlight=False)
    try:
        make_model(console)
        return asyncio.run(run_demo(options, config, console))
    except (DemoError, ServiceError) as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def parse_options() -> tuple[argparse.Namespace, RunConfig]:
    """The options, and run.yaml with what they change."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--steps", type=int, help="policy updates (default: those of run.yaml)")
    parser.add_argument("--seed", type=int, help="seed of the run (default: that of run.yaml)")
    parser.add_argument(
        "--min-rise",
        type=float,
        default=25.0,
        metavar="POINTS",
        help="fail unless held-out sampled accuracy rises by this much (default: %(default)s)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave both services up afterwards, until Ctrl-C"
    )
    options = parser.parse_args()
    changes = {"num_steps": options.steps, "seed": options.seed}
    settings = read_run_config(RUN_CONFIG).model_dump(mode="json", exclude_unset=True)
    settings |= {name: value for name, value in changes.items() if value is not None}
    try:
        return options, parse_run_config(json.dumps(settings))
    except ValueError as error:
        parser.error(str(error))


def make_model(console: Console) -> None:
    if MODEL_DIR.is_dir():
        return
    console.print("Making the demo model: supervised training on noisy demonstrations, once ...")
    import torch
    from transformers.utils import logging

    from examples.demo.model import NUM_WARM_START_STEPS, make_demo_model

    torch.set_num_threads(1)  # a second one gains little, and loses much if the machine is shared
    logging.disable_progress_bar()
    with progress(console) as bar:
        task = bar.add_task("warm start", total=NUM_WARM_START_STEPS)
        make_demo_model(MODEL_DIR, on_step=lambda step: bar.update(task, completed=step))


async def run_demo(options: argparse.Namespace, config: RunConfig, console: Console) -> int:
    """Everything between the first child process and the last; ends them whatever happens."""
    caught = catch_stop_signals()
    api_key = secrets.token_urlsafe(24)
    with ExitStack() as stack:
        try:
            services = start_services(api_key, stack)
            with WaitDisplay(console) as waiting:
                await wait_until_ready(
                    services, api_key=api_key, timeout_s=READY_TIMEOUT_S, on_wait=waiting.show
                )
            history = await train(services, api_key, config, console)
            rose_enough = report(history, options.min_rise, console)
            if options.keep:
                tell_how_to_call(services, api_key, console)
                await watch(services)
        except asyncio.CancelledError:
            if not caught:
                raise
            console.print("Stopping both services ...")
            return 128 + caught[0]
    return 0 if rose_enough else 1


def catch_stop_signals() -> list[int]:
    """Cancel the current task at the first signal; the returned list then holds its number."""
    caught: list[int] = []
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task

    def on_signal(number: int) -> None:
        if not caught:
            caught.append(number)
            task.cancel()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    return caught


def start_services(api_key: str, stack: ExitStack) -> tuple[ServiceProcess, ServiceProcess]:
    """The rollout service and the trainer on free loopback ports; `stack` ends them, the trainer
    first because it talks to the other."""

    def start(name: str, port: int, settings: Mapping[str, str]) -> ServiceProcess:
        environment = {
            "TANDEM_API_KEY": api_key,
            **{f"{name.upper()}_{key}": value for key, value in settings.items()},
        }
        log_path = WORK_DIR / "logs" / f"{name}.log"
        service = ServiceProcess(name, port, log_path, environment)
        stack.callback(service.stop, timeout_s=STOP_TIMEOUT_S)
        return service

    rollout_port, trainer_port = free_ports(2)
    rollout = start(
        "rollout",
        rollout_port,
        {
            "MODEL": str(MODEL_DIR),
            "PORT": str(rollout_port),
            "CACHE_DIR": str(WORK_DIR / "cache"),
            "MAX_LORA_RANK": "16",
            "DRAIN_DELAY_S": "0",
        },
    )
    trainer = start(
        "trainer",
        trainer_port,
        {
            "MODEL": str(MODEL_DIR),
            "PORT": str(trainer_port),
            "ROLLOUT_URLS": rollout.url,
            "RUNS_DIR": str(WORK_DIR / "runs"),
        },
    )
    return rollout, trainer


async def train(
    services: tuple[ServiceProcess, ServiceProcess],
    api_key: str,
    config: RunConfig,
    console: Console,
) -> History:
    """Start the run and show it until it has completed. Raises DemoError if it does not."""
    _, trainer = services
    async with TrainerClient(trainer.url, api_key=api_key, timeout_s=READY_TIMEOUT_S) as client:
        following = asyncio.create_task(follow(client, config, console))
        watching = asyncio.create_task(watch(services))
        try:
            await asyncio.wait({following, watching}, return_when=asyncio.FIRST_COMPLETED)
            if following.done() and isinstance(following.exception(), Unavailable):
                # Perhaps because its service is ending: then that is what to tell.
                await asyncio.wait({watching}, timeout=1.0)
            if watching.done():
                watching.result()
            return await following
        finally:
            following.cancel()
            watching.cancel()
            await asyncio.wait({following, watching})


async def follow(client: TrainerClient, config: RunConfig, console: Console) -> History:
    """Start the run and show its events."""
    history = History()
    with RunDisplay(console, history, num_steps=config.num_steps) as display:
        status = await client.start_run(config.model_dump(mode="json", exclude_unset=True))
        try:
            async with asyncio.timeout(EVENT_TIMEOUT_S) as deadline:
                async for event in client.events():
                    deadline.reschedule(asyncio.get_running_loop().time() + EVENT_TIMEOUT_S)
                    match event:
                        case StepRecord():
                            history.steps.append(event)
                            display.add_step(event)
                        case EvalRecord():
                            history.evals.append(event)
                        case StateRecord(state="completed"):
                            return history
                        case StateRecord(state="failed" | "stopped"):
                            raise DemoError(f"run {status.run_id} {event.state}: {event.detail}")
        except TimeoutError as error:
            raise DemoError(
                f"run {status.run_id} made no progress for {EVENT_TIMEOUT_S:g} s"
            ) from error
    raise DemoError(f"the events of run {status.run_id} ended before the run did")


def report(history: History, min_rise_points: float, console: Console) -> bool:
    """Print the summary and draw the curve; whether accuracy rose enough."""
    curve = WORK_DIR / "curve.png"
    plot_curve(history, curve)
    lines = [*history.summary(), ("learning curve", str(curve.relative_to(ROOT)))]
    width = max(len(what) for what, _ in lines)
    for what, value in lines:
        console.print(f"{what:<{width}}  {value}", soft_wrap=True)
    rise = history.sampled_rise_points
    if rise < min_rise_points:
        print(
            f"The demo failed: held-out sampled accuracy rose by {rise:.1f} points, less than the "
            f"{min_rise_points:g} it should (logs: {(WORK_DIR / 'logs').relative_to(ROOT)}).",
            file=sys.stderr,
        )
    return rise >= min_rise_points


def tell_how_to_call(services: Sequence[ServiceProcess], api_key: str, console: Console) -> None:
    for service in services:
        console.print(f"The {service.name} service stays at {service.url}")
    console.print(f"until Ctrl-C, for callers with TANDEM_API_KEY={api_key}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
