"""Live view of a run: a progress bar and a table on a terminal, otherwise one line per event.

RunEvent, ReplicaStatus ──▶ RunDisplay ──▶ console
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from shared.schemas import EvalRecord, ReplicaStatus, RunEvent, StepRecord
from tandem.cli.connect import milliseconds, plain_table

_NUM_ROWS = 10  # steps shown in the table
_WRONG = {"quarantined": "bold red", "gone": "red"}  # replica states that need attention


class RunDisplay:
    """Shows events while the context manager is open."""

    def __init__(self, console: Console, *, title: str, num_steps: int | None) -> None:
        self._console = console
        self._title = title
        self._num_steps = num_steps
        self._progress = progress(console)
        self._task = self._progress.add_task("training", total=num_steps)
        self._rows: list[dict[str, str]] = []
        self._eval: EvalRecord | None = None
        self._state = ""
        self._fleet = Text()
        self._states: tuple[object, ...] = ()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        elif self._title:
            self._print(self._title)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def add(self, event: RunEvent) -> None:
        if isinstance(event, StepRecord):
            cells = step_cells(event, self._eval)
            self._rows.append(cells)
            self._progress.update(self._task, completed=event.step)
            total = f"/{self._num_steps}" if self._num_steps else ""
            rest = [f"{name} {value}" for name, value in cells.items() if name != "step"]
            self._print(" · ".join([f"step {event.step}{total}", *rest]))
        elif isinstance(event, EvalRecord):
            self._eval = event
            self._print(
                f"eval at step {event.step} · sampled {event.sampled_reward:.3f} · greedy "
                f"{event.greedy_reward:.3f} · {event.num_prompts} prompts"
            )
        else:
            self._state = ": ".join(filter(None, (event.state, event.detail)))
            self._print(self._state)

    def set_fleet(self, replicas: Sequence[ReplicaStatus], note: str = "") -> None:
        """Update the fleet line; `note` is appended to it."""
        self._fleet = fleet_summary(replicas, note)
        states = (note, *((replica.id, replica.state) for replica in replicas))
        if states != self._states:  # details change every second and are not worth a line
            self._states = states
            self._print(self._fleet.plain)

    def _print(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, soft_wrap=True)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [Text(self._title)] if self._title else []
        parts.append(self._progress)
        if self._state not in ("", "running", "external"):
            parts.append(Text(self._state))
        parts.append(self._fleet)
        if self._rows:
            parts.append(_table(self._rows[-_NUM_ROWS:]))
        return Group(*parts)


def progress(console: Console) -> Progress:
    """A progress bar with a description, completed steps and elapsed time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def step_cells(step: StepRecord, held_out: EvalRecord | None) -> dict[str, str]:
    """The table row of a step, as column name -> formatted value."""
    return {
        "step": str(step.step),
        "reward": _number(step.reward_mean, ".3f"),
        "held out": "–" if held_out is None else f"{held_out.sampled_reward:.3f}",
        "KL": _number(step.sampler_kl, ".1e"),
        "gap": _number(step.logprob_gap, ".4f"),
        "staleness": _number(step.staleness_max, "d"),
        "tokens/s": f"{step.tokens_per_s:,.0f}",
        "sync": milliseconds(step.sync_s) if step.adapter_bytes else "–",
        "serving": str(step.num_serving_replicas),
    }


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _table(rows: Sequence[dict[str, str]]) -> Table:
    table = plain_table(*rows[0])
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*row.values())
    return table


def fleet_summary(replicas: Sequence[ReplicaStatus], note: str = "") -> Text:
    """One line that counts serving replicas, then one line per quarantined or gone replica."""
    num_serving = sum(replica.state == "serving" for replica in replicas)
    summary = f"replicas: {num_serving} of {len(replicas)} serving"
    text = Text(" · ".join(filter(None, (summary, note))))
    for replica in replicas:
        if replica.state in _WRONG:
            line = f"\n  {replica.id} {replica.state}: {replica.detail}"
            text.append(line, style=_WRONG[replica.state])
    return text


def replica_table(replicas: Sequence[ReplicaStatus]) -> Table:
    table = plain_table("id", "state", "policy", "running", "last sync", "logprob gap", "detail")
    for replica in replicas:
        gap = "–" if replica.logprob_gap is None else f"{replica.logprob_gap:.4f}"
        table.add_row(
            Text(replica.id),
            Text(replica.state, style=_WRONG.get(replica.state, "")),
            Text(str(replica.policy or "–")),
            str(replica.num_outstanding_completions),
            milliseconds(replica.last_sync_s),
            gap,
            Text(replica.detail),
        )
    return table
