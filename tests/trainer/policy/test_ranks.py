"""Training in two processes: the same policy as in one, and one end for both.

The fixture `two_ranks` starts this file under torchrun, for `main`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.trainer.followers import num_processes
from services.trainer.learner.learner import Learner
from services.trainer.learner.stats import UpdateRefused
from services.trainer.policy.logprobs import TokenLogprobs
from services.trainer.policy.ranks import PeerFailed, Ranks
from services.trainer.policy.samples import Sample
from services.trainer.policy.token_batch import TokenBatch
from services.trainer.run_config import (
    AlgorithmConfig,
    GrpoConfig,
    KlConfig,
    LoraConfig,
    OnlineDpoConfig,
    OptimizerConfig,
    PpoConfig,
    RewardKlConfig,
)
from shared.logs import configure_logging
from shared.schemas import PolicyId
from tests.replica_process import eventually, free_port
from tests.trainer.conftest import (
    NO_GUARDS,
    PLAIN,
    VERSION_0,
    float32_policy,
    make_sample,
    repeatable,
)
from tests.trainer.test_trainer import train_request
from tests.trainer_process import SLOW_BOOT, TrainerProcess, start_trainer

NUM_UPDATES, LEARNING_RATE = 3, 1e-3
WHOLE_BATCH = 100_000
FAILS_ON_RANK_0, FAILS_ON_RANK_1, DRIFTS_ON_RANK_1 = 100.0, 101.0, 102.0  # temperatures
SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

SEVERAL_STEPS = PLAIN.model_copy(update={"num_epochs": 2, "num_minibatches": 3})
CASES: dict[str, tuple[AlgorithmConfig, int]] = {
    "more micro-batches than ranks": (PLAIN, 20),
    "a micro-batch for each rank": (PLAIN, WHOLE_BATCH),
    "minibatches and epochs": (SEVERAL_STEPS, 25),
    "a sample for one rank alone": (PLAIN, WHOLE_BATCH),
    "no sample for any rank": (PLAIN, WHOLE_BATCH),
    "grpo with a reference": (
        GrpoConfig(kl=KlConfig(coefficient=0.1), top_entropy_fraction=0.5),
        WHOLE_BATCH,
    ),
    "ppo": (PpoConfig(num_epochs=2, kl=RewardKlConfig(coefficient=0.05)), 40),
    "online_dpo": (OnlineDpoConfig(), WHOLE_BATCH),
}


def batch_of(case: str, update: int) -> list[Sample]:
    """Nine samples of different lengths; some of them, or all, without advantage. In groups of
    three where an algorithm compares within them."""
    advantages = [1.0, -0.5, 0.0, 0.7, -1.2, 0.0, 0.3, -0.3, 0.9]
    in_groups = case in ("grpo with a reference", "ppo", "online_dpo")
    if case == "a sample for one rank alone":
        advantages[1:] = [0.0] * 8
    if case == "no sample for any rank":
        advantages = [0.0] * 9
    return [
        make_sample(
            10 * update + i,
            advantage=advantage,
            num_prompt=3 + (i // 3 if in_groups else i),
            num_completion=2 + 3 * (i % 3),
            lag=i % 2,
            group=i // 3 if in_groups else None,
        )
        for i, advantage in enumerate(advantages)
    ]


@dataclass(frozen=True, slots=True)
class Outcome:
    stats: list[tuple[float, ...]]  # of each update
    weights: Tensor


def start(learner: Learner, algorithm: AlgorithmConfig = PLAIN) -> None:
    optimizer = OptimizerConfig(learning_rate=LEARNING_RATE, warmup_steps=0)
    lora = LoraConfig(rank=8, alpha=16)
    learner.start(VERSION_0, lora, optimizer, seed=0, algorithm=algorithm)


def train(learner: Learner, case: str) -> Outcome:
    start(learner, CASES[case][0])
    return Outcome([update(learner, case, k) for k in range(NUM_UPDATES)], weights(learner))


def update(learner: Learner, case: str, index: int) -> tuple[float, ...]:
    algorithm, max_tokens = CASES[case]
    batch = batch_of(case, index)
    stats = learner.update(
        batch, algorithm, max_tokens_per_micro_batch=max_tokens, guards=NO_GUARDS
    )
    return tuple(value for _, value in repeatable(stats) if isinstance(value, int | float))


def weights(learner: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner.optimizer.parameters])


# --- what runs in two processes -----------------------------------------------------------------


def main(checkpoint: Path, results: Path) -> None:
    torch.set_num_threads(1)
    configure_logging("trainer")
    ranks = Ranks.join("cpu")
    learner = Learner(float32_policy(checkpoint, ranks))
    break_when_told(learner, ranks.rank)
    if ranks.rank:
        while ranks.obey(learner):
            pass
        return
    outcomes: dict[str, Any] = {case: train(learner, case) for case in CASES}
    for temperature in (FAILS_ON_RANK_0, FAILS_ON_RANK_1):
        outcomes[f"failure at {temperature}"] = fail(learner, temperature=temperature)
    outcomes["not finite"] = fail(learner, rewards=(float("inf"),))
    outcomes["refused"] = refuse(learner)
    outcomes["resumed"] = resume(learner)
    torch.save(outcomes, results)
    told = [replace(s, temperature=DRIFTS_ON_RANK_1) for s in batch_of("", 0)]
    learner.update(told, PLAIN, max_tokens_per_micro_batch=WHOLE_BATCH)
    raise AssertionError("two different policies went on")


def break_when_told(learner: Learner, rank: int) -> None:
    """Let the forward of this rank do what the temperature of a sample says."""
    logprobs = learner.policy.logprobs

    def tempered(batch: TokenBatch) -> TokenLogprobs:
        temperature = float(batch.temperatures[0])
        if temperature == (FAILS_ON_RANK_0, FAILS_ON_RANK_1)[rank]:
            raise MemoryError(f"no memory on rank {rank}")
        if temperature == DRIFTS_ON_RANK_1 and rank == 1:
            with torch.no_grad():
                next(p for p in learner.policy.model.parameters() if p.requires_grad)[0, 0] += 1e-6
        return logprobs(batch)

    learner.policy.logprobs = tempered  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True)
class Failure:
    error: BaseException
    version: int
    has_moved: bool
    next_update: tuple[float, ...]


def fail(learner: Learner, **told: Any) -> Failure:
    """An update whose second step fails, then one that does not."""
    start(learner)
    before = weights(learner)
    bad = [replace(make_sample(seed, advantage=1.0, num_completion=3), **told) for seed in (6, 7)]
    good = [make_sample(8, advantage=1.0), make_sample(9, advantage=-1.0)]
    try:
        learner.update(
            [*good, *bad],
            PLAIN.model_copy(update={"num_minibatches": 2}),
            max_tokens_per_micro_batch=WHOLE_BATCH,
        )
    except (PeerFailed, MemoryError, UpdateRefused) as error:
        return Failure(
            error,
            learner.policy.id.version,
            not torch.equal(before, weights(learner)),
            update(learner, "minibatches and epochs", 0),
        )
    raise AssertionError("it did not fail")


def refuse(learner: Learner) -> tuple[str, tuple[float, ...]]:
    """A run whose config does not fit, then an update of the one before."""
    start(learner)
    try:
        learner.start(
            VERSION_0, LoraConfig(target_modules=("qkv_proj",)), OptimizerConfig(), seed=0
        )
    except ValueError as error:
        return str(error), update(learner, "minibatches and epochs", 0)
    raise AssertionError("it was not refused")


def resume(learner: Learner) -> tuple[Tensor, Tensor]:
    """The weights after three updates, and after two and one from the snapshot between."""
    case = "more micro-batches than ranks"
    start(learner)
    for k in range(2):
        update(learner, case, k)
    snapshot = learner.snapshot()
    update(learner, case, 2)
    whole = weights(learner)
    start(learner)
    learner.restore(PolicyId(run_id="test", incarnation=2, version=2), snapshot)
    update(learner, case, 2)
    return whole, weights(learner)


@dataclass(frozen=True, slots=True)
class TwoRanks:
    outcomes: dict[str, Any]
    return_code: int
    log: str


@pytest.fixture(scope="module")
def two_ranks(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    """What `main` computed and how it ended."""
    results = tmp_path_factory.mktemp("parallel") / "outcomes.pt"
    ended = subprocess.run(
        [*torchrun("tests.trainer.policy.test_ranks"), str(tiny_checkpoint), str(results)],
        env=os.environ | SINGLE_THREADED,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert results.exists(), ended.stdout
    return TwoRanks(torch.load(results, weights_only=False), ended.returncode, ended.stdout)


def torchrun(module: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return [*launcher, "--standalone", "--nproc-per-node", "2", "-m", module]


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path) -> Learner:
    return Learner(float32_policy(tiny_checkpoint, Ranks()))


# --- the same policy ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_the_policy_that_one_trains(
    two_ranks: TwoRanks, alone: Learner, case: str
) -> None:
    """But for the order in which float32 gradients are summed: a thousandth of what was learned.

    AdamW scales a gradient that is all rounding up to a whole step; of those there are few.
    """
    start(alone, CASES[case][0])
    begin = weights(alone)
    expected, outcome = train(alone, case), two_ranks.outcomes[case]
    difference = outcome.weights - expected.weights
    assert difference.norm() <= 1e-3 * (expected.weights - begin).norm()
    assert difference.abs().max() <= 0.1 * LEARNING_RATE
    for stats, expected_stats in zip(outcome.stats, expected.stats, strict=True):
        assert stats == pytest.approx(expected_stats, rel=1e-4, abs=1e-6)


def test_a_restored_run_goes_on_bit_for_bit(two_ranks: TwoRanks) -> None:
    whole, resumed = two_ranks.outcomes["resumed"]
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize(
    ("case", "error"),
    [
        (f"failure at {FAILS_ON_RANK_0}", MemoryError("no memory on rank 0")),
        (
            f"failure at {FAILS_ON_RANK_1}",
            PeerFailed("rank 1 failed: MemoryError: no memory on rank 1"),
        ),
    ],
)
def test_what_fails_on_one_rank_fails_on_all_and_the_next_update_is_as_ever(
    two_ranks: TwoRanks, alone: Learner, case: str, error: Exception
) -> None:
    failure = two_ranks.outcomes[case]
    assert repr(failure.error) == repr(error)
    check_nothing_is_left(failure, alone)


def test_a_gradient_that_is_not_finite_is_refused_by_all_ranks(
    two_ranks: TwoRanks, alone: Learner
) -> None:
    failure = two_ranks.outcomes["not finite"]
    assert isinstance(failure.error, UpdateRefused)
    check_nothing_is_left(failure, alone)


def check_nothing_is_left(failure: Failure, alone: Learner) -> None:
    start(alone)
    assert failure.version == 0
    assert not failure.has_moved
    expected = update(alone, "minibatches and epochs", 0)
    assert failure.next_update == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_run_that_does_not_fit_leaves_the_last_one_on_all_ranks(
    two_ranks: TwoRanks, alone: Learner
) -> None:
    message, next_update = two_ranks.outcomes["refused"]
    assert "has qkv_proj, this model has no such linear" in message
    start(alone)
    expected = update(alone, "minibatches and epochs", 0)
    assert next_update == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_ranks_whose_weights_differ_end(two_ranks: TwoRanks) -> None:
    assert two_ranks.return_code == 1
    assert two_ranks.log.count("the LoRA weights of the ranks differ") == 1


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_share_all_samples_in_equal_numbers_of_tokens(size: int) -> None:
    samples = [make_sample(i, advantage=1.0, num_completion=1 + i**2 % 97) for i in range(100)]
    shares = [Ranks(rank, size).share(samples, lambda s: s.length) for rank in range(size)]
    assert sorted(id(s) for share in shares for s in share) == sorted(map(id, samples))
    loads = [sum(sample.length for sample in share) for share in shares]
    assert max(loads) - min(loads) <= min(sample.length for sample in samples)
    longest = max(samples, key=lambda sample: sample.length).length
    assert min(max(s.length for s in share) for share in shares) > longest / 2  # long ones in each


# --- one end ------------------------------------------------------------------------------------


@pytest.fixture
def service(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[TrainerProcess]:
    trainer = start_trainer(tmp_path, tiny_checkpoint, data_parallel_size=2)
    yield trainer
    trainer.end()


def take_a_step(trainer: TrainerProcess) -> None:
    """One update of an external run."""
    run = trainer.start_run(managed=False, lora={"rank": 8}, run_id="ours")
    body = train_request(run.policy).model_dump(mode="json")
    answer = trainer.post("/train", **body)
    assert answer.is_success, answer.text
    assert answer.json()["policy"]["version"] == 1


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def are_gone(pids: Sequence[int]) -> bool:
    """Zombies that nobody has waited for yet count as gone."""

    def is_gone(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    return all(map(is_gone, pids))


def test_a_trainer_of_two_processes_steps_and_stops_as_one_does(service: TrainerProcess) -> None:
    followers = children(service.process.pid)
    assert len(followers) == 1
    take_a_step(service)
    for pid in followers:
        os.kill(pid, signal.SIGTERM)  # whoever tells all processes to stop
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(30) == 0, service.log.read_text()
    assert are_gone(followers)
    assert (service.runs_dir / "ours" / "adapter" / "adapter_model.safetensors").exists()
    assert "ERROR" not in service.log.read_text()


def test_a_follower_that_is_killed_ends_the_trainer_with_one_sentence(
    service: TrainerProcess,
) -> None:
    take_a_step(service)
    (follower,) = children(service.process.pid)
    os.kill(follower, signal.SIGKILL)
    assert service.process.wait(10) == 1
    errors = [line for line in service.log.read_text().splitlines() if "ERROR" in line]
    assert len(errors) == 1, errors
    assert f"training process 1 (pid {follower}) was ended by SIGKILL: the trainer" in errors[0]


def test_a_trainer_that_is_killed_takes_its_followers_along(service: TrainerProcess) -> None:
    followers = children(service.process.pid)
    service.kill()
    assert eventually(lambda: are_gone(followers), timeout_s=10)


def test_a_trainer_that_still_loads_ends_its_followers_first(tmp_path: Path) -> None:
    """They may not have come so far that they would notice."""
    settings = {"MODEL": "owner/model", "PORT": "0", "RUNS_DIR": "runs", "DEVICE": "cpu"}
    settings |= {"DATA_PARALLEL_SIZE": "2"}
    environment = {f"TRAINER_{name}": value for name, value in settings.items()}
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_BOOT],
        env=os.environ | SINGLE_THREADED | environment | {"PYTHONPATH": os.getcwd()},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"loading\n"
        followers = children(process.pid)
        assert len(followers) == 1
        process.terminate()
        assert process.wait(timeout=30) == 0
        assert are_gone(followers)


def test_the_whole_service_runs_under_torchrun(tiny_checkpoint: Path, tmp_path: Path) -> None:
    trainer = start_under_torchrun(tmp_path, tiny_checkpoint)
    try:
        take_a_step(trainer)
        ranks = children(trainer.process.pid)
        assert len(ranks) == 2
        trainer.process.send_signal(signal.SIGTERM)
        trainer.process.wait(30)
        assert are_gone(ranks)
        assert (trainer.runs_dir / "ours" / "adapter" / "adapter_model.safetensors").exists()
    finally:
        trainer.end()


def start_under_torchrun(root: Path, checkpoint: Path) -> TrainerProcess:
    port, log, runs_dir = free_port(), root / "log", root / "runs"
    settings = {
        "TRAINER_MODEL": str(checkpoint),
        "TRAINER_PORT": str(port),
        "TRAINER_RUNS_DIR": str(runs_dir),
        "TRAINER_DEVICE": "cpu",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            torchrun("services.trainer"),
            env=os.environ | SINGLE_THREADED | settings,
            stdout=output,
            stderr=output,
        )
    trainer = TrainerProcess(process, f"http://127.0.0.1:{port}", log, runs_dir)

    def is_ready() -> bool:
        return "ready after" in log.read_text() or process.poll() is not None

    assert eventually(is_ready, timeout_s=60), log.read_text()
    return trainer


def test_a_model_that_no_rank_can_load_is_one_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    torn = shutil.copytree(tiny_checkpoint, tmp_path / "torn")
    weights_file = torn / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:100_000])
    ended = run_service(tmp_path, TRAINER_MODEL=str(torn), TRAINER_DEVICE="cpu")
    assert ended.returncode in (1, 2)
    assert ended.stderr.count("ERROR") == 1, ended.stderr
    assert str(torn) in ended.stderr


def test_more_processes_than_gpus_are_refused(tmp_path: Path) -> None:
    ended = run_service(tmp_path, TRAINER_DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 2
    assert ended.stderr == (
        "TRAINER_DATA_PARALLEL_SIZE is 2, this process sees 0 GPUs: set it to that at most, or "
        "give the trainer more\n"
    )


def run_service(root: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """A service of two processes that ends by itself."""
    common = {
        "TRAINER_MODEL": "m",
        "TRAINER_PORT": str(free_port()),
        "TRAINER_RUNS_DIR": str(root / "runs"),
        "TRAINER_DATA_PARALLEL_SIZE": "2",
    }
    return subprocess.run(
        [sys.executable, "-m", "services.trainer"],
        env=os.environ | SINGLE_THREADED | common | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("local_world_size", "requested", "problem"),
    [("4", 4, None), ("4", 1, None), ("2", 4, "on several hosts"), ("4", 2, "leave the setting")],
)
def test_the_size_that_torchrun_gives_counts(
    monkeypatch: pytest.MonkeyPatch, local_world_size: str, requested: int, problem: str | None
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    if problem is None:
        assert num_processes(requested, "cpu") == 4
    else:
        with pytest.raises(ValueError, match=problem):
            num_processes(requested, "cpu")


if __name__ == "__main__":
    from tests.trainer.policy import test_ranks  # whose classes the results can be loaded as

    test_ranks.main(Path(sys.argv[1]), Path(sys.argv[2]))
