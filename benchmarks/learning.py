"""Every algorithm, and a control, on the demo's task, with the same initial model and services.

CASES ─▶ run configs ─POST /runs, one after another─▶ events ─▶ table, curves

A run uses the demo's run.yaml with fewer steps and the settings of its case. Policy-gradient
updates take at least two optimizer steps, because in the first one every ratio is 1 and most losses
have the same gradient.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.report import Report
from examples.demo.history import History
from examples.demo.processes import ROOT
from examples.demo.services import DemoServices
from examples.demo.training import demo_config, make_model, train
from services.trainer.data.sort_digits import held_out_problems, training_problems
from services.trainer.run_config import RunConfig

CONTROL = "random reward"
NUM_STEPS = 20
_WORK_DIR = ROOT / ".demo"
_READY_TIMEOUT_S = 180.0
_NUM_PAIRS = 1024
_LOUD = (" WARNING ", " ERROR ")  # levels of log lines that are reported


def _gradient(name: str, **settings: Any) -> dict[str, Any]:
    return {"algorithm": {"name": name, "num_minibatches": 2, **settings}}


# What each run changes in run.yaml; all other settings of `algorithm` are defaults.
CASES: Mapping[str, Mapping[str, Any]] = {
    "dapo": _gradient("grpo", loss="dapo"),
    "grpo": _gradient("grpo", loss="grpo"),
    "bnpo": _gradient("grpo", loss="bnpo"),
    "dr_grpo": _gradient("grpo", loss="dr_grpo", scale_rewards="none"),
    "gspo": _gradient("grpo", loss="gspo"),
    "luspo": _gradient("grpo", loss="luspo"),
    "cispo": _gradient("grpo", loss="cispo"),
    "sapo": _gradient("grpo", loss="sapo"),
    "kl in the loss": _gradient("grpo", kl={"coefficient": 0.02}),
    "kl in the reward": _gradient(
        "grpo", kl={"coefficient": 0.02, "place": "reward", "estimator": "k1"}
    ),
    "rloo": _gradient("rloo"),
    "reinforce_pp": _gradient("reinforce_pp"),
    "reinforce_pp_baseline": _gradient("reinforce_pp_baseline"),
    "ppo": {"algorithm": {"name": "ppo"}},
    "online_dpo": _gradient("online_dpo"),
    "dpo": {
        "algorithm": {"name": "dpo", "beta": 1.0},
        "optimizer": {"learning_rate": 5e-4, "warmup_steps": 0},
    },
    CONTROL: {
        **_gradient("grpo", loss="dapo"),
        "rewards": [{"type": "function", "path": "benchmarks.learning:coin_flip_in_training"}],
    },
}


def coin_flip_in_training(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: object
) -> list[float]:
    """A random reward, from which nothing can be learned; exact match on held-out prompts."""
    held_out = {prompt for prompt, _ in held_out_problems()}
    return [
        float(completion == right) if prompt in held_out else float(random.random() < 0.5)
        for prompt, completion, right in zip(prompts, completions, answer, strict=True)
    ]


def write_pairs(path: Path) -> None:
    """Write preference pairs on training prompts: the answer is chosen over the answer in reverse,
    the prompt's digits unsorted, or the answer with two neighbours swapped."""
    rng = random.Random(0)
    with path.open("w") as file:
        for prompt, answer in islice(training_problems(rng), _NUM_PAIRS):
            i = rng.randrange(len(answer) - 1)
            swapped = answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :]
            rejected = rng.choice((answer[::-1], prompt[1:-1], swapped))
            if rejected != answer:
                pair = {"prompt": prompt, "chosen": answer, "rejected": rejected}
                file.write(json.dumps(pair) + "\n")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of one run. Accuracies are held-out, of sampled completions, in [0, 1]."""

    history: History
    wall_s: float  # seconds from POST /runs to the last event, including evaluations
    complaints: Sequence[str]  # the trainer's warnings and errors during the run

    @property
    def start(self) -> float:
        return self.history.evals[0].sampled_reward

    @property
    def end(self) -> float:
        return self.history.evals[-1].sampled_reward

    @property
    def rise(self) -> float:
        return self.end - self.start

    @property
    def max_sampler_kl(self) -> float:
        return max(step.sampler_kl or 0.0 for step in self.history.steps)


@asynccontextmanager
async def serving(work_dir: Path, console: Console) -> AsyncIterator[DemoServices]:
    """A ready trainer and replica, on a model that is made in `work_dir`."""
    make_model(work_dir / "model", console)
    write_pairs(work_dir / "preferences.jsonl")
    with DemoServices(work_dir, num_replicas=1) as services:
        await services.wait_until_ready(timeout_s=_READY_TIMEOUT_S)
        yield services


async def learn(services: DemoServices, case: str, console: Console, *, seed: int = 0) -> Outcome:
    """Execute the run of a case. Raises DemoError if it does not complete."""
    log, config = services.trainer.log_path, _config(services, case, seed=seed)
    num_before, started = len(_complaints(log)), time.perf_counter()
    finished = await train(services, config, console)
    wall_s = time.perf_counter() - started
    return Outcome(finished.history, wall_s, _complaints(log)[num_before:])


def _config(services: DemoServices, case: str, *, seed: int) -> RunConfig:
    changes: dict[str, Any] = {"num_steps": NUM_STEPS, "seed": seed, **CASES[case]}
    if changes["algorithm"]["name"] == "dpo":
        pairs = services.work_dir / "preferences.jsonl"
        changes["dataset"] = {"type": "preferences", "path": str(pairs)}
    changes["eval"] = {
        "dataset": {"type": "sort_digits"},
        "every_steps": 10 if _trains_on_accuracy(case) else 5,
    }
    return demo_config(**changes)


def _trains_on_accuracy(case: str) -> bool:
    """Whether the mean reward of a step is the accuracy of its completions."""
    return case not in ("dpo", CONTROL)


def _complaints(log: Path) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if any(level in line for level in _LOUD)]


# --- report -------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--report", action="store_true", help="save the report in benchmarks/reports/"
    )
    arguments = parser.parse_args()
    outcomes = asyncio.run(_measure(arguments.only, arguments.seed))
    _report(outcomes, arguments.seed).publish(keep=arguments.report)
    for case, outcome in outcomes.items():
        for line in outcome.complaints:
            print(f"{case}: {line}")


async def _measure(cases: Sequence[str], seed: int) -> dict[str, Outcome]:
    console = Console(stderr=True)
    outcomes = {}
    async with serving(_WORK_DIR, console) as services:
        for case in cases:
            console.print(case)
            outcomes[case] = await learn(services, case, console, seed=seed)
    return outcomes


def _report(outcomes: Mapping[str, Outcome], seed: int) -> Report:
    return Report(
        name="learning",
        title="Every algorithm learns, and a random reward teaches nothing",
        setting=(
            f"The demo's model and task, seed {seed}: {NUM_STEPS} updates on policy of 32 × 8 "
            "completions each (dpo: 32 pairs), one run after another on the same trainer and the "
            "same replica. Accuracy is exact match on 256 held-out prompts. Clipped is the share "
            "of tokens whose loss a bound changed. KL is between sampler and trainer at the same "
            "version, per token, in the worst update. Settings lists what differs from the "
            "algorithm's defaults: two minibatches, because in the first optimizer step of an "
            "update every ratio is 1; no KL term unless stated. The learning rate is run.yaml's "
            "1e-3. For dpo it is 5e-4, with beta 1: at 1e-3 and the default beta of 0.1, accuracy "
            "first rises, and then the chosen answers lose probability with the rejected ones."
        ),
        header=(
            "case",
            "accuracy, sampled",
            "greedy",
            "updates",
            "seconds",
            "clipped",
            "worst KL",
            "warnings",
            "settings",
        ),
        rows=[_row(case, outcome) for case, outcome in outcomes.items()],
        conclusion=_conclusion(outcomes),
        plot=lambda path: _plot(outcomes, path),
    )


def _row(case: str, outcome: Outcome) -> tuple[str, ...]:
    steps, evals = outcome.history.steps, outcome.history.evals
    settings = {k: v for k, v in CASES[case]["algorithm"].items() if k != "name"}
    return (
        case,
        f"{outcome.start:.1%} → {outcome.end:.1%}",
        f"{evals[0].greedy_reward:.1%} → {evals[-1].greedy_reward:.1%}",
        str(len(steps)),
        f"{outcome.wall_s:.0f}",
        f"{statistics.fmean(step.clip_fraction or 0.0 for step in steps):.1%}",
        f"{outcome.max_sampler_kl:.0e}",
        str(len(outcome.complaints)),
        re.sub(r'[{}"]', "", json.dumps(settings)),
    )


def _conclusion(outcomes: Mapping[str, Outcome]) -> str:
    rises = {case: outcome.rise for case, outcome in outcomes.items() if case != CONTROL}
    found = []
    if rises:
        least = min(rises, key=lambda case: rises[case])
        found.append(f"The smallest rise is {_points(rises[least])} ({least})")
    if control := outcomes.get(CONTROL):
        found.append(f"the control changes by {_points(control.rise)}")
    total_s = sum(outcome.wall_s for outcome in outcomes.values())
    return f"{'; '.join(found)}. All runs took {total_s / 60:.1f} minutes."


def _points(rise: float) -> str:
    return f"{100 * rise:+.1f} points"


def _plot(outcomes: Mapping[str, Outcome], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_columns = min(6, len(outcomes))
    num_rows = math.ceil(len(outcomes) / num_columns)
    figure, grid = pyplot.subplots(
        num_rows,
        num_columns,
        figsize=(2.2 * num_columns, 2.1 * num_rows + 0.5),
        dpi=120,
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axes in grid.flat[len(outcomes) :]:
        axes.set_axis_off()
    for axes, (case, outcome) in zip(grid.flat, outcomes.items(), strict=False):
        steps, evals = outcome.history.steps, outcome.history.evals
        if _trains_on_accuracy(case):
            axes.plot(
                [step.step for step in steps],
                [step.reward_mean for step in steps],
                color="#9aa5b1",
                label="mean reward per step",
            )
        for name, style, color in (("sampled", "o-", "#1f6feb"), ("greedy", "s--", "#d9730d")):
            axes.plot(
                [evaluation.step for evaluation in evals],
                [getattr(evaluation, f"{name}_reward") for evaluation in evals],
                style,
                color=color,
                markersize=4,
                label=f"held-out accuracy, {name}",
            )
        axes.set_title(case, fontsize=9, color="#b3261e" if case == CONTROL else "black")
        axes.set(ylim=(0, 1.02), xlim=(0, NUM_STEPS))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.tick_params(labelbottom=True, labelsize=8)
        axes.grid(alpha=0.3)
    figure.supxlabel("update (policy version)", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
