"""A service as a child process: start it, wait until it is ready, notice its exit, stop it.

The service ends when the process that started it ends for any reason (child.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import httpx

from services import child
from shared.auth import authorization

ROOT = Path(__file__).parents[1]
_POLL_S = 0.2
_NUM_LOG_LINES = 15
_OWN_PREFIXES = ("ROLLOUT_", "TRAINER_", "TANDEM_")


class ProcessFailed(Exception):
    """A service exited or did not become ready; the message is written for the user."""


class ChildService:
    """`python -m services.<kind>`, or another `module`, in a separate session so that Ctrl-C
    reaches only the parent.
    """

    def __init__(
        self,
        kind: Literal["rollout", "trainer", "reward"],
        name: str,
        port: int,
        log_path: Path,
        settings: Mapping[str, str],
        *,
        module: str | None = None,
    ) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = log_path
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_OWN_PREFIXES)}
        module = module or f"services.{kind}"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("wb") as log:
            self._process = child.start(
                module,
                cwd=ROOT,
                env=inherited | dict(settings) | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ending(self) -> str | None:
        """How the process ended, as a phrase; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    def check_alive(self) -> None:
        """Raise ProcessFailed with the end of the log if the process has exited."""
        if ending := self.ending:
            raise ProcessFailed(f"the {self.name} service {ending}; {self.log_tail()}")

    async def obstacle(self, http: httpx.AsyncClient) -> str | None:
        """The reason that the service gives for not being ready; None once it is ready."""
        self.check_alive()
        try:
            response = await http.get(f"{self.url}/readyz")
        except httpx.TransportError:
            return "starting the process"
        return None if response.is_success else _problem_detail(response)

    def stop(self, *, timeout_s: float) -> None:
        """Send SIGTERM, then SIGKILL to the whole session if the process still runs."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        self._signal_session(signal.SIGCONT)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _signal_session(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def log_tail(self) -> str:
        with self.log_path.open(errors="replace") as log:
            lines = "".join(f"  {line}" for line in deque(log, _NUM_LOG_LINES)).rstrip()
        return f"the end of {os.path.relpath(self.log_path)}:\n{lines}"


async def wait_until_ready(
    services: Sequence[ChildService],
    *,
    api_key: str,
    timeout_s: float,
    on_wait: Callable[[str], object] = lambda _: None,
) -> None:
    """Return once every `/readyz` answers 200. `on_wait` is called with the reasons for waiting.

    Raises ProcessFailed if a service exits or is not ready in time.
    """
    deadline = time.monotonic() + timeout_s
    headers = authorization(api_key)
    async with httpx.AsyncClient(headers=headers, timeout=10, trust_env=False) as http:
        while True:
            obstacles = {service: await service.obstacle(http) for service in services}
            missing = {service: why for service, why in obstacles.items() if why is not None}
            if not missing:
                return
            if time.monotonic() > deadline:
                late, why = next(iter(missing.items()))
                raise ProcessFailed(
                    f"the {late.name} service was not ready within {timeout_s:g} s ({why}); "
                    f"{late.log_tail()}"
                )
            on_wait("; ".join(f"{service.name}: {why}" for service, why in missing.items()))
            await asyncio.sleep(_POLL_S)


async def watch(services: Sequence[ChildService]) -> None:
    """Never return. Raises ProcessFailed when one of the services exits."""
    while True:
        for service in services:
            service.check_alive()
        await asyncio.sleep(_POLL_S)


def free_ports(count: int) -> list[int]:
    """Distinct loopback ports that are currently free."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]


def _problem_detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"
