"""`python -m examples.agent_tools`: train the agent from scratch on this machine.

Makes the model, starts a rollout and a trainer service, trains with the loop in agent.py, and stops
the services. All output is under .demo/agent_tools/.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from openai import APIError, AsyncOpenAI, DefaultAsyncHttpxClient
from transformers import AutoTokenizer
from transformers.utils import logging

from examples.agent_tools.agent import Step, train
from examples.agent_tools.model import NUM_WARM_START_STEPS, make_agent_model
from examples.demo.processes import ROOT, DemoError
from examples.demo.services import DemoServices
from shared.errors import ServiceError
from shared.trainer_client import TrainerClient

WORK_DIR = ROOT / ".demo" / "agent_tools"
_READY_TIMEOUT_S = 180.0
_AVERAGED_STEPS = 3  # steps averaged for the first and the last reward


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.agent_tools", description=__doc__)
    parser.add_argument("--steps", type=int, default=25, help="policy updates (%(default)s)")
    parser.add_argument(
        "--episodes", type=int, default=64, help="episodes per update (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument(
        "--min-rise",
        type=float,
        default=0.3,
        help="fail unless the mean reward rises by this much from the first to the last steps "
        "(%(default)s)",
    )
    options = parser.parse_args()
    if options.steps < 1 or options.episodes < 1:
        parser.error("--steps and --episodes must be at least 1")
    try:
        make_model(WORK_DIR / "model")
        steps = asyncio.run(run(WORK_DIR, options.steps, options.episodes, options.seed))
    except (DemoError, ServiceError, APIError) as error:
        print(f"The example failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return report(steps, options.min_rise)


def make_model(path: Path, num_steps: int = NUM_WARM_START_STEPS) -> None:
    """Make the model at `path`, unless it already exists."""
    if path.is_dir():
        return
    print(f"Making the model: {num_steps} supervised steps on noisy conversations, once ...")
    torch.set_num_threads(1)  # a second thread gains little and is slow on a shared machine
    logging.disable_progress_bar()
    make_agent_model(path, num_steps=num_steps)


async def run(work_dir: Path, num_steps: int, num_episodes: int, seed: int) -> list[Step]:
    """Start the services, train, stop the services; returns one record per update."""
    started = time.monotonic()
    with DemoServices(work_dir, num_replicas=1) as services:
        print("Starting a rollout and a trainer service ...")
        await services.wait_until_ready(timeout_s=_READY_TIMEOUT_S)
        print(f"ready after {time.monotonic() - started:.0f} s")
        tokenizer = AutoTokenizer.from_pretrained(work_dir / "model")
        number = 0

        def show(step: Step) -> None:
            nonlocal number
            number += 1
            print(
                f"step {number:2}  reward {step.reward:.2f}  calls {step.num_calls:.2f}  "
                f"logprob gap {step.record.logprob_gap:.4f}",
                flush=True,
            )

        async with (
            AsyncOpenAI(
                base_url=f"{services.replicas[0].url}/v1",
                api_key=services.api_key,
                http_client=DefaultAsyncHttpxClient(trust_env=False),
            ) as client,
            TrainerClient(services.trainer.url, api_key=services.api_key) as trainer,
        ):
            return await train(
                client,
                trainer,
                lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
                num_steps=num_steps,
                num_episodes=num_episodes,
                seed=seed,
                on_step=show,
            )


def report(steps: Sequence[Step], min_rise: float) -> int:
    """Plot the curve, print the first and last reward, and return the exit code."""
    curve = WORK_DIR / "curve.png"
    plot(steps, curve)
    first, last = (
        statistics.mean(step.reward for step in part)
        for part in (steps[:_AVERAGED_STEPS], steps[-_AVERAGED_STEPS:])
    )
    print(f"mean reward  {first:.2f} → {last:.2f} (first and last {_AVERAGED_STEPS} steps)")
    print(f"plot         {curve.relative_to(ROOT)}")
    if last - first >= min_rise:
        return 0
    print(
        f"The example failed: the reward rose by {last - first:.2f}, less than the required "
        f"{min_rise:g} (logs: {(WORK_DIR / 'logs').relative_to(ROOT)}).",
        file=sys.stderr,
    )
    return 1


def plot(steps: Sequence[Step], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.8), dpi=100)
    numbers = range(1, len(steps) + 1)
    axes.plot(numbers, [s.reward for s in steps], color="#1f6feb", label="reward: right answers")
    axes.set(xlabel="step (policy version)", ylabel="mean reward", ylim=(0, 1.02))
    calls = axes.twinx()
    calls.plot(numbers, [s.num_calls for s in steps], "--", color="#d9730d", label="calls")
    calls.set(ylabel="calculator calls per episode", ylim=(0, 3))
    axes.grid(alpha=0.3)
    figure.legend(loc="lower right", bbox_to_anchor=(0.88, 0.16), frameon=False)
    axes.set_title("Adding three numbers with a calculator for two")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
