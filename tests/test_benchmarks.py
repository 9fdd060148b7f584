"""The conclusions that benchmarks draw from measurements, and the processes that they drive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.child import Child, ChildError, loop_in_a_thread
from benchmarks.engines import Workload
from benchmarks.load import Arrivals
from benchmarks.sync import Disturbance, Span


def steady(start: float, end: float, *, every: float) -> list[tuple[float, int]]:
    """Arrivals of one token at a time, at equal intervals."""
    return [(start + i * every, 1) for i in range(round((end - start) / every) + 1)]


# --- arrivals -----------------------------------------------------------------------------------


def test_the_longest_gap_is_of_one_completion_and_touches_the_span() -> None:
    arrivals = Arrivals([[(0.0, 1), (1.0, 1), (5.0, 1)], [(0.0, 1), (3.0, 1), (4.0, 1)]])
    assert arrivals.longest_gap_s(0.0, 0.5) == 3.0
    assert arrivals.longest_gap_s(2.0, 2.5) == 4.0


def test_a_pause_between_two_completions_is_no_gap() -> None:
    arrivals = Arrivals([[(0.0, 1), (0.1, 1)], [(9.0, 1), (9.1, 1)]])
    assert arrivals.longest_gap_s(0.0, 10.0) == pytest.approx(0.1)


def test_tokens_are_spread_over_the_time_since_the_last() -> None:
    arrivals = Arrivals([[(0.0, 1), (2.0, 4)]])
    assert arrivals.tokens_per_s(0.5, 1.0) == 2.0


def test_tokens_per_s_are_those_of_a_running_completion() -> None:
    one, other = steady(0.0, 1.0, every=0.1), steady(2.0, 4.0, every=0.1)
    assert Arrivals([one, other]).tokens_per_s(0.0, 4.0) == pytest.approx(10.0)


# --- disturbance --------------------------------------------------------------------------------


def test_nothing_that_happens_is_no_disturbance() -> None:
    arrivals = Arrivals([steady(0.0, 6.0, every=0.01)])
    felt = Disturbance.of(Span(3.0, 3.1), arrivals)
    assert felt.gap_s == pytest.approx(0.01)
    assert felt.usual_gap_s == pytest.approx(0.01)
    assert felt.dip == pytest.approx(0.0, abs=1e-6)


def test_a_pause_of_a_tenth_of_a_second_is_a_dip_of_a_tenth() -> None:
    tokens = [*steady(0.0, 3.0, every=0.01), *steady(3.11, 6.0, every=0.01)]
    felt = Disturbance.of(Span(3.0, 3.1), Arrivals([tokens]))
    assert felt.gap_s == pytest.approx(0.11)
    assert felt.usual_gap_s == pytest.approx(0.01)
    assert felt.dip == pytest.approx(0.1, abs=0.002)


# --- workload -----------------------------------------------------------------------------------


def test_another_seed_has_prompts_of_its_own() -> None:
    work = Workload(num_requests=3, concurrency=2, prompt=4, completion=1, vocabulary=1000)
    other = Workload(num_requests=3, concurrency=2, prompt=4, completion=1, vocabulary=1000, seed=1)
    assert [len(prompt) for prompt in work.prompts()] == [4, 4, 4]
    assert work.prompts() == work.prompts()
    assert work.prompts() != other.prompts()


# --- child --------------------------------------------------------------------------------------


@contextlib.contextmanager
def a_list(*items: int) -> Iterator[tuple[list[int], asyncio.AbstractEventLoop]]:
    print("built")
    with loop_in_a_thread() as loop:
        yield list(items), loop


async def add(numbers: list[int], number: int) -> int:
    asyncio.get_running_loop()
    numbers.append(number)
    return sum(numbers)


async def fail(numbers: list[int]) -> None:
    raise KeyError(numbers[0])


@contextlib.contextmanager
def unfit() -> Iterator[tuple[None, asyncio.AbstractEventLoop]]:
    raise ValueError("there is no such engine")
    yield


def test_a_child_keeps_what_it_has_built_and_what_failed_there_is_told(tmp_path: Path) -> None:
    with Child("numbers", tmp_path / "log", {}, a_list, 1, 2) as child:
        assert child.wait_until_ready() > 0
        assert child.run(add, 3) == 6
        with pytest.raises(ChildError, match=r"numbers: (?s:.*)KeyError: 1(?s:.*)built"):
            child.run(fail)
        assert child.run(add, 4) == 10


def test_a_child_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    with (
        Child("engine", tmp_path / "log", {}, unfit) as child,
        pytest.raises(ChildError, match="there is no such engine"),
    ):
        child.wait_until_ready()
