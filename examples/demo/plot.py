"""Draws the learning curve of a run: History ─▶ PNG."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from examples.demo.history import History

matplotlib.use("Agg")


def plot_curve(
    history: History,
    path: Path,
    *,
    title: str = "Sorting five digits: GRPO over HTTP",
    unit: str = "exact match",
) -> None:
    """Plot the reward of every step as a line and held-out accuracies as points."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(
        [step.step for step in history.steps],
        [step.reward_mean for step in history.steps],
        color="#9aa5b1",
        label="training reward, mean of the step",
    )
    eval_steps = [evaluation.step for evaluation in history.evals]
    axes.plot(
        eval_steps,
        [evaluation.sampled_reward for evaluation in history.evals],
        "o-",
        color="#1f6feb",
        label="held-out accuracy, sampled",
    )
    axes.plot(
        eval_steps,
        [evaluation.greedy_reward for evaluation in history.evals],
        "s--",
        color="#d9730d",
        label="held-out accuracy, greedy",
    )
    axes.set(xlabel="step (policy version)", ylabel=unit, ylim=(0, 1.02))
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    axes.set_title(title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
