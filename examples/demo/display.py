"""What the demo shows before its run begins; the run itself is tandem/cli/display.py's."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.markup import escape


class WaitDisplay:
    """What each service is doing until it is ready. Use as a context manager.

    A stage that is done stays as a line with the time it took, so that the wait can be followed.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._shown = ""
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self.show("starting the services")
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish_stage()
        self._status.stop()

    def show(self, stage: str) -> None:
        if stage == self._shown:
            return
        self._finish_stage()
        self._shown, self._began = stage, time.monotonic()
        self._status.update(escape(f"{stage} ..."))
        if not self._console.is_terminal:
            self._console.print(f"{stage} ...", markup=False, soft_wrap=True)

    def _finish_stage(self) -> None:
        if self._shown and self._console.is_terminal:
            took_s = time.monotonic() - self._began
            self._console.print(f"{self._shown}: {took_s:.1f} s", markup=False, soft_wrap=True)
