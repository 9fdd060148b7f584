"""Every algorithm climbs on the demo's task, as a run with a random reward does not.

The cases of benchmarks/learning.py on real services and the real engine: `make test-learning`. Its
reports have what was measured; the margins are far from it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from rich.console import Console

from benchmarks.learning import CASES, CONTROL, learn, serving
from examples.demo.services import DemoServices

pytestmark = [pytest.mark.anyio, pytest.mark.learning, pytest.mark.timeout(300)]

ALGORITHMS = [case for case in CASES if case != CONTROL]
_SILENT = Console(quiet=True)


@pytest.fixture(scope="module")
async def services(
    anyio_backend: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[DemoServices]:
    async with serving(tmp_path_factory.mktemp("learning"), _SILENT) as services:
        yield services


@pytest.mark.parametrize("case", ALGORITHMS)
async def test_held_out_accuracy_climbs(services: DemoServices, case: str) -> None:
    outcome = await learn(services, case, _SILENT)
    assert 0.2 <= outcome.start <= 0.5
    # A policy that learns from others' pairs never sees what it says itself.
    assert outcome.rise >= (0.25 if case == "dpo" else 0.4)
    is_sampled = case != "dpo"
    assert all((step.num_fresh_tokens > 0) is is_sampled for step in outcome.history.steps)
    assert outcome.max_sampler_kl < 2e-4  # what the replica computes is the trainer's policy
    assert not outcome.complaints


async def test_a_random_reward_teaches_nothing(services: DemoServices) -> None:
    outcome = await learn(services, CONTROL, _SILENT)
    assert 0.2 <= outcome.start <= 0.5
    assert outcome.rise < 0.05
    assert not outcome.complaints
