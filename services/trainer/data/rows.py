"""Rows of a dataset as a run takes them: in a seeded order, each position once.

The order is a permutation per epoch drawn from the seed, so a row is a function of (dataset, seed,
position), and what a run has trained on is a set of positions.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the dataset. `text` is the prompt as rewards see it."""

    text: str
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any]


class RowStream(Generic[Row]):
    """An endless stream of rows, epoch after epoch. A position counts rows over all epochs."""

    def __init__(self, rows: Sequence[Row], *, seed: int) -> None:
        self.rows = rows
        self._seed = seed
        self._order = lru_cache(maxsize=4)(self._shuffle)  # Groups in flight span few epochs.

    def at(self, position: int) -> Row:
        """The row at `position`; an epoch has each exactly once."""
        epoch, offset = divmod(position, len(self.rows))
        return self.rows[self._order(epoch)[offset]]

    def _shuffle(self, epoch: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


class ConsumedState(BaseModel):
    """The part of `Consumed` that a checkpoint keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    next: int = Field(ge=0, default=0)
    beyond: tuple[int, ...] = ()


NOTHING_CONSUMED = ConsumedState()


class Consumed:
    """The positions of a stream that a run has finished with: all below `next`, and `beyond`.

    Groups are trained in the order in which they become ready, so a late one leaves a hole, which
    holds back `next` and nothing else.
    """

    def __init__(self, state: ConsumedState = NOTHING_CONSUMED) -> None:
        self.next = state.next
        self.beyond = set(state.beyond)

    @property
    def state(self) -> ConsumedState:
        return ConsumedState(next=self.next, beyond=tuple(sorted(self.beyond)))

    def next_free(self, count: int) -> list[int]:
        """The first `count` positions that are not consumed."""
        return list(islice((p for p in itertools.count(self.next) if p not in self), count))

    def add(self, positions: Iterable[int]) -> None:
        """Raises ValueError, without adding any, when a position was consumed before."""
        new = list(positions)
        twice = sorted(p for p, count in Counter(new).items() if count > 1 or p in self)
        if twice:
            raise ValueError(f"positions {twice} of the dataset were consumed already")
        self.beyond.update(new)
        while self.next in self.beyond:
            self.beyond.remove(self.next)
            self.next += 1

    def __contains__(self, position: int) -> bool:
        return position < self.next or position in self.beyond

    def __len__(self) -> int:
        return self.next + len(self.beyond)
