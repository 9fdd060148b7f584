"""A service that a test or the demo starts ends with the process that started it."""

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
import signal, subprocess
from services import child
subprocess.Popen(child.command("service"))
signal.pause()
"""
TIMEOUT_S = 30.0


def test_a_service_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text(SERVICE)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    try:
        said = tmp_path / "pid"
        assert eventually(said.exists, timeout_s=TIMEOUT_S)
        pid = int(said.read_text())
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
