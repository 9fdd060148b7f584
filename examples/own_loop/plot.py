"""Draws the learning curve of a loop: rewards ─▶ PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")


def plot_curve(rewards: Sequence[float], *, before: float, after: float, path: Path) -> None:
    """Plot the reward of every step as a line, and held-out accuracy before and after as points."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=100)
    steps = range(len(rewards))
    axes.plot(steps, rewards, color="#9aa5b1", label="training reward, mean of the step")
    axes.plot(
        [0, len(rewards)], [before, after], "o", color="#1f6feb", label="held-out accuracy, sampled"
    )
    axes.set(xlabel="policy version", ylabel="exact match", ylim=(0, 1.02), xlim=(-0.5, None))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    axes.set_title("Sorting five digits: a GRPO loss of one's own")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
