"""A task of a service never ends without a word (fault S7)."""

from __future__ import annotations

import asyncio

import pytest

from services.background import Background

pytestmark = pytest.mark.anyio


async def test_a_task_that_fails_is_logged_counted_and_passed_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures: list[str] = []
    errors: list[Exception] = []

    async def work() -> None:
        raise ZeroDivisionError("broken")

    background = Background(failures.append)
    await background.run("the work", work(), on_error=errors.append)
    assert failures == ["the work"]
    assert [type(error) for error in errors] == [ZeroDivisionError]
    assert "the work failed" in caplog.text
    assert "ZeroDivisionError: broken" in caplog.text


async def test_a_repeated_task_starts_again_after_a_failure() -> None:
    failures: list[str] = []
    num_calls = 0
    done = asyncio.Event()

    async def work() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise ZeroDivisionError
        if num_calls == 3:
            done.set()

    background = Background(failures.append)
    task = background.repeat("the work", work, pause_s=0.0)
    async with asyncio.timeout(20):
        await done.wait()
    await background.aclose()
    assert task.cancelled()
    assert failures == ["the work"]
