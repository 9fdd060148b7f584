"""A real trainer and a real replica: whole runs over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from services.trainer.app import create_app
from services.trainer.rewards import scorer as scoring
from services.trainer.settings import TrainerSettings
from services.trainer.trainer import Trainer
from shared.errors import (
    Conflict,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    RunConflict,
    UnexpectedPolicy,
    UnsuitableForTraining,
)
from shared.rollout_client import RolloutClient
from shared.schemas import (
    EvalRecord,
    GenerateRequest,
    PolicyId,
    SamplingParams,
    ScoredCompletion,
    ScoredGroup,
    ScoreRequest,
    StateRecord,
    StepRecord,
    TrainRequest,
)
from shared.trainer_client import TrainerClient
from tests.integration.rewards import share_of_small_digits
from tests.publisher import PROBE
from tests.replica_process import ReplicaProcess
from tests.trainer_in_process import booted_trainer, client_of, until_end

pytestmark = pytest.mark.anyio
_LORA = {"rank": 8, "alpha": 16}
_OPTIMIZER = {"learning_rate": 5e-3, "warmup_steps": 0}
MANAGED: dict[str, Any] = {
    "num_steps": 3,
    "prompts_per_step": 4,
    "sampling": {"n": 4, "max_tokens": 8, "temperature": 0.8},
    "dataset": {"type": "sort_digits", "num_prompts": 64},
    "rewards": [{"type": "function", "path": "tests.integration.rewards:share_of_small_digits"}],
    "eval": {"dataset": {"type": "sort_digits"}, "num_prompts": 8, "every_steps": 2},
    "lora": _LORA,
    "optimizer": _OPTIMIZER,
}
EXTERNAL: dict[str, Any] = {"managed": False, "lora": _LORA, "optimizer": _OPTIMIZER}


@pytest.fixture(scope="module")
async def trainer(
    anyio_backend: str,
    replica: ReplicaProcess,
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Trainer]:
    async with booted_trainer(
        tiny_checkpoint, replica.url, tmp_path_factory.mktemp("runs")
    ) as trainer:
        yield trainer


@pytest.fixture
async def runs(trainer: Trainer) -> AsyncIterator[TrainerClient]:
    async with client_of(trainer) as client:
        yield client


def replacing(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The replica may still serve the run of another test."""
    return {**config, **changes, "replace_run": True}


# --- managed runs -------------------------------------------------------------------------------


async def test_every_step_samples_from_the_version_the_last_step_made(
    runs: TrainerClient, client: RolloutClient
) -> None:
    """axolotl 7617b95: a sync that became a no-op went unnoticed."""
    status = await runs.start_run(replacing(MANAGED))
    events = await until_end(runs)
    steps = [event for event in events if isinstance(event, StepRecord)]
    assert [step.policy for step in steps] == [
        PolicyId(run_id=status.run_id, version=version) for version in (1, 2, 3)
    ]
    assert {step.staleness_max for step in steps} == {0}
    assert all(step.num_samples == 16 for step in steps)
    assert all((step.num_constant_groups or 0) < 4 for step in steps)
    assert all(0 < (step.logprob_gap or 0) < 0.05 for step in steps)
    assert all((step.sampler_kl or 0) < 0.01 for step in steps)
    evals = [event for event in events if isinstance(event, EvalRecord)]
    assert [(e.step, e.policy.version) for e in evals] == [(0, 0), (2, 2), (3, 3)]
    assert events[-1] == StateRecord(state="completed")

    assert (await client.policies()).newest == steps[-1].policy
    assert await client.adapter(3) == await runs.adapter(3)


async def test_a_finished_run_leaves_metrics_and_an_adapter_that_peft_loads(
    runs: TrainerClient, client: RolloutClient, replica: ReplicaProcess
) -> None:
    """The adapter on disk, applied by PEFT to the exact base, is what the replica serves."""
    status = await runs.start_run(replacing(MANAGED))
    events = await until_end(runs)
    run_dir = Path((await runs.run()).run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == [json.loads(event.model_dump_json()) for event in events]
    assert json.loads((run_dir / "config.json").read_text())["run_id"] == status.run_id
    assert list((run_dir / "tensorboard").iterdir())

    base = AutoModelForCausalLM.from_pretrained(replica.base_dir(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run_dir / "adapter"))
    with torch.no_grad():
        logits = model(torch.tensor([PROBE])).logits[0, :-1]
    expected = logits.log_softmax(-1)[range(len(PROBE) - 1), PROBE[1:]]
    served = (await client.score(ScoreRequest(sequences=(PROBE,)))).logprobs[0]
    assert (torch.tensor(served) - expected).abs().mean() < 0.02


async def test_a_stopped_run_ends_after_a_whole_step(trainer: Trainer, runs: TrainerClient) -> None:
    await runs.start_run(replacing(MANAGED, num_steps=1000, eval=None))
    async for _, event in trainer.events(0):
        if isinstance(event, StepRecord):
            break
    await runs.stop_run()
    assert (await until_end(runs))[-1] == StateRecord(state="stopped")
    status = await runs.run()
    assert 1 <= status.step < 1000
    assert status.policy.version == status.step


async def test_a_run_that_waits_for_a_replica_can_be_stopped(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    nowhere = TrainerSettings(
        model=str(tiny_checkpoint), rollout_urls=("http://127.0.0.1:9",), runs_dir=tmp_path
    )
    trainer = Trainer(nowhere)
    trainer.fleet.start()
    await trainer.boot()
    transport = httpx.ASGITransport(create_app(trainer))
    async with TrainerClient("http://trainer", transport=transport) as runs:
        await runs.start_run(MANAGED)
        assert (await runs.stop_run()).state == "stopping"
        assert (await until_end(runs))[-1] == StateRecord(state="stopped")
    await trainer.stop()


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        ("broken", "raised RuntimeError('the judge is away')"),
        ("not_a_number", "gave nan, not a finite number"),
        ("endless", "gave inf, not a finite number"),
        ("nothing", "gave None, not a finite number"),
        ("none_at_all", "gave 0 values for"),
        ("hangs", "took more than 0.5 s"),
    ],
)
async def test_a_reward_that_fails_stops_the_run_with_the_completion(
    runs: TrainerClient, reward: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_MAX_SEARCH_S", 1.0)
    path = f"tests.integration.rewards:{reward}"
    config = {"type": "function", "path": path, "timeout_s": 0.5 if reward == "hangs" else 60}
    await runs.start_run(replacing(MANAGED, rewards=[config], eval=None))
    events = await until_end(runs)
    assert not [event for event in events if isinstance(event, StepRecord)]
    last = events[-1]
    assert isinstance(last, StateRecord)
    assert last.state == "failed"
    assert f"reward function {path} {problem}" in last.detail
    assert re.search(r"completion 0 of \d+, '.*' to the prompt 's\d+='", last.detail)


async def test_a_reward_that_fails_ends_the_run_and_not_the_services(
    runs: TrainerClient, client: RolloutClient
) -> None:
    broken = {"type": "function", "path": "tests.integration.rewards:broken"}
    await runs.start_run(replacing(MANAGED, rewards=[broken], eval=None))
    await until_end(runs)
    assert (await client.status()).state == "ready"
    await runs.start_run(replacing(MANAGED, num_steps=1, eval=None))
    assert (await until_end(runs))[-1] == StateRecord(state="completed")


async def test_a_run_says_what_it_waits_for_while_a_reward_service_is_away(
    runs: TrainerClient,
) -> None:
    reward = {"type": "http", "url": "http://127.0.0.1:9/rewards", "max_outage_s": 0.5}
    await runs.start_run(replacing(MANAGED, rewards=[reward], eval=None))
    details = [event.detail for event in await until_end(runs) if isinstance(event, StateRecord)]
    assert any("9/rewards has been away for 0 s: ConnectError" in d for d in details[:-1])
    assert "9/rewards gave no rewards for" in details[-1]
    assert (await runs.run()).state == "failed"


async def test_a_run_that_fails_keeps_what_it_learned(runs: TrainerClient) -> None:
    rewards = [{"type": "function", "path": "tests.integration.rewards:breaks_later"}]
    await runs.start_run(replacing(MANAGED, rewards=rewards, eval=None))
    assert "the judge left" in str((await until_end(runs))[-1])
    status = await runs.run()
    assert (status.state, status.policy.version) == ("failed", 2)
    saved = Path(status.run_dir) / "adapter/adapter_model.safetensors"
    assert saved.read_bytes() == await runs.adapter(2)


async def test_one_run_at_a_time(runs: TrainerClient) -> None:
    await runs.start_run(replacing(EXTERNAL))
    with pytest.raises(RunConflict, match="stop it"):
        await runs.start_run(replacing(EXTERNAL))


async def test_a_run_id_is_used_once_where_that_is_asked_for(runs: TrainerClient) -> None:
    await runs.start_run(replacing(EXTERNAL, run_id="once"))
    await runs.stop_run()
    await until_end(runs)
    with pytest.raises(Conflict, match="'once' exists"):
        await runs.start_run(replacing(EXTERNAL, run_id="once", resume="never"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 3}, "did you mean 'num_steps'"),
        ({"rewards": [{"type": "exact_match", "column": "gold"}]}, "dataset has answer beside"),
        ({"rewards": [{"type": "function", "path": "nowhere:f"}]}, "cannot be imported"),
        ({"dataset": {"type": "jsonl", "path": "nowhere.jsonl"}}, r"nowhere\.jsonl"),
    ],
)
async def test_a_config_that_cannot_run_is_refused_at_once(
    runs: TrainerClient, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await runs.start_run(replacing(MANAGED, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 64}}, "lora.rank is 64, the replica's maximum is 16"),
        ({"sampling": {"n": 4, "max_tokens": 512}}, "the replica's context has 512"),
    ],
)
async def test_a_run_that_the_replica_cannot_serve_fails_before_its_first_step(
    runs: TrainerClient, changes: dict[str, Any], message: str
) -> None:
    await runs.start_run(replacing(MANAGED, **changes))
    events = await until_end(runs)
    assert isinstance(events[-1], StateRecord)
    assert message in events[-1].detail
    assert not [event for event in events if isinstance(event, StepRecord)]


# --- POST /train --------------------------------------------------------------------------------


async def sample_groups(client: RolloutClient, policy: PolicyId) -> tuple[ScoredGroup, ...]:
    """Three groups of four, scored by a reward of one's own."""
    response = await client.generate(
        GenerateRequest(
            prompts=("s31=", "s42=", "s75="),
            sampling=SamplingParams(n=4, max_tokens=8, seed=policy.version),
            policy=policy,
            purpose="train",
        )
    )
    return tuple(
        ScoredGroup(
            prompt_token_ids=group.prompt_token_ids,
            sampling=group.sampling,
            completions=tuple(
                ScoredCompletion(completion=c, reward=share_of_small_digits([c.text or ""])[0])
                for c in group.completions
            ),
        )
        for group in response.groups
    )


async def test_a_loop_of_ones_own_trains_and_publishes(
    runs: TrainerClient, client: RolloutClient
) -> None:
    policy = (await runs.start_run(replacing(EXTERNAL))).policy
    for version in (1, 2):
        request = TrainRequest(
            groups=await sample_groups(client, policy),
            expected_policy=policy,
            idempotency_key=f"step-{version}",
        )
        answer = await runs.train(request)
        policy = answer.policy
        assert policy.version == answer.step.step == version
        assert [receipt.policy for receipt in answer.receipts] == [policy]
    assert (await client.policies()).newest == policy == (await runs.policy()).policy


async def test_a_repeated_idempotency_key_gets_the_first_answer_and_takes_no_step(
    runs: TrainerClient, client: RolloutClient
) -> None:
    policy = (await runs.start_run(replacing(EXTERNAL))).policy
    request = TrainRequest(
        groups=await sample_groups(client, policy), expected_policy=policy, idempotency_key="k"
    )
    first = await runs.train(request)
    assert await runs.train(request) == first
    assert (await runs.policy()).policy.version == 1
    other = request.model_copy(update={"groups": request.groups[:1]})
    with pytest.raises(IdempotencyConflict, match="'k' was used"):
        await runs.train(other)


async def test_groups_for_another_policy_are_refused_and_nothing_is_lost(
    runs: TrainerClient, client: RolloutClient
) -> None:
    policy = (await runs.start_run(replacing(EXTERNAL))).policy
    groups = await sample_groups(client, policy)
    with pytest.raises(UnexpectedPolicy, match="the policy is") as error:
        await runs.train(
            TrainRequest(groups=groups, expected_policy=policy.next(), idempotency_key="a")
        )
    assert error.value.extra["current"] == policy.model_dump()
    answer = await runs.train(
        TrainRequest(groups=groups, expected_policy=policy, idempotency_key="b")
    )
    assert answer.policy.version == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": SamplingParams(top_p=0.9)}, "top_p=0.9"),
        ({"sampling": SamplingParams(temperature=0)}, "temperature=0"),
        ({"prompt_token_ids": (1, 999)}, "token id 999"),
    ],
)
async def test_what_a_gradient_cannot_use_is_refused(
    runs: TrainerClient, client: RolloutClient, change: dict[str, Any], message: str
) -> None:
    policy = (await runs.start_run(replacing(EXTERNAL))).policy
    groups = await sample_groups(client, policy)
    bad = groups[1].model_copy(update=change)
    with pytest.raises((UnsuitableForTraining, InvalidRequest), match=message):
        await runs.train(
            TrainRequest(groups=(groups[0], bad), expected_policy=policy, idempotency_key="x")
        )
    assert (await runs.policy()).policy == policy


async def test_a_managed_run_takes_no_groups_from_outside(
    runs: TrainerClient, client: RolloutClient
) -> None:
    status = await runs.start_run(replacing(MANAGED, num_steps=1, eval=None))
    await until_end(runs)
    groups = await sample_groups(client, status.policy)
    with pytest.raises(RunConflict, match="managed"):
        await runs.train(
            TrainRequest(groups=groups, expected_policy=status.policy, idempotency_key="x")
        )


async def test_an_adapter_that_is_no_longer_kept_is_not_found(runs: TrainerClient) -> None:
    await runs.start_run(replacing(MANAGED, eval=None))
    await until_end(runs)
    assert (await runs.policy()).kept_adapters == (2, 3)
    with pytest.raises(NotFound, match="kept versions: 2, 3"):
        await runs.adapter(1)


# --- the exact base -----------------------------------------------------------------------------


async def test_the_exact_base_is_far_closer_to_the_trainer_than_the_original(
    trainer: Trainer, runs: TrainerClient, client: RolloutClient, tiny_checkpoint: Path
) -> None:
    """unsloth#1089: people do not know which base to serve. Mean |Δlogprob| to the trainer."""
    await runs.start_run(replacing(EXTERNAL))
    served = (
        await client.score(
            ScoreRequest(sequences=(PROBE,), policy=PolicyId(run_id="any", version=0))
        )
    ).logprobs[0]
    original = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    with torch.no_grad(), trainer.policy.adapter_disabled():
        quantized_logits = trainer.policy.model(torch.tensor([PROBE])).logits[0, :-1].float()
        original_logits = original(torch.tensor([PROBE])).logits[0, :-1]

    def gap(logits: torch.Tensor) -> float:
        logprobs = logits.log_softmax(-1)[range(len(PROBE) - 1), PROBE[1:]]
        return (logprobs - torch.tensor(served)).abs().mean().item()

    assert gap(quantized_logits) < 0.1 * gap(original_logits)


async def test_a_trainer_with_another_base_is_refused_by_name(
    replica: ReplicaProcess, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trainer = Trainer(
        TrainerSettings(
            model=str(tiny_checkpoint),
            rollout_urls=(replica.url,),
            runs_dir=tmp_path,
            load_in_4bit=False,
        )
    )
    trainer.fleet.start()
    await trainer.boot()
    transport = httpx.ASGITransport(create_app(trainer))
    async with TrainerClient("http://trainer", transport=transport) as runs:
        await runs.start_run(replacing(MANAGED))
        last = (await until_end(runs))[-1]
    await trainer.stop()
    assert isinstance(last, StateRecord)
    assert "another base" in last.detail
    assert "recipe" in last.detail
