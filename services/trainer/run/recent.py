"""What the policy said last, for people: scored groups on their way to an update.

loop, POST /train ─add─▶ RecentGroups ─newest─▶ in_words ─▶ GET /runs/current/completions
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from services.tokens import PromptEncoder
from shared.schemas import RecentCompletion, RecentGroup, ScoredGroup

MAX_COMPLETIONS = 64


@dataclass(frozen=True, slots=True)
class StepGroup:
    step: int
    index: int  # Position in the batch of the step.
    group: ScoredGroup


@dataclass(slots=True)
class RecentGroups:
    """The newest groups: at least one, and MAX_COMPLETIONS completions in all."""

    _groups: deque[StepGroup] = field(default_factory=deque)
    _num_completions: int = 0

    def add(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        for index, group in enumerate(groups):
            self._groups.append(StepGroup(step, index, group))
            self._num_completions += len(group.completions)
            while self._num_completions > MAX_COMPLETIONS and len(self._groups) > 1:
                self._num_completions -= len(self._groups.popleft().group.completions)

    def newest(self, num_groups: int) -> list[StepGroup]:
        return list(islice(reversed(self._groups), num_groups))


def in_words(groups: Sequence[StepGroup], encoder: PromptEncoder) -> tuple[RecentGroup, ...]:
    """The groups as text: the replica's, or else the decoded token ids."""
    return tuple(
        RecentGroup(
            step=item.step,
            group=item.index,
            prompt=encoder.decode(item.group.prompt_token_ids),
            num_prompt_tokens=len(item.group.prompt_token_ids),
            completions=tuple(
                RecentCompletion(
                    text=encoder.decode(scored.completion.token_ids)
                    if scored.completion.text is None
                    else scored.completion.text,
                    reward=scored.reward,
                    rewards=scored.rewards,
                    segments=scored.completion.segments,
                    finish_reason=scored.completion.finish_reason,
                    num_tokens=len(scored.completion.token_ids),
                )
                for scored in item.group.completions
            ),
        )
        for item in groups
    )
