"""`PolicyModel` on the real engine: the loop of the docs as written, and losses of the user's own.

The model of this module is the one that the docs' block loads; its engine is a child of this
process. A test isolates itself with a fresh LoRA, which is a run of its own on the replica.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss

from examples.own_loop.__main__ import accuracy, train
from services.processes import ProcessFailed
from shared.errors import RunConflict
from tandem.model.engine import RolloutEngine
from tandem.model.outputs import RequestOutput
from tandem.model.policy_model import PolicyModel
from tests.publisher import Publisher
from tests.replica_process import ReplicaProcess, eventually, start_replica, wait_until_ready

DOCS = Path(__file__).parents[2] / "docs/python_api.md"
NUM_BATCHES = 3
PROMPTS = ["s53812=", "s90417=", "s26630="]
NOISE = 0.1  # nats per token between trainer and engine; effects are larger
START_A_CHILD = """
import sys, time
from pathlib import Path
from tandem.model.engine import RolloutEngine

engine = RolloutEngine(generate_timeout_s=1)
engine.start_child({"ROLLOUT_MODEL": "/nowhere"}, Path(sys.argv[1]))
print(engine.replica_pid, flush=True)
time.sleep(60)
"""


class Run:
    """The names that the docs' block leaves to its reader, and what they have seen."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {
            "dataset": self.batches(),
            "reward_function": self.rewards,
            "compute_policy_loss": self.loss,
        }
        self.versions: list[int] = []
        self.gaps: list[float] = []  # |trainer - engine|, nats per token
        self.effects: list[float] = []  # |engine - base|

    @property
    def model(self) -> PolicyModel:
        model: PolicyModel = self.names["model"]
        return model

    def batches(self) -> Iterator[SimpleNamespace]:
        for _ in range(NUM_BATCHES):
            yield SimpleNamespace(prompts=PROMPTS)

    def rewards(self, completions: list[RequestOutput]) -> Tensor:
        self.versions.append(completions[0].policy.version)
        return small_digits(completions)

    def loss(self, batch: SimpleNamespace, outputs: list[RequestOutput], rewards: Tensor) -> Tensor:
        assert [output.prompt for output in outputs] == batch.prompts
        found = self.model.logprobs(outputs)
        base = self.model.reference_logprobs(outputs)
        self.gaps.append(distance(found.logprobs, found.sampler_logprobs, found.mask))
        self.effects.append(distance(base.logprobs, found.sampler_logprobs, found.mask))
        advantages = (rewards - rewards.mean())[:, None]
        return -(found.logprobs * advantages)[found.mask].mean()


class Own:
    """An optimizer of the user's own, on whatever has a gradient."""

    def __init__(self, model: PolicyModel, *others: torch.nn.Module) -> None:
        parameters = [p for m in (model, *others) for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-2)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def distance(some: Tensor, others: Tensor, mask: Tensor) -> float:
    return float((some.detach() - others)[mask].abs().mean())


def small_digits(outputs: list[RequestOutput]) -> Tensor:
    """[B]: the share of small digits of every completion, which a random policy gets in part."""
    texts = [completion.text for output in outputs for completion in output.outputs]
    return torch.tensor([sum(c in "01234" for c in text) / max(len(text), 1) for text in texts])


@pytest.fixture(scope="module")
def ran(tiny_checkpoint: Path, base_cache: Path) -> Iterator[Run]:
    """The docs' block, run with the tiny checkpoint in place of the model it names, and fast."""
    (block, *_) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    for named, here in (
        ('"Qwen/Qwen3-4B"', f'"{tiny_checkpoint}", cache_dir="{base_cache}"'),
        ("lr=2e-5", "lr=1e-2"),
    ):
        assert block.count(named) == 1
        block = block.replace(named, here)
    run = Run()
    exec(block, run.names)
    yield run
    run.model.close()


@pytest.fixture
def model(ran: Run) -> PolicyModel:
    return ran.model.get_peft_model(r=8, lora_alpha=16).for_training()


def sample(model: PolicyModel, **sampling: Any) -> list[RequestOutput]:
    with model.for_inference():
        return model.vllm_engine.generate(PROMPTS, **{"max_tokens": 8, "n": 4, **sampling})


def check_served(model: PolicyModel, outputs: list[RequestOutput], version: int) -> None:
    """The engine sampled from the weights as they are, and says which version that is."""
    assert {output.policy.version for output in outputs} == {version}
    found = model.logprobs(outputs)
    assert distance(found.logprobs, found.sampler_logprobs, found.mask) < NOISE
    if version > 1:
        base = model.reference_logprobs(outputs)
        assert distance(base.logprobs, found.sampler_logprobs, found.mask) > 2 * NOISE


# --- the loop -----------------------------------------------------------------------------------


def test_the_loop_of_the_docs_runs_as_written(ran: Run) -> None:
    assert ran.versions == list(range(NUM_BATCHES))
    assert max(ran.gaps) < NOISE
    assert ran.effects[0] == pytest.approx(ran.gaps[0], abs=1e-3)  # version 0 is the base
    assert ran.effects[-1] > 2 * NOISE


def test_an_engine_that_merges_serves_what_trains(tiny_checkpoint: Path, base_cache: Path) -> None:
    model, _ = PolicyModel.from_pretrained(
        str(tiny_checkpoint),
        max_seq_length=512,
        fast_inference=True,
        max_lora_rank=8,
        serving_mode="merged",
        cache_dir=base_cache,
    )
    try:
        own = Own(model)
        for version in range(3):
            outputs = sample(model)
            check_served(model, outputs, version)
            model.for_training()
            found = model.logprobs(outputs)
            rewards = small_digits(outputs)
            own.step(-(found.logprobs * (rewards - rewards.mean())[:, None])[found.mask].mean())
        with pytest.raises(RuntimeError, match="serving_mode='lora'"):
            model.load_lora(base_cache)
    finally:
        model.close()


def test_a_grpo_loss_of_ones_own_trains_what_the_engine_serves(model: PolicyModel) -> None:
    own = Own(model)
    for step in range(3):
        outputs = sample(model)
        check_served(model, outputs, step)
        rewards = small_digits(outputs).view(len(PROMPTS), 4)
        advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()[:, None]
        found = model.logprobs(outputs)
        ratios = (found.logprobs - found.sampler_logprobs).exp()
        objective = torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.28) * advantages)
        own.step(-objective[found.mask].sum() / found.mask.sum())
    check_served(model, sample(model), 3)


def test_a_ppo_loss_with_a_value_head_of_ones_own_trains_what_the_engine_serves(
    model: PolicyModel,
) -> None:
    torch.manual_seed(0)
    critic = torch.nn.Linear(model.config.hidden_size, 1)
    own = Own(model, critic)
    initial = critic.weight.detach().clone()
    for step in range(3):
        outputs = sample(model)
        check_served(model, outputs, step)
        rewards = small_digits(outputs)[:, None]
        values = critic(model.hidden_states(outputs).detach().float()).squeeze(-1)  # [B, T]
        found = model.logprobs(outputs)
        advantages = rewards - values.detach()
        ratios = (found.logprobs - found.sampler_logprobs).exp()
        objective = torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages)
        value_loss = mse_loss(values[found.mask], rewards.expand_as(values)[found.mask])
        own.step(0.5 * value_loss - objective[found.mask].mean())
    assert not torch.equal(initial, critic.weight)
    check_served(model, sample(model), 3)


def test_a_dpo_loss_of_ones_own_trains_what_the_engine_serves(model: PolicyModel) -> None:
    own, margins = Own(model), []
    for step in range(3):
        outputs = sample(model, n=2)
        check_served(model, outputs, step)
        rewards = small_digits(outputs).view(-1, 2)
        order = torch.stack([rewards.argmax(1), 1 - rewards.argmax(1)], 1)  # chosen, rejected
        found, base = model.logprobs(outputs), model.reference_logprobs(outputs)
        effects = ((found.logprobs - base.logprobs) * found.mask).sum(1).view(-1, 2)
        chosen, rejected = effects.gather(1, order).unbind(1)
        own.step(-logsigmoid(0.1 * (chosen - rejected)).mean())
        with torch.no_grad():
            after = model.logprobs(outputs)
        gained = ((after.logprobs - found.logprobs.detach()) * found.mask).sum(1).view(-1, 2)
        chosen, rejected = gained.gather(1, order).unbind(1)
        margins.append(float((chosen - rejected).mean()))
    assert margins[0] > 0  # the chosen became more likely than the rejected
    check_served(model, sample(model), 3)


def test_the_example_runs_and_answers_that_are_all_wrong_change_nothing(
    model: PolicyModel,
) -> None:
    assert train(model, num_steps=2, num_prompts=4, seed=0) == [0.0, 0.0]
    assert accuracy(model) == 0
    check_served(model, sample(model), 0)


# --- weights ------------------------------------------------------------------------------------


def test_weights_that_have_not_changed_are_not_pushed(model: PolicyModel) -> None:
    first = sample(model)
    own = Own(model)
    own.step(-model.logprobs(first).logprobs.sum())
    versions = [sample(model)[0].policy.version for _ in range(3)]
    assert versions == [1, 1, 1]
    own.optimizer.step()  # without a gradient: nothing happens
    assert model.push_weights().version == 1


def test_no_generation_is_of_older_weights_wherever_and_however_they_changed(
    model: PolicyModel,
) -> None:
    generator = torch.Generator().manual_seed(0)
    for version in (1, 2):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # no version counter of torch sees this
                parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        outputs = model.fast_generate(PROMPTS, n=8, max_tokens=8)  # outside of for_inference
        assert outputs[0].policy.version == version
        check_served(model, outputs, version)


def test_weights_that_are_not_finite_are_not_pushed_and_the_engine_goes_on(
    model: PolicyModel, tmp_path: Path
) -> None:
    model.save_lora(tmp_path)
    parameter = next(p for name, p in model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        parameter[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="were not pushed: the engine keeps version 0"):
        model.for_inference()
    model.restore_lora(tmp_path)
    check_served(model, sample(model), 0)


def test_a_loaded_adapter_is_served_beside_the_one_that_trains(
    model: PolicyModel, tmp_path: Path
) -> None:
    own = Own(model)
    own.step(-model.logprobs(sample(model)).logprobs.mean())
    model.save_lora(tmp_path)
    trained = sample(model)
    request = model.load_lora(tmp_path)
    for _ in range(2):  # the weights move away from what was saved
        own.step(-model.logprobs(trained).logprobs.mean())
    saved = model.vllm_engine.generate(PROMPTS, n=4, max_tokens=8, lora_request=request)
    assert {output.policy for output in saved} == {request.policy}
    now = sample(model)
    assert now[0].policy.version > request.policy.version
    found = model.logprobs(now)
    assert distance(found.logprobs, found.sampler_logprobs, found.mask) < NOISE
    # What was sampled under the saved one has its logprobs, and not those of the weights now.
    found = model.logprobs(saved)
    assert distance(found.logprobs, found.sampler_logprobs, found.mask) > 2 * NOISE
    model.restore_lora(tmp_path)
    found = model.logprobs(saved)
    assert distance(found.logprobs, found.sampler_logprobs, found.mask) < NOISE


# --- generate -----------------------------------------------------------------------------------


def test_a_prompt_gives_the_same_answer_in_every_form(model: PolicyModel) -> None:
    ids = model.tokenizer("s53812=")["input_ids"]
    engine = model.vllm_engine
    greedy = {"temperature": 0.0, "max_tokens": 8}
    answers = [
        engine.generate(prompt, greedy)[0].outputs[0].token_ids
        for prompt in ("s53812=", ["s53812="], ids, [ids], {"prompt_token_ids": ids})
    ]
    assert all(answer == answers[0] for answer in answers)
    chat = engine.generate([{"role": "user", "content": "s53812"}], greedy)
    rendered = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "s53812"}], add_generation_prompt=True, return_dict=False
    )
    assert chat[0].prompt_token_ids == rendered


def test_an_output_has_vllms_shape_and_the_logprobs_of_the_sampled_tokens(
    model: PolicyModel,
) -> None:
    (output,) = model.fast_generate(
        "s53812=", SimpleNamespace(n=2, temperature=0.7, max_tokens=4, logprobs=1, stop=[])
    )
    assert (output.prompt, output.finished) == ("s53812=", True)
    assert output.prompt_token_ids == model.tokenizer("s53812=")["input_ids"]
    assert [completion.index for completion in output.outputs] == [0, 1]
    for completion in output.outputs:
        assert completion.finish_reason in ("stop", "length")
        assert completion.text == model.tokenizer.decode(
            completion.token_ids, skip_special_tokens=True
        )
        pairs = [next(iter(entry.items())) for entry in completion.logprobs]
        assert [token for token, _ in pairs] == completion.token_ids
        total = sum(logprob.logprob for _, logprob in pairs)
        assert completion.cumulative_logprob == pytest.approx(total)


def test_batches_give_what_one_call_gives(model: PolicyModel) -> None:
    sampling = {"max_tokens": 6, "n": 2, "seed": 7}

    def texts(outputs: list[RequestOutput]) -> list[list[str]]:
        return [[completion.text for completion in output.outputs] for output in outputs]

    whole = texts(model.fast_generate(PROMPTS, sampling))
    assert texts(model.fast_generate_batches(PROMPTS, sampling, n_batches=2)) == whole
    assert len({text for group in whole for text in group}) > 1


def test_a_loss_refuses_completions_whose_logprobs_are_not_the_policys(model: PolicyModel) -> None:
    outputs = sample(model, top_p=0.5)
    with pytest.raises(ValueError, match=r"sampled with top_p=0.5: their logprobs are not"):
        model.logprobs(outputs)


# --- replicas of one's own ----------------------------------------------------------------------


def by_url(checkpoint: Path, *replicas: ReplicaProcess, **options: Any) -> PolicyModel:
    model, _ = PolicyModel.from_pretrained(
        str(checkpoint),
        max_seq_length=256,
        fast_inference=True,
        max_lora_rank=8,
        rollout_urls=[replica.url for replica in replicas],
        device="cpu",
        **options,
    )
    return model


@pytest.mark.anyio
async def test_a_run_that_replicas_serve_is_not_pushed_out_unasked(
    replica: ReplicaProcess, publisher: Publisher, tiny_checkpoint: Path
) -> None:
    await publisher.publish(1)
    with pytest.raises(RunConflict, match="still serves run"):
        by_url(tiny_checkpoint, replica)


def test_what_a_dead_replica_had_begun_goes_on_elsewhere(
    replica: ReplicaProcess, tiny_checkpoint: Path, base_cache: Path, tmp_path: Path
) -> None:
    other = start_replica(tmp_path, tiny_checkpoint, base_cache, max_lora_rank=8)
    wait_until_ready(other)
    model = by_url(tiny_checkpoint, replica, other, replace_run=True)
    fleet = model.vllm_engine.fleet
    try:
        Own(model).step(-model.logprobs(sample(model)).logprobs.sum())
        policy = model.push_weights()
        assert eventually(lambda: fleet.num_serving(policy) == 2, timeout_s=20)
        with ThreadPoolExecutor() as beside:
            outputs = beside.submit(
                model.fast_generate, PROMPTS * 6, n=2, max_tokens=200, ignore_eos=True
            )
            assert eventually(
                lambda: all(status.num_outstanding_tokens > 0 for status in fleet.status()),
                timeout_s=20,
            )
            other.process.kill()
            completions = [c for output in outputs.result() for c in output.outputs]
        assert {len(completion.token_ids) for completion in completions} == {200}
        assert {completion.policy for completion in completions} == {policy}
        check_served(model, sample(model), 1)
    finally:
        model.close()
        other.end()


# --- the child ----------------------------------------------------------------------------------


def test_an_engine_that_does_not_start_says_why(tmp_path: Path) -> None:
    engine = RolloutEngine(generate_timeout_s=1)
    engine.start_child({"ROLLOUT_MODEL": "/nowhere"}, tmp_path / "log")
    with pytest.raises(ProcessFailed, match=r"exited with 2;(?s:.*)ROLLOUT_MODEL /nowhere"):
        engine.wait_until_ready(60)
    engine.close()
    with pytest.raises(RuntimeError, match="the engine was closed: load the model again"):
        engine.wait_until_ready(60)


def test_an_engine_that_ends_is_noticed_at_once(tmp_path: Path, tiny_checkpoint: Path) -> None:
    engine = RolloutEngine(generate_timeout_s=600)
    engine.start_child({"ROLLOUT_MODEL": str(tiny_checkpoint)}, tmp_path / "log")
    assert engine.replica_pid
    os.kill(engine.replica_pid, signal.SIGKILL)
    with pytest.raises(ProcessFailed, match="the rollout service was ended by SIGKILL"):
        engine.wait_until_ready(60)
    engine.close()


def test_the_engine_ends_with_the_process_however_that_ends(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", START_A_CHILD, tmp_path / "log"],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    assert eventually(lambda: not is_running(pid), timeout_s=10)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
