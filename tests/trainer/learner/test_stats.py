"""What an update says of itself, and when it is refused for that."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from services.trainer.learner.stats import (
    MIN_FRESH_TOKENS,
    Columns,
    TokenRecords,
    UpdateRefused,
    check_guards,
    effective_sample_size,
    join,
    mean_kl,
    peak_memory_bytes,
    update_stats,
)
from services.trainer.run_config import GuardsConfig
from shared.schemas import LagKl, UpdateStats

NAN = math.nan


def columns(
    policy: list[float],
    sampler: list[float],
    *,
    lags: list[int] | None = None,
    rows: list[int] | None = None,
    masked: list[bool] | None = None,
) -> Columns:
    """Tokens of one completion unless `rows` says otherwise, as one micro-batch of them."""
    num_tokens = len(policy)
    rows = rows or [0] * num_tokens
    records = TokenRecords()
    records.add(
        policy_logprobs=torch.tensor(policy),
        sampler_logprobs=torch.tensor(sampler),
        staleness=torch.tensor(lags or [0] * num_tokens),
        entropy=torch.full((num_tokens,), 0.5),
        weights=torch.ones(num_tokens),
        is_truncated=torch.zeros(num_tokens, dtype=torch.bool),
        is_masked=torch.tensor(masked or [False] * num_tokens),
        is_clipped=torch.zeros(num_tokens, dtype=torch.bool),
        rows=torch.tensor(rows),
        num_rows=max(rows) + 1,
    )
    return records.columns()


def stats_of(tokens: Columns, *, loss: float = 0.1, grad_norm: float = 1.0) -> UpdateStats:
    return update_stats(
        tokens,
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=1e-4,
        weighs_tokens=True,
    )


def numbers(stats: UpdateStats) -> list[float]:
    return [v for _, v in stats if isinstance(v, int | float)]


# --- numbers ------------------------------------------------------------------------------------


def test_the_gap_and_kl_are_those_of_two_tokens_by_hand() -> None:
    stats = stats_of(columns([-1.0, -2.0], [-1.5, -1.8]))
    assert stats.logprob_gap == pytest.approx((0.5 + 0.2) / 2)
    assert stats.logprob_gap_max == pytest.approx(0.5)
    assert stats.probability_factor == pytest.approx((math.exp(0.5) + math.exp(0.2)) / 2)
    k3 = (math.exp(0.5) - 1 - 0.5 + math.exp(-0.2) - 1 + 0.2) / 2
    assert stats.sampler_kl == pytest.approx(k3)
    assert stats.kl_by_lag == (LagKl(lag=0, kl=stats.sampler_kl, num_tokens=2),)


def test_k3_over_the_samplers_distribution_is_the_kl() -> None:
    sampler, policy = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    num_each = (sampler * 1000).round().long()
    log_ratios = (policy / sampler).log().repeat_interleave(num_each)
    exact = float((sampler * (sampler / policy).log()).sum())
    assert mean_kl(log_ratios) == pytest.approx(exact, rel=1e-5)


def test_the_p99_of_the_gap_leaves_out_one_token_in_a_hundred() -> None:
    stats = stats_of(columns([0.0] * 100, [-0.1] * 98 + [-0.2, -5.0]))
    assert stats.logprob_gap_p99 == pytest.approx(0.2)
    assert stats.logprob_gap_max == pytest.approx(5.0)


def test_tokens_that_the_policy_of_before_sampled_count_under_their_lag_alone() -> None:
    stats = stats_of(columns([-1.0] * 3, [-1.0, -3.0, -3.0], lags=[0, 2, 2]))
    assert stats.logprob_gap == 0.0
    assert stats.num_fresh_tokens == 1
    assert [(kl.lag, kl.num_tokens) for kl in stats.kl_by_lag] == [(0, 1), (2, 2)]
    assert stats.kl_by_lag[1].kl == pytest.approx(math.exp(2) - 3)


def test_the_ess_of_equal_weights_is_1_and_of_one_that_outweighs_n_is_1_over_n() -> None:
    assert effective_sample_size(torch.full((4,), 0.3)) == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([18.0, -18.0, -18.0, -18.0])) == pytest.approx(0.25)


def test_the_weight_of_a_completion_is_the_product_over_its_tokens() -> None:
    log2 = math.log(2)
    stats = stats_of(columns([0.0] * 4, [-log2, -log2, log2, -log2], rows=[0, 0, 1, 1]))
    # weights: 2 · 2 and 1/2 · 2
    assert stats.sequence_ess == pytest.approx((4 + 1) ** 2 / (2 * (16 + 1)))
    assert stats.token_ess == pytest.approx(6.5**2 / (4 * 12.25))


def test_a_completion_with_one_older_token_is_not_a_fresh_one() -> None:
    stats = stats_of(
        columns([0.0] * 4, [0.0, 0.0, -3.0, 0.0], lags=[0, 0, 0, 1], rows=[0, 0, 1, 1])
    )
    assert stats.fresh_sequence_ess == 1.0
    assert stats.sequence_ess
    assert stats.sequence_ess < 0.6


def test_only_masked_tokens_that_are_fresh_count_against_the_engines() -> None:
    masked = [True, False, True, True]
    stats = stats_of(columns([0.0] * 4, [0.0] * 4, lags=[0, 0, 1, 1], masked=masked))
    assert stats.importance_masked_fraction == 0.75
    assert stats.fresh_masked_fraction == 0.5


@pytest.mark.parametrize(
    ("policy", "sampler"),
    [
        ([], []),
        ([-1.0, -2.0], [NAN, NAN]),  # nobody sampled them
        ([-1.0, -2.0], [-1e6, -1e6]),
        ([-1e6, -2.0], [0.0, -1e6]),
        ([NAN, -math.inf], [-1.0, -1.0]),
    ],
)
def test_every_number_is_finite_whatever_the_tokens_are(
    policy: list[float], sampler: list[float]
) -> None:
    stats = stats_of(columns(policy, sampler) if policy else TokenRecords().columns())
    assert all(math.isfinite(number) for number in numbers(stats))
    assert all(math.isfinite(kl.kl) for kl in stats.kl_by_lag)


def test_an_update_without_a_token_has_nothing_against_it() -> None:
    check_guards(stats_of(join([])), GuardsConfig(min_sequence_ess=1.0, max_sampler_kl=1e-9))


def test_what_no_token_was_measured_for_is_absent_and_no_zero() -> None:
    assert json.loads(stats_of(join([])).model_dump_json()) == {
        "loss": 0.1,
        "grad_norm": 1.0,
        "learning_rate": 1e-4,
        "num_fresh_tokens": 0,
        "num_forward_tokens": 0,
        "update_tokens_per_s": 0.0,
        "peak_memory_bytes": 0,
    }


def test_an_objective_without_importance_weights_has_no_numbers_of_them() -> None:
    tokens = columns([-1.0], [-1.5])
    stats = update_stats(tokens, weighs_tokens=False, loss=0.1, grad_norm=1.0, learning_rate=1e-4)
    assert stats.logprob_gap == 0.5
    assert stats.model_fields_set.isdisjoint({"clip_fraction", "importance_weight_mean"})
    assert (stats.clip_fraction, stats.fresh_masked_fraction) == (None, None)


def test_tokens_nobody_sampled_leave_the_others_their_numbers() -> None:
    known = stats_of(columns([-1.0], [-1.5]))
    both = stats_of(columns([-1.0, -4.0], [-1.5, NAN], rows=[0, 1]))
    assert both == known


# --- cuts ---------------------------------------------------------------------------------------


def test_the_numbers_do_not_depend_on_micro_batches_and_ranks() -> None:
    policy = [-0.1 * i for i in range(12)]
    sampler = [-0.1 * i + 0.05 * (i % 5) for i in range(12)]
    lags = [i // 4 % 2 for i in range(12)]
    whole = stats_of(columns(policy, sampler, lags=lags, rows=[i // 4 for i in range(12)]))
    parts = [
        columns(policy[i : i + 4], sampler[i : i + 4], lags=lags[i : i + 4]) for i in (0, 4, 8)
    ]
    cut = stats_of(join([join(parts[:1]), join(parts[1:])]))
    assert numbers(cut) == pytest.approx(numbers(whole))
    assert cut.sequence_ess
    assert cut.sequence_ess < 1.0


def test_what_is_recorded_holds_no_graph() -> None:
    logprobs = torch.zeros(2, requires_grad=True)
    records = TokenRecords()
    flags = torch.zeros(2, dtype=torch.bool)
    records.add(
        policy_logprobs=logprobs * 2,
        sampler_logprobs=torch.zeros(2),
        staleness=torch.zeros(2, dtype=torch.int64),
        entropy=logprobs * 3,
        weights=logprobs.exp(),
        is_truncated=flags,
        is_masked=flags,
        is_clipped=flags,
        rows=torch.zeros(2, dtype=torch.int64),
        num_rows=1,
    )
    tensors = [v for v in asdict(records.columns()).values() if isinstance(v, Tensor)]
    assert len(tensors) == 9
    assert not any(tensor.requires_grad for tensor in tensors)


def test_this_process_has_held_more_than_a_megabyte() -> None:
    assert peak_memory_bytes(torch.device("cpu")) > 1 << 20


# --- guards -------------------------------------------------------------------------------------


HEALTHY = stats_of(columns([-1.0], [-1.01])).model_copy(
    update={"num_fresh_tokens": MIN_FRESH_TOKENS}
)


def changed(**numbers: Any) -> UpdateStats:
    return HEALTHY.model_copy(update=numbers)


@pytest.mark.parametrize(
    ("name", "good", "bad", "guard"),
    [
        ("sampler_kl", 0.02, 0.021, "max_sampler_kl"),
        ("fresh_masked_fraction", 0.2, 0.21, "max_masked_fraction"),
        ("fresh_sequence_ess", 0.5, 0.49, "min_sequence_ess"),
    ],
)
def test_an_update_out_of_a_bound_is_refused_in_a_sentence_that_names_it(
    name: str, good: float, bad: float, guard: str
) -> None:
    guards = GuardsConfig(min_sequence_ess=0.5)  # off by default
    check_guards(changed(**{name: good}), guards)
    refused = changed(**{name: bad})
    with pytest.raises(UpdateRefused, match=rf"{name} is {bad}.*guards\.{guard} {good}") as caught:
        check_guards(refused, guards)
    assert caught.value.stats == refused
    check_guards(refused, GuardsConfig.model_validate({guard: None}))


def test_numbers_of_few_tokens_refuse_nothing() -> None:
    few = changed(sampler_kl=1.0, num_fresh_tokens=MIN_FRESH_TOKENS - 1)
    check_guards(few, GuardsConfig())
    with pytest.raises(UpdateRefused):
        check_guards(changed(sampler_kl=1.0), GuardsConfig())


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_loss_or_gradient_that_is_not_finite_is_refused_whatever_the_guards(
    name: str, value: float
) -> None:
    stats = changed(**{name: value}, num_fresh_tokens=0)
    off = GuardsConfig(max_sampler_kl=None, min_sequence_ess=None, max_masked_fraction=None)
    with pytest.raises(UpdateRefused, match=f"{name} is .*optimizer.learning_rate"):
        check_guards(stats, off)
