"""The shell blocks of README and docs/ work when they are pasted one after the other.

All pages share the services that first_run.md starts, in a folder that looks like a checkout. What
differs from a reader's is the model (random weights of the same shape), free ports in place of
8000, 8001, 8080 and 8090, and four steps in place of the fifty of the demo's run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.docs.blocks import ALL_BLOCKS, PAGES, ROOT, Block, blocks
from tests.replica_process import eventually, free_port
from tests.shell import start_shell

FIRST, LAST = ROOT / "docs/first_run.md", ROOT / "docs/replicas.md"  # which stops a replica
ORDER = [FIRST, *(page for page in PAGES if page not in (FIRST, LAST)), LAST]
RUNNABLE = [page for page in ORDER if any(b.is_shell and not b.reason for b in blocks(page))]
_BLOCK_TIMEOUT_S = 90
_PRELUDE = 'curl() { command curl --fail-with-body "$@"; }\n'  # an error is a failure, and is shown


class Terminals:
    """Shells in one folder; what runs until it is stopped goes on in the background."""

    def __init__(self, folder: Path, checkpoint: Path, cache: Path) -> None:
        self._folder = folder
        self._ports = {port: str(free_port()) for port in ("8000", "8001", "8080", "8090")}
        self._services: dict[str, subprocess.Popen[bytes]] = {}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ROLLOUT_", "TRAINER_"))}
        kept.pop("TANDEM_API_KEY", None)
        self._environment = kept | {
            "ROLLOUT_PORT": self._ports["8000"],
            "ROLLOUT_CACHE_DIR": str(cache),
            "ROLLOUT_DRAIN_DELAY_S": "0.2",
            "TRAINER_PORT": self._ports["8080"],
            "HF_HUB_OFFLINE": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        for path in ROOT.iterdir():
            if path.name not in (".git", ".venv", ".demo", "runs", "examples", "mine"):
                (folder / path.name).symlink_to(path)
        venv = folder / ".venv"
        venv.mkdir()
        for path in Path(sys.prefix).iterdir():
            if path.name != ".installed":
                (venv / path.name).symlink_to(path)
        (venv / ".installed").touch()  # newer than any list of packages: make installs nothing
        (folder / ".demo").mkdir()
        (folder / ".demo/model").symlink_to(checkpoint)
        demo = folder / "examples/demo"
        demo.mkdir(parents=True)
        for path in (*(ROOT / "examples").iterdir(), *(ROOT / "examples/demo").iterdir()):
            target = folder / path.relative_to(ROOT)
            if not target.exists() and path.name != "__pycache__":
                target.symlink_to(path)
        run = yaml.safe_load((demo / "run.yaml").read_text())
        (demo / "run.yaml").unlink()
        run |= {"num_steps": 4, "prompts_per_step": 4}
        run["eval"] |= {"num_prompts": 8}
        (demo / "run.yaml").write_text(yaml.safe_dump(run))

    def run(self, block: Block) -> None:
        self._until_no_run_stops()
        text = re.sub(r"\b(8000|8001|8080|8090)\b", lambda m: self._ports[m[0]], block.text)
        if block.is_service:
            self._start(str(block), text)
            return
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", _PRELUDE + text],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_BLOCK_TIMEOUT_S,
        )
        logs = "\n".join(path.read_text()[-2000:] for path in self._folder.glob("*.log"))
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{logs}"

    def _start(self, name: str, text: str) -> None:
        log = self._folder / f"{name}.log"
        with log.open("wb") as output:
            process = start_shell(text, cwd=self._folder, env=self._environment, output=output)
        self._services[name] = process

        def is_up() -> bool:
            assert process.poll() is None, log.read_text()
            return re.search(r"ready after|^ready$", log.read_text(), re.MULTILINE) is not None

        assert eventually(is_up, timeout_s=_BLOCK_TIMEOUT_S), log.read_text()

    def _until_no_run_stops(self) -> None:
        """A reader takes longer than a step to come to the next block."""
        url = f"http://127.0.0.1:{self._ports['8080']}/runs/current"

        def is_settled() -> bool:
            try:
                run = httpx.get(url, trust_env=False).json()
            except httpx.TransportError:
                return True
            return bool(run.get("state") != "stopping")

        assert eventually(is_settled, timeout_s=30)

    def close(self) -> None:
        """Stop the services as Ctrl-C in their terminals does, or harder."""
        for process in self._services.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + 30
        for process in self._services.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
            assert process.stdin
            process.stdin.close()


@pytest.fixture(scope="module")
def terminals(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, base_cache: Path
) -> Iterator[Terminals]:
    opened = Terminals(tmp_path_factory.mktemp("tandem"), tiny_checkpoint, base_cache)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def first_run(terminals: Terminals) -> None:
    """Both services are up, and have done a run, as on the page that the others build on."""
    for block in blocks(FIRST):
        if block.is_shell and not block.reason:
            terminals.run(block)


@pytest.mark.engine
@pytest.mark.usefixtures("first_run")
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_the_shell_blocks_of_a_page_run_in_their_order(page: Path, terminals: Terminals) -> None:
    for block in blocks(page):
        if block.is_shell and not block.reason and page != FIRST:
            terminals.run(block)


@pytest.mark.parametrize("block", [b for b in ALL_BLOCKS if b.mark], ids=str)
def test_a_mark_is_a_reason_or_says_that_it_is_a_service(block: Block) -> None:
    assert block.is_shell
    assert block.is_service or len(block.reason) > 10
