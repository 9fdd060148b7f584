"""The compose stack as an operator runs it: a separate checkout, `.env` and `docker compose`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.rollout_client import RolloutClient
from shared.trainer_client import TrainerClient

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
_PARTS = (
    *("docker-compose.yml", ".env.example", ".dockerignore", "Makefile"),
    *("deploy", "shared", "services", "tandem", "examples"),
)
_POLL_S = 0.5


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; the caller checks the exit code."""
    options = {"timeout": 600, "cwd": ROOT, **options}
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> float:
    """Wait for `condition` and return the seconds that it took. Raises TimeoutError."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(_POLL_S)
    return time.monotonic() - started


@dataclass
class Stack:
    """A compose project in its own folder, with ports that no other project uses."""

    folder: Path
    project: str
    settings: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path, project: str, stack: str, **settings: str) -> Stack:
        """Copy the files of a checkout and create .env; `stack` is as in `make up STACK=...`."""
        folder.mkdir(exist_ok=True)
        for name in _PARTS:
            source, target = ROOT / name, folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)
        made = run("deploy/scripts/make_env.sh", stack, cwd=folder)
        assert made.returncode == 0, made.stderr
        values = dict(
            line.split("=", 1)
            for line in (folder / ".env").read_text().splitlines()
            if "=" in line and not line.startswith("#")
        )
        ports = {
            name: str(free_port())
            for name in ("TRAINER_PORT", "ROLLOUT_0_PORT", "ROLLOUT_1_PORT", "PROMETHEUS_PORT")
        }
        self = cls(folder, project, {**values, **ports, **settings})
        self.write_env()
        return self

    def write_env(self, **settings: str) -> None:
        self.settings.update(settings)
        lines = [f"{name}={value}\n" for name, value in self.settings.items()]
        (self.folder / ".env").write_text("".join(lines))

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every command, in which only .env configures the stack."""
        ours = {*self.settings, "COMPOSE_PROFILES"}
        inherited = {name: value for name, value in os.environ.items() if name not in ours}
        return {**inherited, "COMPOSE_PROJECT_NAME": self.project, "COMPOSE_ANSI": "never"}

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return run(*command, **{"cwd": self.folder, "env": self.environment, **options})

    def compose(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run("docker", "compose", *arguments, **options)

    def must_compose(self, *arguments: str, **options: Any) -> str:
        """Standard output of a command. Raises AssertionError with both streams if it fails."""
        result = self.compose(*arguments, **options)
        words = result.stdout[-3000:] + result.stderr[-3000:]
        assert result.returncode == 0, f"{arguments}: {words}\n{self.logs()[-6000:]}"
        return result.stdout

    def logs(self, *services: str) -> str:
        return self.compose("logs", "--no-log-prefix", "--no-color", *services).stdout

    def containers(self, service: str) -> list[str]:
        return self.must_compose("ps", "--all", "--quiet", service).split()

    def inspect(self, service: str) -> dict[str, Any]:
        """`docker inspect` of a service's only container."""
        (container,) = self.containers(service)
        return inspect(container)

    def trainer(self) -> TrainerClient:
        return TrainerClient(
            f"http://127.0.0.1:{self.settings['TRAINER_PORT']}",
            api_key=self.settings["TANDEM_API_KEY"],
        )

    def rollout(self, number: int, *, api_key: str | None) -> RolloutClient:
        port = self.settings[f"ROLLOUT_{number}_PORT"]
        return RolloutClient(f"http://127.0.0.1:{port}", api_key=api_key)

    def num_left(self) -> Mapping[str, int]:
        """Numbers of the project's containers, networks and volumes."""
        label = f"label=com.docker.compose.project={self.project}"
        return {
            kind: len(run("docker", kind, "ls", "--quiet", "--filter", label, *more).stdout.split())
            for kind, more in {"container": ["--all"], "network": [], "volume": []}.items()
        }

    def down(self) -> None:
        self.compose("--profile", "*", "down", "--volumes", "--timeout", "10", "--remove-orphans")


def inspect(what: str) -> dict[str, Any]:
    (found,) = json.loads(run("docker", "inspect", what).stdout)
    assert isinstance(found, dict)
    return found


def address(container: Mapping[str, Any]) -> str:
    """Address of a container on the project's network, as the trainer names a replica."""
    (network,) = container["NetworkSettings"]["Networks"].values()
    return f"{network['IPAddress']}:8000"
