"""Which service gets which GPU on a GPU host. Containers are created, but not started."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.stack import ROOT, Stack, run


def created(folder: Path, name: str, images: dict[str, str], **settings: str) -> Stack:
    """Create the stack's containers, with the CPU images instead of the CUDA images."""
    stand_ins = {
        "TRAINER_IMAGE": images["trainer"],
        **{f"{name}_IMAGE": images["rollout"] for name in ("ROLLOUT_0", "ROLLOUT_1", "ROLLOUT")},
    }
    stack = Stack.make(folder, "tandem-gpu", name, **stand_ins, **settings)
    stack.down()
    stack.must_compose("create", "--no-build", "--pull", "never")
    return stack


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    Stack(tmp_path, "tandem-gpu").down()


def gpus(container: dict[str, Any]) -> list[str]:
    (request,) = container["HostConfig"]["DeviceRequests"]
    assert (request["Driver"], request["Capabilities"]) == ("nvidia", [["gpu"]])
    ids: list[str] = request["DeviceIDs"]
    return ids


@pytest.mark.compose
def test_everyone_has_a_gpu_of_its_own(folder: Path, images: dict[str, str]) -> None:
    stack = created(folder, "", images)
    assert {name: gpus(stack.inspect(name)) for name in ("trainer", "rollout-0", "rollout-1")} == {
        "trainer": ["0"],
        "rollout-0": ["1"],
        "rollout-1": ["2"],
    }


@pytest.mark.compose
def test_gpus_are_those_of_the_env(folder: Path, images: dict[str, str]) -> None:
    """A tensor-parallel replica gets two, whose ids the engine joins with commas for NVIDIA."""
    stack = created(folder, "", images, TRAINER_GPU="3", ROLLOUT_0_GPU="4,5")
    assert gpus(stack.inspect("trainer")) == ["3"]
    assert gpus(stack.inspect("rollout-0")) == ["4,5"]


@pytest.mark.compose
def test_replicas_share_one_name(folder: Path, images: dict[str, str]) -> None:
    stack = created(folder, "", images)
    for name in ("rollout-0", "rollout-1"):
        (network,) = stack.inspect(name)["NetworkSettings"]["Networks"].values()
        assert "rollout" in network["Aliases"]
    environment = stack.inspect("trainer")["Config"]["Env"]
    assert "TRAINER_ROLLOUT_URLS=rollout:8000" in environment


@pytest.mark.compose
def test_one_gpu_is_shared(folder: Path, images: dict[str, str]) -> None:
    stack = created(folder, "one-gpu", images)
    assert gpus(stack.inspect("trainer")) == gpus(stack.inspect("rollout-0")) == ["0"]
    assert "ROLLOUT_GPU_MEMORY_UTILIZATION=0.5" in stack.inspect("rollout-0")["Config"]["Env"]
    assert stack.containers("rollout-1") == []


@pytest.mark.compose
def test_scaled_replicas_see_the_pool(folder: Path, images: dict[str, str]) -> None:
    stack = created(folder, "scale", images, ROLLOUT_GPUS="1,2,3")
    assert gpus(stack.inspect("rollout")) == ["1,2,3"]


CLAIM = [sys.executable, str(ROOT / "deploy/scripts/claim_gpu.py")]
SHOW = ["sh", "-c", "echo GPU $CUDA_VISIBLE_DEVICES; read line"]


def claim(folder: Path, gpus: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*CLAIM, *SHOW],
        env={"ROLLOUT_GPUS": gpus, "GPU_CLAIMS_DIR": str(folder), "PATH": "/usr/bin:/bin"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def line(process: subprocess.Popen[str], stream: str = "stdout") -> str:
    return str(getattr(process, stream).readline()).strip()


def test_two_replicas_never_have_the_same_gpu(tmp_path: Path) -> None:
    """A third replica waits, and takes over the GPU of a killed one."""
    first, second = claim(tmp_path, "4,7"), claim(tmp_path, "4,7")
    with first, second:
        assert sorted([line(first), line(second)]) == ["GPU 0", "GPU 1"]
        with claim(tmp_path, "4,7") as third:
            assert line(third, "stderr") == "all GPUs are taken (4, 7): waiting for one"
            first.kill()
            assert line(third).startswith("GPU ")
            third.kill()
        second.kill()


@pytest.mark.parametrize("gpus", ["", " , "])
def test_no_gpu_to_choose_from_is_one_sentence(tmp_path: Path, gpus: str) -> None:
    with claim(tmp_path, gpus) as process:
        assert line(process, "stderr") == (
            "ROLLOUT_GPUS is empty: set it in .env, for example ROLLOUT_GPUS=1,2"
        )
    assert process.returncode == 2


def test_replicas_by_number_are_not_tensor_parallel(tmp_path: Path) -> None:
    environment = {"ROLLOUT_GPUS": "0,1", "ROLLOUT_TENSOR_PARALLEL_SIZE": "2"}
    refused = run(*CLAIM, *SHOW, env=environment)
    assert refused.returncode == 2
    assert "scaled replicas have one GPU each" in refused.stderr
