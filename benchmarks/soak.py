"""What both services keep of the requests that are over: memory, descriptors, metric lines, leases.

One trainer and one replica serve rounds of finished, abandoned and refused requests, with a policy
update and its sync in each. What grows is printed per 1,000 operations, after a warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import httpx
from rich.console import Console

from benchmarks.report import Report
from examples.demo.processes import ROOT, ServiceProcess
from examples.demo.services import DemoServices
from examples.demo.training import make_model
from examples.own_loop.over_http import RUN, score
from services.trainer.data.sort_digits import training_problems
from shared.auth import authorization
from shared.errors import InvalidRequest
from shared.rollout_client import RolloutClient
from shared.schemas import GenerateRequest, PolicyId, SamplingParams, TrainRequest
from shared.trainer_client import TrainerClient

_WORK_DIR = ROOT / ".demo"
_READY_TIMEOUT_S = 240.0
_NUM_FINISHED, _NUM_ABANDONED, _NUM_REFUSED = 8, 4, 4
_PER_ROUND = 1 + _NUM_FINISHED + _NUM_ABANDONED + _NUM_REFUSED
_WARM_UP = 0.5  # Share of the rounds: allocators, caches and connection pools fill up in it.
_MAX_MIB, _MAX_DESCRIPTORS, _MAX_LINES = 20.0, 1.0, 1.0  # Growth per 1,000 operations.


@dataclass(frozen=True, slots=True)
class Footprint:
    memory_mib: float  # Resident memory of the service and its child processes.
    num_descriptors: int
    num_metric_lines: int


def processes_of(service: ServiceProcess) -> Iterator[Path]:
    """The folders in /proc of the service's session."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == service.pid:
                yield folder


async def footprint(service: ServiceProcess, http: httpx.AsyncClient) -> Footprint:
    memory_kib = num_descriptors = 0
    for folder in processes_of(service):
        for line in (folder / "status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                memory_kib += int(line.split()[1])
        num_descriptors += len(list((folder / "fd").iterdir()))
    metrics = (await http.get(f"{service.url}/metrics")).text
    return Footprint(memory_kib / 1024, num_descriptors, len(metrics.splitlines()))


class Soak:
    """The rounds, on services that run."""

    def __init__(self, rollout: RolloutClient, trainer: TrainerClient) -> None:
        self._rollout = rollout
        self._trainer = trainer
        self._problems = training_problems(random.Random(0))
        self._policy: PolicyId | None = None
        self._round = 0

    async def begin(self) -> None:
        self._policy = (await self._trainer.start_run(RUN)).policy

    async def round(self) -> None:
        """`_PER_ROUND` operations, of which the update comes last."""
        self._round += 1
        await asyncio.gather(
            *(self._finished(k) for k in range(_NUM_FINISHED)),
            *(self._abandoned(k) for k in range(_NUM_ABANDONED)),
            *(self._refused() for _ in range(_NUM_REFUSED)),
        )
        await self._update()

    async def _finished(self, index: int) -> None:
        sampling = SamplingParams(n=2, max_tokens=8, seed=index)
        await self._rollout.generate(GenerateRequest(prompts=("s53812=",), sampling=sampling))

    async def _abandoned(self, index: int) -> None:
        sampling = SamplingParams(n=8, max_tokens=40, ignore_eos=True)
        request = GenerateRequest(prompts=("s53812=",), sampling=sampling, stream=index % 2 == 0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.005 * (1 + index)):
                if not request.stream:
                    await self._rollout.generate(request)
                async for _ in self._rollout.stream(request):
                    pass

    async def _refused(self) -> None:
        with contextlib.suppress(InvalidRequest):
            await self._rollout.generate(GenerateRequest(prompts=((10**6,),)))

    async def _update(self) -> None:
        assert self._policy
        prompts, answers = zip(*islice(self._problems, 4), strict=True)
        sampling = SamplingParams(n=4, max_tokens=8, seed=self._round)
        sampled = await self._rollout.generate(
            GenerateRequest(
                prompts=prompts, policy=self._policy, purpose="train", sampling=sampling
            )
        )
        trained = await self._trainer.train(
            TrainRequest(
                groups=tuple(map(score, sampled.groups, answers)),
                expected_policy=self._policy,
                idempotency_key=f"round-{self._round}",
            )
        )
        self._policy = trained.policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=4000)
    parser.add_argument(
        "--report", action="store_true", help="save the report in benchmarks/reports/"
    )
    arguments = parser.parse_args()
    make_model(_WORK_DIR / "model", Console())
    num_rounds = max(4, arguments.operations // _PER_ROUND)
    report, is_flat = asyncio.run(_measure(num_rounds))
    report.publish(keep=arguments.report)
    raise SystemExit(0 if is_flat else 1)


async def _measure(num_rounds: int) -> tuple[Report, bool]:
    num_warm_up = int(num_rounds * _WARM_UP)
    async with AsyncExitStack() as stack:
        services = stack.enter_context(DemoServices(_WORK_DIR, num_replicas=1))
        await services.wait_until_ready(timeout_s=_READY_TIMEOUT_S)
        (replica,) = services.replicas
        key = services.api_key
        rollout = await stack.enter_async_context(RolloutClient(replica.url, api_key=key))
        trainer = await stack.enter_async_context(TrainerClient(services.trainer.url, api_key=key))
        http = await stack.enter_async_context(
            httpx.AsyncClient(headers=authorization(key), trust_env=False, timeout=30)
        )
        soak = Soak(rollout, trainer)
        await soak.begin()
        for _ in range(num_warm_up):
            await soak.round()
        both = (services.trainer, replica)
        before = [await footprint(service, http) for service in both]
        for _ in range(num_rounds - num_warm_up):
            await soak.round()
        after = [await footprint(service, http) for service in both]
        num_outstanding = (await rollout.status()).num_outstanding_completions
        num_leases = sum(item.num_leases for item in (await rollout.policies()).resident)
        await trainer.stop_run()
    num_operations = (num_rounds - num_warm_up) * _PER_ROUND
    return _report(
        num_operations,
        [service.name for service in both],
        before,
        after,
        num_outstanding,
        num_leases,
    )


def _report(
    num_operations: int,
    names: Sequence[str],
    before: Sequence[Footprint],
    after: Sequence[Footprint],
    num_outstanding: int,
    num_leases: int,
) -> tuple[Report, bool]:
    rows, is_flat = [], num_outstanding == num_leases == 0
    for name, old, new in zip(names, before, after, strict=True):
        thousands = num_operations / 1000
        mib = (new.memory_mib - old.memory_mib) / thousands
        descriptors = (new.num_descriptors - old.num_descriptors) / thousands
        lines = (new.num_metric_lines - old.num_metric_lines) / thousands
        is_flat &= mib <= _MAX_MIB and descriptors <= _MAX_DESCRIPTORS and lines <= _MAX_LINES
        rows.append(
            [
                name,
                f"{new.memory_mib:,.0f}",
                f"{mib:+.1f}",
                str(new.num_descriptors),
                f"{descriptors:+.1f}",
                str(new.num_metric_lines),
                f"{lines:+.1f}",
            ]
        )
    return (
        Report(
            name="soak",
            title="What services keep of requests that are over",
            setting=(
                f"{num_operations:,} operations after a warm-up, in rounds of {_NUM_FINISHED} "
                f"finished, {_NUM_ABANDONED} abandoned and {_NUM_REFUSED} refused requests and one "
                "policy update with its sync. Growth is per 1,000 operations."
            ),
            header=("service", "MiB", "growth", "descriptors", "growth", "metric lines", "growth"),
            rows=rows,
            conclusion=(
                f"Left over: {num_outstanding} completions, {num_leases} leases (target 0). "
                f"Targets of growth: {_MAX_MIB:g} MiB, {_MAX_DESCRIPTORS:g} descriptor, "
                f"{_MAX_LINES:g} metric line."
            ),
        ),
        is_flat,
    )


if __name__ == "__main__":
    main()
