"""The CPU stack in operation: a run, outside requests, swaps, kills, scaling and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.errors import Unauthorized
from shared.schemas import GenerateRequest, RunStatus, SamplingParams
from tests.deploy.conftest import IMAGES, SWAPPED_IMAGE
from tests.deploy.stack import ROOT, Stack, address, inspect, run, wait_for

pytestmark = [pytest.mark.compose, pytest.mark.anyio, pytest.mark.timeout(600)]

PROMPT = GenerateRequest(prompts=("s53812=",), sampling=SamplingParams(n=2, max_tokens=8, seed=7))


def run_config(num_steps: int) -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "examples/demo/run.yaml").read_text())
    del config["eval"]
    return {**config, "num_steps": num_steps, "replace_run": True}


async def wait_for_run(stack: Stack, *, step: int) -> RunStatus:
    """Wait until the run reaches `step` or ends."""
    async with asyncio.timeout(240), stack.trainer() as trainer:
        while True:
            status = await trainer.run()
            if status.step >= step or status.state not in ("running", "stopping"):
                return status
            await asyncio.sleep(0.5)


async def stop(stack: Stack) -> None:
    """Stop the run after its current step."""
    async with stack.trainer() as trainer:
        await trainer.stop_run()
    assert (await wait_for_run(stack, step=10_000)).state == "stopped"


@contextlib.asynccontextmanager
async def running(stack: Stack) -> AsyncIterator[None]:
    """Keep a run in progress during the block, from before its start, and stop it afterwards."""
    async with stack.trainer() as trainer:
        await trainer.start_run(run_config(10_000))
        assert (await wait_for_run(stack, step=1)).state == "running"
        yield
        await stop(stack)


async def serving(stack: Stack) -> dict[str, int]:
    """Address -> policy version of every replica that serves the run."""
    async with stack.trainer() as trainer:
        replicas = (await trainer.replicas()).replicas
    return {r.id: r.policy.version for r in replicas if r.state == "serving" and r.policy}


async def wait_until_serving(stack: Stack, *addresses: str) -> None:
    async with asyncio.timeout(180):
        while set(addresses) - set(await serving(stack)):  # noqa: ASYNC110 (another machine's news)
            await asyncio.sleep(0.5)


@pytest.fixture
def load(stack: Stack) -> Iterator[subprocess.Popen[str]]:
    """Run four clients that send requests to the replicas from inside the network."""
    stack.must_compose("exec", "-T", "trainer", "rm", "-f", "/tmp/stop")
    with (ROOT / "tests/deploy/load.py").open() as program:
        process = subprocess.Popen(
            ["docker", "compose", "exec", "-T", "trainer", "python", "-", "/tmp/stop"],
            cwd=stack.folder,
            env=stack.environment,
            stdin=program,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def end_of(load: subprocess.Popen[str], stack: Stack) -> dict[str, int]:
    stack.must_compose("exec", "-T", "trainer", "touch", "/tmp/stop")
    output, errors = load.communicate(timeout=60)
    assert load.returncode == 0, errors
    results: dict[str, int] = json.loads(output)
    return results


# --- at work -------------------------------------------------------------------------------------


async def test_a_run_started_by_rest_learns_on_both_replicas(stack: Stack) -> None:
    async with stack.trainer() as trainer:
        started = await trainer.start_run(run_config(5))
        ended = await wait_for_run(stack, step=5)
        assert ended.policy.version == 5
        assert (ended.run_id, started.step) == (started.run_id, 0)
        assert (await wait_for_run(stack, step=10_000)).state == "completed"
    assert set((await serving(stack)).values()) == {5}
    assert len(await serving(stack)) == 2
    kept = stack.must_compose("exec", "-T", "trainer", "ls", ended.run_dir).split()
    assert {"config.json", "metrics.jsonl", "adapter"} <= set(kept)


async def test_generate_and_sync_from_outside_want_the_key(stack: Stack) -> None:
    """Requests as a training loop on the host would send them."""
    key = stack.settings["TANDEM_API_KEY"]
    async with stack.trainer() as trainer:
        await trainer.start_run(run_config(1))
        assert (await wait_for_run(stack, step=10_000)).state == "completed"
        version = (await trainer.policy()).policy.version
        adapter = await trainer.adapter(version)
    async with stack.rollout(0, api_key=key) as replica:
        (group,) = (await replica.generate(PROMPT)).groups
        assert len(group.completions) == 2
        receipt = await replica.sync_weights(adapter)
        assert receipt.outcome == "already_resident"
    for wrong in (None, "not-the-key"):
        async with stack.rollout(0, api_key=wrong) as replica:
            with pytest.raises(Unauthorized):
                await replica.generate(PROMPT)
            with pytest.raises(Unauthorized):
                await replica.sync_weights(adapter)


def test_the_command_line_is_in_the_container_of_the_trainer(stack: Stack) -> None:
    """The host needs no installation; key and addresses come from the container."""

    def tandem(*arguments: str) -> str:
        return stack.must_compose("exec", "-T", "trainer", "tandem", *arguments)

    assert "Started run" in tandem("run", "examples/demo/run.yaml", "--detach")
    assert len(json.loads(tandem("replicas", "--json"))["replicas"]) == 2
    tandem("run", "--stop")  # returns when the current step has ended
    answer = json.loads(tandem("generate", "s53812=", "-n", "2", "--max-tokens", "8", "--json"))
    assert len(answer["groups"][0]["completions"]) == 2


async def test_prometheus_finds_the_trainer_and_every_replica(
    stack: Stack, prometheus: str
) -> None:
    stack.write_env(PROMETHEUS_IMAGE=prometheus)
    stack.must_compose("--profile", "observability", "up", "--detach", "--wait", "prometheus")
    url = f"http://127.0.0.1:{stack.settings['PROMETHEUS_PORT']}/api/v1"

    def get(path: str) -> Any:
        with urllib.request.urlopen(url + path, timeout=5) as answer:
            return json.load(answer)["data"]

    def up() -> list[str]:
        targets = get("/targets?state=active")["activeTargets"]
        return sorted(t["labels"]["job"] for t in targets if t["health"] == "up")

    wait_for(lambda: up() == ["rollout", "rollout", "trainer"], "three targets are up", 60)
    used = re.findall(r"vllm:\w+", (ROOT / "deploy/grafana/dashboards/tandem.json").read_text())
    assert used
    for name in set(used):
        wait_for(lambda n=name: len(get(f"/query?query={n}")["result"]) == 2, f"{name}", 30)  # type: ignore[misc]
    groups = get("/rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 5
    assert all(rule["health"] in ("ok", "unknown") for rule in rules)
    stack.must_compose("--profile", "observability", "rm", "--stop", "--force", "prometheus")


# --- swapped, killed ------------------------------------------------------------------------------


async def test_a_replica_is_swapped_under_load_without_a_failed_request(
    stack: Stack, load: subprocess.Popen[str]
) -> None:
    before = stack.inspect("rollout-1")["Id"]
    image = SWAPPED_IMAGE
    assert run("docker", "tag", IMAGES["rollout"], image).returncode == 0
    async with running(stack):
        first = (await wait_for_run(stack, step=2)).step
        swap = ["deploy/scripts/swap-replica.sh", "rollout-1", image]
        swapped = await asyncio.to_thread(stack.run, *swap)
        assert swapped.returncode == 0, swapped.stdout + swapped.stderr
        assert "rollout-1: serves policy version" in swapped.stdout
        after = stack.inspect("rollout-1")
        assert after["Id"] != before
        assert after["Config"]["Image"] == image
        assert address(after) in await serving(stack)
        assert f"ROLLOUT_1_IMAGE={image}\n" in (stack.folder / ".env").read_text()
        assert (await wait_for_run(stack, step=first + 2)).state == "running"
    results = end_of(load, stack)
    print(f"requests during the swap: {results}")
    assert results.pop("answered") > 10
    results.pop("refused there", 0)
    assert results == {}, "failed"


async def test_a_swap_to_an_image_that_does_not_start_comes_back(stack: Stack) -> None:
    """The trainer's image exits at once when started as a replica, and logs the reason."""
    old = stack.inspect("rollout-1")["Config"]["Image"]
    swap = ["deploy/scripts/swap-replica.sh", "rollout-1", "tandem-trainer:0.2.0-cpu"]
    async with running(stack):
        swapped = await asyncio.to_thread(stack.run, *swap)
        assert swapped.returncode == 1
        last = swapped.stderr.strip().splitlines()[-1]
        assert last == (
            "swap-replica: rollout-1 did not come up with tandem-trainer:0.2.0-cpu: see the end of "
            f"its log above; {old} serves again"
        )
        assert "TRAINER_MODEL: Field required" in swapped.stderr
        assert address(stack.inspect("rollout-1")) in await serving(stack)


async def test_the_only_replica_is_not_swapped_by_mistake(stack: Stack) -> None:
    stack.must_compose("stop", "rollout-1")
    try:
        refused = stack.run("deploy/scripts/swap-replica.sh", "rollout-0")
        assert refused.returncode == 2
        assert "rollout-0 is the only healthy replica" in refused.stderr
        started = stack.run("deploy/scripts/swap-replica.sh", "rollout-1")
        assert started.returncode == 0, started.stderr
    finally:
        stack.must_compose("up", "--detach", "--wait", "rollout-1")


async def test_a_killed_replica_restarts_and_is_admitted_again(stack: Stack) -> None:
    """Killed by its host pid, because Docker does not restart after `docker kill`."""
    async with running(stack):
        killed = stack.inspect("rollout-0")
        num_restarts = killed["RestartCount"]
        await wait_until_serving(stack, address(killed))
        os.kill(killed["State"]["Pid"], signal.SIGKILL)
        async with asyncio.timeout(30):
            while address(killed) in await serving(stack):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        await wait_until_serving(stack, address(stack.inspect("rollout-0")))
        after = stack.inspect("rollout-0")
        assert after["RestartCount"] == num_restarts + 1
        step = (await wait_for_run(stack, step=0)).step
        assert (await wait_for_run(stack, step=step + 2)).state == "running"


async def test_a_restarted_stack_takes_up_its_run(stack: Stack) -> None:
    """As after `docker compose up` when the host was down or the key has changed."""
    config = {**run_config(10_000), "checkpoint": {"every_steps": 1}}
    async with stack.trainer() as trainer:
        before = await trainer.start_run(config)
        await wait_for_run(stack, step=3)
    stack.write_env(TANDEM_API_KEY="f" * 64)
    stack.must_compose("up", "--detach", "--wait")
    after = await wait_for_run(stack, step=4)
    assert (after.run_id, after.state) == (before.run_id, "running")
    assert after.policy.incarnation == before.policy.incarnation + 1
    await stop(stack)


# --- mistakes -------------------------------------------------------------------------------------


async def test_a_port_that_is_taken_is_one_sentence(stack: Stack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = stack.settings["TRAINER_PORT"]
        stack.write_env(TRAINER_PORT=str(listener.getsockname()[1]))
        try:
            result = stack.compose("up", "--detach", "trainer")
            assert result.returncode != 0
            assert "address already in use" in result.stderr.strip().splitlines()[-1]
        finally:
            stack.write_env(TRAINER_PORT=port)
            stack.must_compose("up", "--detach", "--wait", "trainer")


async def test_a_mistake_stays_down_with_its_reason_last(stack: Stack) -> None:
    """After five restarts, the container stays down."""
    stack.write_env(TANDEM_CPU_MODEL="/models/nothing")
    try:
        stack.compose("up", "--detach", "--no-deps", "rollout-1")
        wait_for(lambda: stack.inspect("rollout-1")["State"]["Status"] == "exited", "it ends", 240)
        state = stack.inspect("rollout-1")
        assert (state["State"]["ExitCode"], state["RestartCount"]) == (2, 5)
        last = stack.logs("rollout-1").strip().splitlines()[-1]
        assert "ROLLOUT_MODEL /models/nothing: no such folder" in last
    finally:
        stack.write_env(TANDEM_CPU_MODEL="/models/demo")
        stack.must_compose("up", "--detach", "--wait", "rollout-1")


# --- by number ------------------------------------------------------------------------------------


def test_replicas_by_number_and_a_spare(images: dict[str, str], tmp_path: Path) -> None:
    """With two seats and three replicas, the third takes over the seat of a killed one."""
    stack = Stack.make(tmp_path, "tandem-scale", "cpu+scale", ROLLOUT_GPUS="0,1")
    stack.write_env(ROLLOUT_PORTS="0")
    stack.down()
    try:
        stack.must_compose("up", "--detach", "--wait", "--scale", "rollout=2", timeout=400)
        assert "took GPU 1 of 2" in stack.logs("rollout")
        assert "took GPU 2 of 2" in stack.logs("rollout")
        stack.must_compose("up", "--detach", "--no-recreate", "--scale", "rollout=3")
        wait_for(lambda: "waiting for one" in stack.logs("rollout"), "the third waits", 60)
        first = min(map(inspect, stack.containers("rollout")), key=lambda one: str(one["Created"]))
        os.kill(first["State"]["Pid"], signal.SIGKILL)
        wait_for(lambda: stack.logs("rollout").count("took GPU") == 3, "the spare takes over", 60)
        stack.must_compose("up", "--detach", "--no-recreate", "--scale", "rollout=1")
        wait_for(lambda: len(stack.containers("rollout")) == 1, "one is left", 60)
    finally:
        stack.down()
    assert set(stack.num_left().values()) == {0}


# --- the end --------------------------------------------------------------------------------------


async def test_services_stop_in_order_and_start_again(stack: Stack) -> None:
    stack.must_compose("stop")
    for service in ("trainer", "rollout-0", "rollout-1"):
        assert stack.inspect(service)["State"]["ExitCode"] in (0, 143), stack.logs(service)
    started = time.monotonic()
    stack.must_compose("up", "--detach", "--wait")
    print(f"a stack that was up before was ready after {time.monotonic() - started:.0f} s")
