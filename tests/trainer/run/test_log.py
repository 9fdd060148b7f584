"""Events in order to memory and disk, cut to the checkpoint when a run resumes."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]
    event_accumulator,
)

from services.trainer.data.rows import Prompt
from services.trainer.run.log import RunLog, last_state
from services.trainer.run.pacing import GroupBatch, PendingGroup
from services.trainer.run.pairs import PairBatch
from shared.metrics import TrainerMetrics, scalars
from shared.schemas import (
    Completion,
    EvalRecord,
    LagKl,
    PolicyId,
    RunEvent,
    SamplingParams,
    ScoredCompletion,
    ScoredGroup,
    Segment,
    StateRecord,
    StepRecord,
)
from tests.trainer.conftest import no_file_longer_than

pytestmark = pytest.mark.anyio


def state(detail: str) -> StateRecord:
    return StateRecord(state="running", detail=detail)


def evaluation(step: int, reward: float) -> EvalRecord:
    return EvalRecord(
        step=step,
        policy=PolicyId(run_id="r", version=step),
        num_prompts=1,
        sampled_reward=reward,
        greedy_reward=reward,
        eval_s=1.0,
    )


def step_of(**numbers: Any) -> StepRecord:
    """With what every step has had from the beginning; `numbers` came later."""
    return StepRecord(
        step=1,
        policy=PolicyId(run_id="r", version=1),
        num_groups=1,
        num_constant_groups=0,
        num_samples=2,
        num_tokens=8,
        reward_mean=0.5,
        reward_std=0.5,
        completion_tokens_mean=4.0,
        truncated_fraction=0.0,
        staleness_mean=0.0,
        staleness_max=0,
        num_continued=0,
        num_ready_groups=1,
        num_in_flight_groups=0,
        loss=0.1,
        grad_norm=1.0,
        learning_rate=1e-4,
        entropy=0.5,
        clip_fraction=0.0,
        importance_weight_mean=1.0,
        importance_truncated_fraction=0.0,
        logprob_gap=0.01,
        sampler_kl=1e-4,
        **numbers,
    )


async def test_a_step_written_before_it_had_all_its_numbers_is_read(tmp_path: Path) -> None:
    old = step_of()
    line = old.model_dump_json(exclude_unset=True) + "\n"
    assert "sequence_ess" not in line
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", ' + line[1:])
    log = RunLog(tmp_path, TrainerMetrics(), positions={path.name: path.stat().st_size})
    assert log.last_step == old
    log.close()


async def test_a_step_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    step = step_of(
        staleness_histogram={0: 1, 2: 1}, kl_by_lag=(LagKl(lag=0, kl=1e-4, num_tokens=8),)
    )
    first = RunLog(tmp_path, TrainerMetrics())
    await first.emit(step)
    first.close()
    second = RunLog(tmp_path, TrainerMetrics(), positions=first.positions)
    assert second.last_step == step
    second.close()


def test_only_numbers_that_a_step_has_are_plotted() -> None:
    numbers = scalars(step_of(staleness_histogram={0: 2}, sequence_ess=1.0))
    assert numbers["sequence_ess"] == 1.0
    assert not {"staleness_histogram", "kl_by_lag", "policy", "kind"} & numbers.keys()
    assert not {"value_loss", "preference_margin", "token_ess"} & numbers.keys()


async def test_what_does_not_apply_to_a_step_is_absent_from_its_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, TrainerMetrics())
    await log.emit(step_of())
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["entropy"] == 0.5
    assert not {"value_loss", "preference_margin", "token_ess", "kl_by_lag"} & line.keys()


async def test_subscribers_get_every_event_from_where_they_ask_until_the_end(
    tmp_path: Path,
) -> None:
    log = RunLog(tmp_path, TrainerMetrics())
    states = [state(str(i)) for i in range(3)]
    states.append(StateRecord(state="completed"))
    for event in states:
        await log.emit(event)
    log.close()
    assert [index async for index, _ in log.events()] == [0, 1, 2, 3]
    assert [event async for _, event in log.events(2)] == states[2:]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


async def test_a_run_that_resumes_shows_its_whole_history_under_the_same_numbers(
    tmp_path: Path,
) -> None:
    """What came after the checkpoint is gone: it is done again."""
    first = RunLog(tmp_path, TrainerMetrics())
    kept: list[RunEvent] = [state("a"), evaluation(1, 0.5)]
    for event in kept:
        await first.emit(event)
    positions = first.positions
    await first.emit(evaluation(2, 0.1))
    first.close()

    second = RunLog(tmp_path, TrainerMetrics(), positions=positions, first_step=1)
    assert second.last_eval == kept[1]
    end = StateRecord(state="completed")
    await second.emit(end)
    second.close()
    assert [pair async for pair in second.events()] == list(enumerate([*kept, end]))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [event.model_dump_json() for event in [*kept, end]]


async def test_tensorboard_forgets_the_steps_that_are_done_again(tmp_path: Path) -> None:
    first = RunLog(tmp_path, TrainerMetrics())
    await first.emit(evaluation(1, 0.1))
    positions = first.positions
    await first.emit(evaluation(2, 0.2))
    first.close()
    second = RunLog(tmp_path, TrainerMetrics(), positions=positions, first_step=1)
    await second.emit(evaluation(2, 0.4))
    second.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Scalars("eval/sampled_reward")
    assert [(s.step, round(s.value, 3)) for s in scalars] == [(1, 0.1), (2, 0.4)]


async def test_a_subscriber_that_saw_what_was_cut_off_gets_what_comes(tmp_path: Path) -> None:
    log = RunLog(tmp_path, TrainerMetrics())
    await log.emit(state("a"))

    async def next_event() -> tuple[int, RunEvent]:
        return await anext(log.events(17))

    waiting = asyncio.create_task(next_event())
    await asyncio.sleep(0)
    await log.emit(state("b"))
    assert await waiting == (1, state("b"))
    log.close()


async def test_a_line_that_a_crash_cut_short_is_cut_off(tmp_path: Path) -> None:
    log = RunLog(tmp_path, TrainerMetrics())
    await log.emit(state("a"))
    positions = log.positions
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"ste')
    assert last_state(tmp_path) is None
    log = RunLog(tmp_path, TrainerMetrics(), positions=positions)
    assert [log.state, log.detail] == ["running", "a"]
    log.close()


def test_a_log_that_cannot_be_read_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(state("a").model_dump_json() + "\nnonsense\n")
    with pytest.raises(ValueError, match=f"line 2 of {path} cannot be read"):
        RunLog(tmp_path, TrainerMetrics(), positions={"metrics.jsonl": 1000})


async def test_the_last_state_says_whether_a_run_has_ended(tmp_path: Path) -> None:
    assert last_state(tmp_path) is None
    log = RunLog(tmp_path, TrainerMetrics())
    assert last_state(tmp_path) is None
    await log.emit(StateRecord(state="stopped"))
    assert last_state(tmp_path) == StateRecord(state="stopped")
    log.close()


async def test_a_line_that_the_disk_does_not_take_waits_for_the_next_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No half of it is on disk, subscribers have it, and an outage is said once."""
    metrics = TrainerMetrics()
    log = RunLog(tmp_path, metrics)
    states = [state("a"), state("b"), state("c"), StateRecord(state="completed")]
    await log.emit(states[0])
    whole = log.positions["metrics.jsonl"]
    with no_file_longer_than(whole + 10):
        for event in states[1:3]:
            await log.emit(event)
        with pytest.raises(OSError, match="File too large"):
            log.write_waiting()
    assert (tmp_path / "metrics.jsonl").stat().st_size == log.positions["metrics.jsonl"] == whole
    assert log.detail == "c"
    assert metrics.registry.get_sample_value("tandem_trainer_log_failures_total") == 2
    (record,) = caplog.records
    assert "metrics.jsonl cannot be written: File too large" in record.message
    assert "free space there" in record.message
    await log.emit(states[3])
    assert [event async for _, event in log.events()] == states
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [event.model_dump_json() for event in states]


async def test_a_log_that_closes_on_a_full_disk_says_what_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = RunLog(tmp_path, TrainerMetrics())
    await log.emit(state("a"))
    with no_file_longer_than(log.positions["metrics.jsonl"]):
        await log.emit(StateRecord(state="completed"))
        log.close()
    assert "metrics.jsonl lacks its last 1 lines: File too large" in caplog.records[-1].message
    assert last_state(tmp_path) == state("a")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_tensorboard_that_died_costs_no_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    threads = set(threading.enumerate())
    log = RunLog(tmp_path, TrainerMetrics())
    (writer,) = set(threading.enumerate()) - threads
    (curves,) = (tmp_path / "tensorboard").iterdir()
    with no_file_longer_than(curves.stat().st_size):
        for step in range(100):
            await log.emit(evaluation(step, 0.5))
            await asyncio.sleep(0.001)
            if log._tensorboard is None:
                break
    writer.join(timeout=10)  # or its last words land in the test that follows
    await log.emit(evaluation(101, 0.5))
    await log.emit(StateRecord(state="completed"))
    log.close()
    told = [r.message for r in caplog.records if "tensorboard takes no more" in r.message]
    assert len(told) == 1
    assert last_state(tmp_path) == StateRecord(state="completed")


async def test_groups_and_pairs_of_a_step_are_told_by_their_positions(tmp_path: Path) -> None:
    """A group that was set aside was consumed, but nothing was learned from it."""

    def group(position: int, *rewards: float) -> PendingGroup:
        policy, prompt = PolicyId(run_id="r", version=3), Prompt("", (1,), {})
        completion = Completion(
            token_ids=(1, 2),
            logprobs=(-1.0, -1.0),
            segments=(Segment(policy=policy, num_tokens=2),),
            finish_reason="stop",
        )
        scored = ScoredGroup(
            prompt_token_ids=(1,),
            sampling=SamplingParams(n=2),
            completions=tuple(ScoredCompletion(completion=completion, reward=r) for r in rewards),
        )
        return PendingGroup(position, prompt, policy, 0.0, scored=scored)

    run_log = RunLog(tmp_path, TrainerMetrics())
    batch = GroupBatch(
        groups=[group(7, 0.0, 1.0)],
        set_aside=[group(6, 1.0, 1.0)],
        num_ready_groups=1,
        num_in_flight_groups=0,
    )
    run_log.emit_batch(4, batch)
    run_log.emit_batch(5, PairBatch([8], []))
    run_log.close()
    trained, set_aside, pair = map(json.loads, (tmp_path / "groups.jsonl").read_text().splitlines())
    assert (trained["step"], trained["position"], trained["rewards"]) == (4, 7, [0.0, 1.0])
    assert trained["segments"] == [[["r.1@3", 2]]] * 2
    assert "set_aside" not in trained
    assert (set_aside["step"], set_aside["position"], set_aside["set_aside"]) == (4, 6, True)
    assert pair == {"step": 5, "position": 8}
