"""The demo's services: child processes that can also be hurt, as chaos does."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from services.processes import (
    ROOT,
    ChildService,
    ProcessFailed,
    free_ports,
    wait_until_ready,
    watch,
)

__all__ = ["ROOT", "DemoError", "ServiceProcess", "free_ports", "wait_until_ready", "watch"]

DemoError = ProcessFailed  # the demo cannot go on; the message is what the user reads


class ServiceProcess(ChildService):
    def kill(self) -> None:
        """SIGKILL the service alone: what it started must notice by itself."""
        self._process.kill()

    def freeze(self) -> None:
        """Stop the service and what it started, as a suspended machine does."""
        self._signal_session(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_session(signal.SIGCONT)

    def kill_engine(self) -> bool:
        """SIGKILL the engine core under a rollout service; whether there was one."""
        pid = self._engine_pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        return pid is not None

    def _engine_pid(self) -> int | None:
        with suppress(FileNotFoundError):  # the process, or one of its threads, has just ended
            for task in Path(f"/proc/{self._process.pid}/task").iterdir():
                for pid in (task / "children").read_text().split():
                    if "EngineCor" in Path(f"/proc/{pid}/comm").read_text():
                        return int(pid)
        return None
