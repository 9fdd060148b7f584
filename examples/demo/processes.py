"""The demo's services as child processes into which chaos.py can inject faults."""

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

DemoError = ProcessFailed  # the demo cannot continue; its message is shown to the user


class ServiceProcess(ChildService):
    def kill(self) -> None:
        """SIGKILL only the service: its child processes must notice on their own."""
        self._process.kill()

    def freeze(self) -> None:
        """Suspend the service and its child processes, as a suspended machine would."""
        self._signal_session(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_session(signal.SIGCONT)

    def kill_engine(self) -> bool:
        """SIGKILL the engine core of a rollout service; returns whether there was one."""
        pid = self._engine_pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        return pid is not None

    def _engine_pid(self) -> int | None:
        with suppress(FileNotFoundError):  # the process or one of its threads has just ended
            for task in Path(f"/proc/{self._process.pid}/task").iterdir():
                for pid in (task / "children").read_text().split():
                    if "EngineCor" in Path(f"/proc/{pid}/comm").read_text():
                        return int(pid)
        return None
