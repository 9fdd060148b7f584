"""Completions that are still running when a sync comes, and whose tokens they then are."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from shared.schemas import Completion, GenerateResponse, PolicyId
from tests.gpu import machine
from tests.gpu.replicas import Run, gap
from tests.publisher import PROBE
from tests.replica_process import ReplicaProcess, until

# Mean |Δlogprob| of a window, nats: between two forwards under the same strong adapter at most, and
# under two of them at least. Seen on CPUs: 0.01 and 0.6.
NOISE, OTHER = 0.1, 0.3
_WINDOW = 50  # tokens
_UNDER_WAY = 32  # tokens of each


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that one version sampled, and what it sampled them after."""

    context: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @classmethod
    def of(cls, completion: Completion, *, after: Sequence[int]) -> Piece:
        return cls(tuple(after), completion.token_ids, completion.logprobs)


async def start_long(replica: ReplicaProcess, run: Run) -> asyncio.Task[GenerateResponse]:
    """Completions of the newest version, at temperature 1; returns once they are under way."""

    def num_sampled() -> float:
        return replica.metric("vllm:generation_tokens_total")

    before = num_sampled()
    task = asyncio.ensure_future(
        run.generate(
            PROBE,
            n=machine.NUM_LONG,
            max_tokens=machine.LONG_TOKENS,
            seed=9,
            ignore_eos=True,
            detokenize=False,
        )
    )
    await until(lambda: num_sampled() > before + machine.NUM_LONG * _UNDER_WAY, timeout_s=60)
    assert not task.done()
    return task


async def go_on(run: Run, part: Completion, policy: PolicyId, *, seed: int) -> Completion:
    """The rest of an interrupted completion, under another version."""
    answer = await run.generate(
        PROBE,
        policy=policy,
        completion_prefix=part.token_ids,
        max_tokens=machine.LONG_TOKENS - len(part.token_ids),
        seed=seed,
        ignore_eos=True,
        detokenize=False,
    )
    return answer.groups[0].completions[0]


async def check_sampled(
    pieces: Sequence[Piece], run: Run, *, by: PolicyId, not_by: PolicyId
) -> tuple[float, float]:
    """Assert, window for window, that the pieces are of one version and not of the other; the
    largest gap to the one, and the smallest to the other."""
    sequences = [(*piece.context, *piece.token_ids) for piece in pieces]
    own, other = [], []
    for piece, right, wrong in zip(
        pieces, await run.scores(sequences, by), await run.scores(sequences, not_by), strict=True
    ):
        num_tokens = len(piece.token_ids)
        own += _windows(piece.logprobs, right[-num_tokens:])
        other += _windows(piece.logprobs, wrong[-num_tokens:])
    found = max(own), min(other)
    assert found[0] < NOISE, found
    assert found[1] > OTHER, found
    return found


def _windows(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The gaps of consecutive tokens; what is left at the end belongs to the last window."""
    starts = list(range(0, max(len(ours) - _WINDOW, 0) + 1, _WINDOW))
    ends = [*starts[1:], len(ours)]
    return [gap(ours[a:b], theirs[a:b]) for a, b in zip(starts, ends, strict=True)]
