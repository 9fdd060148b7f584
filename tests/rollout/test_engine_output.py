"""What of vLLM's output an operator sees, and which error of a trace is the cause."""

from __future__ import annotations

import subprocess
import sys

import pytest

from services.rollout.engine_output import root_cause

TRACE_OF_A_BOOT = "ERROR [core] failed\nTraceback (most recent call last):\nValueError: full"
SCRIPT = """
import subprocess, sys
from services.rollout.engine_output import EngineOutput
output = EngineOutput()
try:
    with output.boot():
        subprocess.run(["echo", "loading"], check=True)
        subprocess.run(["echo", sys.argv[1]], check=True)
        if sys.argv[2] == "True":
            raise RuntimeError("see above")
except RuntimeError:
    print("kept", len(output.kept), file=sys.stderr)
print("after")
output.close()
"""


@pytest.mark.parametrize("fails", [True, False])
def test_the_trace_of_a_boot_is_shown_only_when_the_boot_succeeded(fails: bool) -> None:
    command = [sys.executable, "-c", SCRIPT, TRACE_OF_A_BOOT, str(fails)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    shown = ["kept 3"] if fails else TRACE_OF_A_BOOT.splitlines()
    assert result.stderr.splitlines() == ["loading", *shown]
    assert result.stdout == "after\n"


def test_what_is_no_trace_is_shown_at_once_after_an_error() -> None:
    """A boot may take half an hour, and be killed before it has ended."""
    log, bar = "INFO 11-23 04:36:11 [core.py:1] loading", "shards:  50% Completed | 1/2"
    text = f"ERROR retrying\n{log}\n  File x\n{bar}\nIt is 95% full"
    command = [sys.executable, "-c", SCRIPT, text, "True"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    shown = [log, bar, "kept 3"]
    assert result.stderr.splitlines() == ["loading", *shown]


PREFIX = "(EngineCore pid=7) ERROR 11-23 04:36:11 [core.py:1510] "
TRACE = [
    PREFIX + "EngineCore failed to start.\n",
    PREFIX + "Traceback (most recent call last):\n",
    PREFIX + "KeyError: 'inner'\n",
    PREFIX + "ValueError: Free memory on device cuda:0 (1/80 GiB) is less. Decrease it.\n",
]


def test_the_cause_is_the_last_error_of_the_trace() -> None:
    cause = root_cause(TRACE)
    assert cause == (
        "ValueError",
        "Free memory on device cuda:0 (1/80 GiB) is less. Decrease it.",
    )


def test_an_error_that_only_follows_from_another_is_not_the_cause() -> None:
    follows = [
        "(Worker pid=8) torch.OutOfMemoryError: CUDA out of memory.\n",
        "(EngineCore pid=7) Exception: WorkerProc initialization failed due to an exception\n",
        "RuntimeError: Engine core initialization failed. See root cause above.\n",
    ]
    assert root_cause(follows) == ("torch.OutOfMemoryError", "CUDA out of memory.")


def test_without_a_trace_there_is_no_cause() -> None:
    assert root_cause(["INFO loading\n"]) is None
