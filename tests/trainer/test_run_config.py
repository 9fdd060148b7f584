"""A run config is complete and consistent, or refused in one sentence that names the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.trainer.run_config import (
    CorrectionConfig,
    GrpoConfig,
    parse_run_config,
    read_run_config,
)

MANAGED = """
num_steps: 3
dataset: {type: sort_digits}
rewards: [{type: exact_match}]
"""
OFFLINE = """
num_steps: 3
dataset: {type: preferences, path: pairs.jsonl}
algorithm: dpo
"""


def test_yaml_and_json_are_read_alike() -> None:
    json = (
        '{"num_steps": 3, "dataset": {"type": "sort_digits"}, "rewards": [{"type": "exact_match"}]}'
    )
    assert parse_run_config(json) == parse_run_config(MANAGED)


def test_the_resolved_config_reads_back_as_itself() -> None:
    config = parse_run_config(MANAGED)
    assert parse_run_config(config.model_dump_json()) == config


def test_the_demo_config_is_valid() -> None:
    path = Path(__file__).parents[2] / "examples/demo/run.yaml"
    assert read_run_config(path).lora.scaling == 2.0


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce_pp"])
def test_an_algorithm_that_compares_over_the_batch_may_have_groups_of_one(algorithm: str) -> None:
    config = parse_run_config(MANAGED + f"sampling: {{n: 1}}\nalgorithm: {algorithm}")
    assert config.sampling.n == 1


def test_an_offline_run_needs_replicas_for_its_evaluations_alone() -> None:
    evaluated = "rewards: [{type: exact_match}]\neval: {dataset: {type: sort_digits}}"
    assert not parse_run_config(OFFLINE).needs_replicas
    assert parse_run_config(OFFLINE + evaluated).needs_replicas
    assert parse_run_config(OFFLINE + "sampling: {n: 1, temperature: 0}").learns_from_pairs


def test_a_factor_bounds_the_groups_of_an_update() -> None:
    config = parse_run_config(MANAGED + "prompts_per_step: 6\ndynamic_sampling: {}")
    assert config.max_set_aside + config.prompts_per_step == 4 * 6
    assert parse_run_config(MANAGED).max_set_aside == 0


def test_the_overlong_penalty_has_a_weight_as_rewards_do() -> None:
    config = parse_run_config(MANAGED + "overlong: {buffer_tokens: 8, penalty: 0.5}")
    assert config.reward_weights == (1.0, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must be a mapping"),
        ("a: b: c", "neither YAML nor JSON"),
        ("[" * 10_000, "neither YAML nor JSON"),
        ("{}", "a managed run needs dataset"),
        (MANAGED + "steps: 4", "unknown field .steps."),
        (MANAGED + "sampling: {top_p: 0.9}", "top_p=0.9"),
        (MANAGED + "sampling: {n: 8, temperature: 0}", "temperature=0"),
        (MANAGED + "sampling: {n: 1}", "at least 2"),
        (MANAGED + "sampling: {seed: 1}", "derived from the run's seed"),
        (MANAGED + "lora: {rank: 0}", "lora.rank"),
        (MANAGED + "optimizer: {learning_rate: .nan}", "optimizer.learning_rate"),
        (MANAGED + "managed: false", "your loop's"),
        (MANAGED.replace("exact_match", "nearly"), "rewards.0"),
        (MANAGED + "sampling: {n: 1}\nalgorithm: online_dpo", "at least 2"),
        (MANAGED + "sampling: {n: 1}\nalgorithm: reinforce_pp_baseline", "at least 2"),
        (
            MANAGED + "sampling: {n: 1}\nalgorithm: ppo\ndynamic_sampling: {}",
            "at least 2",
        ),
        (MANAGED + "sampling: {n: 2}\nalgorithm: {name: grpo, loss: dr_grpo}", "max_tokens"),
        (MANAGED + "overlong: {buffer_tokens: 512}", "buffer must be the shorter one"),
        (MANAGED + "sampling: {n: 2}\noverlong: {buffer_tokens: 4}", "max_tokens not set"),
        (MANAGED + "dynamic_sampling: {max_groups_factor: 1}", "max_groups_factor"),
        (MANAGED + "algorithm: dpo", "learns from pairs: set dataset.type to preferences"),
        (OFFLINE + "rewards: [{type: exact_match}]", "rewards without eval"),
        (OFFLINE + "eval: {dataset: {type: sort_digits}}", "needs rewards"),
        (OFFLINE + "dynamic_sampling: {}", "leave dynamic_sampling out"),
        (OFFLINE + "overlong: {buffer_tokens: 4}", "leave overlong out"),
        (OFFLINE.replace("pairs.jsonl", "pairs.csv"), "neither .jsonl nor .parquet"),
        (OFFLINE.replace("algorithm: dpo", "rewards: [{type: exact_match}]"), "grpo samples"),
        ("managed: false\ndynamic_sampling: {}", "your loop's"),
    ],
)
def test_a_bad_config_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_run_config(text)
    assert "\n" not in str(error.value).strip() or "YAML" in message


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("use_dora: true", "use_dora rescales every row of a weight"),
        ("modules_to_save: [lm_head]", "modules_to_save trains whole modules"),
        ("rank_pattern: {q_proj: 4}", "rank_pattern gives modules ranks of their own"),
        ("alpha_pattern: {q_proj: 4}", "alpha_pattern gives modules factors of their own"),
        ("lora_dropout: 0.1", "lora_dropout makes the policy that trains another one"),
    ],
)
def test_what_an_adapter_on_a_replica_cannot_have_is_refused_with_the_reason(
    option: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"^lora: {reason}.*: leave it out$"):
        parse_run_config(f"managed: false\nlora: {{{option}}}")


@pytest.mark.parametrize(
    "name",
    ["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "ppo", "online_dpo", "dpo"],
)
def test_an_algorithm_is_chosen_by_its_name_alone(name: str) -> None:
    algorithm = parse_run_config(f"managed: false\nalgorithm: {name}").algorithm
    assert algorithm.name == name
    assert algorithm == parse_run_config(f"managed: false\nalgorithm: {{name: {name}}}").algorithm


def test_the_config_of_a_run_of_the_first_version_is_understood() -> None:
    algorithm = parse_run_config("managed: false\nalgorithm: {name: grpo, importance_clip: 2}")
    assert algorithm.algorithm == GrpoConfig(correction=CorrectionConfig(max_ratio=2.0))


@pytest.mark.parametrize(
    ("correction", "problem"),
    [
        ("min_ratio: 5", "min_ratio 5.0 is not below max_ratio 3.0"),
        ("geometric_band: [0, 2]", "is no band of ratios above 0"),
        ("geometric_band: [2, 1]", "is no band of ratios above 0"),
    ],
)
def test_bounds_of_the_correction_that_are_out_of_order_are_refused(
    correction: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_run_config(f"managed: false\nalgorithm: {{name: grpo, correction: {{{correction}}}}}")


@pytest.mark.parametrize(
    ("algorithm", "is_constant"),
    [
        ("grpo", True),
        ("{name: grpo, reward_aggregation: normalize_then_sum}", False),
        ("online_dpo", True),
        ("{name: online_dpo, missing_eos_penalty: 0.5}", False),
    ],
)
def test_a_group_is_constant_by_what_its_algorithm_compares(
    algorithm: str, is_constant: bool
) -> None:
    """Equal sums of different rewards, of which one completion was cut."""
    config = parse_run_config(f"managed: false\nalgorithm: {algorithm}")
    assert config.is_constant([(1.0, 0.0), (0.0, 1.0)], [True, False]) is is_constant


@pytest.mark.parametrize(("factor", "num_prompts", "expected"), [(1.1, 8, 1), (1.2, 10, 2)])
def test_dynamic_sampling_sets_as_many_groups_aside_as_its_factor_says(
    factor: float, num_prompts: int, expected: int
) -> None:
    more = f"prompts_per_step: {num_prompts}\ndynamic_sampling: {{max_groups_factor: {factor}}}"
    assert parse_run_config(MANAGED + more).max_set_aside == expected
