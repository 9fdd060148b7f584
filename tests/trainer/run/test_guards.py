"""What a run does about the guards of its updates."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from services.trainer.learner.learner import Learner
from services.trainer.learner.stats import (
    MIN_FRESH_TOKENS,
    UpdateRefused,
    check_guards,
    join,
    update_stats,
)
from services.trainer.policy.samples import Sample
from services.trainer.run.guards import GuardWatch, check_handshake, refused
from services.trainer.run.run import Run
from services.trainer.run.step import Clock, learn
from services.trainer.run_config import GuardsConfig, RunConfig
from shared.errors import ConformanceFailed, UnsuitableForTraining
from shared.schemas import PolicyId, ScoredCompletion, Segment, TrainRequest, UpdateStats
from tests.trainer.test_trainer import MANAGED, external, make_trainer, train_request
from tests.trainer.test_trainer import join as join_replica

GUARDS = GuardsConfig()


def sampled(number: int, *, lags: tuple[int, ...] = (0,) * 16, logprob: float = -1.0) -> Sample:
    return Sample(
        prompt_token_ids=(1, 2),
        token_ids=(3,) * len(lags),
        sampler_logprobs=(logprob,) * len(lags),
        staleness=lags,
        temperature=1.0,
        group=number // 4,
        rewards=(float(number),),
        is_truncated=False,
    )


class Played:
    """Gives every token the same logprob, and remembers what it was asked."""

    def __init__(self, logprob: float) -> None:
        self.logprob = logprob
        self.scored: list[Sample] = []

    def sample_logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        self.scored += samples
        return [[self.logprob] * sample.num_tokens for sample in samples]


def stats(**numbers: Any) -> UpdateStats:
    measured = update_stats(
        join([]),
        loss=0.1,
        grad_norm=1.0,
        learning_rate=1e-4,
        weighs_tokens=True,
    )
    return measured.model_copy(update={"num_fresh_tokens": MIN_FRESH_TOKENS, **numbers})


def refusal(**numbers: Any) -> UpdateRefused:
    with pytest.raises(UpdateRefused) as caught:
        check_guards(stats(**numbers), GUARDS)
    return caught.value


# --- handshake ----------------------------------------------------------------------------------


def test_replicas_that_sample_from_what_trains_are_shaken_hands_with(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    check_handshake(Played(-1.01), [sampled(i) for i in range(64)], GUARDS)
    assert "55 completions (880 tokens) before the first update is 5e-05" in caplog.text


def test_another_model_fails_the_handshake_in_a_sentence_that_names_what_to_set() -> None:
    with pytest.raises(ConformanceFailed) as caught:
        check_handshake(Played(-1.2), [sampled(i) for i in range(64)], GUARDS)
    k3 = math.exp(-0.2) - 1 + 0.2
    for part in (f"{k3:.2g}", "max_handshake_kl 0.005", "ROLLOUT_BASE=original"):
        assert part in caught.value.detail


def test_only_completions_without_an_older_token_shake_hands() -> None:
    policy = Played(-1.0)
    mixed = sampled(1, lags=(1, 0, 0))
    unsampled = replace(sampled(2), sampler_logprobs=())
    check_handshake(policy, [sampled(0), mixed, unsampled, sampled(3)], GUARDS)
    assert policy.scored == [sampled(0), sampled(3)]


@pytest.mark.parametrize(("num_asked", "num_taken"), [(3, 55), (60, 60), (99, 64)])
def test_a_handshake_takes_what_the_config_says_and_what_it_takes_to_judge(
    num_asked: int, num_taken: int
) -> None:
    """One odd token of 878 or more is no KL above 0.005."""
    policy = Played(-1.0)
    guards = GuardsConfig(num_handshake_completions=num_asked)
    check_handshake(policy, [sampled(i) for i in range(64)], guards)
    assert len(policy.scored) == num_taken


def test_a_handshake_over_few_tokens_says_so_and_one_switched_off_scores_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = [sampled(i) for i in range(54)]
    check_handshake(Played(-9.0), samples, GUARDS)
    assert "of too few tokens to be judged: that takes 878" in caplog.text
    off = Played(-9.0)
    check_handshake(off, samples, GuardsConfig(max_handshake_kl=None))
    assert off.scored == []


class TakesAll(Played):
    """A policy and its learner in one, which takes every update as given."""

    def update(self, *_: object, **__: object) -> UpdateStats:
        return stats()

    def publish(self) -> None:
        return None


@dataclass
class Begun:
    """A run whose earlier life took two steps."""

    config: RunConfig
    policy: TakesAll
    first_step: int = 2
    watch: GuardWatch = field(default_factory=GuardWatch)

    @property
    def learner(self) -> TakesAll:
        return self.policy


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("config", "step", "num_scored"), [(MANAGED, 3, 2), (MANAGED, 4, 0), (external(), 3, 0)]
)
async def test_hands_are_shaken_before_the_first_update_of_a_life_of_a_managed_run(
    config: RunConfig, step: int, num_scored: int
) -> None:
    run = Begun(config, TakesAll(-1.0))
    await learn(cast(Run, run), [sampled(0), sampled(1)], step=step, clock=Clock())
    assert len(run.policy.scored) == num_scored


# --- refusal ------------------------------------------------------------------------------------


def test_a_refused_batch_is_in_the_run_folder_and_the_sentence_says_where(tmp_path: Path) -> None:
    error = refused(tmp_path, 12, [sampled(0), sampled(1)], refusal(sampler_kl=0.5))
    path = tmp_path / "refused" / "step-000012.json"
    assert isinstance(error, UnsuitableForTraining)
    for part in (
        "step 12 was not applied",
        str(path),
        "sampler_kl is 0.5",
        "guards.max_sampler_kl",
    ):
        assert part in error.detail
    saved = json.loads(path.read_bytes())
    assert saved["stats"]["sampler_kl"] == 0.5
    assert [sample["rewards"] for sample in saved["samples"]] == [[0.0], [1.0]]
    assert saved["samples"][0]["sampler_logprobs"] == [-1.0] * 16


def test_numbers_that_are_not_finite_are_saved_by_name(tmp_path: Path) -> None:
    refused(tmp_path, 1, [sampled(0)], refusal(loss=math.nan, grad_norm=math.inf))
    saved = json.loads((tmp_path / "refused" / "step-000001.json").read_bytes())
    assert (saved["stats"]["loss"], saved["stats"]["grad_norm"]) == ("NaN", "Infinity")


def test_a_gradient_that_is_not_finite_is_refused_without_numbers(tmp_path: Path) -> None:
    error = refused(tmp_path, 1, [sampled(0)], FloatingPointError("the gradient is not finite"))
    assert error.detail.endswith("the gradient is not finite")
    assert json.loads((tmp_path / "refused" / "step-000001.json").read_bytes())["stats"] is None


def test_a_batch_that_cannot_be_saved_leaves_the_reason(tmp_path: Path) -> None:
    (tmp_path / "refused").touch()
    error = refused(tmp_path, 1, [sampled(0)], refusal(sampler_kl=0.5))
    assert "could not be saved" in error.detail
    assert "sampler_kl is 0.5" in error.detail


@pytest.mark.anyio
async def test_a_post_of_samples_from_another_model_is_refused_and_the_run_goes_on(
    loaded_learner: Learner, tmp_path: Path
) -> None:
    trainer = make_trainer(loaded_learner, tmp_path)
    await join_replica(trainer)
    begin = (await trainer.start_run(external(run_id="own"))).policy
    with pytest.raises(UnsuitableForTraining, match=r"guards\.max_sampler_kl"):
        await trainer.train(of_another_model(begin))
    assert (tmp_path / "own" / "refused" / "step-000001.json").exists()
    assert trainer.policy.id == begin
    assert (await trainer.train(train_request(begin, key="good"))).policy == begin.next()
    await trainer.stop()


def of_another_model(policy: PolicyId) -> TrainRequest:
    """Enough tokens to tell, all of which the sampler thought very unlikely."""
    (group,) = train_request(policy).groups
    few, many = (scored.completion for scored in group.completions), MIN_FRESH_TOKENS // 2
    long = [
        ScoredCompletion(
            completion=completion.model_copy(
                update={
                    "token_ids": completion.token_ids * many,
                    "logprobs": (-8.0,) * many,
                    "segments": (Segment(policy=policy, num_tokens=many),),
                }
            ),
            reward=reward,
        )
        for completion, reward in zip(few, (0.0, 1.0), strict=True)
    ]
    return TrainRequest(
        groups=(group.model_copy(update={"completions": tuple(long)}),),
        expected_policy=policy,
        idempotency_key="another model",
    )


# --- warnings -----------------------------------------------------------------------------------


def test_a_number_beyond_its_bound_is_said_once_and_so_is_its_return(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    watch = GuardWatch()
    for step, kl in enumerate([1e-4, 2e-3, 3e-3, 2e-3, 1e-4, 1e-4, 5e-3], start=1):
        watch.see(step, stats(sampler_kl=kl), GUARDS)
    said = [(record.levelname, record.getMessage()[:6]) for record in caplog.records]
    assert said == [("WARNING", "step 2"), ("INFO", "step 5"), ("WARNING", "step 7")]


def test_what_is_beyond_its_bound_is_known_until_it_is_back() -> None:
    watch = GuardWatch()
    known = []
    for step, kl in enumerate([1e-4, 2e-3, 3e-3, 1e-4], start=1):
        watch.see(step, stats(sampler_kl=kl), GUARDS)
        known.append([sentence[:6] for sentence in watch.beyond.values()])
    assert known == [[], ["step 2"], ["step 3"], []]


def test_numbers_are_watched_apart(caplog: pytest.LogCaptureFixture) -> None:
    watch = GuardWatch()
    watch.see(1, stats(sampler_kl=2e-3), GUARDS)
    watch.see(2, stats(sampler_kl=2e-3, probability_factor=1.04), GUARDS)
    assert [record.getMessage().split()[2] for record in caplog.records] == [
        "sampler_kl",
        "probability_factor",
    ]


def test_few_tokens_and_bounds_switched_off_warn_of_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    GuardWatch().see(1, stats(sampler_kl=1.0, num_fresh_tokens=10), GUARDS)
    GuardWatch().see(1, stats(sampler_kl=1.0), GuardsConfig(warn_sampler_kl=None))
    assert not caplog.records
