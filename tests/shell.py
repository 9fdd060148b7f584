"""A shell command that runs until it is stopped, or until the process that started it ends."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import IO

# The kernel closes the pipe on stdin when the starter ends for any reason: pytest-xdist kills a
# worker 10 s after Ctrl-C. PR_SET_PDEATHSIG would end the shell, but not what the shell started.
_END_WITH_STARTER = """
exec 3<&0 </dev/null
trap '' TERM INT HUP
(read -r _ <&3; kill -KILL 0) &
trap - TERM INT HUP
exec bash -c "$1" 3<&-
"""


def start_shell(
    text: str, *, cwd: Path, env: dict[str, str] | None = None, output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Run `text` in a separate session. Closing `stdin` of the process kills the whole session."""
    return subprocess.Popen(
        ["bash", "-c", _END_WITH_STARTER, "bash", text],
        cwd=cwd,
        env=env,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
