"""From a dataset to prompts (token ids for the replicas, columns for the rewards) or to pairs.

The order is a permutation per epoch drawn from the seed, so a row is a function of (dataset, seed,
position), and what a run has trained on is a set of positions.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from services.tokens import PromptEncoder
from services.trainer.data.sort_digits import held_out_problems, training_problems
from services.trainer.run_config import (
    PreferenceDataset,
    PromptDatasetConfig,
    SortDigitsDataset,
)
from shared.schemas import ChatMessage, PolicyId, PreferencePair, PromptInput

Row = TypeVar("Row")
Value = TypeVar("Value")
Answer = (
    Annotated[str, Field(min_length=1)] | Annotated[tuple[ChatMessage, ...], Field(min_length=1)]
)
_PROMPT: TypeAdapter[PromptInput] = TypeAdapter(PromptInput)
_ANSWER: TypeAdapter[Answer] = TypeAdapter(Answer)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the dataset. `text` is what the rewards see of the prompt."""

    text: str
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any]


class RowStream(Generic[Row]):
    """Rows without end, epoch after epoch; a position counts rows over all epochs."""

    def __init__(self, rows: Sequence[Row], *, seed: int) -> None:
        self.rows = rows
        self._seed = seed
        self._order = lru_cache(maxsize=4)(self._shuffle)  # groups in flight span few epochs

    def at(self, position: int) -> Row:
        """The row at `position`; an epoch has each exactly once."""
        epoch, offset = divmod(position, len(self.rows))
        return self.rows[self._order(epoch)[offset]]

    def _shuffle(self, epoch: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


class ConsumedState(BaseModel):
    """What of `Consumed` a checkpoint keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    next: int = Field(ge=0, default=0)
    beyond: tuple[int, ...] = ()


NOTHING_CONSUMED = ConsumedState()


class Consumed:
    """The positions of a stream that a run is done with, each once: all below `next`, and `beyond`.

    Groups are trained in the order in which they become ready, so a late one leaves a hole: it
    holds back `next`, and nothing else.
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
        """Raises ValueError, and adds none, when one of them was consumed before."""
        new = list(positions)
        twice = sorted({p for p in new if p in self or new.count(p) > 1})
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


@dataclass(frozen=True, slots=True)
class PairBatch:
    """What one update of `dpo` learns from."""

    positions: Sequence[int]
    pairs: Sequence[PreferencePair]


@dataclass(frozen=True, slots=True)
class PairsInOrder:
    """Batches of the pairs that are not consumed, handed out as pacing.py hands out groups."""

    pairs: RowStream[PreferencePair]
    consumed: Consumed
    batch_size: int

    async def take(self) -> PairBatch:
        positions = self.consumed.next_free(self.batch_size)
        return PairBatch(positions, [self.pairs.at(position) for position in positions])

    def release(self, policy: PolicyId) -> None:
        """Nothing waits for a version."""


def load_prompts(
    config: PromptDatasetConfig, encoder: PromptEncoder, *, seed: int, held_out: bool = False
) -> list[Prompt]:
    """All prompts of a dataset, tokenized. Raises ValueError with the row that cannot be used."""
    if isinstance(config, SortDigitsDataset):
        problems = (
            held_out_problems()
            if held_out
            else list(islice(training_problems(random.Random(seed)), config.num_prompts))
        )
        rows: Sequence[Mapping[str, Any]] = [
            {"prompt": prompt, "answer": answer} for prompt, answer in problems
        ]
        return _encode_rows(rows, "prompt", encoder, config.type)
    return _encode_rows(
        _read_file(config.type, config.path), config.prompt_column, encoder, config.path
    )


def load_pairs(
    config: PreferenceDataset, encoder: PromptEncoder, *, max_positions: int
) -> list[PreferencePair]:
    """All pairs of a dataset, tokenized. Raises ValueError with the row that cannot be used, as one
    that is longer than the model's `max_positions`."""
    kind = Path(config.path).suffix[1:]
    return [
        _encode_pair(row, f"row {number} of {config.path}", config, encoder, max_positions)
        for number, row in enumerate(_read_file(kind, config.path))
    ]


def _encode_pair(
    row: Mapping[str, Any],
    where: str,
    config: PreferenceDataset,
    encoder: PromptEncoder,
    max_positions: int,
) -> PreferencePair:
    prompt = _cell(row, config.prompt_column, _PROMPT, where)
    chosen, rejected = (
        encoder.encode_answer(_answer(row, column, prompt, where))
        for column in (config.chosen_column, config.rejected_column)
    )
    if chosen == rejected:
        raise ValueError(f"{where} has one answer twice, which teaches nothing: leave it out")
    pair = PreferencePair(
        prompt_token_ids=encoder.encode(prompt),
        chosen_token_ids=chosen,
        rejected_token_ids=rejected,
    )
    if pair.num_positions > max_positions:
        raise ValueError(
            f"{where} has {pair.num_positions} tokens with its longer answer, the model has "
            f"{max_positions} positions: leave it out"
        )
    return pair


def _answer(row: Mapping[str, Any], column: str, prompt: PromptInput, where: str) -> str:
    """The text of an answer, which may be the last message of a chat that begins as the prompt."""
    answer = _cell(row, column, _ANSWER, where)
    if isinstance(answer, str):
        return answer
    *before, last = answer
    if last.role != "assistant" or not last.content:
        raise ValueError(f"{where}: the last message of {column} must be the assistant's answer")
    if before and tuple(before) != prompt:
        raise ValueError(
            f"{where}: the messages of {column} before the answer are not the prompt's: leave them "
            "out"
        )
    return last.content


def _read_file(kind: str, path: str) -> Sequence[Mapping[str, Any]]:
    if not Path(path).is_file():
        raise ValueError(f"dataset {path} does not exist on the trainer's machine")
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    reader = Dataset.from_json if kind == "jsonl" else Dataset.from_parquet
    rows: Sequence[Mapping[str, Any]] = []
    try:
        if Path(path).stat().st_size:
            rows = reader(path).to_list()
    except (DatasetsError, ValueError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"dataset {path} cannot be read as {kind}: {reason}") from error
    if not rows:
        raise ValueError(f"dataset {path} has no rows")
    return rows


def _encode_rows(
    rows: Sequence[Mapping[str, Any]], column: str, encoder: PromptEncoder, name: str
) -> list[Prompt]:
    prompts = []
    for number, row in enumerate(rows):
        value = _cell(row, column, _PROMPT, f"row {number} of {name}")
        text = value if isinstance(value, str) else encoder.decode(encoder.encode(value))
        columns = {key: item for key, item in row.items() if key != column}
        prompts.append(Prompt(text, encoder.encode(value), columns))
    return prompts


def _cell(row: Mapping[str, Any], column: str, kind: TypeAdapter[Value], where: str) -> Value:
    if column not in row:
        raise ValueError(
            f"{where} has no column {column!r}; it has {', '.join(row)}: name the columns in the "
            "run config's dataset"
        )
    try:
        return kind.validate_python(row[column])
    except ValidationError as error:
        raise ValueError(
            f"{where}: {column} must be a text or a list of chat messages "
            f"({error.errors()[0]['msg']})"
        ) from error
