"""Counts what a run trained on: `<run_dir>/groups.jsonl`, one line per trained group ─▶ Audit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.trainer.run_config import RunConfig


@dataclass(frozen=True, slots=True)
class Audit:
    """Counts of completions; they show whether a fault lost, repeated or mislabelled any."""

    num_trained: int
    num_lost: int  # expected by the steps, but never trained on
    num_duplicated: int  # trained on more than once, or beyond the last expected position
    num_wrong_version: int  # some token is from another run, a later version or a too stale one
    num_mixed: int  # tokens come from several versions

    @property
    def is_clean(self) -> bool:
        return not (self.num_lost or self.num_duplicated or self.num_wrong_version)

    def __str__(self) -> str:
        return (
            f"{self.num_trained} trained on, {self.num_lost} lost, {self.num_duplicated} "
            f"duplicated, {self.num_wrong_version} of a wrong version"
        )


def audit(run_dir: Path, config: RunConfig) -> Audit:
    """Audit a completed run, whose folder is named after its run id."""
    with (run_dir / "groups.jsonl").open() as lines:
        groups = [json.loads(line) for line in lines]
    return audit_groups(groups, config, run_id=run_dir.name)


def audit_groups(groups: Iterable[Mapping[str, Any]], config: RunConfig, *, run_id: str) -> Audit:
    """Audit `groups`, the lines of groups.jsonl. Step s starts from policy version s - 1."""
    assert config.num_steps
    num_per_group = config.sampling.n
    num_expected = config.num_steps * config.prompts_per_step
    trained: Counter[int] = Counter()  # dataset position -> completions
    num_wrong_version = num_mixed = 0
    for group in groups:
        completions: Sequence[Sequence[tuple[str, int]]] = group["segments"]
        trained[group["position"]] += len(completions)
        for segments in completions:
            versions = [_version(policy, run_id) for policy, _ in segments]
            staleness = [group["step"] - 1 - version for version in versions]
            if not all(0 <= lag <= config.max_staleness for lag in staleness):
                num_wrong_version += 1
            num_mixed += len(set(versions)) > 1
    expected = Counter(dict.fromkeys(range(num_expected), num_per_group))
    return Audit(
        num_trained=trained.total(),
        num_lost=(expected - trained).total(),
        num_duplicated=(trained - expected).total(),
        num_wrong_version=num_wrong_version,
        num_mixed=num_mixed,
    )


def _version(policy: str, run_id: str) -> float:
    """The version in `<run_id>.<incarnation>@<version>`; NaN, never in bounds, for another run."""
    life, _, version = policy.rpartition("@")
    return int(version) if life.rpartition(".")[0] == run_id else float("nan")
