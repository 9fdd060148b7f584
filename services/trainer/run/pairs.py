"""What the next update of offline DPO takes: pairs of the dataset, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.trainer.data.rows import Consumed, RowStream
from shared.schemas import PolicyId, PreferencePair


@dataclass(frozen=True, slots=True)
class PairBatch:
    """What one update of `dpo` learns from."""

    positions: Sequence[int]
    pairs: Sequence[PreferencePair]


@dataclass(frozen=True, slots=True)
class PairsInOrder:
    """Batches of pairs that are not consumed; the interface is GroupQueue's."""

    pairs: RowStream[PreferencePair]
    consumed: Consumed
    batch_size: int

    async def take(self) -> PairBatch:
        positions = self.consumed.next_free(self.batch_size)
        return PairBatch(positions, [self.pairs.at(position) for position in positions])

    def release(self, policy: PolicyId) -> None:
        """Nothing waits for a version."""
