"""Whose a run's folder is, which life of the run, and what may change between two."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from services.trainer.data.rows import Prompt
from services.trainer.run.folder import RunFolder, dataset_digest, is_unattended, newest_unfinished
from services.trainer.run.log import RunLog
from services.trainer.run_config import RunConfig
from shared.errors import BaseMismatch, Conflict, InvalidRequest, RunConflict
from shared.metrics import TrainerMetrics
from shared.schemas import BaseIdentity, PreferencePair, RunState, StateRecord

BASE = BaseIdentity(weights="a" * 64, recipe=None, tokenizer="b" * 64, chat_template=None)
MANAGED: dict[str, Any] = {
    "run_id": "r",
    "num_steps": 10,
    "dataset": {"type": "sort_digits"},
    "rewards": [{"type": "exact_match"}, {"type": "http", "url": "http://judge"}],
    "lora": {"rank": 8},
}


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate({**MANAGED, **changes})


def test_every_life_of_a_run_has_a_higher_incarnation_than_the_one_before(tmp_path: Path) -> None:
    """It is on disk before the folder is anybody's: whatever was published, by a process that was
    killed at whatever moment, is superseded."""
    path = tmp_path / "r"
    folder = RunFolder.create(path, config(), BASE)
    assert json.loads((path / "life.json").read_text())["incarnation"] == 1
    folder.close()
    for incarnation in (2, 3):
        folder = RunFolder.reopen(path, config(), BASE)
        folder.begin_life(config())
        assert folder.life.incarnation == incarnation
        assert json.loads((path / "life.json").read_text())["incarnation"] == incarnation
        folder.close()


def test_a_run_has_one_trainer(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "r", config(), BASE)
    assert not is_unattended(tmp_path / "r")
    with pytest.raises(RunConflict, match="another trainer executes run 'r'"):
        RunFolder.reopen(tmp_path / "r", config(), BASE)
    folder.close()
    assert is_unattended(tmp_path / "r")
    assert not is_unattended(tmp_path / "unknown")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seed": 1}, "seed is 1, run 'r' began with 0"),
        ({"lora": {"rank": 4}}, "lora.rank is 4, run 'r' began with 8"),
        ({"prompts_per_step": 3}, "prompts_per_step is 3, run 'r' began with 32"),
        ({"rewards": [{"type": "exact_match"}]}, "rewards is"),
        (
            {"rewards": [{"type": "exact_match", "column": "b"}, MANAGED["rewards"][1]]},
            "rewards.0.column is 'b', run 'r' began with 'answer'",
        ),
    ],
)
def test_a_run_goes_on_as_it_began(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    RunFolder.create(tmp_path / "r", config(), BASE).close()
    with pytest.raises(InvalidRequest, match=complaint):
        RunFolder.reopen(tmp_path / "r", config(**changes), BASE)
    assert is_unattended(tmp_path / "r")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_steps": 20},
        {"checkpoint": {"every_steps": 1}},
        {"eval": {"dataset": {"type": "sort_digits"}}},
        {"max_staleness": 2, "in_flight": "continue"},
        {"generate_timeout_s": 5},
        {"rewards": [{"type": "exact_match"}, {**MANAGED["rewards"][1], "timeout_s": 5}]},
    ],
)
def test_what_does_not_change_the_objective_may_change(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    RunFolder.create(tmp_path / "r", config(), BASE).close()
    folder = RunFolder.reopen(tmp_path / "r", config(**changes), BASE)
    folder.begin_life(config(**changes))
    folder.close()
    saved = RunConfig.model_validate_json((tmp_path / "r/config.json").read_bytes())
    assert saved == config(**changes)


def test_a_run_is_bound_to_its_base(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "r", config(), BASE).close()
    other = BASE.model_copy(update={"weights": "f" * 64})
    with pytest.raises(BaseMismatch, match="start the trainer with the TRAINER_MODEL of the run"):
        RunFolder.reopen(tmp_path / "r", config(), other)


def test_a_run_may_say_that_its_id_is_never_used_again(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "r", config(), BASE).close()
    with pytest.raises(Conflict, match=r"'r' exists in .*: choose another run_id"):
        RunFolder.reopen(tmp_path / "r", config(resume="never"), BASE)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/thesis.tex").write_text("")
    with pytest.raises(Conflict, match=r"has no usable config\.json"):
        RunFolder.reopen(tmp_path / "r", config(), BASE)
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["thesis.tex"]


async def leave(
    runs_dir: Path, run_id: str, state: RunState, *, age_s: float, **changes: Any
) -> None:
    """A run that nobody executes any more."""
    folder = RunFolder.create(runs_dir / run_id, config(run_id=run_id, **changes), BASE)
    log = RunLog(folder.path, TrainerMetrics())
    await log.emit(StateRecord(state=state))
    log.close()
    folder.close()
    written = (folder.path / "life.json").stat().st_mtime - age_s
    os.utime(folder.path / "life.json", (written, written))


@pytest.mark.anyio
async def test_the_newest_run_is_taken_up_when_nobody_executes_it_and_nothing_ended_it(
    tmp_path: Path,
) -> None:
    assert newest_unfinished(tmp_path / "nowhere") is None
    (tmp_path / "notes").mkdir()
    await leave(tmp_path, "oldest", "running", age_s=60)
    await leave(tmp_path, "suspended", "suspended", age_s=50)
    assert newest_unfinished(tmp_path) == tmp_path / "suspended"
    living = RunFolder.create(tmp_path / "living", config(), BASE)
    assert newest_unfinished(tmp_path) is None
    living.close()
    assert newest_unfinished(tmp_path) == tmp_path / "living"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("state", "changes"),
    [("running", {"resume": "never"}), ("completed", {}), ("stopped", {}), ("failed", {})],
)
async def test_a_run_that_another_one_came_after_is_not_taken_up(
    tmp_path: Path, state: RunState, changes: dict[str, Any]
) -> None:
    await leave(tmp_path, "suspended", "suspended", age_s=50)
    await leave(tmp_path, "newest", state, age_s=0, **changes)
    assert newest_unfinished(tmp_path) is None


@pytest.mark.anyio
async def test_a_run_whose_config_cannot_be_read_is_named_and_not_taken_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await leave(tmp_path, "r", "suspended", age_s=0)
    (tmp_path / "r/config.json").write_text("{}")
    assert newest_unfinished(tmp_path) is None
    assert "r has no usable config.json" in caplog.records[-1].message


def test_a_run_goes_on_with_the_prompts_that_it_began_with(tmp_path: Path) -> None:
    """A checkpoint counts positions: of other prompts, some came twice and others never."""
    prompts = [Prompt("1", (1,), {"answer": "a"}), Prompt("2", (2,), {"answer": "b"})]
    digest = dataset_digest(prompts)
    RunFolder.create(tmp_path / "r", config(), BASE, dataset=digest).close()
    folder = RunFolder.reopen(tmp_path / "r", config(), BASE)
    folder.refuse_other_dataset(config(), digest)
    others = [prompts[::-1], prompts[:1], [prompts[0], Prompt("2", (2,), {"answer": "c"})]]
    for other in others:
        with pytest.raises(Conflict, match="dataset sort_digits is not the one that run 'r' began"):
            folder.refuse_other_dataset(config(), dataset_digest(other))
    folder.close()


def test_pairs_have_a_digest_too() -> None:
    pair = PreferencePair(prompt_token_ids=(1,), chosen_token_ids=(2,), rejected_token_ids=(3,))
    turned = PreferencePair(prompt_token_ids=(1,), chosen_token_ids=(3,), rejected_token_ids=(2,))
    assert dataset_digest([pair]) == dataset_digest([pair]) != dataset_digest([turned])
    assert dataset_digest(()) is None


def test_a_run_that_cannot_be_written_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "r/things").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"):
        RunFolder.create(tmp_path / "r", config(), BASE)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.anyio
async def test_a_completed_run_goes_on_only_for_more_steps(tmp_path: Path) -> None:
    await leave(tmp_path, "r", "completed", age_s=0)
    with pytest.raises(Conflict, match="has completed its 10 steps: set num_steps to more"):
        RunFolder.reopen(tmp_path / "r", config(), BASE)
    RunFolder.reopen(tmp_path / "r", config(num_steps=11), BASE).close()


def test_a_run_begun_by_the_first_version_goes_on(tmp_path: Path) -> None:
    """Its config.json has a field that is no more, and clips that a config leaves to its loss."""
    path = tmp_path / "r"
    RunFolder.create(path, config(), BASE).close()
    saved = json.loads((path / "config.json").read_text())
    saved["algorithm"] = {
        "name": "grpo",
        "scale_rewards": "group",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "importance_clip": 3.0,
        "num_epochs": 1,
        "num_minibatches": 1,
    }
    (path / "config.json").write_text(json.dumps(saved))
    RunFolder.reopen(path, config(), BASE).close()
    with pytest.raises(InvalidRequest, match=r"algorithm\.clip_high is 0\.3"):
        RunFolder.reopen(path, config(algorithm={"name": "grpo", "clip_high": 0.3}), BASE)


def test_a_config_that_cannot_be_read_is_refused_with_its_problem(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "r", config(), BASE).close()
    (tmp_path / "r" / "config.json").write_text('{"num_steps": "many"}')
    with pytest.raises(Conflict, match=r"no usable config\.json \(num_steps: Input should be"):
        RunFolder.reopen(tmp_path / "r", config(), BASE)
