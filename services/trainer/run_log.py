"""What happened in a run: to memory and subscribers, metrics.jsonl, TensorBoard and Prometheus."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import AsyncIterator
from pathlib import Path

from shared.metrics import TrainerMetrics, scalars
from shared.schemas import EvalRecord, RunEvent, RunState, StateRecord, StepRecord


class RunLog:
    """Events in the order they were emitted. `state` is that of the latest state record."""

    def __init__(self, run_dir: Path, metrics: TrainerMetrics) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = run_dir
        self.state: RunState = "running"
        self.detail = ""
        self.last_step: StepRecord | None = None
        self.last_eval: EvalRecord | None = None
        self._metrics = metrics
        self._events: list[RunEvent] = []
        self._changed = asyncio.Condition()
        self._lock = (run_dir / "lock").open("w")  # held while the run goes on
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._jsonl = (run_dir / "metrics.jsonl").open("a", buffering=1)
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"))

    @property
    def has_ended(self) -> bool:
        return self.state in ("completed", "stopped", "failed")

    async def emit(self, event: RunEvent) -> None:
        if isinstance(event, StateRecord):
            self.state, self.detail = event.state, event.detail
        else:
            self._record(event)
        self._jsonl.write(event.model_dump_json() + "\n")
        self._events.append(event)
        async with self._changed:
            self._changed.notify_all()

    def _record(self, record: StepRecord | EvalRecord) -> None:
        if isinstance(record, StepRecord):
            self.last_step = record
        else:
            self.last_eval = record
        self._metrics.record(record)
        for name, value in scalars(record).items():
            self._tensorboard.add_scalar(f"{record.kind}/{name}", value, record.step)

    async def events(self, start: int = 0) -> AsyncIterator[tuple[int, RunEvent]]:
        """Numbered events from `start` on, as they come, until the run has ended."""
        index = start
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
        self._jsonl.close()
        self._lock.close()
        self._tensorboard.close()


def run_has_ended(run_dir: Path) -> bool:
    """True for the folder of a run that no living trainer is in."""
    if not (run_dir / "lock").is_file():
        return False
    with (run_dir / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
