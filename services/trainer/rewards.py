"""Was it good? From groups and the columns of their prompts to scored groups.

A reward that cannot be computed raises RewardFailed: an infrastructure failure is never a 0.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from services.tokens import PromptEncoder
from services.trainer.data import Prompt
from services.trainer.run_config import (
    ExactMatchReward,
    FunctionReward,
    HttpReward,
    OverlongConfig,
    RegexReward,
    RewardConfig,
)
from shared.errors import RewardFailed
from shared.schemas import Completion, CompletionGroup, ScoredCompletion, ScoredGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """Parallel by completion: what every reward is computed from."""

    prompts: Sequence[str]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]]


class Reward(Protocol):
    async def __call__(self, batch: RewardBatch) -> Sequence[float]: ...


class Scorer:
    """A run's rewards, weighted: each, and their sum."""

    def __init__(self, configs: Sequence[RewardConfig], encoder: PromptEncoder) -> None:
        self._rewards = [(config, build_reward(config)) for config in configs]
        self._encoder = encoder
        self._lock = asyncio.Lock()  # a reward function of the user's never runs twice at once

    async def score(
        self, prompts: Sequence[Prompt], groups: Sequence[CompletionGroup]
    ) -> list[ScoredGroup]:
        """Group i answers prompt i. Raises RewardFailed."""
        pairs = [
            (prompt, completion)
            for prompt, group in zip(prompts, groups, strict=True)
            for completion in group.completions
        ]
        names = {name for prompt in prompts for name in prompt.columns}
        batch = RewardBatch(
            prompts=[prompt.text for prompt, _ in pairs],
            completions=[self._encoder.decode(completion.token_ids) for _, completion in pairs],
            columns={name: [prompt.columns.get(name) for prompt, _ in pairs] for name in names},
        )
        weighted = []
        for config, reward in self._rewards:
            name = config.path if isinstance(config, FunctionReward) else config.type
            async with self._lock:
                values = _checked(await reward(batch), len(pairs), name)
            weighted.append([config.weight * value for value in values])
        by_completion = zip(*weighted, strict=True)
        return [
            ScoredGroup(
                prompt_token_ids=group.prompt_token_ids,
                sampling=group.sampling,
                completions=tuple(
                    _scored(completion, next(by_completion)) for completion in group.completions
                ),
            )
            for group in groups
        ]


def overlong_penalty(
    num_tokens: int, *, max_tokens: int, buffer_tokens: int, penalty: float
) -> float:
    """DAPO's soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, equation 13), times
    `penalty`: 0 for completions that leave `buffer_tokens` free, then linearly down to -penalty for
    those of `max_tokens`."""
    return -penalty * max(0.0, (num_tokens - (max_tokens - buffer_tokens)) / buffer_tokens)


def punish_overlong(
    groups: Sequence[ScoredGroup], config: OverlongConfig, *, max_tokens: int
) -> list[ScoredGroup]:
    """Groups that were sampled with `max_tokens`, with the penalty as one more reward."""

    def punished(scored: ScoredCompletion) -> ScoredCompletion:
        penalty = overlong_penalty(
            len(scored.completion.token_ids),
            max_tokens=max_tokens,
            buffer_tokens=config.buffer_tokens,
            penalty=config.penalty,
        )
        return _scored(scored.completion, (*scored.rewards, penalty))

    return [
        group.model_copy(update={"completions": tuple(map(punished, group.completions))})
        for group in groups
    ]


def _scored(completion: Completion, rewards: tuple[float, ...]) -> ScoredCompletion:
    return ScoredCompletion(completion=completion, reward=sum(rewards), rewards=rewards)


def build_reward(config: RewardConfig) -> Reward:
    """The reward of a config. Raises ValueError when it cannot be built."""
    match config:
        case ExactMatchReward():
            return _exact_match(config)
        case RegexReward():
            return _regex(config)
        case FunctionReward():
            return _function(config)
        case HttpReward():
            return _http(config)


def _exact_match(config: ExactMatchReward) -> Reward:
    async def reward(batch: RewardBatch) -> list[float]:
        if config.column not in batch.columns:
            raise RewardFailed(f"exact_match: the dataset has no column {config.column!r}")
        answers = batch.columns[config.column]
        return [
            float(completion.strip() == str(answer).strip())
            for completion, answer in zip(batch.completions, answers, strict=True)
        ]

    return reward


def _regex(config: RegexReward) -> Reward:
    try:
        pattern = re.compile(config.pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"reward pattern {config.pattern!r} does not compile: {error}") from error
    matches = pattern.fullmatch if config.full else pattern.search

    async def reward(batch: RewardBatch) -> list[float]:
        return [float(matches(completion) is not None) for completion in batch.completions]

    return reward


def _function(config: FunctionReward) -> Reward:
    module, _, name = config.path.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward function {config.path} cannot be imported: {error}; its folder "
            "must be on the trainer's PYTHONPATH"
        ) from error

    async def reward(batch: RewardBatch) -> Sequence[float]:
        arguments = {"prompts": list(batch.prompts), "completions": list(batch.completions)}
        try:
            async with asyncio.timeout(config.timeout_s) as deadline:
                if inspect.iscoroutinefunction(function):
                    values = await function(**arguments, **batch.columns)
                else:
                    values = await asyncio.to_thread(function, **arguments, **batch.columns)
            return list(values)
        except Exception as error:  # the user's code: name it, whatever it raised
            if deadline.expired():
                problem = f"gave no rewards within {config.timeout_s:g} s"
            else:
                log.error("reward function %s failed", config.path, exc_info=error)
                problem = f"raised {error!r}"
            raise RewardFailed(f"reward function {config.path} {problem}") from error

    return reward


def _http(config: HttpReward) -> Reward:
    async def reward(batch: RewardBatch) -> Sequence[float]:
        body = {
            "prompts": list(batch.prompts),
            "completions": list(batch.completions),
            "columns": {name: list(values) for name, values in batch.columns.items()},
        }
        problem = ""
        async with httpx.AsyncClient(timeout=config.timeout_s) as client:
            for attempt in range(config.max_attempts):
                if attempt:
                    await asyncio.sleep(min(2.0**attempt / 4, 5.0))
                try:
                    response = await client.post(config.url, json=body)
                except httpx.TransportError as error:
                    problem = repr(error)
                    continue
                if response.is_success:
                    return _rewards_field(response, config.url)
                problem = f"HTTP {response.status_code}"
                if response.is_client_error and response.status_code != 429:
                    break  # asking again would not help
        raise RewardFailed(f"the reward service {config.url} gave no rewards: {problem}")

    return reward


def _rewards_field(response: httpx.Response, url: str) -> Sequence[float]:
    try:
        rewards = response.json()["rewards"]
    except (ValueError, KeyError, TypeError) as error:
        raise RewardFailed(f'{url} must answer {{"rewards": [numbers]}}: {error!r}') from error
    if not isinstance(rewards, list):
        raise RewardFailed(f'{url} must answer {{"rewards": [numbers]}}, not {rewards!r:.80}')
    return rewards


def _checked(values: Sequence[float], count: int, name: str) -> Sequence[float]:
    """One finite number per completion, or RewardFailed."""
    if len(values) != count:
        raise RewardFailed(f"reward {name} gave {len(values)} values for {count} completions")
    for index, value in enumerate(values):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise RewardFailed(f"reward {name} is {value!r} for completion {index}, not a number")
    return values
