"""Events in order to memory and disk, and who is in a run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.trainer.run_log import RunLog, run_has_ended
from shared.metrics import TrainerMetrics
from shared.schemas import StateRecord

pytestmark = pytest.mark.anyio


async def test_subscribers_get_every_event_from_where_they_ask_until_the_end(
    tmp_path: Path,
) -> None:
    log = RunLog(tmp_path, TrainerMetrics())
    states = [StateRecord(state="running", detail=str(i)) for i in range(3)]
    states.append(StateRecord(state="completed"))
    for state in states:
        await log.emit(state)
    log.close()
    assert [index async for index, _ in log.events()] == [0, 1, 2, 3]
    assert [event async for _, event in log.events(2)] == states[2:]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_has_ended_when_no_trainer_is_in_its_folder(tmp_path: Path) -> None:
    """Two trainers in one folder must not take each other's live runs for their own."""
    assert not run_has_ended(tmp_path / "unknown")
    log = RunLog(tmp_path, TrainerMetrics())
    assert not run_has_ended(tmp_path)
    log.close()
    assert run_has_ended(tmp_path)
