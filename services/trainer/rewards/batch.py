"""What a reward is computed from, and what it can say instead of numbers."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_SHOWN_CHARACTERS = 80  # Longest excerpt of a prompt, completion or value in a message.


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """What every reward is computed from; parallel lists with one entry per completion."""

    prompts: Sequence[str]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.completions)

    def part(self, start: int, end: int) -> RewardBatch:
        columns = {name: values[start:end] for name, values in self.columns.items()}
        return RewardBatch(self.prompts[start:end], self.completions[start:end], columns)

    def shares(self, max_completions: int) -> Iterator[RewardBatch]:
        """Parts of at most that many completions; those of one prompt stay together."""
        start = 0
        while start < len(self):
            end = min(start + max_completions, len(self))
            while start < end < len(self) and self.prompts[end] == self.prompts[end - 1]:
                end -= 1
            if end == start:  # One prompt alone has more completions than that.
                end = start + 1
                while end < len(self) and self.prompts[end] == self.prompts[start]:
                    end += 1
            yield self.part(start, end)
            start = end

    def shown(self, index: int) -> str:
        """A completion and its prompt, abbreviated."""
        return (
            f"completion {index} of {len(self)}, {shown(self.completions[index])} to the prompt "
            f"{shown(self.prompts[index])}"
        )


def shown(text: str) -> str:
    """A text in quotes, without its middle when it is long."""
    if len(text) <= _SHOWN_CHARACTERS:
        return repr(text)
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]!r} ... {text[-half:]!r}"


@dataclass(frozen=True, slots=True)
class NoNumber:
    """A value instead of a reward, as it would be printed."""

    text: str


def as_reward(value: object) -> float | NoNumber:
    """A finite float from any kind of real number, including numpy's."""
    if isinstance(value, numbers.Real):
        try:
            number = float(value)
        except (OverflowError, ValueError):
            number = math.inf
        if math.isfinite(number):
            return number
    return NoNumber(repr(value)[:_SHOWN_CHARACTERS])


class RewardProblem(Exception):
    """Why a batch has no rewards: the end of a sentence that begins with the reward's name.

    `may_be_of_one`: a single completion may be the cause, so that each is tried alone.
    """

    def __init__(self, problem: str, *, may_be_of_one: bool = False) -> None:
        super().__init__(problem)
        self.may_be_of_one = may_be_of_one


class Reward(Protocol):
    """Computes rewards. `close` ends what `check`, `start` and `__call__` start."""

    @property
    def name(self) -> str:
        """The reward's name in sentences."""

    async def check(self, columns: Mapping[str, Sequence[Any]], *, dataset: str) -> None:
        """Raises ValueError when it can never work, for example when `dataset` lacks a column."""

    async def start(self) -> None:
        """Get ready to compute, which `__call__` also does by itself. Raises RewardProblem."""

    async def __call__(
        self, batch: RewardBatch, *, timeout_s: float | None = None
    ) -> Sequence[float | NoNumber]:
        """One value per completion. Raises RewardProblem.

        `timeout_s` replaces the config's limit for a single trial.
        """

    def close(self) -> None: ...
