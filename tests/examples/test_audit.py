"""The audit of groups.jsonl finds lost, duplicated and mislabelled completions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.demo.audit import Audit, audit
from examples.demo.training import demo_config

NUM_STEPS, NUM_PROMPTS, NUM_COMPLETIONS = 3, 2, 4


def groups() -> list[dict[str, Any]]:
    """Three on-policy steps with two groups each."""
    return [
        {
            "step": 1 + position // NUM_PROMPTS,
            "position": position,
            "segments": [[[f"run-a.1@{position // NUM_PROMPTS}", 6]]] * NUM_COMPLETIONS,
        }
        for position in range(NUM_STEPS * NUM_PROMPTS)
    ]


def count(lines: list[dict[str, Any]], folder: Path, **changes: Any) -> Audit:
    run_dir = folder / "run-a"
    run_dir.mkdir()
    (run_dir / "groups.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = demo_config(
        num_steps=NUM_STEPS,
        prompts_per_step=NUM_PROMPTS,
        sampling={"n": NUM_COMPLETIONS, "max_tokens": 8},
        **changes,
    )
    return audit(run_dir, config)


def test_a_run_that_trained_on_everything_once_is_clean(tmp_path: Path) -> None:
    found = count(groups(), tmp_path)
    assert found == Audit(24, 0, 0, 0, 0)
    assert found.is_clean


@pytest.mark.parametrize(
    ("damage", "lost", "duplicated", "wrong"),
    [
        (lambda lines: lines.pop(3), 4, 0, 0),
        (lambda lines: lines.append(lines[2]), 0, 4, 0),
        (lambda lines: lines[0].update(position=1), 4, 4, 0),
        (lambda lines: lines[5].update(position=6), 4, 4, 0),
        (lambda lines: lines[1].update(segments=lines[1]["segments"][1:]), 1, 0, 0),
        (lambda lines: lines[4].update(segments=[[["run-a.1@1", 6]]] * 4), 0, 0, 4),
        (lambda lines: lines[0].update(segments=[[["run-a.1@1", 6]]] * 4), 0, 0, 4),
        (lambda lines: lines[0].update(segments=[[["run-b.1@0", 6]]] * 4), 0, 0, 4),
    ],
    ids=["lost", "twice", "misplaced", "beyond", "one lost", "stale", "future", "another run"],
)
def test_what_is_lost_repeated_or_of_a_wrong_version_is_counted(
    tmp_path: Path, damage: Any, lost: int, duplicated: int, wrong: int
) -> None:
    """In trl#7274, a lost group went unnoticed."""
    lines = groups()
    damage(lines)
    found = count(lines, tmp_path)
    assert (found.num_lost, found.num_duplicated, found.num_wrong_version) == (
        lost,
        duplicated,
        wrong,
    )
    assert not found.is_clean


def test_a_version_of_the_past_is_right_within_the_bound_and_so_is_a_mixture(
    tmp_path: Path,
) -> None:
    lines = groups()
    lines[4]["segments"] = [[["run-a.1@1", 2], ["run-a.1@2", 4]], *[[["run-a.1@1", 6]]] * 3]
    found = count(lines, tmp_path, max_staleness=1)
    assert found.is_clean
    assert found.num_mixed == 1
