"""Was it good? From groups and the columns of their prompts to scored groups.

A reward that cannot be computed raises RewardFailed, with the completion that it failed for where
that can be found out: it is never a 0.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from services.tokens import PromptEncoder
from services.trainer.data.rows import Prompt
from services.trainer.rewards.batch import NoNumber, Reward, RewardBatch, RewardProblem
from services.trainer.rewards.built_in import build_reward, say_nothing
from services.trainer.rewards.service import OnStall
from services.trainer.run_config import OverlongConfig, RewardConfig
from shared.errors import RewardFailed
from shared.schemas import Completion, CompletionGroup, ScoredCompletion, ScoredGroup

_MAX_SEARCH_S = 30.0  # Time limit of the search for the completion that made a reward fail.


class Scorer:
    """The weighted rewards of a run: each, and their sum. `close` it."""

    def __init__(self, configs: Sequence[RewardConfig], encoder: PromptEncoder) -> None:
        """Raises ValueError for a reward that cannot be built."""
        # Called with why the run waits, and with "" once it continues.
        self.on_stall: OnStall = say_nothing
        self._rewards = [(config, build_reward(config, self._stalled)) for config in configs]
        self._encoder = encoder
        self._lock = asyncio.Lock()  # A reward never runs twice at the same time.

    async def _stalled(self, why: str) -> None:
        await self.on_stall(why)

    async def check(self, datasets: Mapping[str, Sequence[Prompt]]) -> None:
        """Try what needs no completion. Raises ValueError for a reward that cannot work with the
        columns of the prompts; each dataset has the name it has in the config."""
        for dataset, prompts in datasets.items():
            for _, reward in self._rewards:
                await reward.check(_columns(prompts), dataset=dataset)

    def close(self) -> None:
        """End what the rewards started."""
        for _, reward in self._rewards:
            reward.close()

    async def score(
        self, prompts: Sequence[Prompt], groups: Sequence[CompletionGroup]
    ) -> list[ScoredGroup]:
        """Group i answers prompt i. Raises RewardFailed."""
        pairs = [
            (prompt, completion)
            for prompt, group in zip(prompts, groups, strict=True)
            for completion in group.completions
        ]
        batch = RewardBatch(
            prompts=[prompt.text for prompt, _ in pairs],
            completions=[self._encoder.decode(completion.token_ids) for _, completion in pairs],
            columns=_columns([prompt for prompt, _ in pairs]),
        )
        weighted = []
        for config, reward in self._rewards:
            async with self._lock:
                values = await compute(reward, batch)
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


def _columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


async def compute(reward: Reward, batch: RewardBatch) -> list[float]:
    """One finite number per completion. Raises RewardFailed."""
    try:
        values = await reward(batch)
    except RewardProblem as problem:
        culprit = ""
        if problem.may_be_of_one:
            index = await _fails_alone(reward, batch)
            culprit = (
                f": {batch.shown(index)}, is enough for that"
                if index is not None
                else f" for {len(batch)} completions, and none of them is found to be enough for "
                f"that; the first is {batch.shown(0)}"
            )
        raise RewardFailed(f"{reward.name} {problem}{culprit}") from problem
    rewards = []
    for index, value in enumerate(values):
        if isinstance(value, NoNumber):
            raise RewardFailed(
                f"{reward.name} gave {value.text}, not a finite number, for {batch.shown(index)}"
            )
        rewards.append(value)
    return rewards


async def _fails_alone(reward: Reward, batch: RewardBatch) -> int | None:
    """The first completion that makes the reward fail by itself, if found in time.

    A late one counts only if it took most of the time.
    """
    try:
        await reward.start()  # It may have been ended before, for which no completion is to blame.
    except RewardProblem:
        return None
    deadline = time.monotonic() + _MAX_SEARCH_S
    for index in range(len(batch)):
        left_s = deadline - time.monotonic()
        if left_s < _MAX_SEARCH_S / 2:
            return None
        try:
            await reward(batch.part(index, index + 1), timeout_s=left_s)
        except RewardProblem as problem:
            return index if problem.may_be_of_one else None
    return None


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
