"""What an operator did wrong is one line on stderr and exit code 2, of the real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.trainer_process import SLOW_BOOT

Name = Literal["rollout", "trainer"]
both = pytest.mark.parametrize("name", ["rollout", "trainer"])


def refusal(name: Name, folder: Path, **settings: object) -> str:
    """The one line that the service says before it exits with 2."""
    prefix = name.upper()
    named = {"device": "cpu", "port": 0, **settings}
    if name == "rollout":
        named = {"base": "original", "adapter_dir": folder / "adapters", **named}
    else:
        named = {"runs_dir": folder / "runs", **named}
    prefixes = ("ROLLOUT_", "TRAINER_", "TANDEM_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    environment |= {f"{prefix}_{key.upper()}": str(value) for key, value in named.items()}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    command = [sys.executable, "-m", f"services.{name}"]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@both
def test_without_a_key_a_service_does_not_listen_beyond_loopback(
    name: Name, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    line = refusal(name, tmp_path, model=tiny_checkpoint, host="0.0.0.0")
    assert "set TANDEM_API_KEY" in line


@both
def test_a_port_in_use_is_named(name: Name, tmp_path: Path, tiny_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        line = refusal(name, tmp_path, model=tiny_checkpoint, port=port)
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in line


@both
def test_a_model_that_is_not_there_is_named(name: Name, tmp_path: Path) -> None:
    line = refusal(name, tmp_path, model=tmp_path / "nothing")
    assert f"boot failed: {name.upper()}_MODEL {tmp_path / 'nothing'}: no such folder" in line


@both
def test_a_hub_id_that_cannot_be_downloaded_is_named(name: Name, tmp_path: Path) -> None:
    line = refusal(name, tmp_path, model="owner/model")
    assert (
        f"{name.upper()}_MODEL owner/model: the model is not in the cache {tmp_path / 'hub'}"
        in line
    )


@both
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named_by_its_setting(
    name: Name, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    line = refusal(name, tmp_path, model=tiny_checkpoint, device="cuda")
    assert f"boot failed: {name.upper()}_DEVICE=cuda: " in line


@pytest.mark.parametrize(
    ("name", "setting"),
    [("rollout", "adapter_dir"), ("rollout", "cache_dir"), ("trainer", "runs_dir")],
)
def test_a_folder_that_cannot_be_written_is_named_by_its_setting(
    name: Name, setting: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    (tmp_path / "file").touch()
    fields: dict[str, object] = {"model": tiny_checkpoint, setting: tmp_path / "file" / "folder"}
    if setting == "cache_dir":
        fields["base"] = "nf4-exact"
    line = refusal(name, tmp_path, **fields)
    assert f"boot failed: {name.upper()}_{setting.upper()}: {tmp_path / 'file' / 'folder'}" in line


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"max_model_len": 100000},
            "User-specified ROLLOUT_MAX_MODEL_LEN (100000) is greater than the derived",
        ),
        ({"max_num_batched_tokens": 16}, "ROLLOUT_MAX_NUM_BATCHED_TOKENS (16) is smaller than"),
    ],
)
def test_what_vllm_refuses_is_said_in_the_names_of_our_settings(
    settings: dict[str, int], sentence: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    line = refusal("rollout", tmp_path, model=tiny_checkpoint, **settings)
    assert f"boot failed: vLLM does not start: {sentence}" in line


def test_a_trainer_that_still_downloads_its_model_stops_when_asked_to(tmp_path: Path) -> None:
    """A thread cannot be cancelled: waited for, it would take up the whole grace period."""
    settings = {"TRAINER_MODEL": "owner/model", "TRAINER_PORT": "0", "TRAINER_RUNS_DIR": "runs"}
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_BOOT],
        env={**os.environ, **settings, "PYTHONPATH": os.getcwd()},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"loading\n"
        process.terminate()
        assert process.wait(timeout=30) == 0
