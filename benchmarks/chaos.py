"""Compares the demo's run under a random fault every few seconds with the same run undisturbed."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.report import Report
from examples.demo.audit import Audit, audit
from examples.demo.chaos import DEFAULT_KINDS, FAULT_MEANINGS, Chaos, Fault
from examples.demo.history import History
from examples.demo.processes import ROOT
from examples.demo.services import DemoServices
from examples.demo.training import demo_config, make_model, train
from services.trainer.run_config import RunConfig

_WORK_DIR = ROOT / ".demo"
_READY_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    history: History
    audit: Audit
    wall_s: float  # seconds from POST /runs to the last event, including evaluations
    faults: Sequence[Fault] = ()
    num_replaced: int = 0

    @property
    def num_continued(self) -> int:
        return sum(step.num_continued or 0 for step in self.history.steps)

    @property
    def longest_step_s(self) -> float:
        return max(step.step_s for step in self.history.steps)

    @property
    def final_accuracy(self) -> float:
        return self.history.evals[-1].sampled_reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blackout", action="store_true", help="also kill all replicas at once")
    parser.add_argument(
        "--report", action="store_true", help="save the report in benchmarks/reports/"
    )
    arguments = parser.parse_args()
    make_model(_WORK_DIR / "model", Console())
    quiet, disturbed = asyncio.run(_measure(arguments))
    report = _report(arguments, quiet, disturbed)
    report.publish(keep=arguments.report)
    for fault in disturbed.faults:
        print(fault)


async def _measure(arguments: argparse.Namespace) -> tuple[Outcome, Outcome]:
    console = Console(stderr=True)
    config = demo_config(num_steps=arguments.steps, seed=arguments.seed)
    kinds = (*DEFAULT_KINDS, "blackout") if arguments.blackout else DEFAULT_KINDS
    with DemoServices(_WORK_DIR, num_replicas=arguments.replicas) as services:
        await services.wait_until_ready(timeout_s=_READY_TIMEOUT_S)
        quiet = await _run("undisturbed", services, config, console, None)
        chaos = Chaos(services, seed=arguments.seed, kinds=kinds)
        disturbed = await _run("with faults", services, config, console, chaos)
    return quiet, disturbed


async def _run(
    name: str, services: DemoServices, config: RunConfig, console: Console, chaos: Chaos | None
) -> Outcome:
    console.print(name)
    started = time.perf_counter()
    finished = await train(services, config, console, chaos=chaos)
    wall_s = time.perf_counter() - started
    return Outcome(
        name,
        finished.history,
        audit(finished.run_dir, config),
        wall_s,
        faults=chaos.faults if chaos else (),
        num_replaced=chaos.num_replaced if chaos else 0,
    )


def _report(arguments: argparse.Namespace, quiet: Outcome, disturbed: Outcome) -> Report:
    counts = {
        kind: sum(fault.kind == kind for fault in disturbed.faults) for kind in FAULT_MEANINGS
    }
    injected = "; ".join(
        f"{count} × {FAULT_MEANINGS[kind]}" for kind, count in counts.items() if count
    )
    return Report(
        name="chaos",
        title="A run with a fault every few seconds",
        setting=(
            f"The demo's {arguments.steps} steps of 32 × 8 completions on {arguments.replicas} "
            f"replicas, seed {arguments.seed}, on-policy. Each replica that ended was replaced by "
            "one on a new port, which registered itself; its start takes CPU time from the others, "
            f"because all share two cores. Injected: {injected}; {disturbed.num_replaced} replicas "
            "were started. A completion is lost if no step trained on it, duplicated if two steps "
            "did, and of a wrong version if a token does not come from the one allowed version; "
            "all are counted in the run's groups.jsonl."
        ),
        header=(
            "run",
            "faults",
            "completions",
            "lost",
            "duplicated",
            "wrong version",
            "continued elsewhere",
            "wall time",
            "longest step",
            "accuracy, sampled",
            "greedy",
        ),
        rows=[
            (
                outcome.name,
                str(len(outcome.faults)),
                f"{outcome.audit.num_trained:,}",
                str(outcome.audit.num_lost),
                str(outcome.audit.num_duplicated),
                str(outcome.audit.num_wrong_version),
                str(outcome.num_continued),
                f"{outcome.wall_s:.1f} s",
                f"{outcome.longest_step_s:.1f} s",
                f"{outcome.history.evals[0].sampled_reward:.1%} → {outcome.final_accuracy:.1%}",
                f"{outcome.history.evals[-1].greedy_reward:.1%}",
            )
            for outcome in (quiet, disturbed)
        ],
        conclusion=(
            f"Slowdown {disturbed.wall_s / quiet.wall_s:.2f}; "
            f"{disturbed.audit.num_lost} completions lost, {disturbed.audit.num_duplicated} "
            f"duplicated, {disturbed.audit.num_wrong_version} of a wrong version (target 0)."
        ),
        plot=lambda path: _plot(quiet, disturbed, path),
    )


def _plot(quiet: Outcome, disturbed: Outcome, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for outcome in (quiet, disturbed):
        evals = outcome.history.evals
        axes.plot(
            [e.step for e in evals], [e.sampled_reward for e in evals], "o-", label=outcome.name
        )
    axes.set(xlabel="step", ylabel="held-out accuracy, sampled", ylim=(0, 1.02))
    times = axes.twinx()
    times.bar(
        [step.step for step in disturbed.history.steps],
        [step.step_s for step in disturbed.history.steps],
        color="#d9730d",
        alpha=0.3,
    )
    times.set_ylabel("seconds per step, with faults")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
