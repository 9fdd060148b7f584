"""The forward passes of an update: micro-batches of this rank, scores, and what was seen of them.

samples, indices ─▶ trees ─▶ this rank's share ─▶ TokenBatch ─▶ an objective's loss
                                                             └▶ TokenRecords, sums ─▶ Seen
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.trainer.learner.stats import Columns, TokenRecords, join
from services.trainer.policy.policy import Policy
from services.trainer.policy.samples import Sample, group_indices
from services.trainer.policy.token_batch import TokenBatch, Tree, collate, make_trees, micro_batches

TokenScores = Mapping[int, Tensor]  # Index of a sample -> one number per token, [R] on the CPU.


@dataclass(frozen=True, slots=True)
class Seen:
    """What one optimizer step saw: its tokens, and sums over its micro-batches."""

    columns: Columns
    sums: Mapping[str, float]

    @classmethod
    def of_all(cls, parts: Sequence[Seen]) -> Seen:
        names = {name for part in parts for name in part.sums}
        sums = {name: sum(part.sums.get(name, 0.0) for part in parts) for name in names}
        return cls(join([part.columns for part in parts]), sums)

    def mean(self, name: str, count: str) -> float | None:
        """One sum over another; None when either is missing."""
        if name not in self.sums or not self.sums.get(count):
            return None
        return self.sums[name] / self.sums[count]


class Forward:
    """The micro-batches of this rank, and what one optimizer step saw of them."""

    def __init__(self, policy: Policy, samples: Sequence[Sample], max_tokens: int) -> None:
        self.policy = policy
        self.samples = samples
        self.max_tokens = max_tokens
        self._records = TokenRecords()
        self._sums: dict[str, Tensor | float] = {}

    def micro_batches(
        self, units: Sequence[Sequence[int]], *, keep_units: bool = False
    ) -> Iterator[tuple[TokenBatch, list[int]]]:
        """Batches of this rank's units, with the indices of their samples in row order.

        The samples of a unit share a prompt. With `keep_units` they stay together, in their order.
        """
        policy = self.policy
        trees = self._trees(units, self.max_tokens)
        # A prompt shared by a whole group would be the work of one rank.
        if (size := policy.ranks.size) > 1:
            num_positions = sum(tree.num_positions for unit in trees for tree in unit)
            trees = self._trees(units, min(self.max_tokens, num_positions // size))
        whole = trees if keep_units else [[tree] for unit in trees for tree in unit]
        mine = policy.ranks.share(whole, lambda unit: sum(tree.num_positions for tree in unit))
        for batch in micro_batches(mine, layout=policy.layout, max_tokens=self.max_tokens):
            tensors = collate(self.samples, batch, layout=policy.layout).to(policy.device)
            self.add(positions=sum(tree.num_positions for tree in batch))
            yield tensors, [index for tree in batch for index in tree.indices]

    def _trees(self, units: Sequence[Sequence[int]], max_tokens: int) -> list[list[Tree]]:
        return [
            make_trees(
                self.samples,
                unit,
                layout=self.policy.layout,
                max_tokens=max_tokens,
                hidden_size=self.policy.hidden_size,
            )
            for unit in units
        ]

    def score(
        self, indices: Sequence[int], compute: Callable[[TokenBatch], Tensor]
    ) -> dict[int, Tensor]:
        """What `compute` returns for some samples, [..., N] per batch -> [..., R] per sample.

        Computed without a gradient, and known on all ranks.
        """
        wanted = set(indices)
        units = [[i for i in group if i in wanted] for group in group_indices(self.samples)]
        mine: dict[int, Tensor] = {}
        with torch.no_grad():
            for batch, rows in self.micro_batches([unit for unit in units if unit]):
                parts = compute(batch).cpu().split([self.samples[i].num_tokens for i in rows], -1)
                # A view would carry its whole batch to the other ranks.
                mine.update((i, part.clone()) for i, part in zip(rows, parts, strict=True))
        return {i: part for scores in self.policy.ranks.gather(mine) for i, part in scores.items()}

    def old(self, indices: Sequence[int]) -> tuple[TokenScores, TokenScores]:
        """Logprobs and entropies under the policy before the update."""
        both = self.score(indices, lambda batch: torch.stack(self.policy.logprobs(batch)))
        return {i: b[0] for i, b in both.items()}, {i: b[1] for i, b in both.items()}

    def reference(self, indices: Sequence[int]) -> TokenScores:
        """Logprobs under the reference: the policy with its adapter off."""
        with self.policy.adapter_disabled():
            return self.score(indices, lambda batch: self.policy.logprobs(batch).logprobs)

    def on_device(self, scores: TokenScores, rows: Sequence[int]) -> Tensor:
        """The scores [N] of the samples of a batch."""
        return torch.cat([scores[index] for index in rows]).to(self.policy.device)

    def record(self, batch: TokenBatch, **tokens: Tensor) -> None:
        self._records.add(
            sampler_logprobs=batch.sampler_logprobs,
            staleness=batch.staleness,
            rows=batch.rows,
            num_rows=batch.num_rows,
            **tokens,
        )

    def add(self, **sums: Tensor | float) -> None:
        for name, value in sums.items():
            detached = value.detach() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + detached

    def take_seen(self) -> Seen:
        """What this rank has seen since the last call."""
        self.add(steps=1.0 / self.policy.ranks.size)
        seen = Seen(self._records.columns(), {k: float(v) for k, v in self._sums.items()})
        self._records, self._sums = TokenRecords(), {}
        return seen
