"""`python -m examples.gsm8k`: see README.md.

A small model (model.py) is made for CPUs, trained on generated problems and evaluated on the
shipped sample.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from examples.demo.training import warm_start_progress
from examples.gsm8k.data import convert, write_jsonl
from examples.gsm8k.word_problems import training_problems
from examples.runner import Example, main

_NUM_TRAINING_PROBLEMS = 2048


def make_model(path: Path, console: Console) -> None:
    """Make the model at `path`, unless it already exists."""
    if path.is_dir():
        return
    console.print("Making a model for word problems: supervised on noisy demonstrations, once ...")
    from examples.gsm8k.model import NUM_WARM_START_STEPS, make_gsm8k_model

    path.parent.mkdir(parents=True, exist_ok=True)
    with warm_start_progress(console, NUM_WARM_START_STEPS) as on_step:
        make_gsm8k_model(path, on_step=on_step)


def datasets(folder: Path) -> Mapping[str, Any]:
    """Write prompt files: generated problems to train on, and the shipped sample for evaluation.

    Returns the parts of the run config that name these files.
    """
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    problems = islice(training_problems(random.Random(0)), _NUM_TRAINING_PROBLEMS)
    write_jsonl(train, ({"prompt": p.question, "answer": p.answer} for p in problems))
    convert(Path(__file__).with_name("sample.jsonl"), test, plain=True)
    config = yaml.safe_load(Path(__file__).with_name("run.yaml").read_text())
    config["dataset"]["path"], config["eval"]["dataset"]["path"] = str(train), str(test)
    return {name: config[name] for name in ("dataset", "eval")}


EXAMPLE = Example(
    name="gsm8k",
    title="Word problems: GRPO with math-verify",
    unit="correct answers",
    min_rise_points=20.0,
    model="gsm8k/model",
    make_model=make_model,
    changes=datasets,
)

if __name__ == "__main__":
    sys.exit(main(EXAMPLE))
