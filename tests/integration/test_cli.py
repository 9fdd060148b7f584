"""The command line on a real trainer and a real engine, each command a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from shared.model_folder import linear_shapes
from shared.rollout_client import RolloutClient
from shared.schemas import GenerateRequest, RunStatus, SamplingParams, ScoreRequest
from tests.publisher import PROBE, Publisher
from tests.reference_model import ReferenceModel
from tests.replica_process import ReplicaProcess, eventually, start_replica, wait_until_ready
from tests.trainer_process import TrainerProcess, start_trainer

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[2]
KERNEL_NOISE = 0.05  # nats, mean |Δlogprob|: bf16 in another order of summation
CONFIG: dict[str, Any] = {
    "num_steps": 3,
    "prompts_per_step": 4,
    "sampling": {"n": 4, "max_tokens": 8},
    "dataset": {"type": "sort_digits", "num_prompts": 64},
    "rewards": [{"type": "function", "path": "tests.trainer_process:share_of_small_digits"}],
    "lora": {"rank": 8, "alpha": 16},
    "optimizer": {"learning_rate": 2e-2, "warmup_steps": 0},
    "guards": dict.fromkeys(("max_sampler_kl", "min_sequence_ess", "max_masked_fraction")),
    "replace_run": True,
}


class Cli:
    """`tandem` with the two services in its environment."""

    def __init__(self, trainer: TrainerProcess, replica: ReplicaProcess) -> None:
        self._environment = {
            **os.environ,
            "TANDEM_TRAINER_URL": trainer.url,
            "TANDEM_ROLLOUT_URLS": replica.url,
        }

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tandem", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=self._environment,
        )

    def __call__(self, *arguments: str | Path) -> str:
        """What it prints to stdout; it has to succeed."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out


@pytest.fixture(scope="module")
def trainer(
    replica: ReplicaProcess, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TrainerProcess]:
    trainer = start_trainer(tmp_path_factory.mktemp("cli"), tiny_checkpoint, replica.url)
    yield trainer
    trainer.end()


@pytest.fixture
def cli(trainer: TrainerProcess, replica: ReplicaProcess) -> Cli:
    return Cli(trainer, replica)


@pytest.fixture
def without_trainer(cli: Cli, replica: ReplicaProcess) -> Iterator[None]:
    """The replica is out of the fleet meanwhile: a trainer would take it back for its run."""

    def serving() -> bool:
        (status,) = json.loads(cli("replicas", "--json"))["replicas"]
        return bool(status["state"] == "serving")

    cli("replicas", "remove", replica.url.removeprefix("http://"))
    yield
    cli("replicas", "add", replica.url)
    assert eventually(serving, timeout_s=30)


def write_config(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(CONFIG | changes))  # JSON is YAML
    return path


async def test_a_run_is_followed_left_found_again_and_stopped(cli: Cli, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", num_steps=1000, optimizer={"learning_rate": 1e-4})
    following = cli.start("run", config)
    assert following.stdout
    while not (line := following.stdout.readline()).startswith("step 2/1000"):
        assert line, following.communicate()
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=20)
    assert (following.returncode, "continues" in err) == (130, True)

    status = json.loads(cli("status", "--json"))
    run = RunStatus.model_validate(status["trainer"]["run"])
    assert (run.state, run.step >= 2) == ("running", True)
    assert [replica["state"] for replica in status["replicas"]] == ["serving"]
    assert f"{run.run_id} running" in cli("status")

    assert cli("run", "--stop").startswith(f"Run {run.run_id} stopped at step ")
    events = [json.loads(line) for line in cli("follow", "--json").splitlines()]
    assert events[-1] == {"kind": "state", "state": "stopped", "detail": ""}
    steps = [event["step"] for event in events if event["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= run.step


async def test_a_misspelt_key_is_bad_input_and_starts_nothing(cli: Cli, tmp_path: Path) -> None:
    process = cli.start("run", write_config(tmp_path / "run.yaml", num_step=3))
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert "num_step" in err


@pytest.mark.usefixtures("without_trainer")
async def test_generate_streams_what_the_same_request_answers(
    cli: Cli, publisher: Publisher, client: RolloutClient
) -> None:
    policy = await publisher.publish(1)
    out = cli("generate", "s53=", "-n", "2", "--max-tokens", "30", "--seed", "7", "--policy", "1")
    request = GenerateRequest(
        prompts=("s53=",), sampling=SamplingParams(n=2, max_tokens=30, seed=7), policy=policy
    )
    texts = [c.text for c in (await client.generate(request)).groups[0].completions]
    assert out == "".join(f"[{i}] {text}\n" for i, text in enumerate(texts, start=1))
    (document,) = cli("generate", "--chat", "s2", "--max-tokens", "4", "--json").splitlines()
    assert json.loads(document)["groups"][0]["completions"][0]["segments"][0]["policy"] == (
        policy.model_dump()
    )


@pytest.mark.usefixtures("without_trainer")
async def test_a_peft_folder_that_is_pushed_is_served_as_peft_applies_it(
    cli: Cli,
    replica: ReplicaProcess,
    client: RolloutClient,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        r=4,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["v_proj", "down_proj"],
        init_lora_weights=False,  # B is random: an effect to see
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    out = cli("sync", tmp_path / "peft", "--run-id", "from-peft", "--replace-run")
    assert "from-peft.1@1" in out
    assert " loaded " in out
    served = (await client.score(ScoreRequest(sequences=(PROBE,)))).logprobs[0]
    adapter = await client.adapter(1)
    moved = ReferenceModel(replica.base_dir(), adapter, tmp_path).of_tokens(PROBE)
    base = ReferenceModel(replica.base_dir()).of_tokens(PROBE)
    assert gap(moved, base) > 5 * KERNEL_NOISE
    assert gap(served, moved) < KERNEL_NOISE


async def test_the_engine_serves_an_exported_checkpoint_as_it_serves_the_adapter(
    cli: Cli,
    client: RolloutClient,
    trainer: TrainerProcess,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    cli("run", write_config(tmp_path / "run.yaml"))
    run = trainer.run()
    out, err = (exporting := cli.start("export", tmp_path / "merged", "--merged")).communicate()
    assert (exporting.returncode, err, f"policy {run.policy}" in out) == (0, "", True)
    cli("export", tmp_path / "adapter", "--run", run.run_dir)
    assert (tmp_path / "adapter/adapter_model.safetensors").read_bytes() == await client.adapter(3)

    request = ScoreRequest(sequences=(PROBE,))
    with_adapter = (await client.score(request)).logprobs[0]
    of_base = ScoreRequest(sequences=(PROBE,), policy=run.policy.model_copy(update={"version": 0}))
    before = (await client.score(of_base)).logprobs[0]
    assert gap(with_adapter, before) > 5 * KERNEL_NOISE
    assert gap(ReferenceModel(tmp_path / "merged").of_tokens(PROBE), with_adapter) < KERNEL_NOISE

    exported = start_replica(
        tmp_path / "replica", tmp_path / "merged", tmp_path, base="original", max_num_seqs=4
    )
    try:
        wait_until_ready(exported)
        async with RolloutClient(exported.url, timeout_s=60) as merged:
            served = (await merged.score(request)).logprobs[0]
    finally:
        exported.end()
    assert gap(served, with_adapter) < KERNEL_NOISE
    assert linear_shapes(tmp_path / "merged") == linear_shapes(tiny_checkpoint)


def gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The mean |Δlogprob|."""
    return mean(abs(a - b) for a, b in zip(ours, theirs, strict=True))
