"""A reward service: POST {prompts, completions, columns} ─▶ {"rewards": [a number each]}.

One that is away, overloaded or broken is an infrastructure failure: it is asked again, more and
more seldom, until it is back or `max_outage_s` are over, and the run waits. One that answers what
is not rewards, or refuses the request, ends the run at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx

from services.trainer.rewards.batch import NoNumber, RewardBatch, RewardProblem, as_reward, shown
from services.trainer.run_config import HttpReward
from shared.auth import authorization

log = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0
_SAY_EVERY_S = 15.0
_AWAY = (429, 502, 503, 504)  # Statuses that do not blame the request.
_MAX_BREAKDOWNS = 3  # Other 5xx in a row, after which the request is to blame.

OnStall = Callable[[str], Awaitable[None]]


class _Away(Exception):
    """The service can be asked again, `after_s` from now if it says so."""

    def __init__(self, problem: str, *, after_s: float = 0.0, is_breakdown: bool = False) -> None:
        super().__init__(problem)
        self.after_s = after_s
        self.is_breakdown = is_breakdown


class ServiceReward:
    def __init__(self, config: HttpReward, on_stall: OnStall) -> None:
        """`on_stall` is called with why the run waits, and with "" once it continues."""
        self._config = config
        self._on_stall = on_stall
        self._api_key: str | None = None
        if config.api_key_env:
            self._api_key = os.environ.get(config.api_key_env, "").strip()
            if not self._api_key:
                raise ValueError(
                    f"the trainer's environment has no {config.api_key_env}, which is to hold the "
                    f"key of the {self.name}: start the trainer with it"
                )

    @property
    def name(self) -> str:
        return f"reward service {self._config.public_url}"

    async def check(self, columns: Mapping[str, Sequence[Any]], *, dataset: str) -> None:
        """It may be started after the run."""

    async def start(self) -> None:
        """Connections begin with each batch."""

    def close(self) -> None:
        """Connections end with each batch."""

    async def __call__(
        self, batch: RewardBatch, *, timeout_s: float | None = None
    ) -> list[float | NoNumber]:
        config = self._config
        shares = list(batch.shares(config.max_completions_per_request or len(batch)))
        places = asyncio.Semaphore(config.max_concurrent_requests)
        async with httpx.AsyncClient(
            timeout=None, headers=authorization(self._api_key), trust_env=False
        ) as client:

            async def ask(share: RewardBatch) -> list[float | NoNumber]:
                async with places:
                    if timeout_s is None:
                        return await self._ask_until_it_answers(client, share)
                    return await self._ask_once(client, share, timeout_s)

            asked = [asyncio.ensure_future(ask(share)) for share in shares]
            try:
                answers = await asyncio.gather(*asked)
            finally:
                for task in asked:
                    task.cancel()
                await asyncio.wait(asked)
        return [reward for answer in answers for reward in answer]

    async def _ask_once(
        self, client: httpx.AsyncClient, batch: RewardBatch, timeout_s: float
    ) -> list[float | NoNumber]:
        try:
            return await self._ask(client, batch, timeout_s)
        except _Away as away:
            raise RewardProblem(str(away), may_be_of_one=away.is_breakdown) from away

    async def _ask_until_it_answers(
        self, client: httpx.AsyncClient, batch: RewardBatch
    ) -> list[float | NoNumber]:
        config, started, said_at = self._config, time.monotonic(), 0.0
        pause_s, num_breakdowns = _FIRST_PAUSE_S, 0
        while True:
            try:
                rewards = await self._ask(client, batch, config.timeout_s)
            except _Away as away:
                num_breakdowns = num_breakdowns + 1 if away.is_breakdown else 0
                away_s = time.monotonic() - started
                if num_breakdowns == _MAX_BREAKDOWNS:
                    raise RewardProblem(
                        f"answers {away}, {_MAX_BREAKDOWNS} times in a row", may_be_of_one=True
                    ) from away
                if away_s >= config.max_outage_s:
                    raise RewardProblem(
                        f"gave no rewards for {away_s:.0f} s: {away}; start it, then post the run "
                        "again: it resumes from its last checkpoint"
                    ) from away
                if not said_at or time.monotonic() - said_at > _SAY_EVERY_S:
                    said_at = time.monotonic()
                    waits = (
                        f"the {self.name} has been away for {away_s:.0f} s: {away}; the run "
                        f"waits for it up to {config.max_outage_s:g} s"
                    )
                    log.warning("%s", waits)
                    await self._on_stall(waits)
                left_s = config.max_outage_s - away_s
                await asyncio.sleep(min(max(pause_s, away.after_s), left_s))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            if said_at:
                log.info("the %s is back after %.1f s", self.name, time.monotonic() - started)
                await self._on_stall("")
            return rewards

    async def _ask(
        self, client: httpx.AsyncClient, batch: RewardBatch, timeout_s: float
    ) -> list[float | NoNumber]:
        """Raises _Away, or RewardProblem when asking again would not help."""
        body = {
            "prompts": list(batch.prompts),
            "completions": list(batch.completions),
            "columns": {name: list(values) for name, values in batch.columns.items()},
        }
        try:
            async with asyncio.timeout(timeout_s):
                response = await client.post(self._config.url, json=body)
        except TimeoutError as error:
            raise _Away(f"no answer within {timeout_s:g} s") from error
        except httpx.TransportError as error:
            raise _Away(f"{type(error).__name__} {error}".strip()) from error
        except httpx.DecodingError as error:
            raise RewardProblem(f"answered what cannot be decoded: {error}") from error
        # A column holds what JSON cannot express, such as a date.
        except (TypeError, ValueError) as error:
            raise RewardProblem(
                f"takes JSON, which the columns of the dataset cannot be: {error}"
            ) from error
        if response.is_success:
            return _rewards_field(response, len(batch))
        problem = f"HTTP {response.status_code} {shown(response.text)}"
        if response.status_code in _AWAY:
            raise _Away(problem, after_s=_retry_after_s(response))
        if response.is_server_error:
            raise _Away(problem, is_breakdown=True)
        raise RewardProblem(f"refuses the request: {problem}", may_be_of_one=True)


def _retry_after_s(response: httpx.Response) -> float:
    seconds = response.headers.get("Retry-After", "")
    return min(float(seconds), 60.0) if seconds.isdigit() else 0.0


def _rewards_field(response: httpx.Response, count: int) -> list[float | NoNumber]:
    try:
        rewards = response.json()["rewards"]
    except (ValueError, KeyError, TypeError, IndexError):
        rewards = None
    if not isinstance(rewards, list):
        raise RewardProblem(
            f'must answer {{"rewards": [numbers]}}, not {shown(response.text)}', may_be_of_one=True
        )
    if len(rewards) != count:
        raise RewardProblem(
            f"gave {len(rewards)} values for {count} completions", may_be_of_one=True
        )
    return [as_reward(value) for value in rewards]
