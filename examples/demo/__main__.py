"""`python -m examples.demo`: a trainer and its rollout services train a policy on this machine.

The demo makes the model, starts the services as processes of their own, submits run.yaml to the
trainer, shows its events, and ends them all. What it writes is under .demo/.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

from rich.console import Console

from examples.demo.audit import audit
from examples.demo.chaos import DEFAULT_KINDS, FAULT_MEANINGS, Chaos
from examples.demo.display import WaitDisplay
from examples.demo.plot import plot_curve
from examples.demo.processes import ROOT, DemoError, watch
from examples.demo.services import DemoServices
from examples.demo.training import FinishedRun, demo_config, make_model, train
from examples.runner import READY_TIMEOUT_S, catch_stop_signals, print_lines
from services.trainer.run_config import RunConfig
from shared.errors import ServiceError

WORK_DIR = ROOT / ".demo"


def main() -> int:
    options, config = parse_options()
    console = Console(highlight=False, stderr=options.json)
    try:
        make_model(WORK_DIR / "model", console)
        return asyncio.run(run_demo(options, config, console))
    except (DemoError, ServiceError) as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def parse_options() -> tuple[argparse.Namespace, RunConfig]:
    """The options, and run.yaml with what they change."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--steps", type=int, help="policy updates (default: run.yaml)")
    parser.add_argument("--seed", type=int, help="seed of the run (default: run.yaml)")
    parser.add_argument(
        "--min-rise",
        type=float,
        default=25.0,
        metavar="POINTS",
        help="fail unless held-out sampled accuracy rises by this much (default: %(default)s)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the services up afterwards, until Ctrl-C"
    )
    parser.add_argument(
        "--replicas", type=int, default=1, help="rollout services (default: %(default)s)"
    )
    faults = ", ".join(FAULT_MEANINGS[kind] for kind in DEFAULT_KINDS)
    parser.add_argument(
        "--chaos",
        action="store_true",
        help=f"every few seconds a fault of a random replica ({faults}); one that ended is "
        "replaced by another, which joins; needs --replicas 2 or more",
    )
    parser.add_argument(
        "--json", action="store_true", help="the events of the run on stdout, as NDJSON"
    )
    options = parser.parse_args()
    if options.replicas < (2 if options.chaos else 1):
        parser.error(
            "--chaos needs --replicas 2 or more" if options.chaos else "--replicas is at least 1"
        )
    changes = {"num_steps": options.steps, "seed": options.seed}
    try:
        return options, demo_config(**{k: v for k, v in changes.items() if v is not None})
    except ValueError as error:
        parser.error(str(error))


async def run_demo(options: argparse.Namespace, config: RunConfig, console: Console) -> int:
    """Everything between the first child process and the last; ends them whatever happens."""
    caught = catch_stop_signals()
    with DemoServices(WORK_DIR, num_replicas=options.replicas) as services:
        try:
            with WaitDisplay(console) as waiting:
                await services.wait_until_ready(timeout_s=READY_TIMEOUT_S, on_wait=waiting.show)
            tell_where_the_page_is(services, console)
            chaos = Chaos(services, seed=config.seed) if options.chaos else None
            finished = await train(services, config, console, chaos=chaos, as_json=options.json)
            succeeded = report(finished, config, chaos, options.min_rise, console)
            if options.keep:
                tell_how_to_call(services, console)
                await watch([services.trainer] if chaos else services.all)
        except asyncio.CancelledError:
            if not caught:
                raise
            console.print("Stopping the services ...")
            return 128 + caught[0]
    return 0 if succeeded else 1


def report(
    finished: FinishedRun,
    config: RunConfig,
    chaos: Chaos | None,
    min_rise_points: float,
    console: Console,
) -> bool:
    """Print the summary and draw the curve; whether accuracy rose enough and nothing was lost."""
    history = finished.history
    curve = WORK_DIR / "curve.png"
    plot_curve(history, curve)
    lines = [*history.summary(), ("learning curve", str(curve.relative_to(ROOT)))]
    found = audit(finished.run_dir, config)
    if chaos:
        lines += [("faults injected", chaos.summary()), ("completions", str(found))]
    print_lines(lines, console)
    complaints = []
    if (rise := history.sampled_rise_points) < min_rise_points:
        complaints.append(
            f"held-out sampled accuracy rose by {rise:.1f} points, less than the "
            f"{min_rise_points:g} it should"
        )
    if not found.is_clean:
        complaints.append(f"the run trained on {found}")
    if complaints:
        logs = (WORK_DIR / "logs").relative_to(ROOT)
        print(f"The demo failed: {'; '.join(complaints)} (logs: {logs}).", file=sys.stderr)
    return not complaints


def tell_where_the_page_is(services: DemoServices, console: Console) -> None:
    console.print(f"Live page: {services.trainer.url} (its key: {services.api_key})", markup=False)


def tell_how_to_call(services: DemoServices, console: Console) -> None:
    for service in services.all:
        console.print(f"The {service.name} service stays at {service.url}")
    console.print(f"until Ctrl-C, for callers with TANDEM_API_KEY={services.api_key}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
