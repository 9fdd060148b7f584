"""What the wire types accept, refuse and compute."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from shared.schemas import (
    AdapterManifest,
    BaseIdentity,
    ChatMessage,
    Completion,
    GenerateRequest,
    PolicyId,
    PreferencePair,
    SamplingParams,
    ScoredCompletion,
    ScoredGroup,
    Segment,
    TrainRequest,
)

POLICY = PolicyId(run_id="run", version=3)
BASE = BaseIdentity(weights="0" * 64, recipe=None, tokenizer="1" * 64, chat_template=None)


def test_policies_are_ordered_by_incarnation_then_version() -> None:
    old = PolicyId(run_id="run", incarnation=1, version=47)
    resumed = PolicyId(run_id="run", incarnation=2, version=41)
    assert old.age_key < resumed.age_key < resumed.next().age_key
    assert str(resumed.next()) == "run.2@42"


def test_version_0_is_the_base() -> None:
    assert PolicyId(run_id="run", version=0).is_base
    assert not POLICY.is_base


@pytest.mark.parametrize("run_id", ["", "a b", "a/b", "../a", "-a", "a" * 65, "é"])
def test_a_run_id_is_safe_in_a_path_and_a_url(run_id: str) -> None:
    with pytest.raises(ValidationError):
        PolicyId(run_id=run_id, version=1)


def test_records_are_frozen_and_refuse_unknown_fields() -> None:
    with pytest.raises(ValidationError):
        POLICY.version = 4  # type: ignore[misc]
    with pytest.raises(ValidationError):
        PolicyId.model_validate({"run_id": "run", "version": 1, "epoch": 2})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.009, 101.0])
def test_a_temperature_is_finite_and_one_that_vllm_does_not_change(value: float) -> None:
    with pytest.raises(ValidationError):
        SamplingParams(temperature=value)


def test_only_the_temperature_may_change_in_a_training_request() -> None:
    assert SamplingParams(temperature=0.7, seed=1, max_tokens=9, n=8).gradient_obstacles() == ()
    assert SamplingParams(top_p=0.9, top_k=5).gradient_obstacles() == ("top_p=0.9", "top_k=5")
    assert SamplingParams(temperature=0).gradient_obstacles() == ("temperature=0",)
    assert SamplingParams(min_tokens=1).gradient_obstacles() == ("min_tokens=1",)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [("12", str), ([1, 2], int), ([{"role": "user", "content": "x"}], ChatMessage)],
)
def test_a_prompt_is_text_ids_or_chat(prompt: Any, kind: type) -> None:
    (parsed,) = GenerateRequest.model_validate({"prompts": [prompt]}).prompts
    assert isinstance(parsed if kind is str else parsed[0], kind)


@pytest.mark.parametrize(
    "prompt", ["", [], [-1], [1.5], ["1"], [True], [1, {"role": "user"}], 5, None]
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(ValidationError):
        GenerateRequest.model_validate({"prompts": [prompt]})


def test_a_prefix_continues_one_completion() -> None:
    GenerateRequest(prompts=((1,),), completion_prefix=(2,))
    with pytest.raises(ValidationError, match="exactly one prompt and n = 1"):
        GenerateRequest(prompts=((1,), (1,)), completion_prefix=(2,))
    with pytest.raises(ValidationError, match="exactly one prompt and n = 1"):
        GenerateRequest(prompts=((1,),), completion_prefix=(2,), sampling=SamplingParams(n=2))


def completion(num_ids: int, num_logprobs: int, *segments: int) -> Completion:
    return Completion(
        token_ids=(1,) * num_ids,
        logprobs=(-1.0,) * num_logprobs,
        segments=tuple(Segment(policy=POLICY, num_tokens=n) for n in segments),
        finish_reason="stop",
    )


def test_every_token_has_a_logprob_and_a_version() -> None:
    completion(3, 3, 1, 2)
    completion(0, 0)
    for wrong in ((3, 2, 3), (3, 3, 2), (3, 3), (0, 0, 1)):
        with pytest.raises(ValidationError, match="counts must be equal"):
            completion(*wrong)


@pytest.mark.parametrize("rewards", [(), (0.3,), (0.1, 0.2), (1e9, -1e9 + 0.3)])
def test_the_parts_of_a_reward_add_up_to_it(rewards: tuple[float, ...]) -> None:
    ScoredCompletion(completion=completion(1, 1, 1), reward=0.3, rewards=rewards)
    with pytest.raises(ValidationError, match="set reward to their sum"):
        ScoredCompletion(completion=completion(1, 1, 1), reward=0.3, rewards=(0.3, 0.3))


def test_a_train_request_has_groups_or_pairs() -> None:
    pair = PreferencePair(prompt_token_ids=(1,), chosen_token_ids=(2, 3), rejected_token_ids=(4,))
    assert pair.num_positions == 3
    scored = ScoredCompletion(completion=completion(1, 1, 1), reward=1.0)
    group = ScoredGroup(prompt_token_ids=(1,), sampling=SamplingParams(), completions=(scored,))
    TrainRequest(pairs=(pair,), expected_policy=POLICY, idempotency_key="a")
    TrainRequest(groups=(group,), expected_policy=POLICY, idempotency_key="a")
    for pairs, groups in (((), ()), ((pair,), (group,))):
        with pytest.raises(ValidationError, match="either groups or pairs, not both"):
            TrainRequest(groups=groups, pairs=pairs, expected_policy=POLICY, idempotency_key="a")


@pytest.mark.parametrize("logprob", [0.1, float("nan"), float("-inf")])
def test_a_logprob_is_finite_and_not_positive(logprob: float) -> None:
    with pytest.raises(ValidationError):
        Completion(
            token_ids=(1,),
            logprobs=(logprob,),
            segments=(Segment(policy=POLICY, num_tokens=1),),
            finish_reason="stop",
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 0},
        {"scaling": 0.0},
        {"scaling": float("nan")},
        {"scaling": 1e5},
        {"target_modules": ()},
        {"use_dora": True},
        {"format": "tandem-adapter-2"},
        {"policy": PolicyId(run_id="run", version=0)},
    ],
    ids=str,
)
def test_a_manifest_that_cannot_be_served_is_refused(fields: dict[str, Any]) -> None:
    valid = {
        "policy": POLICY,
        "base": BASE,
        "rank": 8,
        "scaling": 2.0,
        "target_modules": ("q_proj",),
    }
    AdapterManifest.model_validate(valid)
    with pytest.raises(ValidationError):
        AdapterManifest.model_validate(valid | fields)
