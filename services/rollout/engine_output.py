"""Filters what vLLM and its processes print, so that a failed boot is a sentence and not a trace.

The engine runs in a process of its own and reports only that it failed; its trace has the reason.
So stdout and stderr pass through a pipe while it starts, and the engine's own as long as it lives.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator

_TRACE = re.compile(r"Traceback \(most recent|^Process \S+:|\bERROR\b|terminate called")
# Matches a log line or a progress bar.
_NO_TRACE = re.compile(r"\b(?:DEBUG|INFO|WARNING)\b|\d%.*\|")
_OURS = re.compile(r"^\d\d:\d\d:\d\d \w+ +rollout ")
_CAUSE = re.compile(r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception)): (\S.*)$")
_FOLLOWS = re.compile(r"initialization failed|See root cause|background process|shutting down")
_LAST_LINES_S = 0.5


class EngineOutput:
    """Passes lines on to stderr. While the engine starts, from the first of a trace on it keeps
    what may belong to one: `boot` prints that once it has succeeded, and raises with it in `kept`
    when it fails."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self._is_booting = True
        self._lock = threading.Lock()
        self._stderr = os.dup(2)
        self._pump = threading.Thread(target=self._pass_on, daemon=True)

    @contextlib.contextmanager
    def boot(self) -> Iterator[None]:
        """Inside, engine processes may be started."""
        read_end, write_end = os.pipe()
        self._read_end = read_end
        stdout = os.dup(1)
        self._pump.start()
        sys.stdout.flush()
        for number in (1, 2):
            os.dup2(write_end, number)
        os.close(write_end)
        try:
            yield
        except BaseException:
            self._restore(stdout)
            self._pump.join(_LAST_LINES_S)
            raise
        self._restore(stdout)
        with self._lock:
            self._is_booting = False
            for line in self.kept:
                os.write(self._stderr, line.encode())
            self.kept.clear()

    def _restore(self, stdout: int) -> None:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.dup2(self._stderr, 2)
        os.close(stdout)

    def close(self) -> None:
        """Wait a moment for the last lines of processes that have ended."""
        self._pump.join(_LAST_LINES_S)

    def _pass_on(self) -> None:
        with open(self._read_end, errors="replace", newline="") as lines:
            for line in lines:
                with self._lock:
                    follows = self.kept and not _NO_TRACE.search(line) and not _OURS.match(line)
                    if self._is_booting and (_TRACE.search(line) or follows):
                        self.kept.append(line)
                    else:
                        os.write(self._stderr, line.encode())


def root_cause(lines: list[str]) -> tuple[str, str] | None:
    """Class and message of the error that ended the engine; None when no trace names one."""
    found = [match.groups() for line in lines if (match := _CAUSE.search(line.rstrip()))]
    own = [(name, message) for name, message in found if not _FOLLOWS.search(message)]
    return own[-1] if own else None
