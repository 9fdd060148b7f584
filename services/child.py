"""`python -m services.child PARENT_PID MODULE`: become MODULE, and end when the parent does.

The kernel sends SIGKILL to the child when the parent ends for any reason; exec keeps this setting.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)


def command(module: str) -> list[str]:
    """The command line that runs `module` until this process ends.

    The thread that starts it must outlive it: the kernel ends the child with that thread.
    """
    return [sys.executable, "-m", "services.child", str(os.getpid()), module]


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
