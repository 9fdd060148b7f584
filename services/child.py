"""`python -m services.child PARENT_PID MODULE`: become MODULE, and end when the parent does.

The kernel sends SIGKILL to the child when the parent ends for any reason; exec keeps this setting.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from typing import Any

_PR_SET_PDEATHSIG = 1  # prctl(2)


def start(module: str, **options: Any) -> subprocess.Popen[bytes]:
    """Run `module` as a process that ends with this one. `options`: as for Popen.

    The kernel ends a child with the thread that started it, so each child has one of its own, which
    ends with this process.
    """
    command = [sys.executable, "-m", "services.child", str(os.getpid()), module]
    started = Future[subprocess.Popen[bytes]]()

    def run() -> None:
        try:
            process = subprocess.Popen(command, **options)
        except Exception as error:
            started.set_exception(error)
            return
        started.set_result(process)
        threading.Event().wait()

    threading.Thread(target=run, name=f"start {module}", daemon=True).start()
    return started.result()


def main() -> None:
    parent_pid, module = int(sys.argv[1]), sys.argv[2]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        sys.exit("the parent ended before this process started")
    os.execv(sys.executable, [sys.executable, "-m", module])


if __name__ == "__main__":
    main()
