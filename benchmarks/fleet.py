"""What a fleet of 1, 2, 4 or 8 replicas costs the trainer, per group and per sync.

The replicas are real services on real HTTP, but their engines answer at a fixed rate. The ideal
time is therefore known; the rest is overhead of the fleet, HTTP, and two cores for all processes.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.replica import free_port, replica_process
from benchmarks.report import Report
from benchmarks.simulated_replica import LOAD_S, NUM_SLOTS, SECONDS_PER_REQUEST
from services.rollout.settings import RolloutSettings
from services.trainer.fleet.fleet import Fleet
from services.trainer.fleet.member import Requirements
from services.trainer.policy.adapter import PublishedAdapter
from shared.adapters import LINEAR_MODULES, content_digest, expected_shapes, manifest_metadata
from shared.model_folder import base_identity, linear_shapes
from shared.rollout_client import RolloutClient
from shared.schemas import AdapterManifest, BaseIdentity, GenerateRequest, PolicyId, SamplingParams

_PROMPT = (1, 15, 5, 8, 4, 3, 7, 14)
_NUM_COMPLETIONS, _NUM_TOKENS = 8, 64  # completions per group, tokens per completion
_NUM_ROUNDS = 8  # groups per slot
_TIMEOUT_S = 120.0
_MODULE = "benchmarks.simulated_replica"


class CountingTransport(httpx.AsyncHTTPTransport):
    """Sends over real HTTP and counts the bytes of request bodies."""

    def __init__(self) -> None:
        super().__init__(limits=httpx.Limits(max_connections=None))
        self.num_bytes = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.num_bytes += int(request.headers.get("content-length", 0))
        return await super().handle_async_request(request)


@dataclass(frozen=True, slots=True)
class Measured:
    num_replicas: int
    num_groups: int
    wall_s: float
    trainer_cpu_s: float  # CPU seconds of the process that routes requests and receives groups
    sync_s: dict[int, float]  # adapter bytes -> median seconds until every replica serves it
    sync_bytes: dict[int, int]  # adapter bytes -> bytes sent per sync, including probes

    @property
    def ideal_s(self) -> float:
        return self.num_groups / (NUM_SLOTS * self.num_replicas) * SECONDS_PER_REQUEST

    @property
    def overhead_ms(self) -> float:
        """Milliseconds per group beyond the ideal."""
        return 1000 * (self.wall_s - self.ideal_s) / self.num_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--syncs", type=int, default=5, help="syncs per adapter size")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 512])
    parser.add_argument(
        "--report", action="store_true", help="save the report in benchmarks/reports/"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        _make_model(root / "model")
        urls = [
            stack.enter_context(replica_process(settings, root / f"{index}.log", _MODULE))
            for index, settings in enumerate(_settings(root, max(arguments.replicas)))
        ]
        incarnations = itertools.count(1)  # each fleet supersedes the policies of the last one
        measured = [
            asyncio.run(_measure(root / "model", urls[:count], arguments, incarnations))
            for count in arguments.replicas
        ]
    _report(arguments, measured).publish(keep=arguments.report)


def _settings(root: Path, count: int) -> Iterator[RolloutSettings]:
    for _ in range(count):
        yield RolloutSettings(
            model=str(root / "model"),
            base="original",
            cache_dir=root,
            port=free_port(),
            max_lora_rank=512,
            drain_delay_s=0.0,
        )


def _make_model(path: Path) -> None:
    from examples.demo import model as demo

    demo.save(demo.make_model(seed=0), path)


async def _measure(
    model: Path, urls: Sequence[str], arguments: argparse.Namespace, incarnations: Iterator[int]
) -> Measured:
    transports: list[CountingTransport] = []

    def connect(url: str) -> RolloutClient:
        transports.append(CountingTransport())
        return RolloutClient(url, transport=transports[-1])

    def num_bytes_sent() -> int:
        return sum(transport.num_bytes for transport in transports)

    fleet = Fleet(urls, connect=connect)
    fleet.start()
    sync_s, sync_bytes = {}, {}
    try:
        for rank in arguments.ranks:
            run = PolicyId(run_id="benchmark", incarnation=next(incarnations), version=0)
            base = base_identity(model, None)
            requirements = Requirements(
                run=run,
                base=base,
                lora_rank=rank,
                num_context_tokens=len(_PROMPT) + _NUM_TOKENS,
                may_replace_run=lambda _: True,
                min_ready_replicas=len(urls),
            )
            await fleet.begin(requirements, timeout_s=_TIMEOUT_S)
            seconds, sent = [], []
            for version in range(1, arguments.syncs + 2):
                policy = run.model_copy(update={"version": version})
                adapter = _adapter(model, base, policy, rank)
                bytes_before, started = num_bytes_sent(), time.perf_counter()
                await fleet.sync(adapter, timeout_s=_TIMEOUT_S)
                seconds.append(time.perf_counter() - started)
                sent.append(num_bytes_sent() - bytes_before)
            size = len(adapter.content)
            sync_s[size] = statistics.median(seconds[1:])  # the first sync is a warm-up
            sync_bytes[size] = round(statistics.median(sent[1:]))
        num_groups = NUM_SLOTS * len(urls) * _NUM_ROUNDS
        await fleet.generate(_requests(len(urls), policy), timeout_s=_TIMEOUT_S)
        started, cpu_started = time.perf_counter(), time.process_time()
        groups = await fleet.generate(_requests(num_groups, policy), timeout_s=_TIMEOUT_S)
        wall_s = time.perf_counter() - started
        trainer_cpu_s = time.process_time() - cpu_started
        assert len(groups) == num_groups
    finally:
        await fleet.aclose()
    return Measured(len(urls), num_groups, wall_s, trainer_cpu_s, sync_s, sync_bytes)


def _requests(count: int, policy: PolicyId) -> list[GenerateRequest]:
    sampling = SamplingParams(
        n=_NUM_COMPLETIONS, max_tokens=_NUM_TOKENS, ignore_eos=True, detokenize=False
    )
    return [
        GenerateRequest(prompts=(_PROMPT,), sampling=sampling, policy=policy, purpose="train")
        for _ in range(count)
    ]


def _adapter(model: Path, base: BaseIdentity, policy: PolicyId, rank: int) -> PublishedAdapter:
    import torch
    from safetensors.torch import save

    manifest = AdapterManifest(
        policy=policy, base=base, rank=rank, scaling=1.0, target_modules=LINEAR_MODULES
    )
    tensors = {
        name: torch.full(shape, 0.01 * policy.version, dtype=torch.bfloat16)
        for name, shape in expected_shapes(manifest, linear_shapes(model)).items()
    }
    content = save(tensors, metadata=manifest_metadata(manifest))
    digest = content_digest(hashlib.sha256(content).digest())
    return PublishedAdapter(manifest=manifest, content=content, content_digest=digest)


def _report(arguments: argparse.Namespace, measured: Sequence[Measured]) -> Report:
    sizes = sorted(measured[0].sync_s)
    first, last = measured[0], measured[-1]
    growth = last.num_replicas / first.num_replicas
    conclusions = [
        f"{last.num_replicas} replicas: {last.overhead_ms:.1f} ms per group beyond the ideal and "
        f"{1000 * last.trainer_cpu_s / last.num_groups:.1f} ms of the trainer's CPU."
    ]
    for size in sizes:
        conclusions.append(
            f"{_megabytes(size)}: {last.sync_bytes[size] / first.sync_bytes[size]:.2f} × the bytes "
            f"and {last.sync_s[size] / first.sync_s[size]:.2f} × the time for {growth:g} × the "
            "replicas."
        )
    conclusions.append(
        "Two cores send, receive, hash and check everything: they are the bottleneck."
    )
    return Report(
        name="fleet",
        title="What more replicas cost the trainer",
        setting=(
            "Simulated replicas, one process each, behind real HTTP on loopback; two cores for all "
            f"of them and the fleet. An engine runs {NUM_SLOTS} requests at once, "
            f"{SECONDS_PER_REQUEST:g} s each, streaming {_NUM_COMPLETIONS} × {_NUM_TOKENS} tokens; "
            f"{_NUM_ROUNDS} rounds of groups are sent at once; a load takes {LOAD_S:g} s. Sync: "
            f"until every replica serves the version, median of {arguments.syncs}; bytes count all "
            "request bodies."
        ),
        header=(
            "replicas",
            "groups",
            "wall time",
            "ideal",
            "over it, per group",
            "trainer CPU per group",
            *(f"sync of {_megabytes(size)}" for size in sizes),
            *(f"sent for {_megabytes(size)}" for size in sizes),
        ),
        rows=[
            (
                str(item.num_replicas),
                str(item.num_groups),
                f"{item.wall_s:.2f} s",
                f"{item.ideal_s:.2f} s",
                f"{item.overhead_ms:.2f} ms",
                f"{1000 * item.trainer_cpu_s / item.num_groups:.2f} ms",
                *(f"{1000 * item.sync_s[size]:.0f} ms" for size in sizes),
                *(f"{item.sync_bytes[size] / 1e6:.2f} MB" for size in sizes),
            )
            for item in measured
        ],
        conclusion=" ".join(conclusions),
        plot=lambda path: _plot(measured, path),
    )


def _plot(measured: Sequence[Measured], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = [item.num_replicas for item in measured]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.8), dpi=120)
    left.plot(counts, [item.num_groups / item.wall_s for item in measured], "o-", label="measured")
    left.plot(counts, [item.num_groups / item.ideal_s for item in measured], "--", label="ideal")
    left.set_title("groups per second")
    for size in measured[0].sync_s:
        label = _megabytes(size)
        middle.plot(counts, [1000 * item.sync_s[size] for item in measured], "o-", label=label)
        right.plot(counts, [item.sync_bytes[size] / 1e6 for item in measured], "o-", label=label)
    middle.set_title("sync until every replica serves it, ms")
    right.set_title("bytes sent per sync, MB")
    right.set_yscale("log")
    for axes in (left, middle, right):
        axes.set(xlabel="replicas", xticks=counts)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    left.set_ylim(bottom=0)
    middle.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
