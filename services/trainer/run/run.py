"""Run: everything that one run needs, from its first step to its last."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.trainer.data.rows import Consumed, Prompt, RowStream
from services.trainer.fleet.fleet import Fleet
from services.trainer.learner.learner import Learner
from services.trainer.policy.policy import Policy
from services.trainer.rewards.scorer import Scorer
from services.trainer.run.checkpoints import Checkpoints
from services.trainer.run.guards import GuardWatch
from services.trainer.run.log import RunLog
from services.trainer.run.recent import RecentGroups
from services.trainer.run_config import RunConfig
from shared.schemas import PreferencePair


@dataclass(frozen=True, slots=True)
class Run:
    """Everything one run needs; built by prepare.py."""

    config: RunConfig
    learner: Learner
    fleet: Fleet
    log: RunLog
    prompts: RowStream[Prompt]
    pairs: RowStream[PreferencePair]  # Offline DPO learns from these instead of groups.
    consumed: Consumed  # Consumed positions of prompts or pairs.
    checkpoints: Checkpoints
    first_step: int  # Steps that earlier incarnations of the run took.
    scorer: Scorer
    held_out: Sequence[Prompt]
    stop: asyncio.Event
    watch: GuardWatch = field(default_factory=GuardWatch)
    recent: RecentGroups = field(default_factory=RecentGroups)

    @property
    def policy(self) -> Policy:
        return self.learner.policy

    async def save(self, step: int) -> None:
        """Keep a checkpoint of the state after `step`. Call between two updates."""
        await self.checkpoints.save(step, self.learner, self.log, self.consumed)

    async def save_if_due(self, step: int) -> None:
        """`save`, when the config names this step."""
        if self.checkpoints.is_due(step):
            await self.save(step)
