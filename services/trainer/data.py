"""From a dataset to prompts: token ids for the replicas, columns for the rewards.

The order is a permutation per epoch drawn from the seed, so the stream is a function of
(dataset, seed, position) and resumes anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

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
    """Prompts without end, epoch after epoch. `position` counts the prompts taken."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, position: int = 0) -> None:
        self._prompts = prompts
        self._seed = seed
        self.position = position

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt; 0 without prompts."""
        return max((len(prompt.token_ids) for prompt in self._prompts), default=0)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts; each row exactly once per epoch."""
        taken: list[Prompt] = []
        while len(taken) < count:
            epoch, start = divmod(self.position, len(self._prompts))
            chosen = self._order(epoch)[start : start + count - len(taken)]
            taken += [self._prompts[index] for index in chosen]
            self.position += len(chosen)
        return taken

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


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
