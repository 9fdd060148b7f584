"""The demo's run on-policy, one version ahead, and with completions that continue across syncs."""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.report import Report
from examples.demo.audit import Audit, audit
from examples.demo.history import History
from examples.demo.processes import ROOT
from examples.demo.services import DemoServices
from examples.demo.training import demo_config, make_model, train

_WORK_DIR = ROOT / ".demo"
_READY_TIMEOUT_S = 180.0
_PACINGS: Mapping[str, Mapping[str, Any]] = {
    "max_staleness 0": {"max_staleness": 0},
    "max_staleness 1": {"max_staleness": 1},
    "max_staleness 1, in_flight continue": {"max_staleness": 1, "in_flight": "continue"},
}


@dataclass(frozen=True, slots=True)
class Outcome:
    history: History
    audit: Audit

    @property
    def step_s(self) -> list[float]:
        """Seconds of each step except the first, a warm-up; excludes evaluations."""
        return [step.step_s for step in self.history.steps[1:]]

    @property
    def wall_s(self) -> float:
        return sum(self.step_s)

    def mean(self, name: str) -> float:
        return statistics.fmean(getattr(step, name) for step in self.history.steps[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="runs per pacing, one per seed")
    parser.add_argument(
        "--report", action="store_true", help="save the report in benchmarks/reports/"
    )
    arguments = parser.parse_args()
    make_model(_WORK_DIR / "model", Console())
    outcomes = asyncio.run(_measure(arguments))
    _report(arguments, outcomes).publish(keep=arguments.report)


async def _measure(arguments: argparse.Namespace) -> dict[str, list[Outcome]]:
    """Run all pacings in turn, seed by seed, on the same services."""
    console = Console(stderr=True)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in _PACINGS}
    with DemoServices(_WORK_DIR, num_replicas=arguments.replicas) as services:
        await services.wait_until_ready(timeout_s=_READY_TIMEOUT_S)
        for seed in range(arguments.seeds):
            for name, pacing in _PACINGS.items():
                console.print(f"{name}, seed {seed}")
                config = demo_config(num_steps=arguments.steps, seed=seed, **pacing)
                finished = await train(services, config, console)
                outcomes[name].append(Outcome(finished.history, audit(finished.run_dir, config)))
    return outcomes


def _report(arguments: argparse.Namespace, outcomes: Mapping[str, Sequence[Outcome]]) -> Report:
    wall = {name: statistics.fmean(o.wall_s for o in runs) for name, runs in outcomes.items()}
    baseline = wall["max_staleness 0"]
    rows = []
    for name, runs in outcomes.items():
        evals = [run.history.evals for run in runs]
        rows.append(
            (
                name,
                f"{wall[name]:.1f} s",
                f"{wall[name] / baseline:.2f}",
                f"{statistics.fmean(e[0].sampled_reward for e in evals):.1%} → "
                f"{statistics.fmean(e[-1].sampled_reward for e in evals):.1%}",
                f"{statistics.fmean(e[-1].greedy_reward for e in evals):.1%}",
                f"{statistics.fmean(r.mean('trainer_idle_fraction') for r in runs):.0%}",
                f"{statistics.fmean(r.mean('rollout_idle_fraction') for r in runs):.0%}",
                f"{statistics.fmean(r.mean('staleness_mean') for r in runs):.2f}",
                str(sum(r.audit.num_mixed for r in runs)),
                "yes" if all(run.audit.is_clean for run in runs) else "NO",
            )
        )
    return Report(
        name="pacing",
        title="Steps that wait for their groups, and steps that do not",
        setting=(
            f"The demo's {arguments.steps} steps of 32 × 8 completions on {arguments.replicas} "
            f"replica(s), {arguments.seeds} seed(s), the same for each row; wall time covers all "
            "steps but the first, without evaluations. Idle is the share of a step in which the "
            "trainer has no groups, or the replica no requests. Clean means that each position "
            "was trained on once and no version was out of bounds."
        ),
        header=(
            "pacing",
            "wall time",
            "ratio",
            "accuracy, sampled",
            "greedy",
            "trainer idle",
            "replicas idle",
            "mean staleness",
            "mixed completions",
            "clean",
        ),
        rows=rows,
        conclusion=(
            f"One version ahead takes {wall['max_staleness 1'] / baseline:.2f} of the on-policy "
            "wall time. Trainer and replica share two cores here, so that overlapping them gains "
            "less than on separate machines."
        ),
        plot=lambda path: _plot(outcomes, path),
    )


def _plot(outcomes: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for name, runs in outcomes.items():
        history = runs[0].history
        seconds = dict(zip((s.step for s in history.steps), _running(runs[0]), strict=True))
        axes.plot(
            [seconds.get(e.step, 0.0) for e in history.evals],
            [e.sampled_reward for e in history.evals],
            "o-",
            label=name,
        )
    axes.set(xlabel="seconds of training", ylabel="held-out accuracy, sampled", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _running(outcome: Outcome) -> list[float]:
    """Cumulative training seconds at the end of each step."""
    return list(accumulate(step.step_s for step in outcome.history.steps))


if __name__ == "__main__":
    main()
