"""A checkpoint is whole, exact, and the last good one counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from services.trainer.data.rows import Consumed, RowStream
from services.trainer.fleet.fleet import Fleet
from services.trainer.learner.learner import Learner
from services.trainer.policy.samples import Sample
from services.trainer.rewards.scorer import Scorer
from services.trainer.run.checkpoints import Checkpoints
from services.trainer.run.log import RunLog
from services.trainer.run.run import Run
from services.trainer.run_config import CheckpointConfig, LoraConfig, OptimizerConfig, RunConfig
from shared.metrics import TrainerMetrics
from shared.rollout_client import RolloutClient
from shared.schemas import PolicyId, StateRecord
from tests.trainer.conftest import VERSION_0, no_file_longer_than, repeatable
from tests.trainer.policy.test_policy import train_a_little, weights

pytestmark = pytest.mark.anyio


def checkpoints(run_dir: Path, **config: int) -> Checkpoints:
    return Checkpoints(
        run_dir, CheckpointConfig(**config), source="the-base", metrics=TrainerMetrics()
    )


@pytest.fixture
def run(learner: Learner, tmp_path: Path) -> Iterator[Run]:
    """Before its first step, in a folder of its own."""
    run = Run(
        config=RunConfig(managed=False),
        learner=learner,
        fleet=Fleet((), connect=RolloutClient),
        log=RunLog(tmp_path, TrainerMetrics()),
        prompts=RowStream((), seed=0),
        pairs=RowStream((), seed=0),
        consumed=Consumed(),
        checkpoints=checkpoints(tmp_path, every_steps=2, keep=2),
        first_step=0,
        scorer=Scorer((), learner.policy.encoder),
        held_out=(),
        stop=asyncio.Event(),
    )
    yield run
    run.log.close()


async def take_step(run: Run, samples: list[Sample]) -> None:
    train_a_little(run.learner, samples)
    step = run.policy.id.version
    run.consumed.add([step - 1])
    await run.log.emit(StateRecord(state="running", detail=f"step {step}"))
    await run.save_if_due(step)


def names(run: Run) -> list[str]:
    return sorted(path.name for path in run.checkpoints.dir.iterdir())


async def test_the_step_after_a_resume_is_bit_for_bit_the_one_it_would_have_been(
    run: Run, samples: list[Sample], tmp_path: Path
) -> None:
    """open-rl#83: no durable checkpoint. AdamW's moments, its step count and the warm-up go on."""
    learner = run.learner
    options = OptimizerConfig(learning_rate=1e-3, warmup_steps=5)
    learner.start(VERSION_0, LoraConfig(rank=8, alpha=16), options, seed=0)
    for _ in range(2):
        await take_step(run, samples)
    uninterrupted = [
        (repeatable(train_a_little(learner, samples)), weights(learner)) for _ in range(2)
    ]

    saved = checkpoints(tmp_path).load()
    assert saved
    torch.manual_seed(1234)
    learner.start(VERSION_0, LoraConfig(rank=8, alpha=16), options, seed=7)
    second_life = PolicyId(run_id="test", incarnation=2, version=saved.state.policy.version)
    learner.restore(second_life, saved.snapshot)
    assert learner.policy.id == second_life
    for stats, expected in uninterrupted:
        assert repeatable(train_a_little(learner, samples)) == stats
        assert torch.equal(weights(learner), expected)
    assert learner.policy.id == second_life.model_copy(update={"version": 4})


async def test_a_snapshot_does_not_move_with_the_policy(
    learner: Learner, samples: list[Sample]
) -> None:
    train_a_little(learner, samples)
    snapshot = learner.snapshot()
    train_a_little(learner, samples)
    expected = weights(learner)
    for _ in range(2):
        learner.restore(snapshot.manifest.policy, snapshot)
        train_a_little(learner, samples)
        assert torch.equal(weights(learner), expected)


async def test_the_saved_adapter_is_the_master_weights_and_peft_loads_it(
    run: Run, samples: list[Sample], tiny_checkpoint: Path
) -> None:
    for _ in range(2):
        await take_step(run, samples)
    folder = run.checkpoints.dir / "step-000002"
    assert load_file(folder / "adapter_model.safetensors").keys() == run.policy.lora_shapes().keys()
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    loaded = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    assert torch.equal(loaded, weights(run.learner))


async def test_a_checkpoint_says_what_was_consumed_and_how_far_the_log_was(
    run: Run, samples: list[Sample], tmp_path: Path
) -> None:
    for _ in range(3):
        await take_step(run, samples)
    saved = checkpoints(tmp_path).load()
    assert saved
    assert (saved.state.step, saved.state.policy) == (2, VERSION_0.next().next())
    assert (saved.state.consumed.next, saved.state.num_updates) == (2, 2)
    first_lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:2]
    assert saved.state.log_positions == {
        "metrics.jsonl": sum(map(len, first_lines)),
        "groups.jsonl": 0,
    }


async def test_the_newest_checkpoints_are_kept(run: Run, samples: list[Sample]) -> None:
    for _ in range(7):
        await take_step(run, samples)
    assert names(run) == ["step-000004", "step-000006"]
    await run.save(7)
    assert names(run) == ["step-000006", "step-000007"]


async def test_a_step_that_is_kept_is_not_written_again(run: Run, samples: list[Sample]) -> None:
    await run.save(0)
    assert not run.checkpoints.dir.exists()  # no step was taken: there is nothing to keep
    for _ in range(2):
        await take_step(run, samples)
    before = (run.checkpoints.dir / "step-000002").stat().st_ino
    await run.save(2)
    assert (run.checkpoints.dir / "step-000002").stat().st_ino == before


async def test_damaged_checkpoints_go_with_those_of_their_age(
    run: Run, samples: list[Sample]
) -> None:
    for name in ("step-000001.damaged", "step-000005.damaged"):
        (run.checkpoints.dir / name).mkdir(parents=True)
    for _ in range(6):
        await take_step(run, samples)
    assert names(run) == ["step-000004", "step-000005.damaged", "step-000006"]


async def test_a_checkpoint_counts_although_an_old_one_cannot_be_removed(
    run: Run, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    run.checkpoints.dir.mkdir()
    (run.checkpoints.dir / "step-000001").touch()  # rmtree takes no file
    for _ in range(4):
        await take_step(run, samples)
    assert names(run) == ["step-000001", "step-000002", "step-000004"]
    saved = run.checkpoints._metrics.registry.get_sample_value(
        "tandem_trainer_checkpoints_total", {"outcome": "saved"}
    )
    assert saved == 2
    assert "old checkpoints in" in caplog.records[-1].message


async def test_no_checkpoint_is_saved_while_the_log_lacks_lines(
    run: Run, samples: list[Sample]
) -> None:
    """A run that resumes would miss them."""
    await take_step(run, samples)
    with no_file_longer_than(run.log.positions["metrics.jsonl"]):
        await run.log.emit(StateRecord(state="running", detail="a line that waits"))
        train_a_little(run.learner, samples)
        await run.save(2)
    assert not run.checkpoints.dir.exists()
    await run.save(2)
    assert names(run) == ["step-000002"]
    assert "a line that waits" in (run.log.run_dir / "metrics.jsonl").read_text()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def forget_the_digests(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digests": {}}))


@pytest.mark.parametrize(
    ("name", "damage", "complaint"),
    [
        ("adapter_model.safetensors", truncate, "of adapter_model.safetensors are not those"),
        ("adapter_model.safetensors", flip_a_bit, "of adapter_model.safetensors are not those"),
        ("optimizer.pt", truncate, "of optimizer.pt are not those"),
        ("optimizer.pt", Path.unlink, "it has no optimizer.pt"),
        ("state.json", truncate, "state.json: Invalid JSON"),
        ("state.json", forget_the_digests, "is incomplete"),
        ("state.json", Path.unlink, "it has no state.json"),
    ],
)
async def test_of_a_damaged_checkpoint_the_one_before_counts(
    run: Run,
    samples: list[Sample],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], None],
    complaint: str,
) -> None:
    for _ in range(4):
        await take_step(run, samples)
    damage(run.checkpoints.dir / "step-000004" / name)
    again = checkpoints(tmp_path)
    saved = again.load()
    assert saved
    assert saved.state.step == 2
    (record,) = caplog.records
    assert str(run.checkpoints.dir / "step-000004") in record.message
    assert complaint in record.message
    assert names(run) == ["step-000002", "step-000004.damaged"]


async def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_unasked(
    run: Run, samples: list[Sample], tmp_path: Path
) -> None:
    for _ in range(2):
        await take_step(run, samples)
    truncate(run.checkpoints.dir / "step-000002/state.json")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no checkpoint in .* can be used .*state.json"):
            checkpoints(tmp_path).load()


async def test_what_a_killed_writer_left_is_removed_and_never_loaded(
    run: Run, samples: list[Sample], tmp_path: Path
) -> None:
    for _ in range(2):
        await take_step(run, samples)
    unfinished = run.checkpoints.dir / "step-000004.writing"
    (run.checkpoints.dir / "step-000002").rename(unfinished)
    assert checkpoints(tmp_path).load() is None
    assert names(run) == []


async def test_a_full_disk_is_said_loudly_and_costs_no_checkpoint(
    run: Run, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        await take_step(run, samples)
    train_a_little(run.learner, samples)
    with no_file_longer_than(100_000):
        await run.save_if_due(4)
    assert names(run) == ["step-000002"]
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "step 4 could not be saved in" in record.message
    assert "resume from step 2: free space there" in record.message
    await run.save(4)
    assert names(run) == ["step-000002", "step-000004"]


async def test_the_weights_of_another_lora_config_are_refused(
    run: Run, samples: list[Sample], tmp_path: Path
) -> None:
    for _ in range(2):
        await take_step(run, samples)
    saved = checkpoints(tmp_path).load()
    assert saved
    run.learner.start(VERSION_0, LoraConfig(rank=4), OptimizerConfig(), seed=0)
    with pytest.raises(ValueError, match="do not fit this base"):
        run.learner.restore(saved.state.policy, saved.snapshot)
