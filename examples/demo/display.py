"""What the demo shows before its run begins; the run itself is tandem/cli/display.py's."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.markup import escape


class WaitDisplay:
    """What the services still do before they are ready. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._shown = ""

    def __enter__(self) -> Self:
        self.show("the services start")
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def show(self, missing: str) -> None:
        if missing == self._shown:
            return
        self._shown = missing
        self._status.update(escape(f"Waiting: {missing}"))
        if not self._console.is_terminal:
            self._console.print(f"Waiting: {missing}", markup=False, soft_wrap=True)
