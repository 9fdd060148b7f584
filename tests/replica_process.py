"""A rollout service in a separate process, started as an operator would start it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from services import child
from shared.schemas import PoliciesResponse, PolicyId, RolloutStatus

_BOOT_TIMEOUT_S = 120.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class ReplicaProcess:
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    checkpoint: Path  # source checkpoint, before quantization
    cache_dir: Path
    adapter_dir: Path

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10.0, trust_env=False)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels. KeyError when it is absent."""
        lines = re.findall(
            rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", self.get("/metrics").text, re.M
        )
        if not lines:
            raise KeyError(name)
        return sum(map(float, lines))

    def num_leases(self, policy: PolicyId) -> int:
        """Number of requests that run under a resident policy."""
        policies = PoliciesResponse.model_validate_json(self.get("/policies").content)
        return sum(item.num_leases for item in policies.resident if item.policy == policy)

    def adapter_files(self) -> list[Path]:
        """Files in the adapter folder, except the lock of the process."""
        return [
            path for path in self.adapter_dir.rglob("*") if path.is_file() and path.name != "lock"
        ]

    def base_dir(self) -> Path:
        """The checkpoint that the engine serves."""
        base = RolloutStatus.model_validate_json(self.get("/status").content).base
        assert base
        name = "-".join((digest or "none")[:16] for _, digest in base)
        return self.cache_dir / "bases" / name

    def engine_pid(self) -> int:
        """Process id of the engine, a child of the service."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
        (pid,) = [p for p in children if "EngineCor" in Path(f"/proc/{p}/comm").read_text()]
        return pid

    def end(self) -> None:
        """Stop the process: first with SIGTERM, then with SIGKILL."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)


def start_replica(
    root: Path,
    checkpoint: Path,
    cache_dir: Path,
    *,
    module: str = "services.rollout",
    **settings: object,
) -> ReplicaProcess:
    """Start a service with fields of RolloutSettings; wait for it with `wait_until_ready`."""
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    named = {
        "model": checkpoint,
        "port": port,
        "cache_dir": cache_dir,
        "adapter_dir": root / "adapters",
        "drain_delay_s": 0.2,
        **settings,
    }
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ROLLOUT_", "TANDEM_"))}
    environment = inherited | {
        f"ROLLOUT_{name.upper()}": str(value) for name, value in named.items()
    }
    log = root / "log"
    with log.open("wb") as output:
        process = child.start(
            module,  # leaves no process behind if the test run is killed
            stdout=output,
            stderr=output,
            env=environment | {"HF_HUB_OFFLINE": "1"},
        )
    return ReplicaProcess(
        process=process,
        url=f"http://127.0.0.1:{port}",
        log=log,
        checkpoint=checkpoint,
        cache_dir=cache_dir,
        adapter_dir=root / "adapters",
    )


def wait_until_ready(replica: ReplicaProcess) -> None:
    """Return when /readyz answers 200; fail with the log if the process ends or takes too long."""

    def ready() -> bool:
        assert replica.process.poll() is None, replica.log.read_text()
        try:
            return replica.get("/readyz").is_success
        except httpx.TransportError:
            return False

    assert eventually(ready, timeout_s=_BOOT_TIMEOUT_S), replica.log.read_text()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def eventually(condition: Callable[[], bool], *, timeout_s: float) -> bool:
    """Poll whether `condition` becomes true in time, for effects in other processes."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(_POLL_S)
    return condition()


async def until(condition: Callable[[], bool], *, timeout_s: float = 15.0) -> None:
    """Wait for `condition` without blocking the event loop; fail if it stays false too long."""
    assert await asyncio.to_thread(eventually, condition, timeout_s=timeout_s)
