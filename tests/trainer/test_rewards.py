"""Rewards are numbers somebody computed; a failure to compute one is an error, never a 0."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from services.tokens import PromptEncoder
from services.trainer.data import Prompt
from services.trainer.rewards import (
    RewardBatch,
    Scorer,
    build_reward,
    overlong_penalty,
    punish_overlong,
)
from services.trainer.run_config import (
    ExactMatchReward,
    FunctionReward,
    HttpReward,
    OverlongConfig,
    RegexReward,
    RewardConfig,
)
from shared.errors import RewardFailed
from shared.schemas import Completion, CompletionGroup, PolicyId, SamplingParams, Segment

pytestmark = pytest.mark.anyio
BATCH = RewardBatch(
    prompts=["s21=", "s43="], completions=["12", "43"], columns={"answer": ["12", "34"]}
)


def count_characters(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    return [
        float(len(p) + len(c) + len(a))
        for p, c, a in zip(prompts, completions, answer, strict=True)
    ]


async def always_half(completions: list[str], **_: object) -> list[float]:
    return [0.5 for _ in completions]


def broken(**_: object) -> list[float]:
    raise ZeroDivisionError("in the user's code")


def forgets_to_return(**_: object) -> None:
    pass


async def asleep(**_: object) -> list[float]:
    await asyncio.sleep(60)
    return []


_running = threading.Lock()


def alone(completions: list[str], **_: object) -> list[float]:
    assert _running.acquire(blocking=False), "it runs twice"
    time.sleep(0.05)
    _running.release()
    return [1.0] * len(completions)


def one_short(completions: list[str], **_: object) -> list[float]:
    return [1.0] * (len(completions) - 1)


def not_finite(completions: list[str], **_: object) -> list[float]:
    return [float("nan")] * len(completions)


def function(name: str) -> FunctionReward:
    return FunctionReward(path=f"{__name__}:{name}")


async def test_exact_match_compares_with_the_column() -> None:
    assert list(await build_reward(ExactMatchReward())(BATCH)) == [1.0, 0.0]


async def test_exact_match_without_its_column_is_an_error() -> None:
    with pytest.raises(RewardFailed, match="no column 'gold'"):
        await build_reward(ExactMatchReward(column="gold"))(BATCH)


@pytest.mark.parametrize(
    ("pattern", "full", "expected"),
    [(r"\d\d", True, [1.0, 1.0]), (r"1", True, [0.0, 0.0]), (r"1", False, [1.0, 0.0])],
)
async def test_regex_matches_whole_or_anywhere(
    pattern: str, full: bool, expected: list[float]
) -> None:
    assert list(await build_reward(RegexReward(pattern=pattern, full=full))(BATCH)) == expected


async def test_a_function_gets_prompts_completions_and_columns() -> None:
    assert list(await build_reward(function("count_characters"))(BATCH)) == [8.0, 8.0]


async def test_a_coroutine_function_is_awaited() -> None:
    assert list(await build_reward(function("always_half"))(BATCH)) == [0.5, 0.5]


@pytest.mark.parametrize("path", ["no_such_module:f", f"{__name__}:no_such_function"])
def test_a_function_that_cannot_be_imported_is_refused_before_the_run(path: str) -> None:
    with pytest.raises(ValueError, match="cannot be imported"):
        build_reward(FunctionReward(path=path))


def test_a_pattern_that_does_not_compile_is_refused_before_the_run() -> None:
    with pytest.raises(ValueError, match="does not compile"):
        build_reward(RegexReward(pattern="("))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "ZeroDivisionError"),
        ("forgets_to_return", "forgets_to_return raised TypeError"),
        ("one_short", "gave 1 values for 2 completions"),
        ("not_finite", "nan for completion 0"),
    ],
)
async def test_a_reward_that_fails_is_never_zero(
    name: str, message: str, tiny_checkpoint: Path
) -> None:
    """NeMo-RL#3589: failures became rewards of 0 and biased the baseline."""
    scorer = Scorer([function(name)], PromptEncoder.load(tiny_checkpoint))
    with pytest.raises(RewardFailed, match=message):
        await scorer.score(PROMPTS, GROUPS)


async def test_a_function_that_hangs_ends_at_its_deadline() -> None:
    config = FunctionReward(path=f"{__name__}:asleep", timeout_s=0.05)
    with pytest.raises(RewardFailed, match=r"asleep gave no rewards within 0\.05 s"):
        await build_reward(config)(BATCH)


async def test_a_reward_function_never_runs_twice_at_once(tiny_checkpoint: Path) -> None:
    """An evaluation scores while groups ahead are scored."""
    scorer = Scorer([function("alone")], PromptEncoder.load(tiny_checkpoint))
    await asyncio.gather(scorer.score(PROMPTS, GROUPS), scorer.score(PROMPTS, GROUPS))


async def test_scores_are_weighted_sums_in_the_order_of_the_completions(
    tiny_checkpoint: Path,
) -> None:
    configs: list[RewardConfig] = [ExactMatchReward(weight=2.0), function("always_half")]
    scored = await Scorer(configs, PromptEncoder.load(tiny_checkpoint)).score(PROMPTS, GROUPS)
    assert [[c.reward for c in group.completions] for group in scored] == [[2.5], [0.5]]
    assert [[c.rewards for c in group.completions] for group in scored] == [[(2, 0.5)], [(0, 0.5)]]


# --- overlong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(1, 0.0), (80, 0.0), (85, -0.5), (90, -1.0), (100, -2.0)]
)
def test_the_overlong_penalty_begins_at_the_buffer_and_is_full_at_max_tokens(
    num_tokens: int, expected: float
) -> None:
    penalty = overlong_penalty(num_tokens, max_tokens=100, buffer_tokens=20, penalty=2.0)
    assert penalty == pytest.approx(expected)


async def test_the_overlong_penalty_is_one_more_reward(tiny_checkpoint: Path) -> None:
    scored = await Scorer([ExactMatchReward()], PromptEncoder.load(tiny_checkpoint)).score(
        PROMPTS, GROUPS
    )
    config = OverlongConfig(buffer_tokens=2)
    (group, _) = punish_overlong(scored, config, max_tokens=4)
    (completion,) = group.completions  # of 3 tokens
    assert (completion.rewards, completion.reward) == ((1.0, -0.5), 0.5)


# --- HTTP ---------------------------------------------------------------------------------------


class RewardService(HTTPServer):
    """Answers each POST with the next of `answers`: (status, body)."""

    answers: list[tuple[int, bytes]]
    bodies: list[dict[str, Any]]


class _Handler(BaseHTTPRequestHandler):
    server: RewardService

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.bodies.append(json.loads(self.rfile.read(length)))
        status, body = self.server.answers.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[RewardService]:
    server = RewardService(("127.0.0.1", 0), _Handler)
    server.answers, server.bodies = [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def over_http(service: RewardService, max_attempts: int = 2) -> HttpReward:
    return HttpReward(
        url=f"http://127.0.0.1:{service.server_port}/reward", max_attempts=max_attempts
    )


async def test_a_reward_service_is_asked_with_the_whole_batch(service: RewardService) -> None:
    service.answers = [(200, b'{"rewards": [0.25, 1]}')]
    assert list(await build_reward(over_http(service))(BATCH)) == [0.25, 1]
    assert service.bodies[0]["columns"] == {"answer": ["12", "34"]}


async def test_a_reward_service_that_fails_is_asked_again(service: RewardService) -> None:
    service.answers = [(503, b""), (200, b'{"rewards": [1, 0]}')]
    assert list(await build_reward(over_http(service))(BATCH)) == [1, 0]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([(503, b""), (503, b"")], "HTTP 503"),
        ([(404, b"")], "HTTP 404"),
        ([(200, b"[]")], "must answer"),
        ([(200, b'{"rewards": null}')], "must answer .* not None"),
    ],
)
async def test_a_reward_service_without_rewards_is_an_error(
    service: RewardService, answers: list[tuple[int, bytes]], message: str
) -> None:
    service.answers = answers
    with pytest.raises(RewardFailed, match=message):
        await build_reward(over_http(service))(BATCH)
    assert not service.answers


PROMPTS = [
    Prompt("s21=", (15, 5, 4, 14), {"answer": "12"}),
    Prompt("s43=", (15,), {"answer": "34"}),
]
GROUPS = [
    CompletionGroup(
        prompt_token_ids=prompt.token_ids,
        sampling=SamplingParams(),
        completions=(
            Completion(
                token_ids=ids,
                logprobs=(-1.0,) * len(ids),
                segments=(Segment(policy=PolicyId(run_id="r", version=0), num_tokens=len(ids)),),
                finish_reason="stop",
            ),
        ),
    )
    for prompt, ids in zip(PROMPTS, ((4, 5, 2), (7, 6, 2)), strict=True)
]
