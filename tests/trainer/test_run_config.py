"""A run config is complete and consistent, or refused in one sentence that names the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.trainer.run_config import parse_run_config, read_run_config

MANAGED = """
num_steps: 3
dataset: {type: sort_digits}
rewards: [{type: exact_match}]
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
    ],
)
def test_a_bad_config_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_run_config(text)
    assert "\n" not in str(error.value).strip() or "YAML" in message
