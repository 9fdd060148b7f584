"""FP8 against bfloat16 KV cache: how many tokens it holds, and tokens/s at a long context.

Two replicas with the same share of the same GPU run one after the other, so that each profiles its
memory alone. Each is the service with LoRA enabled but no adapter, driven in-process. On a CPU both
have KV caches of the same number of bytes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import engines
from benchmarks.checkpoints import SHAPES, work_folder, write_checkpoint
from benchmarks.child import Child
from benchmarks.engines import Workload, say
from benchmarks.report import Report
from services.rollout.replica import Replica

MIN_CAPACITY_RATIO = 1.95
_DTYPES = {"bf16": "auto", "fp8": "fp8"}  # name -> ROLLOUT_KV_CACHE_DTYPE


@dataclass(frozen=True, slots=True)
class Outcome:
    capacity: int  # tokens that the KV cache holds
    dtype: str  # KV cache dtype, as reported by the replica
    rates: tuple[float, ...]  # generated tokens/s, one per round

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(self.rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    engines.add_arguments(parser, tuple(SHAPES))
    parser.add_argument("--requests", type=int, default=96, help="all at once")
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2, help="rounds after a short warm-up")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    arguments = parser.parse_args()
    outcomes = {}
    with work_folder() as folder:
        model = folder / "model"
        write_checkpoint(arguments.shape, model, device=arguments.device)
        for name in reversed(_DTYPES):
            outcomes[name] = _measure(arguments, folder, model, name)
    _report(arguments, outcomes).publish(keep=arguments.report)


def _measure(arguments: argparse.Namespace, folder: Path, model: Path, name: str) -> Outcome:
    settings = engines.replica_settings(
        arguments,
        model,
        kv_cache_dtype=_DTYPES[name],
        max_model_len=arguments.prompt + arguments.tokens,
        max_num_seqs=arguments.requests,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
    )
    workload, seeds, rates = _workload(arguments), itertools.count(1), []
    with Child(name, folder / f"{name}.log", {}, engines.service, settings) as service:
        say(f"{name}: ready after {service.wait_until_ready():.0f} s")
        capacity, dtype = service.run(kv_capacity)
        say(f"{name}: {capacity:,} tokens ({dtype})")
        few = max(1, arguments.requests // 8)
        service.run(engines.in_service, replace(workload, num_requests=few, concurrency=few))
        for _ in range(arguments.rounds):
            rates.append(service.run(engines.in_service, replace(workload, seed=next(seeds))))
            say(f"{name}: {rates[-1]:,.0f} generated tokens/s")
    return Outcome(capacity, dtype, tuple(rates))


async def kv_capacity(replica: Replica) -> tuple[int, str]:
    """The capacity of the KV cache in tokens, as reported by vLLM, and its dtype."""
    engine = replica.serving.engine.async_llm  # type: ignore[attr-defined]
    cache = engine.vllm_config.cache_config
    return cache.kv_cache_size_tokens or cache.num_gpu_blocks * cache.block_size, cache.cache_dtype


def _workload(arguments: argparse.Namespace) -> Workload:
    return Workload(
        num_requests=arguments.requests,
        concurrency=arguments.requests,
        prompt=arguments.prompt,
        completion=arguments.tokens,
        vocabulary=SHAPES[arguments.shape].vocabulary,
    )


def _report(arguments: argparse.Namespace, outcomes: dict[str, Outcome]) -> Report:
    fp8, bf16 = outcomes["fp8"], outcomes["bf16"]
    memory = f"the same {arguments.gpu_memory_utilization:g} of one GPU"
    if arguments.device == "cpu":
        memory = "KV caches of the same size on a CPU"
    return Report(
        name="kv_cache",
        variant=f"{arguments.device}-{arguments.shape}",
        title="KV cache: FP8 against bfloat16",
        setting=(
            f"Qwen3 shape {arguments.shape}, random weights in 16 bits, LoRA on, {memory}; "
            f"{_workload(arguments)}, all at once, temperature 1; median of {arguments.rounds} "
            "rounds after a short warm-up, including the computation of prompts."
        ),
        header=("KV cache", "vLLM's dtype", "capacity, tokens", "generated tokens/s"),
        rows=[
            (name, outcome.dtype, f"{outcome.capacity:,}", f"{outcome.tokens_per_s:,.0f}")
            for name, outcome in outcomes.items()
        ],
        conclusion=(
            f"FP8 holds {fp8.capacity / bf16.capacity:.2f} × the tokens (target at least "
            f"{MIN_CAPACITY_RATIO}) and generates {fp8.tokens_per_s / bf16.tokens_per_s:.2f} × the "
            "tokens/s."
        ),
    )


if __name__ == "__main__":
    main()
