"""`python -m examples.http_reward`: see README.md.

The reward service is killed after a few steps and restarted; the run waits for it.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from examples.demo.history import History
from examples.demo.processes import ServiceProcess, free_ports, wait_until_ready
from examples.runner import READY_TIMEOUT_S, Example, Meanwhile, main

_NUM_STEPS_BEFORE = 3  # steps until the service is killed
_AWAY_S = 4.0  # seconds until it is restarted
_STOP_TIMEOUT_S = 10.0


class RewardService:
    """Runs server.py as a process, on the same free port across restarts."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self.key = secrets.token_urlsafe(24)

    def start(self, folder: Path) -> ServiceProcess:
        return ServiceProcess(
            "reward",
            "reward",
            self.port,
            folder / "logs" / "reward.log",
            {"REWARD_KEY": self.key, "REWARD_PORT": str(self.port)},
            module="examples.http_reward.server",
        )

    def changes(self, _folder: Path) -> Mapping[str, Any]:
        """The `rewards` of run.yaml, with the URL of this service."""
        text = Path(__file__).with_name("run.yaml").read_text()
        (reward,) = yaml.safe_load(text)["rewards"]
        return {"rewards": [{**reward, "url": f"http://127.0.0.1:{self.port}/rewards"}]}

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[list[ServiceProcess]]:
        """Yields the process once it is ready; on exit, stops every process in the list.

        A caller that restarts the service appends the new process.
        """
        processes = [self.start(folder)]
        try:
            await wait_until_ready(
                processes,
                api_key=self.key,
                timeout_s=READY_TIMEOUT_S,
                on_wait=lambda missing: None,
            )
            yield processes
        finally:
            for process in processes:
                process.stop(timeout_s=_STOP_TIMEOUT_S)

    @asynccontextmanager
    async def beside(self, folder: Path, console: Console) -> AsyncIterator[Meanwhile]:
        """Yields, once the service is ready, a coroutine function that kills and restarts it."""
        async with self.running(folder) as processes:

            async def die_and_come_back(history: History) -> None:
                while len(history.steps) < _NUM_STEPS_BEFORE:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                processes[-1].kill()
                console.print(f"Killed the reward service; restarting it in {_AWAY_S:g} s")
                await asyncio.sleep(_AWAY_S)
                processes.append(self.start(folder))
                console.print("Restarted the reward service")

            yield die_and_come_back


def example() -> Example:
    service = RewardService()
    return Example(
        name="http_reward",
        title="Sorting five digits: rewards over HTTP",
        unit="digits in place",
        min_rise_points=20.0,
        changes=service.changes,
        environment={"REWARD_KEY": service.key},
        beside=service.beside,
    )


if __name__ == "__main__":
    sys.exit(main(example()))
