"""A trainer service in a separate process, started as an operator would, and its run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from services import child
from shared.schemas import RunStatus
from tests.replica_process import eventually, free_port

# A script for `python -c`: a trainer that prints `loading` and then loads for a minute.
SLOW_BOOT = """
import sys, time
import services.trainer.trainer as trainer
from services.trainer.__main__ import main

def load(settings):
    print("loading", flush=True)
    time.sleep(60)

trainer.check_start = load
sys.exit(main())
"""

_BOOT_TIMEOUT_S = 60.0


def share_of_small_digits(completions: list[str], **_: object) -> list[float]:
    """A reward that a random policy partly earns, so that every step has a gradient."""
    return [sum(c in "01234" for c in text) / max(len(text), 1) for text in completions]


@dataclass(frozen=True, slots=True)
class TrainerProcess:
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    runs_dir: Path

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10.0, trust_env=False)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30.0, trust_env=False)

    def start_run(self, **config: Any) -> RunStatus:
        answer = self.post("/runs", **config)
        assert answer.is_success, answer.text
        return RunStatus.model_validate_json(answer.content)

    def run(self) -> RunStatus:
        return RunStatus.model_validate_json(self.get("/runs/current").content)

    def until_end(self, *, timeout_s: float) -> RunStatus:
        """Wait until the run completes; fail with the log if it ends in any other way."""

        def ended() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return self.run().state in ("completed", "failed", "stopped")

        assert eventually(ended, timeout_s=timeout_s), self.log.read_text()
        status = self.run()
        assert status.state == "completed", f"{status.detail}\n{self.log.read_text()}"
        return status

    def kill(self) -> None:
        """Kill the process as the kernel does when memory runs out."""
        self.process.kill()
        self.process.wait(10)

    def end(self) -> None:
        """Stop the process: first with SIGTERM, then with SIGKILL."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


def start_trainer(
    root: Path, checkpoint: Path, *rollout_urls: str, **settings: object
) -> TrainerProcess:
    """Start a service on the runs in `root` and wait until it is ready; it can be started again.

    `settings` are fields of TrainerSettings.
    """
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    named = {
        "model": checkpoint,
        "port": port,
        "rollout_urls": ",".join(rollout_urls),
        "runs_dir": root / "runs",
        "device": "cpu",
        "probe_interval_s": 0.2,
        **settings,
    }
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRAINER_", "TANDEM_"))}
    environment = inherited | {
        f"TRAINER_{name.upper()}": str(value) for name, value in named.items()
    }
    log = root / "log"
    with log.open("ab") as output:
        process = child.start(
            "services.trainer",
            stdout=output,
            stderr=output,
            # One thread keeps the order of sums, so that two runs can be compared.
            env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    trainer = TrainerProcess(process, f"http://127.0.0.1:{port}", log, root / "runs")

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return trainer.get("/readyz").is_success
        except httpx.TransportError:
            return False

    assert eventually(ready, timeout_s=_BOOT_TIMEOUT_S), log.read_text()
    return trainer


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, without an incomplete last line; empty if there is no file."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
