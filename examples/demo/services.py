"""The trainer and its replicas on loopback: processes, keys, ports, logs.

                   ┌──▶ rollout-1   known to the trainer from its settings
trainer ───────────┼──▶ rollout-2
   ▲               └──▶ rollout-3   started later: it registers itself
   └───────────────────────┘
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Self

from examples.demo.processes import ServiceProcess, free_ports, wait_until_ready

_STOP_TIMEOUT_S = 10.0  # for a service to end by itself


class DemoServices:
    """Starts all processes, and ends them on exit. Use as a context manager.

    `work_dir` holds the model (made before), the exact base, logs and runs.
    """

    def __init__(
        self,
        work_dir: Path,
        *,
        num_replicas: int,
        rollout_settings: Mapping[str, str] = {},
        trainer_settings: Mapping[str, str] = {},
        environment: Mapping[str, str] = {},  # of all of them
    ) -> None:
        self.work_dir = work_dir
        self.api_key = secrets.token_urlsafe(24)
        self.num_replicas = num_replicas
        self._rollout_settings = rollout_settings
        self._trainer_settings = trainer_settings
        self._environment = environment
        self._started: list[ServiceProcess] = []
        self._num_started_replicas = 0

    def __enter__(self) -> Self:
        trainer_port, *ports = free_ports(1 + self.num_replicas)
        self.replicas = [self.start_replica(PORT=str(port)) for port in ports]
        self.trainer = self._start(
            "trainer",
            "trainer",
            trainer_port,
            {
                "ROLLOUT_URLS": ",".join(replica.url for replica in self.replicas),
                "RUNS_DIR": str(self.work_dir / "runs"),
                **self._trainer_settings,
            },
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.trainer.stop(timeout_s=_STOP_TIMEOUT_S)  # first: it talks to the others
        for replica in self._started:
            replica.stop(timeout_s=_STOP_TIMEOUT_S)

    @property
    def all(self) -> list[ServiceProcess]:
        return [*self.replicas, self.trainer]

    async def wait_until_ready(
        self, *, timeout_s: float, on_wait: Callable[[str], object] = lambda _: None
    ) -> None:
        """Raises DemoError when one ends or is late."""
        await wait_until_ready(self.all, api_key=self.api_key, timeout_s=timeout_s, on_wait=on_wait)

    def replace(self, ended: ServiceProcess) -> ServiceProcess:
        """Start a replica in the place of one that ended: on a new port, registering itself."""
        new = self.start_replica(TRAINER_URL=self.trainer.url)
        self.replicas[self.replicas.index(ended)] = new
        return new

    def start_replica(self, **settings: str) -> ServiceProcess:
        """Start one more replica, stopped with the others.

        `settings`: fields of RolloutSettings, in capitals.
        """
        self._num_started_replicas += 1
        port = int(settings.get("PORT") or free_ports(1)[0])
        named = {
            "CACHE_DIR": str(self.work_dir / "cache"),
            "MAX_LORA_RANK": "16",
            "DRAIN_DELAY_S": "0",
            **self._rollout_settings,
            **settings,
        }
        return self._start("rollout", f"rollout-{self._num_started_replicas}", port, named)

    def _start(
        self,
        kind: Literal["rollout", "trainer"],
        name: str,
        port: int,
        settings: Mapping[str, str],
    ) -> ServiceProcess:
        named = {"MODEL": str(self.work_dir / "model"), **settings, "PORT": str(port)}
        environment = {f"{kind.upper()}_{key}": value for key, value in named.items()}
        environment |= {"TANDEM_API_KEY": self.api_key, **self._environment}
        log_path = self.work_dir / "logs" / f"{name}.log"
        process = ServiceProcess(kind, name, port, log_path, environment)
        self._started.append(process)
        return process
