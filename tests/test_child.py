"""A service that a test or the demo starts ends with the process that started it, and no sooner."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.replica_process import eventually

ROOT = Path(__file__).parents[1]
SERVICE = """
import os, pathlib, signal
pathlib.Path("pid.new").write_text(str(os.getpid()))
os.rename("pid.new", "pid")
signal.pause()
"""
PARENT = """
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
pathlib.Path("thread-ended").touch()
signal.pause()
"""
TIMEOUT_S = 30.0


def test_a_service_outlives_the_thread_that_asked_for_it_and_ends_with_the_process(
    tmp_path: Path,
) -> None:
    (tmp_path / "service.py").write_text(SERVICE)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    try:
        assert eventually((tmp_path / "thread-ended").exists, timeout_s=TIMEOUT_S)
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
