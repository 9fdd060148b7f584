"""Fixtures: the images, built once, and one CPU stack for tests that disturb it at most briefly."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.stack import ROOT, VERSION, Stack, run

IMAGES = {name: f"tandem-{name}:{VERSION}-cpu" for name in ("trainer", "rollout")}

SWAPPED_IMAGE = f"tandem-rollout:{VERSION}-swapped"

_BUILD_S = 1200  # of one image, at most


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests of the images the time of the build: whichever comes first waits for it."""
    for item in items:
        if "images" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(len(IMAGES) * _BUILD_S + 600), append=False)


@pytest.fixture(scope="session")
def engine() -> None:
    """Check that a Docker engine with compose answers; otherwise the tests fail."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        if not shutil.which("docker") or run(*command).returncode:
            pytest.fail(
                f"`{' '.join(command)}` fails: the deployment tests need a Docker engine with "
                "compose 2.24 or newer; start it, or name it with DOCKER_HOST"
            )


@pytest.fixture(scope="session")
def images(engine: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Build the CPU images as `make up STACK=cpu` does; returns service -> image name.

    Wheels in pip's PIP_FIND_LINKS are used, as they are outside of containers.
    """
    more = []
    wheels = os.environ.get("PIP_FIND_LINKS", "")
    if Path(wheels).is_dir():
        more = ["--build-context", f"wheels={wheels}"]
    for name, image in IMAGES.items():
        started = time.monotonic()
        command = f"docker build --quiet --file deploy/Dockerfile --build-arg DEVICE=cpu --target {name} --tag {image}"  # noqa: E501
        built = run(*command.split(), *more, ".", cwd=ROOT, timeout=_BUILD_S)
        assert built.returncode == 0, built.stderr[-4000:]
        print(f"built {image} in {time.monotonic() - started:.0f} s")
    return IMAGES


@pytest.fixture(scope="session")
def stack(images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A ready trainer with two replicas on a CPU."""
    stack = Stack.make(tmp_path_factory.mktemp("stack"), "tandem-test", "cpu")
    stack.down()  # removes what a killed test run left
    try:
        started = time.monotonic()
        stack.must_compose("up", "--detach", "--wait", "--wait-timeout", "400")
        print(f"the stack was ready after {time.monotonic() - started:.0f} s")
        yield stack
    finally:
        stack.down()
    run("docker", "image", "rm", SWAPPED_IMAGE)
    assert set(stack.num_left().values()) == {0}, "`docker compose down` left something"


@pytest.fixture(scope="session")
def prometheus(engine: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with Debian's Prometheus, which accepts the arguments of the official image."""
    folder, image = tmp_path_factory.mktemp("prometheus"), "tandem-test-prometheus"
    (folder / "Dockerfile").write_text(
        "FROM python:3.11.14-slim-bookworm\n"
        "RUN apt-get update && apt-get install -y --no-install-recommends prometheus"
        " && install -d -o nobody -g nogroup /prometheus\n"
        "USER nobody\n"
        'ENTRYPOINT ["/usr/bin/prometheus"]\n'
    )
    built = run("docker", "build", "--quiet", "--tag", image, str(folder), timeout=300)
    assert built.returncode == 0, built.stderr
    return image
