"""What a test or the demo starts ends with the process that started it, and no sooner."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.replica_process import eventually

ROOT = Path(__file__).parents[1]
SERVICE = """
import os, pathlib, time
pathlib.Path("pid.new").write_text(str(os.getpid()))
os.rename("pid.new", "pid")
time.sleep(120)
"""
A_MODULE = """
import os, pathlib, signal, threading, time
from services import child

def start():
    child.start("service")
    while not os.path.exists("pid"):
        time.sleep(0.05)

thread = threading.Thread(target=start)
thread.start()
task = pathlib.Path(f"/proc/self/task/{thread.native_id}")
thread.join()
while task.exists():
    time.sleep(0.05)
pathlib.Path("started").touch()
signal.pause()
"""
# As `make trainer` does, the shell runs the service as a child process; SIGTERM does not end it.
A_SHELL = """
import os, pathlib, signal, sys, time
from tests.shell import start_shell

text = f"trap '' TERM; kill -TERM 0; {sys.executable} -m service; true"
process = start_shell(text, cwd=pathlib.Path())
while not os.path.exists("pid"):
    time.sleep(0.05)
pathlib.Path("started").touch()
signal.pause()
"""
TIMEOUT_S = 30.0


@pytest.mark.parametrize("starter", [A_MODULE, A_SHELL], ids=["a module", "a shell"])
def test_a_service_outlives_the_thread_that_asked_and_ends_with_the_process(
    starter: str, tmp_path: Path
) -> None:
    (tmp_path / "service.py").write_text(SERVICE)
    parent = subprocess.Popen(
        [sys.executable, "-c", starter],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    try:
        assert eventually((tmp_path / "started").exists, timeout_s=TIMEOUT_S)
        pid = int((tmp_path / "pid").read_text())
        assert is_running(pid)
    finally:
        parent.kill()
        parent.wait()
    assert eventually(lambda: not is_running(pid), timeout_s=TIMEOUT_S)


def is_running(pid: int) -> bool:
    """Whether the process still runs. A zombie, which nobody has waited for yet, does not count."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
