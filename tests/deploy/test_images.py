"""What the images contain, and what they do not."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from examples.demo import model as demo
from tests.deploy.stack import inspect, run

pytestmark = pytest.mark.compose


def python_in(image: str, code: str, *options: str) -> str:
    result = run("docker", "run", "--rm", *options, "--entrypoint", "python", image, "-c", code)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("service", "absent"),
    [
        ("trainer", ["vllm", "services.rollout", "pytest"]),
        ("rollout", ["peft", "datasets", "services.trainer", "pytest"]),
    ],
)
def test_an_image_has_only_its_service(
    images: dict[str, str], service: str, absent: list[str]
) -> None:
    other = "rollout" if service == "trainer" else "trainer"
    found = python_in(
        images[service],
        "import importlib.util as u, os, json; print(json.dumps("
        f"[[n for n in {absent} if u.find_spec(n)], os.path.isdir('services/{other}')]))",
    )
    assert json.loads(found) == [[], False]


def test_an_image_runs_as_nobody_special_and_owns_its_caches(images: dict[str, str]) -> None:
    for image in images.values():
        config = inspect(image)["Config"]
        assert config["User"] == "10001:10001"
        assert config["Entrypoint"][:2] == ["python", "-m"]
        assert not config.get("Healthcheck")  # every user of an image brings its own
        owners = python_in(
            image,
            "import os; folders = '/cache/hf /cache/vllm /cache/tandem /models /runs'.split(); "
            "print({os.stat(folder).st_uid for folder in folders}, os.access('/app', os.W_OK))",
        )
        assert owners == "{10001} False"


def test_no_secret_is_in_an_image(images: dict[str, str]) -> None:
    """Not in its history, its environment or its files."""
    for image in images.values():
        history = run("docker", "history", "--no-trunc", image).stdout
        environment = " ".join(inspect(image)["Config"]["Env"])
        for word in ("API_KEY", "HF_TOKEN", "PASSWORD", "://user", "@"):
            assert word not in (history + environment).replace("@sha256", "")
        files = python_in(
            image,
            "import os; print([f for _, _, fs in os.walk('/app') for f in fs if f[0] == '.'])",
        )
        assert files == "[]"


def test_torch_is_one_layer_of_both_images(images: dict[str, str]) -> None:
    """A host that runs both services stores the layer once."""
    layers = [inspect(image)["RootFS"]["Layers"] for image in images.values()]
    base = inspect("python:3.11.14-slim-bookworm")["RootFS"]["Layers"]
    common = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*layers, strict=False)))
    assert len(common) == len(base) + 2  # one with user and folders, one with torch
    assert python_in(images["rollout"], "import torch; print(torch.__version__)") == "2.13.0+cpu"


@pytest.mark.parametrize("service", ["trainer", "rollout"])
class TestAMistakeIsOneLine:
    """The container exits on its own, and the last line of its log says what to set."""

    def last_line(self, image: str, *options: str) -> str:
        folders = ["--tmpfs", "/tmp", "--volume", "/runs"]
        result = run("docker", "run", "--rm", "--read-only", *folders, *options, image)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        return result.stderr.strip().splitlines()[-1]

    def test_no_key(self, images: dict[str, str], service: str) -> None:
        line = self.last_line(images[service], *variables(service, "/models/demo", key=""))
        assert line == (
            "refusing to listen on 0.0.0.0 without a key: set TANDEM_API_KEY, or bind 127.0.0.1"
        )

    def test_no_model(self, images: dict[str, str], service: str) -> None:
        line = self.last_line(images[service], *variables(service, "/models/nothing"))
        assert f"{service.upper()}_MODEL /models/nothing: no such folder" in line

    def test_too_little_memory(
        self, images: dict[str, str], large_model: Path, service: str
    ) -> None:
        """Otherwise the kernel would kill the container without an explanation."""
        options = ["--memory", "1g", "--memory-swap", "1g"]
        volume = ["--volume", f"{large_model}:/models:ro"]
        line = self.last_line(images[service], *options, *volume, *variables(service, "/models"))
        assert "/models needs at least " in line
        assert "GiB of memory" in line
        assert "of 1.0 GiB are free in this container" in line


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights are a sparse file of 4 GB."""
    folder = tmp_path_factory.mktemp("large") / "model"
    demo.save(demo.make_model(seed=0), folder)
    num_rows, width = 2_000_000, 1024
    name, num_bytes = "model.embed_tokens.weight", 2 * num_rows * width
    tensor = {"dtype": "BF16", "shape": [num_rows, width], "data_offsets": [0, num_bytes]}
    header = json.dumps({name: tensor}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + num_bytes)
    for path in (folder.parent, folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def variables(service: str, model: str, *, key: str = "key") -> list[str]:
    return ["--env", f"{service.upper()}_MODEL={model}", "--env", f"TANDEM_API_KEY={key}"]
