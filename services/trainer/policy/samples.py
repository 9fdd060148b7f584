"""One completion as the trainer sees it: ScoredGroup or PreferencePair ─▶ Sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby

from shared.schemas import PolicyId, PreferencePair, ScoredGroup


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion as the trainer sees it."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]  # Empty when no replica sampled it.
    staleness: tuple[int, ...]  # Per token: trainer version minus sampling version.
    temperature: float
    group: int  # Samples of a group share a prompt and are adjacent.
    rewards: tuple[float, ...]  # Weighted, one per reward of the run.
    is_truncated: bool  # Whether it ran into max_tokens.

    @property
    def reward(self) -> float:
        return sum(self.rewards)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def length(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)


# --- samples ------------------------------------------------------------------------------------


def make_samples(groups: Sequence[ScoredGroup], policy: PolicyId) -> list[Sample]:
    """One sample per completion, in order. `policy` is the version about to be updated."""
    return [
        Sample(
            prompt_token_ids=group.prompt_token_ids,
            token_ids=scored.completion.token_ids,
            sampler_logprobs=scored.completion.logprobs,
            staleness=tuple(
                chain.from_iterable(
                    [policy.version - segment.policy.version] * segment.num_tokens
                    for segment in scored.completion.segments
                )
            ),
            temperature=group.sampling.temperature,
            group=number,
            rewards=scored.rewards or (scored.reward,),
            is_truncated=scored.completion.finish_reason == "length",
        )
        for number, group in enumerate(groups)
        for scored in group.completions
    ]


def pair_samples(pairs: Sequence[PreferencePair]) -> list[Sample]:
    """Two samples per pair that no replica sampled: the chosen one, of the higher reward, first."""
    return [
        Sample(
            pair.prompt_token_ids, token_ids, (), (0,) * len(token_ids), 1.0, number, (r,), False
        )
        for number, pair in enumerate(pairs)
        for token_ids, r in ((pair.chosen_token_ids, 1.0), (pair.rejected_token_ids, 0.0))
    ]


def group_indices(samples: Sequence[Sample]) -> list[list[int]]:
    """The indices of each group's samples."""
    indices = range(len(samples))
    return [list(group) for _, group in groupby(indices, key=lambda i: samples[i].group)]


# --- trees --------------------------------------------------------------------------------------


# --- tensors ------------------------------------------------------------------------------------
