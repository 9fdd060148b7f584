"""What happened in a run: to memory and subscribers, metrics.jsonl, TensorBoard and Prometheus.

A run that resumes has its files cut to where its checkpoint was; the numbers of the events before
that stay.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from services.trainer.pacing import AheadGroup
from shared.metrics import TrainerMetrics, scalars
from shared.schemas import EvalRecord, RunEvent, RunState, StateRecord, StepRecord

EVENTS_FILE = "metrics.jsonl"
GROUPS_FILE = "groups.jsonl"
FINAL_STATES: tuple[RunState, ...] = ("completed", "stopped", "failed")
_EVENT: TypeAdapter[RunEvent] = TypeAdapter(RunEvent)


class LineFile:
    """A file that grows by whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)

    @property
    def position(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def append(self, line: str) -> None:
        """Write the whole line, or, with an OSError, none of it."""
        start, rest = self.position, line.encode() + b"\n"
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(start)
            raise

    def sync(self) -> None:
        """Have on disk what was written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class RunLog:
    """Events in the order they were emitted. `state` is that of the latest state record."""

    def __init__(
        self,
        run_dir: Path,
        metrics: TrainerMetrics,
        *,
        positions: Mapping[str, int] = {},
        first_step: int = 0,
    ) -> None:
        """Go on at `positions` (see the property), after `first_step`; by default, begin.

        Raises ValueError for events on disk that cannot be read.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = run_dir
        self.state: RunState = "running"
        self.detail = ""
        self.last_step: StepRecord | None = None
        self.last_eval: EvalRecord | None = None
        self._metrics = metrics
        self._changed = asyncio.Condition()
        for name in (EVENTS_FILE, GROUPS_FILE):
            _cut(run_dir / name, positions.get(name, 0))
        self._events = _read_events(run_dir / EVENTS_FILE)
        for event in self._events:
            self._note(event)
        self._lines = LineFile(run_dir / EVENTS_FILE)
        self._groups = LineFile(run_dir / GROUPS_FILE)
        self._tensorboard = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=first_step + 1 if self._events else None
        )

    @property
    def has_ended(self) -> bool:
        """Nothing follows in this process."""
        return self.state in (*FINAL_STATES, "suspended")

    @property
    def positions(self) -> dict[str, int]:
        """The length of each file in bytes, by name."""
        return {file.path.name: file.position for file in (self._lines, self._groups)}

    def sync(self) -> None:
        """Have on disk what was logged; blocks."""
        self._lines.sync()
        self._groups.sync()

    async def emit(self, event: RunEvent) -> None:
        """Raises OSError when the disk takes no more; subscribers have the event then."""
        self._note(event)
        if not isinstance(event, StateRecord):
            self._metrics.record(event)
            for name, value in scalars(event).items():
                self._tensorboard.add_scalar(f"{event.kind}/{name}", value, event.step)
        self._events.append(event)
        async with self._changed:
            self._changed.notify_all()
        self._lines.append(event.model_dump_json())

    async def emit_groups(self, step: int, groups: Sequence[AheadGroup]) -> None:
        """What `step` was trained on, one line per group."""
        for group in groups:
            assert group.scored, "it was trained on"
            completions = group.scored.completions
            line = {
                "step": step,
                "position": group.position,
                "rewards": [scored.reward for scored in completions],
                "segments": [
                    [[str(segment.policy), segment.num_tokens] for segment in c.completion.segments]
                    for c in completions
                ],
                "finish_reasons": [scored.completion.finish_reason for scored in completions],
            }
            self._groups.append(json.dumps(line))

    def _note(self, event: RunEvent) -> None:
        if isinstance(event, StateRecord):
            self.state, self.detail = event.state, event.detail
        elif isinstance(event, StepRecord):
            self.last_step = event
        else:
            self.last_eval = event

    async def events(self, start: int = 0) -> AsyncIterator[tuple[int, RunEvent]]:
        """Numbered events from `start` on, as they come, until the run has ended.

        Who has seen more than there is, before the run was cut to its checkpoint, gets what is new.
        """
        index = min(start, len(self._events))
        while True:
            while index < len(self._events):
                yield index, self._events[index]
                index += 1
            if self.has_ended:
                return
            async with self._changed:
                if index == len(self._events) and not self.has_ended:
                    await self._changed.wait()

    def close(self) -> None:
        self._lines.close()
        self._groups.close()
        self._tensorboard.close()


def _cut(path: Path, num_bytes: int) -> None:
    """Leave the first `num_bytes` of a file, which may not exist yet."""
    with path.open("ab") as file:
        file.truncate(min(num_bytes, file.tell()))


def _read_events(path: Path) -> list[RunEvent]:
    events: list[RunEvent] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            events.append(_EVENT.validate_json(line))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
            raise ValueError(
                f"line {number} of {path} cannot be read ({problem}): restore the file from a "
                "copy, or start a run with another run_id"
            ) from error
    return events


def last_state(run_dir: Path) -> StateRecord | None:
    """The state record that is the last event of a run; None when another event is."""
    try:
        lines = (run_dir / EVENTS_FILE).read_bytes().splitlines()
        event = _EVENT.validate_json(lines[-1])
    except (FileNotFoundError, IndexError, ValidationError):  # killed early, or within a line
        return None
    return event if isinstance(event, StateRecord) else None
