"""What happened in a run: to memory and subscribers, metrics.jsonl, TensorBoard, Prometheus and
trackers.

A run that resumes has its files cut to where its checkpoint was; the numbers of the events before
that stay. A full disk ends no run: lines wait in memory until it takes them, in their order.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from services.trainer.run.pacing import GroupBatch, PendingGroup
from services.trainer.run.pairs import PairBatch
from services.trainer.run.tracking import TrackedRun, Trackers
from shared.metrics import TrainerMetrics, scalars
from shared.schemas import EvalRecord, RunEvent, RunState, StateRecord, StepRecord

log = logging.getLogger(__name__)
EVENTS_FILE = "metrics.jsonl"
GROUPS_FILE = "groups.jsonl"
FINAL_STATES: tuple[RunState, ...] = ("completed", "stopped", "failed")
_EVENT: TypeAdapter[RunEvent] = TypeAdapter(RunEvent)
_TAIL_BYTES = 1 << 20  # Longer than any line.


class LineFile:
    """A file that grows by whole lines; lines that a full disk refuses wait for the next write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self.position = os.fstat(self._file.fileno()).st_size  # Bytes of whole lines.
        self._waiting: deque[bytes] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def append(self, line: str) -> None:
        """Raises OSError when the disk is full; the line then waits."""
        self._waiting.append(line.encode() + b"\n")
        self.write_waiting()

    def write_waiting(self) -> None:
        """Write every waiting line whole, or none and raise OSError."""
        while self._waiting:
            rest = line = self._waiting[0]
            try:
                # The truncation below may have failed last time.
                self._file.truncate(self.position)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(self.position)
                raise
            self.position += len(line)
            self._waiting.popleft()

    def sync(self) -> None:
        """Flush what was written to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class RunLog:
    """Events in the order of their emission. `state` is that of the latest state record."""

    def __init__(
        self,
        run_dir: Path,
        metrics: TrainerMetrics,
        *,
        positions: Mapping[str, int] = {},
        first_step: int = 0,
        tracked: TrackedRun | None = None,
    ) -> None:
        """Continue at `positions` (see the property) after `first_step`; by default, begin.

        Raises ValueError for events on disk that cannot be read.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = run_dir
        self.state: RunState = "running"
        self._detail = ""
        self._lost_curves: list[str] = []  # One sentence per lost curve.
        self.last_step: StepRecord | None = None
        self.last_eval: EvalRecord | None = None
        self.changed_at = time.monotonic()  # Time of the last event.
        self._metrics = metrics
        self._changed = asyncio.Condition()
        for name in (EVENTS_FILE, GROUPS_FILE):
            _cut(run_dir / name, positions.get(name, 0))
        self._events = _read_events(run_dir / EVENTS_FILE)
        for event in self._events:
            self._note(event)
        self._lines = LineFile(run_dir / EVENTS_FILE)
        self._groups = LineFile(run_dir / GROUPS_FILE)
        self._tensorboard: SummaryWriter | None = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=first_step + 1 if self._events else None
        )
        self._trackers = Trackers(tracked, on_failure=self._lose_curves) if tracked else None

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended in this process."""
        return self.state in (*FINAL_STATES, "suspended")

    @property
    def detail(self) -> str:
        """Detail of the latest state record, and which curves ended before the run."""
        return "; ".join(filter(None, (self._detail, *self._lost_curves)))

    @property
    def positions(self) -> dict[str, int]:
        """The length of each file in bytes, by name."""
        return {file.path.name: file.position for file in (self._lines, self._groups)}

    def write_waiting(self) -> None:
        """Write the lines that wait. Raises OSError while the disk is full."""
        for file in (self._lines, self._groups):
            file.write_waiting()

    def sync(self) -> None:
        """Flush what was written to the disk; blocks."""
        self._lines.sync()
        self._groups.sync()

    async def emit(self, event: RunEvent) -> None:
        """Record an event. Subscribers get it whatever the disk does."""
        self._note(event)
        self.changed_at = time.monotonic()
        self._events.append(event)
        self._write(self._lines, event.model_dump_json())
        async with self._changed:
            self._changed.notify_all()
        if not isinstance(event, StateRecord):
            self._metrics.record(event)
            self._plot(event)

    def count_refusal(self) -> None:
        """Count a refused update, which is no event; its batch is kept elsewhere."""
        self._metrics.refused_updates.inc()

    def _write(self, file: LineFile, line: str) -> None:
        """Append the line, or let it wait; a full disk is logged once until lines are written."""
        num_waiting = file.num_waiting
        try:
            file.append(line)
        except OSError as error:
            self._metrics.log_failures.inc()
            if not num_waiting:
                log.error(
                    "%s cannot be written: %s; the run continues and keeps its lines in memory, "
                    "without a checkpoint until they are written: free space there",
                    file.path,
                    error.strerror or error,
                )
            return
        if num_waiting:
            log.info("%s has the %d lines that waited", file.path, num_waiting)

    def _plot(self, event: StepRecord | EvalRecord) -> None:
        numbers = {f"{event.kind}/{name}": value for name, value in scalars(event).items()}
        if self._trackers:
            self._trackers.log(numbers, event.step)
        if self._tensorboard is None:
            return
        try:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, event.step)
        except Exception as error:  # TensorBoard's thread is dead: give it up for good.
            self._give_up_tensorboard(error)

    def _give_up_tensorboard(self, error: Exception) -> None:
        self._tensorboard = None
        self._lose_curves(f"{self.run_dir / 'tensorboard'} takes no more: {error}")

    def _lose_curves(self, problem: str) -> None:
        """Log once that the curves of TensorBoard or a tracker end here; from any thread."""
        self._lost_curves.append(problem)
        self._metrics.log_failures.inc()
        log.error(
            "%s; its curves end here, %s has all numbers: mend it, stop the run and post it again "
            "for new curves",
            problem,
            self.run_dir / EVENTS_FILE,
        )

    def finish_trackers(self) -> None:
        """Let trackers send what they have; blocks up to tracking.FINISH_TIMEOUT_S."""
        if self._trackers:
            self._trackers.finish(failed=self.state == "failed")

    def emit_batch(self, step: int, batch: GroupBatch | PairBatch) -> None:
        """Write what `step` was trained on, and what was set aside: one line per group or pair."""
        if isinstance(batch, PairBatch):
            lines = [{"position": position} for position in batch.positions]
        else:
            lines = [_group_line(group) for group in batch.groups]
            lines += [{**_group_line(group), "set_aside": True} for group in batch.set_aside]
        for line in lines:
            self._write(self._groups, json.dumps({"step": step, **line}))

    def _note(self, event: RunEvent) -> None:
        if isinstance(event, StateRecord):
            self.state, self._detail = event.state, event.detail
        elif isinstance(event, StepRecord):
            self.last_step = event
        else:
            self.last_eval = event

    async def events(self, start: int = 0) -> AsyncIterator[tuple[int, RunEvent]]:
        """Numbered events from `start` on, as they come, until the run has ended.

        A subscriber that saw events which the checkpoint cut off gets the new ones.
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
        """Write waiting lines and close the files; lines that cannot be written are lost, and
        logged."""
        for file in (self._lines, self._groups):
            try:
                try:
                    file.write_waiting()
                finally:
                    file.close()
            except OSError as error:
                self._metrics.log_failures.inc()
                log.error(
                    "%s lacks its last %d lines: %s; free space there: a resumed run starts "
                    "from its last checkpoint",
                    file.path,
                    file.num_waiting,
                    error.strerror or error,
                )
        if self._tensorboard is not None:
            try:
                self._tensorboard.close()
            except Exception as error:  # TensorBoard's thread is dead.
                self._give_up_tensorboard(error)


def _group_line(group: PendingGroup) -> dict[str, Any]:
    assert group.scored, "it was taken"
    completions = group.scored.completions
    return {
        "position": group.position,
        "rewards": [scored.reward for scored in completions],
        "segments": [
            [[str(segment.policy), segment.num_tokens] for segment in c.completion.segments]
            for c in completions
        ],
        "finish_reasons": [scored.completion.finish_reason for scored in completions],
    }


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
    """The last event of a run if it is a state record, else None."""
    try:
        with (run_dir / EVENTS_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            event = _EVENT.validate_json(file.read().splitlines()[-1])
    except (FileNotFoundError, IndexError, ValidationError):  # Killed early, or within a line.
        return None
    return event if isinstance(event, StateRecord) else None
