"""From the files of a dataset to prompts (ids for replicas, columns for rewards) or to pairs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from services.tokens import PromptEncoder
from services.trainer.data.rows import Prompt
from services.trainer.data.sort_digits import held_out_problems, training_problems
from services.trainer.run_config import PreferenceDataset, PromptDatasetConfig, SortDigitsDataset
from shared.schemas import ChatMessage, PreferencePair, PromptInput

Value = TypeVar("Value")
Answer = (
    Annotated[str, Field(min_length=1)] | Annotated[tuple[ChatMessage, ...], Field(min_length=1)]
)
_PROMPT: TypeAdapter[PromptInput] = TypeAdapter(PromptInput)
_ANSWER: TypeAdapter[Answer] = TypeAdapter(Answer)


def load_prompts(
    config: PromptDatasetConfig, encoder: PromptEncoder, *, seed: int, held_out: bool = False
) -> list[Prompt]:
    """All prompts of a dataset, tokenized. Raises ValueError naming a row that cannot be used."""
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
    """All pairs of a dataset, tokenized.

    Raises ValueError naming a row that cannot be used, for example one that exceeds
    `max_positions`.
    """
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
        raise ValueError(f"{where} has the same answer twice, which teaches nothing: remove it")
    pair = PreferencePair(
        prompt_token_ids=encoder.encode(prompt),
        chosen_token_ids=chosen,
        rejected_token_ids=rejected,
    )
    if pair.num_positions > max_positions:
        raise ValueError(
            f"{where} has {pair.num_positions} tokens with its longer answer, the model has "
            f"{max_positions} positions: remove it"
        )
    return pair


def _answer(row: Mapping[str, Any], column: str, prompt: PromptInput, where: str) -> str:
    """The text of an answer, which may be the last message of a chat that begins with the
    prompt."""
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
