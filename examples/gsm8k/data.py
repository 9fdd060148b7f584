"""Converts a file in GSM8K's format to a dataset of prompts.

JSONL or Parquet with `question` and `answer` ─▶ JSONL with `prompt` and `answer`

    python -m examples.gsm8k.data train.parquet .demo/gsm8k/train.jsonl

A prompt is a chat message with an instruction; with --plain it is only the question.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from examples.gsm8k.reward import final_answer

INSTRUCTION = "Think step by step. End with a line that has #### and the final number."


def convert(source: Path, target: Path, *, plain: bool = False) -> int:
    """Write `target` and return its number of rows. Raises ValueError that names a bad row."""
    rows = [_row(row, f"row {n} of {source}", plain) for n, row in enumerate(_read(source))]
    if not rows:
        raise ValueError(f"{source} has no rows")
    write_jsonl(target, rows)
    return len(rows)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}: pass a .jsonl or .parquet file")
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path} is neither .jsonl nor .parquet: convert it to one of them")
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    reader = Dataset.from_json if path.suffix == ".jsonl" else Dataset.from_parquet
    try:
        rows: list[dict[str, Any]] = reader(str(path)).to_list() if path.stat().st_size else []
    except (DatasetsError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error
    return rows


def _row(row: Mapping[str, Any], where: str, plain: bool) -> dict[str, Any]:
    for column in ("question", "answer"):
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"{where} has no text in a column {column!r}; its columns are {', '.join(row)}: "
                "rename them to question and answer"
            )
    if final_answer(row["answer"]) is None:
        raise ValueError(f"{where}: its answer has no number after ####, which the reward needs")
    question = row["question"]
    chat = [{"role": "user", "content": f"{question}\n{INSTRUCTION}"}]
    return {"prompt": question if plain else chat, "answer": row["answer"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.gsm8k.data", description=__doc__)
    parser.add_argument(
        "source", type=Path, help="file of questions and answers, .jsonl or .parquet"
    )
    parser.add_argument("target", type=Path, help="the .jsonl to write, for use in run configs")
    parser.add_argument("--plain", action="store_true", help="for models without a chat template")
    options = parser.parse_args()
    try:
        num_rows = convert(options.source, options.target, plain=options.plain)
    except ValueError as error:
        sys.exit(str(error))
    print(f"{options.target} has {num_rows} prompts")


if __name__ == "__main__":
    main()
