"""What becomes of a request that vLLM fails on after it has taken it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from shared.schemas import SamplingParams

pytestmark = pytest.mark.anyio


class Failing:
    """vLLM's engine, which registers a request and then cannot send it on."""

    def __init__(self) -> None:
        self.registered: set[str] = set()

    async def generate(self, *_: Any, request_id: str, **__: Any) -> AsyncGenerator[Any]:
        self.registered.add(request_id)
        raise OverflowError("can't serialize ints >= 2**64")
        yield

    async def abort(self, request_id: str) -> None:
        self.registered.discard(request_id)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # vLLM's imports
async def test_a_request_that_fails_in_the_call_is_aborted() -> None:
    """Fault S1: otherwise it stays registered, and the watchdog ends an idle replica."""
    from services.rollout.vllm_engine import VllmEngine

    engine = VllmEngine.__new__(VllmEngine)
    engine.async_llm = failing = Failing()
    with pytest.raises(Exception, match="serialize"):
        async for _ in engine.generate("r", (1, 3), SamplingParams(), None, stream=False):
            pass
    assert failing.registered == set()
