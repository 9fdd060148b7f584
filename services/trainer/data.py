"""From a dataset to prompts: token ids for the replicas, columns for the rewards.

The order is a permutation per epoch drawn from the seed, so a prompt is a function of (dataset,
seed, position), and what a run has trained on is a set of positions.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from services.tokens import PromptEncoder
from services.trainer.run_config import DatasetConfig, SortDigitsDataset
from services.trainer.sort_digits import held_out_problems, training_problems
from shared.schemas import PromptInput

_PROMPT: TypeAdapter[PromptInput] = TypeAdapter(PromptInput)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the dataset. `text` is what the rewards see of the prompt."""

    text: str
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any]


class PromptStream:
    """Prompts without end, epoch after epoch; a position counts prompts over all epochs."""

    def __init__(self, rows: Sequence[Prompt], *, seed: int) -> None:
        self.rows = rows
        self._seed = seed
        self._order = lru_cache(maxsize=4)(self._shuffle)  # groups in flight span few epochs

    def at(self, position: int) -> Prompt:
        """The prompt at `position`; an epoch has each row exactly once."""
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
    """The positions of a stream that were trained on, each once: all below `next`, and `beyond`.

    Groups are trained in the order in which they become ready, so a late one leaves a hole: it
    holds back `next`, and nothing else.
    """

    def __init__(self, state: ConsumedState = NOTHING_CONSUMED) -> None:
        self.next = state.next
        self.beyond = set(state.beyond)

    @property
    def state(self) -> ConsumedState:
        return ConsumedState(next=self.next, beyond=tuple(sorted(self.beyond)))

    def add(self, positions: Iterable[int]) -> None:
        """Raises ValueError, and adds none, when one of them was consumed before."""
        new = list(positions)
        twice = sorted({p for p in new if p in self or new.count(p) > 1})
        if twice:
            raise ValueError(f"positions {twice} of the prompts were trained on already")
        self.beyond.update(new)
        while self.next in self.beyond:
            self.beyond.remove(self.next)
            self.next += 1

    def __contains__(self, position: int) -> bool:
        return position < self.next or position in self.beyond

    def __len__(self) -> int:
        return self.next + len(self.beyond)


def load_prompts(
    config: DatasetConfig, encoder: PromptEncoder, *, seed: int, held_out: bool = False
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
        if column not in row:
            raise ValueError(
                f"row {number} of {name} has no column {column!r}; it has {', '.join(row)}: set "
                "dataset.prompt_column"
            )
        try:
            value = _PROMPT.validate_python(row[column])
        except ValidationError as error:
            raise ValueError(
                f"row {number} of {name}: {column} must be a text or a list of chat messages "
                f"({error.errors()[0]['msg']})"
            ) from error
        text = value if isinstance(value, str) else encoder.decode(encoder.encode(value))
        columns = {key: item for key, item in row.items() if key != column}
        prompts.append(Prompt(text, encoder.encode(value), columns))
    return prompts
