"""Run configs of the examples, for a CPU and for a GPU host, are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.trainer.run_config import read_run_config

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_run_config_is_accepted(path: Path) -> None:
    assert read_run_config(path).num_steps


@pytest.mark.parametrize("name", ["gsm8k", "http_reward", "online_dpo"])
def test_an_example_has_settings_for_a_gpu_host_and_says_what_comes_out(name: str) -> None:
    assert {EXAMPLES / name / "run.yaml", EXAMPLES / name / "gpu.yaml"} <= set(CONFIGS)
    readme = (EXAMPLES / name / "README.md").read_text()
    assert f"python -m examples.{name}" in readme
    assert "curve.png" in readme
    assert (EXAMPLES / name / "curve.png").stat().st_size < 100_000
