"""From `policy.publish()` to the first token of the new version, against vLLM's own add_lora.

    this process            policy (4-bit base) ─publish─▶ HTTP ─┐
    child: the service                                           ├─▶ the same engine
                            file in shared memory ─▶ add_lora ───┘
    child: the load         256 completions that run meanwhile; some are watched token by token

Both sides use the same engine. Tandem's adapter arrives over HTTP and is verified; the peer loads
the same file by path from local shared memory, without any check. Each then samples one token under
the adapter. With --replicas, one version goes to several services at once, all on one device.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from benchmarks import engines
from benchmarks.checkpoints import SHAPES, work_folder, write_checkpoint
from benchmarks.child import Child, ChildError
from benchmarks.engines import GIB, say
from benchmarks.load import Arrivals, Load, build_load
from benchmarks.report import Report
from services.boot import settle_memory
from services.rollout.replica import Replica
from services.rollout.settings import RolloutSettings
from shared.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, peft_config
from shared.errors import ServiceError
from shared.rollout_client import RolloutClient
from shared.schemas import AdapterManifest, GenerateRequest, PolicyId, SamplingParams, SyncReceipt

if TYPE_CHECKING:  # imports torch, which child processes must not inherit from this module
    from services.trainer.learner.learner import Learner
    from services.trainer.policy.adapter import PublishedAdapter

MAX_IDLE_RATIO = 1.5
MAX_LOADED_S = 0.300
MAX_GAP_S = 0.030
MAX_DIP = 0.02
MAX_FLEET_S = 0.5
_PROMPT = (1, 15, 5, 8, 4, 3, 7, 14)
_SHARED_MEMORY = "/dev/shm"
_ONE_TOKEN = SamplingParams(max_tokens=1, detokenize=False)
_WINDOW_S = 1.0  # seconds around a sync, and before and after them for comparison
_IDLE_PAUSE_S = 0.2
_LOADED_PAUSE_S = 2 * _WINDOW_S  # keeps the windows for comparison free of other syncs
_FIRST_PEER = 1000  # id of the peer's first adapter, above all ids of the service
_NUM_WARM_UP = 3  # rounds until the policy reuses the memory of adapters that it has dropped
_GPU_SHARE = 0.1  # share that must be free at an engine's start; --kv-cache-gib sets the KV cache


@dataclass(frozen=True, slots=True)
class Case:
    label: str
    shape: str
    rank: int


CASES = (Case("0.5 MB", "tiny", 13), Case("40 MB", "mid", 32), Case("160 MB", "mid", 128))


@dataclass(frozen=True, slots=True)
class Span:
    """Start and end of an event, by time.perf_counter."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def window(self) -> Span:
        """The second around the middle of the span, or the span itself if it is longer."""
        middle, half = (self.start + self.end) / 2, max(_WINDOW_S, self.seconds) / 2
        return Span(middle - half, middle + half)


@dataclass(frozen=True, slots=True)
class Sync:
    """Duration of one sync and of its parts, in seconds."""

    span: Span
    export_s: float
    transfer_s: float
    verify_s: float
    load_s: float
    first_token_s: float
    num_bytes: int

    @property
    def total_s(self) -> float:
        return self.span.seconds


@dataclass(frozen=True, slots=True)
class Disturbance:
    """How an event disturbed running completions."""

    gap_s: float  # longest gap between two tokens of a completion, during and shortly after it
    usual_gap_s: float  # longest gap in the seconds before and after
    dip: float  # relative drop of tokens/s around the event, from the seconds before and after

    @classmethod
    def of(cls, span: Span, arrivals: Arrivals) -> Disturbance:
        window = span.window
        before = Span(window.start - _WINDOW_S, window.start)
        after = Span(window.end, window.end + _WINDOW_S)
        usual = statistics.fmean(arrivals.tokens_per_s(s.start, s.end) for s in (before, after))
        return cls(
            gap_s=arrivals.longest_gap_s(span.start, window.end),
            usual_gap_s=max(arrivals.longest_gap_s(s.start, s.end) for s in (before, after)),
            dip=1 - arrivals.tokens_per_s(window.start, window.end) / usual,
        )


@dataclass(frozen=True, slots=True)
class Round:
    """A sync and its peer, in an idle replica or (`felt`) under load."""

    sync: Sync
    add_lora: Span  # span of the peer's sync, up to its first token
    felt: Disturbance | None = None
    felt_of_peer: Disturbance | None = None

    def under(self, load: Arrivals) -> Round:
        return replace(
            self,
            felt=Disturbance.of(self.sync.span, load),
            felt_of_peer=Disturbance.of(self.add_lora, load),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    engines.add_arguments(parser, tuple(SHAPES))
    parser.set_defaults(shape=None)
    parser.add_argument(
        "--rank", type=int, action="append", help="adapter rank, with --shape (default: 16)"
    )
    parser.add_argument(
        "--only",
        choices=[case.label for case in CASES],
        action="append",
        help="cases to measure, without --shape (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument(
        "--load", type=int, default=0, help="running completions in a second series of rounds"
    )
    parser.add_argument("--load-prompt", type=int, default=128)
    parser.add_argument("--load-tokens", type=int, default=768, help="per completion of the load")
    parser.add_argument("--replicas", type=int, default=1, help="above 1: sync to all at once")
    parser.add_argument("--kv-cache-gib", type=float, default=17.0, help="per replica, on CUDA")
    arguments = parser.parse_args()
    cases = [case for case in CASES if not arguments.only or case.label in arguments.only]
    if arguments.shape:
        ranks = arguments.rank or [16]
        cases = [Case(f"{arguments.shape}, rank {r}", arguments.shape, r) for r in ranks]
    with work_folder() as folder:
        benchmark = _Benchmark(arguments, folder)
        report = (benchmark.fleet if arguments.replicas > 1 else benchmark.one)(cases)
    report.publish(keep=arguments.report)


class _Benchmark:
    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._learners: dict[str, Learner] = {}
        self._peers = itertools.count(_FIRST_PEER)

    # --- one replica ----------------------------------------------------------------------------

    def one(self, cases: Sequence[Case]) -> Report:
        """Measure one replica per case; on a GPU all boot concurrently, on a CPU one at a time."""
        rows: list[Sequence[str]] = []
        verdicts: list[str] = []
        waves = [list(cases)] if self._arguments.device == "cuda" else [[case] for case in cases]
        for wave in waves:
            with ExitStack() as stack:
                services = [self._start(stack, case, case.label) for case in wave]
                for case, (settings, service) in zip(wave, services, strict=True):
                    try:
                        learner = self._learner(case)
                        say(f"{case.label}: ready after {service.wait_until_ready():.0f} s")
                        idle = uvloop.run(self._rounds(case, learner, settings, service))
                        rows.append(_row(case, "idle", idle))
                        verdicts.append(_idle_verdict(case, idle))
                        if self._arguments.load:
                            loaded = uvloop.run(
                                self._loaded_rounds(case, learner, settings, service)
                            )
                            rows.append(_row(case, f"{self._arguments.load} running", loaded))
                            verdicts.append(_loaded_verdict(case, loaded))
                    except (ChildError, ServiceError) as error:  # other cases can still be measured
                        say(f"{case.label} is cut short: {error}")
        variant = f"{self._arguments.device}-{cases[0].shape}" if self._arguments.shape else ""
        return Report(
            name="sync",
            variant=variant,
            title="From publish to the first token of the new version",
            setting=(
                f"One replica on loopback. Milliseconds, medians of {self._arguments.rounds} "
                "versions after a warm-up; transfer is the HTTP call without verify and load; "
                "add_lora loads the same file from shared memory in the same engine. A gap is the "
                "longest pause between two tokens of a running completion; usual gaps are from the "
                "seconds before and after. The dip is the relative drop of tokens/s in the second "
                "around the sync. Models are Qwen3 with random weights: "
                f"{', '.join(dict.fromkeys(case.shape for case in cases))}."
            ),
            header=(
                "adapter",
                "bytes",
                "replica",
                "export",
                "transfer",
                "verify",
                "load",
                "first token",
                "total",
                "add_lora + first token",
                "ratio",
                "gap",
                "gap of add_lora",
                "usual gap",
                "dip",
                "dip of add_lora",
            ),
            rows=rows,
            conclusion=f"Ratio: total over add_lora with its first token. {' '.join(verdicts)}",
        )

    async def _rounds(
        self, case: Case, learner: Learner, settings: RolloutSettings, service: Child[Replica]
    ) -> list[Round]:
        """Measure in an idle replica."""
        rounds: list[Round] = []
        async with RolloutClient(_url(settings)) as client:
            for _ in range(_NUM_WARM_UP + self._arguments.rounds):
                _train(learner)
                peer = next(self._peers)
                rounds.append(await _round(learner, client, service, peer, _IDLE_PAUSE_S))
                _say(case, rounds[-1])
        return rounds[_NUM_WARM_UP:]

    async def _loaded_rounds(
        self, case: Case, learner: Learner, settings: RolloutSettings, service: Child[Replica]
    ) -> list[Round]:
        """Measure under load, which restarts in every round and settles before the measurement."""
        rounds: list[Round] = []
        async with RolloutClient(_url(settings)) as client:
            with self._load(settings) as load:
                load.wait_until_ready()
                for _ in range(1 + self._arguments.rounds):
                    _train(learner)
                    await asyncio.to_thread(load.run, Load.start)
                    await asyncio.sleep(_LOADED_PAUSE_S)
                    peer = next(self._peers)
                    measured = await _round(learner, client, service, peer, _LOADED_PAUSE_S)
                    arrivals = await asyncio.to_thread(load.run, Load.stop)
                    rounds.append(measured.under(arrivals))
                    _say(case, rounds[-1])
        return rounds[1:]

    # --- several replicas -----------------------------------------------------------------------

    def fleet(self, cases: Sequence[Case]) -> Report:
        """Measure a sync to all replicas at once and, in turn, to only one of them."""
        number = self._arguments.replicas
        rows, verdicts = [], []
        for case in cases:
            with ExitStack() as stack:
                first = self._start(stack, case, "replica-1")
                learner = self._learner(case)
                say(f"replica-1: ready after {first[1].wait_until_ready():.0f} s")
                # The others start later, to find the kernels that the first has compiled.
                others = [self._start(stack, case, f"replica-{i}") for i in range(2, number + 1)]
                for _, service in others:
                    say(f"{service.name}: ready after {service.wait_until_ready():.0f} s")
                urls = [_url(settings) for settings, _ in (first, *others)]
                alone, together = uvloop.run(self._fleet_rounds(learner, urls))
            rows += [_fleet_row(case, 1, alone), _fleet_row(case, number, together)]
            total = statistics.median(sync.total_s for sync in together)
            verdicts.append(
                f"{case.label}: {number} replicas in {total:.3f} s "
                f"(target at most {MAX_FLEET_S:g} s)."
            )
        return Report(
            name="sync",
            variant=f"{self._arguments.device}-{cases[0].shape}-replicas",
            title="One version to several replicas",
            setting=(
                f"{number} replicas on loopback, idle, all on one device; milliseconds, medians of "
                f"{self._arguments.rounds} versions after a warm-up, which go in turn to one "
                "replica and to all. The total is from before publish() until every replica has "
                "answered with its first token of the new version; the parts are the longest of "
                "any replica."
            ),
            header=(
                "adapter",
                "bytes",
                "replicas",
                "export",
                "transfer",
                "verify",
                "load",
                "first token",
                "total",
            ),
            rows=rows,
            conclusion=" ".join(verdicts),
        )

    async def _fleet_rounds(
        self, learner: Learner, urls: Sequence[str]
    ) -> tuple[list[Sync], list[Sync]]:
        alone: list[Sync] = []
        together: list[Sync] = []
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(RolloutClient(url)) for url in urls]
            for _ in range(_NUM_WARM_UP + self._arguments.rounds):
                for syncs, receivers in ((alone, clients[:1]), (together, clients)):
                    _train(learner)
                    sync, _ = await _sync(learner, receivers)
                    syncs.append(sync)
                    say(f"{len(receivers)} replica(s): {1000 * sync.total_s:.0f} ms")
                    await asyncio.sleep(_IDLE_PAUSE_S)
        return alone[_NUM_WARM_UP:], together[_NUM_WARM_UP:]

    # --- what takes part ------------------------------------------------------------------------

    def _start(
        self, stack: ExitStack, case: Case, name: str
    ) -> tuple[RolloutSettings, Child[Replica]]:
        given, model = self._arguments, self._model(case)
        on_cuda = {
            "kv_cache_memory_bytes": int(given.kv_cache_gib * GIB),
            "gpu_memory_utilization": _GPU_SHARE,
        }
        settings = engines.replica_settings(
            given,
            model,
            max_lora_rank=case.rank,
            max_model_len=given.load_prompt + given.load_tokens,
            max_num_seqs=max(8, given.load + 1),  # leaves a place free for the first token
            stream_interval=1,
            **(on_cuda if given.device == "cuda" else {}),
        )
        log = self._folder / f"{name.replace(' ', '-')}.log"
        return settings, stack.enter_context(Child(name, log, {}, engines.service, settings))

    def _load(self, settings: RolloutSettings) -> Child[Load]:
        given, model = self._arguments, Path(settings.model)
        return Child(
            "load",
            self._folder / "load.log",
            {},
            build_load,
            _url(settings),
            concurrency=given.load,
            prompt=given.load_prompt,
            completion=given.load_tokens,
            vocabulary=SHAPES[model.name].vocabulary,
        )

    def _model(self, case: Case) -> Path:
        model = self._folder / case.shape
        if not model.exists():
            write_checkpoint(case.shape, model, device=self._arguments.device)
        return model

    def _learner(self, case: Case) -> Learner:
        """A learner at version 0 of a run with an adapter of the case's rank."""
        from services.trainer.learner.learner import Learner
        from services.trainer.policy.policy import Policy
        from services.trainer.run_config import LoraConfig, OptimizerConfig

        if case.shape not in self._learners:
            policy = Policy.load(
                str(self._model(case)), device=self._arguments.device, gradient_checkpointing=False
            )
            self._learners[case.shape] = Learner(policy)
        learner = self._learners[case.shape]
        learner.start(
            PolicyId(run_id="benchmark", version=0),
            LoraConfig(rank=case.rank, alpha=case.rank),
            OptimizerConfig(),
            seed=0,
        )
        settle_memory()  # the trainer does the same
        return learner


def _url(settings: RolloutSettings) -> str:
    return f"http://{settings.host}:{settings.port}"


# --- a round ------------------------------------------------------------------------------------


def _train(learner: Learner) -> None:
    """Update the policy, which makes the next version."""
    from services.trainer.policy.samples import Sample
    from services.trainer.run_config import ReinforceConfig

    sample = Sample(
        prompt_token_ids=_PROMPT,
        token_ids=(4, 5),
        sampler_logprobs=(),
        staleness=(0, 0),
        temperature=1.0,
        group=0,
        rewards=(1.0,),
        is_truncated=False,
    )
    (logprobs,) = learner.policy.sample_logprobs([sample])
    learner.update(
        [replace(sample, sampler_logprobs=tuple(logprobs))],
        ReinforceConfig(whiten_advantages=False),
        max_tokens_per_micro_batch=64,
    )


async def _round(
    learner: Learner, client: RolloutClient, service: Child[Replica], peer: int, pause_s: float
) -> Round:
    sync, adapter = await _sync(learner, [client])
    await asyncio.sleep(pause_s)
    add_lora = await asyncio.to_thread(
        service.run, _add_lora, bytes(adapter.content), adapter.manifest, peer
    )
    await asyncio.sleep(pause_s)
    return Round(sync, add_lora)


async def _sync(
    learner: Learner, clients: Sequence[RolloutClient]
) -> tuple[Sync, PublishedAdapter]:
    """Publish to all clients at once; each part is the longest of any replica."""
    start = time.perf_counter()
    adapter = learner.policy.publish()
    exported = time.perf_counter()

    async def push(client: RolloutClient) -> tuple[SyncReceipt, float, float]:
        receipt = await client.sync_weights(adapter.content, digest=adapter.content_digest)
        synced = time.perf_counter()
        await client.generate(
            GenerateRequest(prompts=(_PROMPT,), sampling=_ONE_TOKEN, policy=adapter.policy)
        )
        return receipt, synced - exported, time.perf_counter() - synced

    pushed = await asyncio.gather(*map(push, clients))
    end = time.perf_counter()
    sync = Sync(
        span=Span(start, end),
        export_s=exported - start,
        transfer_s=max(took - r.verify_s - r.load_s for r, took, _ in pushed),
        verify_s=max(receipt.verify_s for receipt, _, _ in pushed),
        load_s=max(receipt.load_s for receipt, _, _ in pushed),
        first_token_s=max(first_token_s for _, _, first_token_s in pushed),
        num_bytes=len(adapter.content),
    )
    return sync, adapter


async def _add_lora(
    replica: Replica, content: bytes, manifest: AdapterManifest, number: int
) -> Span:
    """The peer's sync, up to its first token: loads a file in shared memory without any check."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.inputs import tokens_input

    engine = replica.serving.engine.async_llm  # type: ignore[attr-defined]
    params = VllmSamplingParams(max_tokens=1, logprobs=0, detokenize=False)
    with tempfile.TemporaryDirectory(dir=_SHARED_MEMORY) as folder:
        path = Path(folder)
        (path / ADAPTER_WEIGHTS).write_bytes(content)
        (path / ADAPTER_CONFIG).write_text(json.dumps(peft_config(manifest, "")))
        request = engines.lora_request(f"peer-{number}", number, path)
        start = time.perf_counter()
        await engine.add_lora(request)
        async for _ in engine.generate(
            tokens_input(list(_PROMPT)), params, request_id=f"peer-{number}", lora_request=request
        ):
            pass
        end = time.perf_counter()
        await engine.remove_lora(number)
    return Span(start, end)


# --- the report ---------------------------------------------------------------------------------


def _say(case: Case, measured: Round) -> None:
    text = (
        f"{case.label}: total {1000 * measured.sync.total_s:.0f} ms, "
        f"add_lora {1000 * measured.add_lora.seconds:.0f} ms"
    )
    if measured.felt and measured.felt_of_peer:
        text += (
            f", gap {1000 * measured.felt.gap_s:.0f} and {1000 * measured.felt_of_peer.gap_s:.0f} "
            f"ms (usually {1000 * measured.felt.usual_gap_s:.0f}), dip {measured.felt.dip:.1%} and "
            f"{measured.felt_of_peer.dip:.1%}"
        )
    say(text)


def _milliseconds(values: Iterable[float]) -> str:
    return f"{1000 * statistics.median(values):.1f}"


def _parts(syncs: Sequence[Sync]) -> list[str]:
    names = ("export_s", "transfer_s", "verify_s", "load_s", "first_token_s", "total_s")
    return [_milliseconds(getattr(sync, name) for sync in syncs) for name in names]


def _row(case: Case, replica: str, rounds: Sequence[Round]) -> Sequence[str]:
    syncs = [measured.sync for measured in rounds]
    felt = [measured.felt for measured in rounds if measured.felt]
    felt_of_peer = [measured.felt_of_peer for measured in rounds if measured.felt_of_peer]
    disturbance = ["–"] * 5
    if felt:
        disturbance = [
            _milliseconds(item.gap_s for item in felt),
            _milliseconds(item.gap_s for item in felt_of_peer),
            _milliseconds(item.usual_gap_s for item in felt),
            f"{statistics.median(item.dip for item in felt):.1%}",
            f"{statistics.median(item.dip for item in felt_of_peer):.1%}",
        ]
    return (
        case.label,
        f"{syncs[0].num_bytes:,}",
        replica,
        *_parts(syncs),
        _milliseconds(measured.add_lora.seconds for measured in rounds),
        f"{_ratio(rounds):.2f}",
        *disturbance,
    )


def _fleet_row(case: Case, num_replicas: int, syncs: Sequence[Sync]) -> Sequence[str]:
    return (case.label, f"{syncs[0].num_bytes:,}", str(num_replicas), *_parts(syncs))


def _ratio(rounds: Sequence[Round]) -> float:
    own = statistics.median(measured.sync.total_s for measured in rounds)
    return own / statistics.median(measured.add_lora.seconds for measured in rounds)


def _idle_verdict(case: Case, rounds: Sequence[Round]) -> str:
    return f"{case.label}: idle {_ratio(rounds):.2f} × (target at most {MAX_IDLE_RATIO:g})."


def _loaded_verdict(case: Case, rounds: Sequence[Round]) -> str:
    felt = [measured.felt for measured in rounds if measured.felt]
    total = statistics.median(measured.sync.total_s for measured in rounds)
    gap = statistics.median(item.gap_s for item in felt)
    return (
        f"{case.label}, under load: {1000 * total:.0f} ms (at most {1000 * MAX_LOADED_S:.0f}), "
        f"gap {1000 * gap:.0f} ms, at worst {1000 * max(item.gap_s for item in felt):.0f} (at most "
        f"{1000 * MAX_GAP_S:.0f}), dip {statistics.median(item.dip for item in felt):.1%} (at most "
        f"{MAX_DIP:.0%})."
    )


if __name__ == "__main__":
    main()
