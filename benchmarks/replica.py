"""A rollout service for benchmarks: in a separate process, or in a thread of this one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import httpx
import uvloop

from services.rollout.app import create_app
from services.rollout.replica import Replica
from services.rollout.settings import RolloutSettings
from services.server import Server

_BOOT_TIMEOUT_S = 600.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def replica_process(
    settings: RolloutSettings,
    log: Path,
    module: str = "services.rollout",
    *,
    extra: Mapping[str, str] = {},
    without: Collection[str] = (),
) -> Iterator[str]:
    """Run `python -m <module>` with these settings; yields its URL once it is ready.

    Its environment is that of this process, minus the variables in `without`, plus `extra`.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in without}
    environment = {
        f"ROLLOUT_{name.upper()}": str(value)
        for name, value in settings.model_dump(exclude_unset=True).items()
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=inherited | dict(extra) | environment,
            stdout=output,
            stderr=output,
        )
    try:
        url = f"http://{settings.host}:{settings.port}"
        _wait_until_ready(url, lambda: process.poll() is None, log)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def replica_thread(
    settings: RolloutSettings,
) -> Iterator[tuple[str, Replica, asyncio.AbstractEventLoop]]:
    """Run the service in a thread of this process, so that its engine can also be driven directly.

    Yields its URL, the replica, and the event loop on which the engine must be called.
    """
    loop = uvloop.new_event_loop()
    replica = Replica(settings, on_exit=lambda code: server.exit(code))
    server = Server(
        create_app(replica), host=settings.host, port=settings.port, on_stop=lambda: None
    )
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(),), daemon=True)
    thread.start()
    try:
        url = f"http://{settings.host}:{settings.port}"
        _wait_until_ready(url, thread.is_alive, None)
        yield url, replica, loop
    finally:
        server.exit(0)
        thread.join(60)


def _wait_until_ready(url: str, is_alive: Callable[[], bool], log: Path | None) -> None:
    deadline = time.monotonic() + _BOOT_TIMEOUT_S
    while time.monotonic() < deadline:
        if not is_alive():
            raise RuntimeError(f"the replica ended: {log.read_text()[-2000:] if log else ''}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=5, trust_env=False).is_success:
                return
        time.sleep(0.2)
    raise TimeoutError(f"the replica at {url} is not ready after {_BOOT_TIMEOUT_S:g} s")
