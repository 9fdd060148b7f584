"""Generated tokens/s of one replica (over HTTP, under an adapter, merged) against a bare engine.

Every engine runs in its own child process (child.py), with a KV cache of the same size. The engines
of a wave boot concurrently; then all sides take turns, one at a time. This process is the client of
the HTTP sides. The bare engine, vLLM's AsyncLLM without LoRA, is measured in every wave, so that
each ratio compares sides of the same wave. No prompt is used twice, so prefix caches never help.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import engines
from benchmarks.checkpoints import SHAPES, random_adapter, work_folder, write_checkpoint
from benchmarks.child import Child, ChildError
from benchmarks.engines import GIB, Workload, say
from benchmarks.report import Report
from services.boot import settle_memory
from services.rollout.settings import RolloutSettings
from shared.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, peft_config
from shared.model_folder import base_identity, linear_shapes
from shared.rollout_client import RolloutClient
from shared.schemas import BASE_POLICY, GenerateRequest, PolicyId, SamplingParams

MIN_HTTP_RATIO = 0.97
MIN_LORA_RATIO = 0.90
_BASE = "base engine, in-process"
_POLICY = PolicyId(run_id="benchmark", version=1)
_GPU_SHARE = 0.25  # share that must be free at an engine's start; --kv-cache-gib sets the KV cache
_MODES = ("lora", "merged")  # serving modes of the service
# vLLM settings that may change the cost of LoRA: name -> (engine options, environment).
_VARIANTS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]] = {
    "as-served": ({}, {}),
    "all-modules": ({"lora_target_modules": None}, {}),  # includes the head
    "specialized": ({"specialize_active_lora": True}, {}),
    "dual-stream": ({}, {"VLLM_LORA_ENABLE_DUAL_STREAM": "1"}),
    "specialized-dual-stream": (
        {"specialize_active_lora": True},
        {"VLLM_LORA_ENABLE_DUAL_STREAM": "1"},
    ),
    "2-slots": ({"max_loras": 2, "max_cpu_loras": 2}, {}),
    "1-slot": ({"max_loras": 1, "max_cpu_loras": 1}, {}),
    "rank-32": ({"max_lora_rank": 32}, {}),
}


@dataclass(frozen=True, slots=True)
class Side:
    name: str
    measure: Callable[[Workload], float]  # returns tokens/s


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens/s of a side, one per round, and of the bare engine in the same wave."""

    name: str
    own: Sequence[float]
    base: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.own)

    @property
    def of_base(self) -> float:
        return self.median / statistics.median(self.base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    engines.add_arguments(parser, tuple(SHAPES))
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--requests", type=int, help="requests per round (default: --concurrency)")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    parser.add_argument("--rounds", type=int, default=3, help="rounds after a warm-up")
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=(*_MODES, *_VARIANTS),
        default=list(_MODES),
        help="engines to measure: modes of the service, or bare engines with a LoRA setting",
    )
    parser.add_argument(
        "--variants", action="store_true", help="compare bare engines with each LoRA setting"
    )
    parser.add_argument(
        "--at-once", type=int, default=1, help="engines per wave, not counting the bare one"
    )
    parser.add_argument("--kv-cache-gib", type=float, default=12.0, help="per engine, on CUDA")
    arguments = parser.parse_args()
    if arguments.variants:
        arguments.engines = list(_VARIANTS)
    with work_folder() as folder:
        rates = _Benchmark(arguments, folder).measure()
    _report(arguments, rates).publish(keep=arguments.report)


class _Benchmark:
    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._model = folder / "model"
        self._workload = _workload(arguments)
        self._seeds = itertools.count(1)
        write_checkpoint(arguments.shape, self._model, device=arguments.device)
        manifest, self._adapter = random_adapter(
            base_identity(self._model, None),
            linear_shapes(self._model),
            _POLICY,
            rank=arguments.rank,
        )
        self._adapter_folder = folder / "adapter"  # used by engines without a service
        self._adapter_folder.mkdir()
        (self._adapter_folder / ADAPTER_WEIGHTS).write_bytes(self._adapter)
        config = json.dumps(peft_config(manifest, str(self._model)))
        (self._adapter_folder / ADAPTER_CONFIG).write_text(config)

    def measure(self) -> list[Rates]:
        names, at_once = self._arguments.engines, self._arguments.at_once
        settings = self._settings()
        with self._child(_BASE, {}, engines.bare_engine, settings, {}) as base:
            waves = [names[start : start + at_once] for start in range(0, len(names), at_once)]
            return [rates for wave in waves for rates in self._wave(base, wave)]

    def _wave(self, base: Child[Any], names: Sequence[str]) -> list[Rates]:
        """Boot these engines, measure all sides in turns, and stop the engines."""
        with ExitStack() as stack:
            booting = [self._start(stack, name) for name in names]
            base.wait_until_ready()
            sides = [Side(_BASE, lambda work: base.run(engines.in_process, work))]
            for child, make_sides in booting:
                try:
                    say(f"{child.name}: ready after {child.wait_until_ready():.0f} s")
                    sides += make_sides()
                except ChildError as error:  # other engines can still be measured
                    say(f"left out: {error}")
            settle_memory()  # the trainer, a similar client, does the same
            return self._take_turns(sides)

    def _take_turns(self, sides: Sequence[Side]) -> list[Rates]:
        rates: dict[str, list[float]] = {side.name: [] for side in sides}
        for number in range(1 + self._arguments.rounds):
            for side in sides:
                rate = side.measure(replace(self._workload, seed=next(self._seeds)))
                say(f"round {number}, {side.name}: {rate:,.0f} tokens/s")
                if number:  # the first round is a warm-up
                    rates[side.name].append(rate)
        return [Rates(name, own, rates[_BASE]) for name, own in rates.items()]

    # --- engines --------------------------------------------------------------------------------

    def _start(
        self, stack: ExitStack, name: str
    ) -> tuple[Child[Any], Callable[[], Sequence[Side]]]:
        """Start an engine; returns it with a function that makes its sides once it is ready."""
        if name in _MODES:
            settings = self._settings(serving_mode=name)
            service = stack.enter_context(self._child(name, {}, engines.service, settings))
            url = f"http://{settings.host}:{settings.port}"
            return service, lambda: self._service_sides(name, service, url)
        options, environment = _VARIANTS[name]
        settings = self._settings()
        options = {**engines.lora_options(settings), **options}
        child = stack.enter_context(
            self._child(name, environment, engines.bare_engine, settings, options)
        )
        return child, lambda: self._variant_sides(name, child)

    def _child(
        self, name: str, environment: Mapping[str, str], build: Any, *arguments: Any
    ) -> Child[Any]:
        log = self._folder / f"{name.replace(' ', '-')}.log"
        return Child(name, log, environment, build, *arguments)

    def _settings(self, **others: Any) -> RolloutSettings:
        given = self._arguments
        on_cuda = {
            "kv_cache_memory_bytes": int(given.kv_cache_gib * GIB),
            "gpu_memory_utilization": _GPU_SHARE,
        }
        return engines.replica_settings(
            given,
            self._model,
            max_model_len=given.prompt + given.tokens,
            max_num_seqs=given.concurrency,
            max_lora_rank=given.rank,
            **(on_cuda if given.device == "cuda" else {}),
            **others,
        )

    # --- sides ----------------------------------------------------------------------------------

    def _service_sides(self, mode: str, service: Child[Any], url: str) -> list[Side]:
        uvloop.run(self._install(url))

        def in_service(name: str, policy: PolicyId) -> Side:
            return Side(name, lambda work: service.run(engines.in_service, work, policy))

        def over_http(name: str, policy: PolicyId, stream: bool = False) -> Side:
            return Side(
                name, lambda work: uvloop.run(engines.over_http(url, work, policy, stream=stream))
            )

        sides = [
            in_service(f"{mode}, adapter, in-process", _POLICY),
            over_http(f"{mode}, adapter, HTTP", _POLICY),
        ]
        if mode == "lora":
            sides += [
                over_http("lora, adapter, HTTP, streamed", _POLICY, stream=True),
                in_service("lora, no adapter, in-process", BASE_POLICY),
                over_http("lora, no adapter, HTTP", BASE_POLICY),
            ]
        return sides

    async def _install(self, url: str) -> None:
        """Make the adapter the newest version and use it once, because the first use merges it."""
        sampling = SamplingParams(max_tokens=1, detokenize=False)
        async with RolloutClient(url) as client:
            await client.sync_weights(self._adapter, in_flight="continue")
            await client.generate(
                GenerateRequest(prompts=((3, 4, 5),), sampling=sampling, policy=_POLICY)
            )

    def _variant_sides(self, name: str, child: Child[Any]) -> list[Side]:
        folder = self._adapter_folder
        return [
            Side(
                f"LoRA {name}, adapter, in-process",
                lambda work: child.run(_under_adapter, work, folder),
            ),
            Side(
                f"LoRA {name}, no adapter, in-process",
                lambda work: child.run(engines.in_process, work),
            ),
        ]


async def _under_adapter(engine: Any, workload: Workload, folder: Path) -> float:
    request = engines.lora_request("benchmark", 1, folder)
    await engine.add_lora(request)  # does nothing if it is already loaded
    return await engines.in_process(engine, workload, request)


def _workload(arguments: argparse.Namespace) -> Workload:
    return Workload(
        num_requests=arguments.requests or arguments.concurrency,
        concurrency=arguments.concurrency,
        prompt=arguments.prompt,
        completion=arguments.tokens,
        vocabulary=SHAPES[arguments.shape].vocabulary,
    )


# --- the report ---------------------------------------------------------------------------------


def _report(arguments: argparse.Namespace, rates: Sequence[Rates]) -> Report:
    only_variants = not set(arguments.engines) & set(_MODES)
    return Report(
        name="serving",
        title="Generated tokens/s of one replica against the bare engine",
        variant=f"{arguments.device}-{arguments.shape}{'-variants' if only_variants else ''}",
        setting=(
            f"Qwen3 shape {arguments.shape}, random weights in 16 bits, adapter of rank "
            f"{arguments.rank} on all linears; {_workload(arguments)}, "
            f"{arguments.concurrency} at a time, temperature 1, with the sampled tokens' logprobs; "
            f"median of {arguments.rounds} rounds in which the sides alternate, after a warm-up "
            "round. The base engine is vLLM's AsyncLLM without LoRA, measured with each engine."
        ),
        header=("side", "median tokens/s", "lowest", "highest", "of the base engine"),
        rows=[
            (
                item.name,
                f"{item.median:,.0f}",
                f"{min(item.own):,.0f}",
                f"{max(item.own):,.0f}",
                f"{item.of_base:.3f}",
            )
            for item in rates
        ],
        conclusion=" ".join(_ratios({item.name: item for item in rates})),
    )


def _ratios(rates: Mapping[str, Rates]) -> list[str]:
    """Sentences that compare two sides, if both were measured."""
    sentences = []
    for mode in _MODES:
        adapter = f"{mode}, adapter"
        inside = rates.get(f"{adapter}, in-process")
        if inside is None:
            continue
        target = f" (target at least {MIN_LORA_RATIO:.2f})" if mode == "lora" else ""
        sentence = f"Under an adapter, {mode}: {inside.of_base:.3f} of the base engine{target}"
        http = rates[f"{adapter}, HTTP"].median / inside.median
        sentence += f"; HTTP {http:.3f} of in-process (target at least {MIN_HTTP_RATIO})"
        if streamed := rates.get(f"{adapter}, HTTP, streamed"):
            sentence += f", streamed {streamed.median / inside.median:.3f}"
        sentences.append(f"{sentence}.")
    for name in _VARIANTS:
        if item := rates.get(f"LoRA {name}, adapter, in-process"):
            sentences.append(f"Under an adapter, LoRA {name}: {item.of_base:.3f}.")
    return sentences


if __name__ == "__main__":
    main()
