"""The rewards that a run config can name: exact match, regex, a Python function, a service."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from services.trainer.rewards.batch import NoNumber, Reward, RewardBatch, RewardProblem
from services.trainer.rewards.process import FunctionFailed, FunctionProcess
from services.trainer.rewards.service import OnStall, ServiceReward
from services.trainer.run_config import (
    ExactMatchReward,
    FunctionReward,
    HttpReward,
    RegexReward,
    RewardConfig,
)


async def say_nothing(_: str) -> None:
    pass


def build_reward(config: RewardConfig, on_stall: OnStall = say_nothing) -> Reward:
    """The reward of a config. Raises ValueError when it cannot be built."""
    match config:
        case ExactMatchReward():
            return _ExactMatch(config)
        case RegexReward():
            return _Regex(config)
        case FunctionReward():
            return _Function(config)
        case HttpReward():
            return ServiceReward(config, on_stall)


class _BuiltIn:
    """Rewards that start nothing and never fail."""

    name = ""

    async def check(self, columns: Mapping[str, Sequence[Any]], *, dataset: str) -> None:
        pass

    async def start(self) -> None:
        pass

    def close(self) -> None:
        pass


class _ExactMatch(_BuiltIn):
    def __init__(self, config: ExactMatchReward) -> None:
        self.name = "reward exact_match"
        self._column = config.column

    async def check(self, columns: Mapping[str, Sequence[Any]], *, dataset: str) -> None:
        if self._column not in columns:
            raise ValueError(
                f"reward exact_match needs the column {self._column!r}; {dataset} has "
                f"{_listed(columns)} besides the prompts: name the right column in rewards"
            )
        for row, answer in enumerate(columns[self._column]):
            if answer is None:
                raise ValueError(
                    f"row {row} of {dataset} has nothing in column {self._column!r}, which "
                    "reward exact_match compares with: leave the row out"
                )

    async def __call__(
        self, batch: RewardBatch, *, timeout_s: float | None = None
    ) -> list[float | NoNumber]:
        return [
            float(completion.strip() == str(answer).strip())
            for completion, answer in zip(
                batch.completions, batch.columns[self._column], strict=True
            )
        ]


class _InProcess:
    """A function in a process of its own (process.py), which can be killed."""

    def __init__(
        self, name: str, path: str, timeout_s: float, *, max_memory_bytes: int | None = None
    ) -> None:
        self.name = name
        self._timeout_s = timeout_s
        self._process = FunctionProcess(path, max_memory_bytes=max_memory_bytes)

    async def check(self, columns: Mapping[str, Sequence[Any]], *, dataset: str) -> None:
        """It starts with the first batch."""

    async def start(self) -> None:
        try:
            await self._process.start(timeout_s=self._timeout_s)
        except FunctionFailed as failure:
            raise RewardProblem(f"cannot be imported: importing it {failure}") from failure

    def _arguments(self, batch: RewardBatch) -> dict[str, Any]:
        columns = {name: list(values) for name, values in batch.columns.items()}
        given = {"prompts": list(batch.prompts), "completions": list(batch.completions)}
        return {**columns, **given}

    async def __call__(
        self, batch: RewardBatch, *, timeout_s: float | None = None
    ) -> Sequence[float | NoNumber]:
        await self.start()
        try:
            values = await self._process.call(
                self._arguments(batch), timeout_s=timeout_s or self._timeout_s
            )
        except FunctionFailed as failure:
            raise RewardProblem(str(failure), may_be_of_one=True) from failure
        if len(values) != len(batch):
            raise RewardProblem(
                f"gave {len(values)} values for {len(batch)} completions", may_be_of_one=True
            )
        return values

    def close(self) -> None:
        self._process.close()


class _Regex(_InProcess):
    """Some patterns take forever on some texts, and block everything else in their process."""

    def __init__(self, config: RegexReward) -> None:
        try:
            re.compile(config.pattern)
        except re.error as error:
            raise ValueError(
                f"reward pattern {config.pattern!r} does not compile: {error}"
            ) from error
        path = "services.trainer.rewards.regex:matches"
        super().__init__(f"reward regex {config.pattern!r}", path, config.timeout_s)
        self._pattern = {"pattern": config.pattern, "full": config.full}

    def _arguments(self, batch: RewardBatch) -> dict[str, Any]:
        return {"completions": list(batch.completions), **self._pattern}


class _Function(_InProcess):
    """A function of the user."""

    def __init__(self, config: FunctionReward) -> None:
        super().__init__(
            f"reward function {config.path}",
            config.path,
            config.timeout_s,
            max_memory_bytes=config.max_memory_bytes,
        )

    async def check(self, columns: Mapping[str, Sequence[Any]], *, dataset: str) -> None:
        try:
            takes = await self._process.start(timeout_s=self._timeout_s)
        except FunctionFailed as failure:
            raise ValueError(
                f"{self.name} cannot be imported: importing it {failure}; its folder must be on "
                "the trainer's PYTHONPATH"
            ) from failure
        if twice := [name for name in ("prompts", "completions") if name in columns]:
            raise ValueError(
                f"{dataset} has a column {twice[0]!r}, as an argument of every reward function is "
                "called: rename it"
            )
        given = ("prompts", "completions", *columns)
        if lacking := [name for name in takes.required if name not in given]:
            raise ValueError(
                f"{self.name} needs the column {lacking[0]!r}; {dataset} has {_listed(columns)} "
                "besides the prompts: rename one, or give the parameter a default"
            )
        known = (*takes.required, *takes.optional)
        if not takes.takes_any and (unknown := [name for name in given if name not in known]):
            raise ValueError(
                f"{self.name} takes no argument {unknown[0]!r}, and gets prompts, completions and "
                f"the columns of {dataset}: add **columns to its parameters"
            )


def _listed(columns: Mapping[str, Sequence[Any]]) -> str:
    return ", ".join(columns) or "none"
