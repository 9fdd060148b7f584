"""A run as it happens: a progress bar and a table on a terminal, else one line per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.demo.history import History
from shared.schemas import StepRecord

_NUM_ROWS = 10  # the last steps, in the table
_COLUMNS = (
    "step",
    "reward",
    "held-out accuracy",
    "policy version",
    "staleness",
    "sync",
    "logprob gap",
)


@dataclass(frozen=True, slots=True)
class FleetView:
    """The fleet in one line."""

    num_serving: int
    num_replicas: int
    num_faults: int | None  # injected so far; None without chaos

    def __str__(self) -> str:
        faults = "" if self.num_faults is None else f" · faults injected: {self.num_faults}"
        return f"fleet: {self.num_serving} of {self.num_replicas} serving{faults}"


class RunDisplay:
    """Shows `history` and the fleet as they change. Use as a context manager."""

    def __init__(self, console: Console, history: History, *, num_steps: int | None) -> None:
        self._console = console
        self._history = history
        self._progress = progress(console)
        self._task = self._progress.add_task("training", total=num_steps)
        self._rows: list[tuple[str, ...]] = []
        self._fleet: FleetView | None = None
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def add_step(self, step: StepRecord) -> None:
        row = _cells(step, self._history.accuracy)
        self._rows.append(row)
        self._progress.update(self._task, completed=step.step)
        if not self._console.is_terminal:
            print(
                " · ".join(f"{name} {cell}" for name, cell in zip(_COLUMNS, row, strict=True)),
                flush=True,
            )

    def set_fleet(self, fleet: FleetView) -> None:
        if fleet == self._fleet:
            return
        self._fleet = fleet
        if not self._console.is_terminal:
            print(fleet, flush=True)

    def _render(self) -> RenderableType:
        table = Table(*_COLUMNS, box=None, padding=(0, 2))
        for column in table.columns:
            column.justify = "right"
        for row in self._rows[-_NUM_ROWS:]:
            table.add_row(*row)
        fleet = "" if self._fleet is None else str(self._fleet)
        return Group(self._progress, fleet, table)


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
            print(f"Waiting: {missing}", flush=True)


def progress(console: Console) -> Progress:
    """A bar with a description, steps done and time elapsed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _cells(step: StepRecord, accuracy: float | None) -> tuple[str, ...]:
    return (
        str(step.step),
        f"{step.reward_mean:.3f}",
        "–" if accuracy is None else f"{accuracy:.1%}",
        str(step.policy.version),
        str(step.staleness_max),
        f"{1000 * step.sync_s:.0f} ms",
        f"{step.logprob_gap:.4f}",
    )
