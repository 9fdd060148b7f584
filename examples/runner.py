"""The shared command line of examples: `python -m examples.<name>`.

    model ─▶ services as processes ─POST /runs with run.yaml─▶ events ─▶ table, curve, exit code

An example fails unless the reward on held-out prompts rises. Logs, runs and the curve are in
.demo/<name>.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.demo.display import WaitDisplay
from examples.demo.history import History
from examples.demo.plot import plot_curve
from examples.demo.processes import ROOT, DemoError
from examples.demo.services import DemoServices
from examples.demo.training import changed_config, make_model, train
from services.trainer.run_config import RunConfig
from shared.errors import ServiceError

WORK_DIR = ROOT / ".demo"
READY_TIMEOUT_S = 180.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Meanwhile = Callable[[History], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Example:
    """An example: a folder with a run.yaml, and what it needs in addition to the two services."""

    name: str  # folder of the example, below examples/
    title: str  # title of the learning curve
    unit: str  # what the reward measures, for example "correct answers"
    min_rise_points: float  # required rise of the held-out reward, in hundredths
    model: str = "model"  # folder of the generated model; examples with the demo's model share it
    make_model: Callable[[Path, Console], None] = make_model
    # Maps the example's folder to values that replace those of run.yaml, such as generated files.
    changes: Callable[[Path], Mapping[str, Any]] = lambda folder: {}
    # Extra environment variables of both services, such as API keys.
    environment: Mapping[str, str] = field(default_factory=dict)
    # Runs something next to the services; yields what to do during the run, or None.
    beside: Callable[[Path, Console], AbstractAsyncContextManager[Meanwhile | None]] = (
        lambda folder, console: nullcontext()
    )

    @property
    def run_config(self) -> Path:
        return Path(__file__).parent / self.name / "run.yaml"


def main(example: Example, arguments: Sequence[str] | None = None) -> int:
    """Run an example from the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.{example.name}")
    parser.add_argument("--steps", type=int, help="policy updates (default: from run.yaml)")
    parser.add_argument("--seed", type=int, help="seed of the run (default: from run.yaml)")
    parser.add_argument(
        "--min-rise",
        type=float,
        default=example.min_rise_points,
        metavar="POINTS",
        help="fail unless the reward on held-out prompts rises by this much, in hundredths "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--model", type=Path, help="checkpoint to train instead of the generated model"
    )
    parser.add_argument(
        "--work-dir", type=Path, default=WORK_DIR, help="folder for models, runs, logs and curve"
    )
    options = parser.parse_args(arguments)
    work_dir, console = options.work_dir.resolve(), Console(highlight=False)
    folder = work_dir / example.name
    changes = {"num_steps": options.steps, "seed": options.seed}
    try:
        config = changed_config(
            example.run_config,
            {k: v for k, v in changes.items() if v is not None} | dict(example.changes(folder)),
        )
    except ValueError as error:
        parser.error(str(error))
    try:
        model = (options.model or work_dir / example.model).resolve()
        if options.model is None:
            example.make_model(model, console)
        history = asyncio.run(_run(example, config, folder, model, console))
    except (DemoError, ServiceError) as error:
        print(f"The example failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if isinstance(history, int):
        return history
    return 0 if _report(example, history, folder, options.min_rise, console) else 1


async def _run(
    example: Example, config: RunConfig, folder: Path, model: Path, console: Console
) -> History | int:
    """Start the services, train, and stop the services in every case.

    Returns the history, or the exit code if a signal stopped the run.
    """
    caught = catch_stop_signals()
    try:
        with DemoServices(
            folder,
            num_replicas=1,
            rollout_settings={"MODEL": str(model), "CACHE_DIR": str(folder.parent / "cache")},
            trainer_settings={"MODEL": str(model)},
            environment=example.environment,
        ) as services:
            async with example.beside(folder, console) as meanwhile:
                with WaitDisplay(console) as waiting:
                    await services.wait_until_ready(timeout_s=READY_TIMEOUT_S, on_wait=waiting.show)
                finished = await train(services, config, console, meanwhile=meanwhile)
                return finished.history
    except asyncio.CancelledError:
        if not caught:
            raise
        return 128 + caught[0]


def _report(
    example: Example, history: History, folder: Path, min_rise_points: float, console: Console
) -> bool:
    """Print the summary, draw the curve, and return whether the reward rose enough."""
    curve = folder / "curve.png"
    plot_curve(history, curve, title=example.title, unit=example.unit)
    first, last = history.evals[0], history.evals[-1]
    print_lines(
        [
            (
                f"held-out {example.unit}, {kind}",
                f"{before:.3f} → {after:.3f} ({100 * (after - before):+.1f} points)",
            )
            for kind, before, after in (
                ("sampled", first.sampled_reward, last.sampled_reward),
                ("greedy", first.greedy_reward, last.greedy_reward),
            )
        ]
        + [("learning curve", os.path.relpath(curve))],
        console,
    )
    if (rise := history.sampled_rise_points) < min_rise_points:
        print(
            f"The example failed: held-out {example.unit} rose by {rise:.1f} points, less than the "
            f"required {min_rise_points:g} (logs: {os.path.relpath(folder / 'logs')}).",
            file=sys.stderr,
        )
    return rise >= min_rise_points


def catch_stop_signals() -> list[int]:
    """Cancel the current task at the first signal; the returned list then holds its number."""
    caught: list[int] = []
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task

    def on_signal(number: int) -> None:
        if not caught:
            caught.append(number)
            task.cancel()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    return caught


def print_lines(lines: Sequence[tuple[str, str]], console: Console) -> None:
    """Print (label, value) pairs in two columns."""
    width = max(len(what) for what, _ in lines)
    for what, value in lines:
        console.print(f"{what:<{width}}  {value}", soft_wrap=True)
